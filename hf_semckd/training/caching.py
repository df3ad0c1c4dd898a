"""Checking and filling a teacher cache: what cannot be cached, or finds no room, is refused before training."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..config import SemCKDConfig
from ..data.batches import BatchCheck, CheckedCollator, collate
from ..data.samples import first_samples, is_map_style, longest_sample, spread_samples
from ..errors import ConfigurationError, InputError
from ..losses.sampled_logits import TokenSampling
from ..teacher.cache.shard import row_bytes
from ..teacher.cache.store import check_space
from ..teacher.cached import CachedTeacher
from ..teacher.running import TeacherRunner
from .memory import readable
from .pair import Pair
from .plan import Plan

logger = logging.getLogger(__name__)
# Enough to tell how large a row is on average, and few enough for a large teacher.
MEASURED_SAMPLES = 8
# A token's logits that take more, in half precision, are sampled.
WHOLE_BYTES = 120
DRAWS = 32


@dataclass(frozen=True)
class TrainingData:
    """The training samples and the collator as a data loader has them; `prepare` moves a batch to the device.

    `columns` are those that the models may take.
    """

    dataset: Any
    collator: Callable[[Any], Any]
    prepare: Callable[[Any], Any]
    columns: frozenset[str]

    def first_batch(self) -> Any:
        """Return a small batch on the device."""
        collator = CheckedCollator(self.collator, BatchCheck(self.columns))
        return self.prepare(collator(first_samples(self.dataset)))

    def longest_batch(self) -> Any:
        """Return a batch of the longest text alone; None where that is not known without reading all samples."""
        index = longest_sample(self.dataset)
        return None if index is None else collate(self.collator, [self.dataset[index]])


def require_cache(pair: Pair | None, config: SemCKDConfig) -> list[CachedTeacher]:
    """Return the teachers with their caches. Raises `ConfigurationError` when they have none."""
    if pair is not None and pair.cached_teachers:
        return pair.cached_teachers
    raise ConfigurationError(
        "There is no teacher cache to fill",
        received=f"teacher_cache_dir={config.teacher_cache_dir!r}",
        expected="a folder, and a distillation term that is on",
        todo="set teacher_cache_dir",
    )


def token_sampling(plan: Plan, logits: tuple[int, ...] | None, draws: int | None) -> TokenSampling | None:
    """Return how a cache samples the teacher's logits, of which the shape is given; None where it keeps them whole.

    `draws` is `teacher_cache_samples`; `ConfigurationError` where a number of them is asked of other logits than
    those of one causal language model.
    """
    if logits is None or not plan.distills_logits or draws == 0:
        return None
    if plan.task != "tokens" or not plan.shifts_labels or plan.mixture is not None or plan.match.order is not None:
        if draws is None:
            return None
        teachers = "one teacher" if plan.mixture is None else "several teachers"
        task = f"{plan.task} (of the next token)" if plan.shifts_labels else plan.task
        raise ConfigurationError(
            "`teacher_cache_samples` is for the logits of a single causal language model",
            received=f"teacher_cache_samples={draws}, {teachers}, task {task}",
            expected="one causal language model as the teacher",
            todo="leave teacher_cache_samples out: these logits are kept whole",
        )
    vocabulary = plan.match.vocabulary or logits[-1]
    if draws is None and vocabulary * torch.float16.itemsize <= WHOLE_BYTES:
        return None
    sampling = TokenSampling(DRAWS if draws is None else draws, vocabulary, plan.temperature)
    logger.info("In place of the teacher's logits the cache keeps, at each position, %s.", sampling)
    return sampling


def check_cache(teacher: CachedTeacher, data: TrainingData, run_teacher: TeacherRunner) -> float | None:
    """Read a few samples, with the cache open: `InputError` unless they stay the same and all of them find room.

    Returns the bytes that the cache takes for a sample; None for a stream.
    """
    dataset, cache = data.dataset, teacher.cache
    if not is_map_style(dataset) or not len(dataset):
        return None
    views = getattr(dataset, "views", 1)
    samples = spread_samples(dataset, MEASURED_SAMPLES)
    # One by one: samples of several sizes may make no batch.
    batches = [collate(data.collator, [copy.deepcopy(sample)]) for sample in samples]
    readings = [samples] if views > 1 else [samples, spread_samples(dataset, MEASURED_SAMPLES)]
    again = [[collate(data.collator, [sample]) for sample in reading] for reading in readings]
    keys = [cache.keys(batch) for batch in batches]
    if any([cache.keys(batch) for batch in reading] != keys for reading in again):
        raise InputError(
            "The training samples change whenever they are read, so the teacher cache would never be hit",
            received="two different versions of the same samples: random augmentation or masking",
            expected="samples that stay as they are, or few versions of each",
            todo="make hf_semckd.data.RepeatableViews(dataset, transform, views=4) the training dataset, move the "
            "randomness out of the collator, or leave teacher_cache_dir out",
        )
    found = [cache.look_up(batch) for batch in batches]
    missing = [(batch, lookup.keys) for batch, lookup in zip(batches, found, strict=True) if not all(lookup.present)]
    if not missing:
        return sum(value.nbytes for lookup in found for value in lookup.values.values()) / len(batches)
    live = replace(run_teacher, teacher=teacher.load())
    size = 0.0
    for collated, own in missing:
        batch = data.prepare(collated)
        outputs = live(batch)
        live.wait()
        rows = cache.rows(outputs, teacher.inputs(batch), own)
        size += sum(map(row_bytes, rows)) / len(rows)
    needed = int(size / len(batches) * len(dataset) * views)
    check_space(cache.store.folder, needed, cache.store.limit_bytes)
    logger.info("The teacher cache will take about %s in %s.", readable(needed), cache.store.folder)
    return size / len(missing)


def fill_cache(
    teachers: list[CachedTeacher],
    run_teacher: TeacherRunner,
    loader: DataLoader,
    prepare: Callable[[Any], Any],
    quiet: bool,
    limit: int | None,
) -> None:
    """Run the teachers on what the open caches lack of a loader's samples; `prepare` moves a batch to the device.

    `limit` ends a stream after so many batches.
    """
    total = limit if limit is not None else len(loader)
    for batch in tqdm(islice(loader, limit), desc="Caching the teacher", unit="batch", disable=quiet, total=total):
        run_teacher(prepare(batch))
        if not all(teacher.cache.store.writable for teacher in teachers):
            break
    for teacher in teachers:
        teacher.flush()
        teacher.remove_traces()


def check_filled(teacher: CachedTeacher) -> int:
    """Return how many samples a cache holds, of all processes. Raises `InputError` when it took no more."""
    store = teacher.cache.store
    store.refresh()
    if not store.writable:
        raise InputError(
            "The teacher cache could not be filled",
            received=f"{len(store)} samples in {store.folder}, which takes no more",
            expected="room for all samples, in a folder that can be written",
            todo="see the warning above; free the disk, raise teacher_cache_limit_gb, or name another folder",
        )
    return len(store)
