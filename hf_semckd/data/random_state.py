"""Random generators that are left as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(seed: int) -> Iterator[None]:
    """Seed all generators for a moment and restore them: inspection and building leave training's randomness alone."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Not in a worker process, where touching a GPU is an error, and not where none was used yet.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
