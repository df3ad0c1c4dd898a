"""The models to evaluate in every form that is measured, and the data set that each of them reads in its own way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SequenceFeatureExtractor,
    default_data_collator,
)
from transformers.utils import logging

from ..data.batches import collate
from ..data.columns import LABEL_COLUMNS, TEACHER_PREFIX, teacher_entries
from ..errors import InputError
from ..models.inputs import InputSelector, inference_inputs
from ..models.tasks import label_names, label_order
from ..teacher.placement import is_whole
from .decisions import SPANS
from .export import NEEDED, export_onnx, is_installed
from .memory import peak_memory
from .runtimes import OnnxRuntime, PyTorch, Runtime, float_arrays


def usual_collator(processing_class: Any) -> Any:
    """Return the collator that Trainer would take."""
    if isinstance(processing_class, (PreTrainedTokenizerBase, SequenceFeatureExtractor)):
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


@dataclass(frozen=True)
class LabeledData:
    """A labeled data set in batches."""

    dataset: Any
    collator: Any
    models: tuple[nn.Module, ...]

    def first(self, count: int) -> Mapping[str, Any]:
        """Return a batch of the first samples; those of a small data set come again."""
        return self._batch([index % len(self.dataset) for index in range(count)])

    def batches(self, size: int) -> Iterator[Mapping[str, Any]]:
        """Yield all samples, in order."""
        count = len(self.dataset)
        return (self._batch(list(range(at, min(at + size, count)))) for at in range(0, count, size))

    def shapes(self, batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the last model's inputs of a batch."""
        taken = inference_inputs(self.models[-1], batch)
        return {name: tuple(value.shape) for name, value in taken.items() if isinstance(value, Tensor)}

    @cached_property
    def _columns(self) -> set[str]:
        """What models take, and labels."""
        return {*LABEL_COLUMNS, *SPANS, *(name for model in self.models for name in InputSelector(model).parameters)}

    def _batch(self, places: list[int]) -> Mapping[str, Any]:
        samples = [self.dataset[place] for place in places]
        if isinstance(self.dataset, Dataset) and self.dataset.format["type"] != "custom":
            # Texts and what else Trainer leaves out; what a transform makes is all there for a reason.
            samples = [
                {key: value for key, value in row.items() if key in self._columns or key.startswith(TEACHER_PREFIX)}
                for row in samples
            ]
        return collate(self.collator, samples)


@dataclass(frozen=True)
class Variant:
    """A model in one of the forms that are measured."""

    model: str
    pytorch: PyTorch
    runtime: Runtime
    saved: Path | None
    disk_bytes: int | None
    is_reference: bool
    class_order: Tensor | None = None

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the logits of a batch, with the classes in the order of the labels."""
        found = self.runtime.logits(self.batch(batch))
        if self.class_order is None:
            return found
        return found.index_select(1 if found.dim() == 4 else -1, self.class_order.to(found.device))

    def batch(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the model gets of a batch: the reference its `teacher_*` columns, where there are any."""
        if not self.is_reference:
            return batch
        labels = {name: value for name, value in batch.items() if name in (*LABEL_COLUMNS, *SPANS)}
        return {**labels, **teacher_entries(batch)}

    def peak(self, batch: Mapping[str, Any]) -> int | None:
        """Return the peak of memory in bytes: of a new process, or what is allocated on the GPU."""
        if self.runtime.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.runtime.forward(self.batch(batch))()
            return torch.cuda.max_memory_allocated()
        if self.saved is None:
            return None
        arrays = float_arrays(self.pytorch.inputs(self.batch(batch)))
        kind = type(self.pytorch.model).__name__ if self.saved.is_dir() else None
        return peak_memory(self.saved, arrays, kind)


def make_variants(
    models: Mapping[str, nn.Module], data: LabeledData, folder: Path, onnx: bool | None
) -> tuple[list[Variant], list[str]]:
    """Return all forms of all models, and what to tell of those that could not be made."""
    found, notes = [], []
    last = list(models.values())[-1]
    exports = all(map(is_installed, NEEDED)) if onnx is None else onnx
    if onnx is None and not exports:
        notes.append('Not measured as ONNX files: pip install "hf-semckd[onnx]".')
    for place, (name, model) in enumerate(models.items()):
        pytorch = PyTorch(model, torch.device("cpu"))
        saved = _save(model, folder / f"model{place}")
        order = class_order(model, last)
        plain = Variant(name, pytorch, pytorch, saved, _size(saved), place == 0, order)
        found.append(plain)
        if torch.cuda.is_available() and is_whole(model):
            found.append(replace(plain, runtime=PyTorch(model, torch.device("cuda"))))
        if not exports:
            continue
        try:
            files = export_onnx(pytorch.model, folder / f"onnx{place}", plain.batch(data.first(2)), int8=True)
        except InputError as error:
            if onnx:
                raise
            notes.append(f"{name} is not measured as an ONNX file: {str(error).partition(chr(10))[0]}")
            continue
        for form, path in zip(("ONNX", "ONNX int8"), files, strict=True):
            runtime = OnnxRuntime(form, path, pytorch.inputs)
            found.append(replace(plain, runtime=runtime, saved=path, disk_bytes=_size(path)))
    return found, notes


def class_order(model: nn.Module, last: nn.Module) -> Tensor | None:
    """Return where a model has the classes of another one, by name; None where they are in the same order."""
    own, wanted = label_names(model), label_names(last)
    if own is None or wanted is None or own == wanted:
        return None
    order = label_order(own, wanted)
    if order is None:
        raise InputError(
            "The models name their labels differently, so that their predictions cannot be compared",
            received=f"{own} and {wanted}",
            expected="the same names, in any order",
            todo="load them with the same id2label and label2id",
        )
    return order


def _save(model: nn.Module, folder: Path) -> Path | None:
    """Save a model that can be; `None` for others, and for one whose weights are not together."""
    if not isinstance(model, PreTrainedModel) or not is_whole(model):
        return None
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    # Saving writes into the configuration.
    copied: Any = copy.copy(model)
    copied.config = copy.deepcopy(model.config)
    # All of it is here: it is not to be looked for where parts may be offloaded.
    vars(copied).pop("hf_device_map", None)
    copied.save_pretrained(folder)
    if shows:
        logging.enable_progress_bar()
    return folder


def _size(path: Path | None) -> int | None:
    """Return the bytes of a file, or of all in a folder; weights beside an ONNX file count."""
    if path is None:
        return None
    beside = path.with_name(f"{path.name}.data")
    return sum(file.stat().st_size for file in (path, beside, *path.rglob("*")) if file.is_file())
