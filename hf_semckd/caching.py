"""The part of a trainer that keeps teacher outputs between epochs and runs: checks first, then lookups and storing."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .cache import CachingCollator, TeacherCache
from .config import SemCKDConfig
from .data import untouched_random_state
from .deferred import TeacherNote, describe_extra_tokens, read_note, source_digest, write_note
from .errors import ConfigurationError, InputError, message
from .probing import collate, spread_samples
from .store import check_space

logger = logging.getLogger(__name__)

# Enough to tell how large a row is on average, and few enough for a large teacher.
MEASURED_SAMPLES = 8
GIGABYTE = 2**30


class CachingTrainer(Trainer):
    """Opens the teacher cache and looks samples up while batches are made; a base of `DistillationTrainer`."""

    args: SemCKDConfig
    data_collator: Any
    # Of the files of a teacher that was given by name or folder.
    _teacher_digest: str | None = None

    def fill_teacher_cache(self) -> int:
        """Run the teacher on every training sample that the cache lacks, ahead of training.

        Under Accelerate every process takes its share. Training with the same settings then never runs the teacher.

        Returns:
            The number of samples that the cache holds.

        Raises:
            ConfigurationError: Without `teacher_cache_dir`.
            InputError: When the cache would not fit, or samples change whenever they are read.
        """
        if not self._distils or self.args.teacher_cache_dir is None:
            raise ConfigurationError(
                message(
                    "There is no teacher cache to fill",
                    received=f"teacher_cache_dir={self.args.teacher_cache_dir!r}",
                    expected="a folder, and a distillation term that is on",
                    todo="set teacher_cache_dir",
                )
            )
        if self._probe is None:
            self._build()
        cache = self._teacher.cache
        with self._looking_up(cache):
            # In order, each sample once, shared out among the processes; an evaluation's loader may be kept.
            loader = self.get_test_dataloader(self.train_dataset)
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        with untouched_random_state(self.args.seed):
            for batch in tqdm(loader, desc="Caching the teacher", unit="batch", disable=quiet):
                self._run_teacher(self._prepare_input(batch))
        cache.store.flush()
        self._teacher.remove_traces()
        self.accelerator.wait_for_everyone()
        cache.store.refresh()
        return len(cache.store)

    def get_train_dataloader(self) -> DataLoader:
        """Return `Trainer`'s, whose batches bring along what the cache holds of them."""
        cache = self._teacher.cache if self._teacher is not None else None
        if cache is None or not hasattr(self.train_dataset, "__getitem__"):
            return super().get_train_dataloader()
        with self._looking_up(cache):
            return super().get_train_dataloader()

    @contextmanager
    def _looking_up(self, cache: TeacherCache) -> Iterator[None]:
        """Let data loaders that are made meanwhile look their samples up."""
        plain = self.data_collator
        self.data_collator = CachingCollator(plain, cache, in_thread=self.args.dataloader_num_workers == 0)
        try:
            yield
        finally:
            self.data_collator = plain

    def _known_teacher(self, source: Any) -> TeacherNote | None:
        """Return what an earlier run noted of a teacher that is given by name or folder, or None."""
        folder = self.args.teacher_cache_dir
        if folder is None or self.args.teacher_compile:
            return None
        self._teacher_digest = source_digest(source)
        return (
            None if self._teacher_digest is None else read_note(folder, self._teacher_digest, self._asked_of_teacher())
        )

    def _note_teacher(self, inputs: Mapping[str, Any]) -> None:
        """Keep what was found out, so that the next run need not load a teacher that is given by name or folder."""
        folder, digest, found = self.args.teacher_cache_dir, self._teacher_digest, self._probe
        if folder is None or digest is None or self._teacher.note is not None or not self.is_world_process_zero():
            return
        # Without the batch, and without the tokens of logits that have some.
        logits = None if found.teacher_logits is None else found.teacher_logits[-1:]
        extra = describe_extra_tokens(found.teacher_specs, inputs)
        layers = list(self._teacher.capture.layers or ())
        note = TeacherNote(self._teacher.weights(), layers, found.teacher_specs, extra, logits)
        write_note(folder, digest, self._asked_of_teacher(), note)

    def _asked_of_teacher(self) -> str:
        """Say what a note of the teacher is about."""
        args = self.args
        return repr((args.teacher_layers, args.teacher_dtype, args.distils_logits, self._distils_features))

    def _open_teacher_cache(self, inputs: Mapping[str, Any]) -> None:
        """Open the cache for the layers that were found, and refuse what cannot be cached.

        Args:
            inputs: The teacher's inputs of the probe's batch.
        """
        args = self.args
        if args.teacher_cache_dir is None:
            return
        if self._teacher.cache is not None:
            self._teacher.cache.store.close()
        limit = None if args.teacher_cache_limit_gb is None else int(args.teacher_cache_limit_gb * GIGABYTE)
        self._teacher.open_cache(
            args.teacher_cache_dir,
            logits=args.distils_logits,
            features=self._distils_features,
            kept=self.feature_loss.kept if self.feature_loss is not None and self._distils_features else "",
            dtype=args.resolved_cache_dtype(),
            limit_bytes=limit,
        )
        if hasattr(self.train_dataset, "__getitem__") and len(self.train_dataset):
            self._check_cache(self._teacher.cache)
        self._note_teacher(inputs)

    def _check_cache(self, cache: TeacherCache) -> None:
        """Look at a few samples: they must stay the same, and all of them must find room."""
        dataset, collator = self._dataset_and_collator()
        with untouched_random_state(self.args.seed):
            batch = collate(collator, spread_samples(dataset, MEASURED_SAMPLES))
            views = getattr(self.train_dataset, "views", 1)
            if views == 1 and cache.keys(collate(collator, spread_samples(dataset, MEASURED_SAMPLES))) != cache.keys(
                batch
            ):
                raise InputError(
                    message(
                        "The training samples change whenever they are read, so the teacher cache would never be hit",
                        received="two different versions of the same samples: random augmentation or masking",
                        expected="samples that stay as they are, or few versions of each",
                        todo="wrap the dataset in hf_semckd.data.RepeatableViews(dataset, transform, views=4), move "
                        "the randomness out of the collator, or leave teacher_cache_dir out",
                    )
                )
            if all(cache.look_up(batch).present):
                return
            size = self._teacher.stored_bytes(self._prepare_input(batch), self._run_teacher)
        missing = max(len(self.train_dataset) * views - len(cache.store), 0)
        check_space(cache.store.folder, int(size * missing), cache.store.limit_bytes)
        logger.info("The teacher cache will take about %.2f GB in %s.", size * missing / GIGABYTE, cache.store.folder)


class CacheCallback(TrainerCallback):
    """Brings what an epoch added to the cache to the disk, where other processes and runs see it.

    Args:
        trainer: The trainer whose cache it is.
    """

    def __init__(self, trainer: CachingTrainer):
        self.trainer = trainer

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what is waiting."""
        if self.trainer._teacher is not None and self.trainer._teacher.cache is not None:
            self.trainer._teacher.cache.store.flush()
