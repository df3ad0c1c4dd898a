"""How many examples the properties are tried on: HYPOTHESIS_PROFILE=thorough takes 2,000 of each, in a new order."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

# Before anything of hypothesis asks for it: nothing is left in the checkout.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "hf-semckd-hypothesis"))

from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

# No outcome depends on the clock: a busy machine draws slowly too. What only some losses take is drawn for all.
CHECKS = [HealthCheck.too_slow, HealthCheck.differing_executors, HealthCheck.filter_too_much]
PATIENT = {"deadline": None, "suppress_health_check": CHECKS}
FAILURES = Path(os.environ["HYPOTHESIS_STORAGE_DIRECTORY"]) / "examples"

settings.register_profile("quick", max_examples=50, derandomize=True, database=None, **PATIENT)
settings.register_profile(
    "thorough", max_examples=2000, database=DirectoryBasedExampleDatabase(FAILURES), print_blob=True, **PATIENT
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
