"""A dataset whose random augmentation repeats, so that teacher outputs can be cached."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


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


class RepeatableViews(Dataset[Any]):
    """A dataset whose random transform has a few outcomes a sample, each the same whenever it comes.

    Random augmentation never shows a teacher the same input twice, so that nothing can be cached. With this, every
    sample has `views` versions, of which a random one is taken each time: a cache holds them all after some epochs.
    `transform` turns a sample of the map-style dataset into one of this; it draws from the generators of `random`,
    `numpy` or `torch`.

    Example:
        >>> RepeatableViews(images, lambda row: {**row, "pixel_values": crop(row["pixel_values"])})  # doctest: +SKIP
    """

    def __init__(self, dataset: Any, transform: Callable[[Any], Any], views: int = 4, seed: int = 0):
        self.dataset, self.transform = dataset, transform
        self.views, self.seed = views, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return a random one of the sample's versions."""
        return self.version(index, int(torch.randint(self.views, ())))

    def version(self, index: int, view: int) -> Any:
        """Return a certain version of a sample, the same every time."""
        # An own seed for each version: neighbors must not share their crops.
        seed = int(np.random.SeedSequence([self.seed, index, view]).generate_state(1)[0])
        with preserved_random_state(seed):
            return self.transform(self.dataset[index])


class _AllVersions(Dataset[Any]):
    def __init__(self, views: RepeatableViews):
        self.of = views

    def __len__(self) -> int:
        return len(self.of) * self.of.views

    def __getitem__(self, index: int) -> Any:
        return self.of.version(*divmod(index, self.of.views))


def all_versions(dataset: Any) -> Any:
    """Return a dataset with every version of every sample of `RepeatableViews`; any other dataset as it is."""
    return _AllVersions(dataset) if isinstance(dataset, RepeatableViews) else dataset
