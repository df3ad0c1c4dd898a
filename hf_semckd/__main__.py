"""`python -m hf_semckd`, and `accelerate launch -m hf_semckd`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
