"""Settings of all tests: one thread, no network, and no time lost on collecting what the imports made."""

from __future__ import annotations

import gc
import os

# Before anything reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers  # noqa: F401


def pytest_configure() -> None:
    # Tests run side by side, and sums in a fixed order make repetitions equal bit for bit.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # Trainer collects garbage after every training: a quarter of a second each, if all modules and all collected tests
    # were looked through.
    gc.freeze()
