"""`python -m hf_semckd.cli`."""

from . import main

raise SystemExit(main())
