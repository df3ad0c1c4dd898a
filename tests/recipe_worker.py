"""`hf-semckd` in a process of its own, with a quick table; killed after the step KILL_AT of the training KILL_IN."""

from __future__ import annotations

import os
import signal
import sys

from recipe_parts import interrupt_at, quick_evaluate

from hf_semckd.cli import main
from hf_semckd.recipes import prepare, run

run.evaluate = quick_evaluate
if "KILL_IN" in os.environ:
    place = {"student": run, "teacher": prepare}[os.environ["KILL_IN"]]
    place.use_progress = interrupt_at(int(os.environ["KILL_AT"]), lambda: os.kill(os.getpid(), signal.SIGKILL))
if "WORLD_SIZE" in os.environ:
    print(f"world size {os.environ['WORLD_SIZE']}", file=sys.stderr)
sys.exit(main())
