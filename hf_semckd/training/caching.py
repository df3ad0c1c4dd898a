"""The part of a trainer that keeps teacher outputs between epochs and runs: checks first, then lookups and storing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import SemCKDConfig
from ..data.random_state import preserved_random_state
from ..data.samples import collate, is_map_style, spread_samples
from ..data.views import all_versions
from ..errors import ConfigurationError, InputError, message
from ..teacher.cache.cache import CachingCollator, TeacherCache
from ..teacher.cache.keys import token_count
from ..teacher.cache.store import check_space
from ..teacher.notes import (
    TeacherNote,
    describe_extra_tokens,
    describe_inputs,
    has_notes,
    read_note,
    source_digest,
    write_note,
)

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
                "There is no teacher cache to fill",
                received=f"teacher_cache_dir={self.args.teacher_cache_dir!r}",
                expected="a folder, and a distillation term that is on",
                todo="set teacher_cache_dir",
            )
        if self._probe is None:
            self._build()
        cache = self._teacher.cache
        loader = self._filling_loader(cache)
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        with preserved_random_state(self.args.seed):
            for batch in tqdm(loader, desc="Caching the teacher", unit="batch", disable=quiet):
                self._run_teacher(self._prepare_input(batch))
                if not cache.store.writable:
                    break
        cache.store.flush()
        self._teacher.remove_traces()
        self.accelerator.wait_for_everyone()
        cache.store.refresh()
        if not cache.store.writable:
            raise InputError(
                "The teacher cache could not be filled",
                received=f"{len(cache.store)} samples in {cache.store.folder}, which takes no more",
                expected="room for all samples, in a folder that can be written",
                todo="see the warning above; free the disk, raise teacher_cache_limit_gb, or name another folder",
            )
        return len(cache.store)

    def _filling_loader(self, cache: TeacherCache) -> DataLoader:
        """Return every version of every training sample once, in order, shared out among the processes."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with self._looking_up(cache):
                # Not an evaluation's loader, which Trainer may keep.
                return self.get_test_dataloader(all_versions(self.train_dataset))
        finally:
            self.args.dataloader_drop_last = drops

    def get_train_dataloader(self) -> DataLoader:
        """Return `Trainer`'s, whose batches bring along what the cache holds of them."""
        cache = self._teacher.cache if self._teacher is not None else None
        if cache is None or not is_map_style(self.train_dataset):
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

    def _may_stay_unloaded(self, source: Any) -> bool:
        """Whether an earlier run noted what has to be known of a teacher that is given by name or folder."""
        folder = self.args.teacher_cache_dir
        if folder is None or self.args.teacher_compile:
            return False
        self._teacher_digest = source_digest(source)
        return self._teacher_digest is not None and has_notes(folder, self._teacher_digest, self._asked_of_teacher())

    def _settle_teacher(self, batch: Mapping[str, Any]) -> None:
        """Load a teacher that was left unloaded, unless this very kind of batch was noted."""
        teacher, folder, digest = self._teacher, self.args.teacher_cache_dir, self._teacher_digest
        if not teacher.unloaded:
            return
        assert folder is not None and digest is not None
        inputs = teacher.inputs(batch)
        note = read_note(folder, digest, self._asked_of_teacher() + describe_inputs(inputs))
        if note is None:
            teacher.materialize()
        else:
            teacher.note = note

    def _note_teacher(self, inputs: Mapping[str, Any]) -> None:
        """Keep what was found out, so that the next run need not load a teacher that is given by name or folder."""
        folder, digest, found = self.args.teacher_cache_dir, self._teacher_digest, self._probe
        if folder is None or digest is None or self._teacher.unloaded or not self.is_world_process_zero():
            return
        logits = found.teacher_logits
        if logits is not None:
            # Without the batch, and without the tokens where there are some.
            logits = logits[-1:] if len(logits) == 3 else logits[1:]
        note = TeacherNote(
            self._teacher.weights(),
            list(self._teacher.capture.layers or ()),
            found.teacher_specs,
            describe_extra_tokens(found.teacher_specs, inputs),
            logits,
            self._teacher.cache.cut,
        )
        write_note(folder, digest, self._asked_of_teacher() + describe_inputs(inputs), note)

    def _asked_of_teacher(self) -> str:
        """Say what a note of the teacher is about, but for the inputs."""
        args = self.args
        head = type(self.student).__name__.rpartition("For")[2]
        # A method that looks at modules of its own choice has other layers than one that looks at blocks.
        layers = args.teacher_layers if self._chooses_layers is None else self._chooses_layers
        return repr((head, layers, args.teacher_dtype, args.distils_logits, self._distils_features))

    def _cuts_padding(self, inputs: Mapping[str, Any]) -> bool:
        """Whether all that the teacher gives for tokens is as long as their mask."""
        if self._teacher.note is not None:
            return self._teacher.note.cut
        tokens, found = token_count(inputs), self._probe
        lengths = [spec.length for spec in found.teacher_specs if spec.kind == "tokens" and spec.length != 1]
        if found.teacher_logits is not None and len(found.teacher_logits) == 3:
            lengths.append(found.teacher_logits[1])
        return tokens is None or all(length == tokens for length in lengths)

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
            kept=self._kept_in_cache(),
            dtype=args.resolved_cache_dtype(),
            limit_bytes=limit,
            cut=self._cuts_padding(inputs),
        )
        if is_map_style(self.train_dataset) and len(self.train_dataset):
            self._check_cache(self._teacher.cache)
        self._note_teacher(inputs)

    def _kept_in_cache(self) -> str:
        """Say what is stored, and under which autocast the teacher ran."""
        kept = self.feature_loss.kept if self.feature_loss is not None and self._distils_features else ""
        return f"{kept} autocast {self.accelerator.mixed_precision}"

    def _check_cache(self, cache: TeacherCache) -> None:
        """Look at a few samples: they must stay the same, and all of them must find room."""
        dataset, collator = self._dataset_and_collator()
        views = getattr(self.train_dataset, "views", 1)
        with preserved_random_state(self.args.seed):
            samples = spread_samples(dataset, MEASURED_SAMPLES)
            # One by one: samples of several sizes may make no batch.
            batches = [collate(collator, [copy.deepcopy(sample)]) for sample in samples]
            readings = [samples] if views > 1 else [samples, spread_samples(dataset, MEASURED_SAMPLES)]
            again = [[collate(collator, [sample]) for sample in reading] for reading in readings]
            keys = [cache.keys(batch) for batch in batches]
            if any([cache.keys(batch) for batch in reading] != keys for reading in again):
                raise InputError(_changing_samples_message())
            missing = [batch for batch in batches if not all(cache.look_up(batch).present)]
            if not missing:
                return
            sizes = [self._teacher.stored_bytes(self._prepare_input(batch), self._run_teacher) for batch in missing]
        share = len(missing) / len(batches)
        needed = int(sum(sizes) / len(sizes) * share * len(self.train_dataset) * views)
        check_space(cache.store.folder, needed, cache.store.limit_bytes)
        logger.info("The teacher cache will take about %.2f GB in %s.", needed / GIGABYTE, cache.store.folder)


def _changing_samples_message() -> str:
    return message(
        "The training samples change whenever they are read, so the teacher cache would never be hit",
        received="two different versions of the same samples: random augmentation or masking",
        expected="samples that stay as they are, or few versions of each",
        todo="make hf_semckd.data.RepeatableViews(dataset, transform, views=4) the training dataset, move the "
        "randomness out of the collator, or leave teacher_cache_dir out",
    )


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
