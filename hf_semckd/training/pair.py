"""Teacher and student before the first batch: loaded, checked, and with the layers that are to be captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config import SemCKDConfig
from ..data.columns import CACHED, LABEL_COLUMNS, TEACHER_PREFIX
from ..features.capture import FeatureCapture
from ..losses import FeatureLoss
from ..losses.registry import LossSource, compares_both_sides, find_layers, names_layers, reuses_teacher_head
from ..models.inputs import InputSelector
from ..models.loading import ModelSource, empty_model, load_model
from ..teacher.cached import CachedTeacher
from ..teacher.notes import TeacherRequest, is_noted, source_digest
from ..teacher.teacher import Teacher
from .checks import check_encoder_decoder, check_models, check_reload, check_trainable

GIGABYTE = 2**30


class InputRouter:
    """Takes the teacher's entries out of the student's batches, and keeps them in the data set's columns."""

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self._select = InputSelector(student)
        self.student_takes = self._select.parameters
        self._teacher_takes = InputSelector(teacher).parameters
        self._teacher_only = {*self._teacher_takes} - {*self.student_takes, *LABEL_COLUMNS}
        self._pretrained = isinstance(student, PreTrainedModel)
        self._named_inputs = self._pretrained or hasattr(student, "get_base_model")

    def student_needs_labels(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the student's decoder makes its inputs from the labels; see `InputSelector.needs_labels`."""
        return self._select.needs_labels(inputs)

    def takes_any(self, label_names: Sequence[str]) -> bool:
        """Whether the student's forward takes labels, and so computes their loss."""
        return any(name in self.student_takes for name in (*label_names, "labels"))

    def student_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the student gets of a batch: not the teacher's columns, nor those only the teacher names."""
        own = {
            key: value
            for key, value in batch.items()
            if key not in self._teacher_only and key != CACHED and not key.startswith(TEACHER_PREFIX)
        }
        if self._named_inputs:
            return own
        # A plain module's one input may have any name, also one that the teacher alone knows.
        labels = {key: value for key, value in batch.items() if key in LABEL_COLUMNS}
        return {**self._select(batch), **labels}

    def extra_columns(self, kept: Sequence[str], columns: Sequence[str]) -> list[str]:
        """Return which of a data set's columns must stay besides those kept by `Trainer` for the student."""
        extra = [name for name in self._teacher_takes if name not in kept]
        extra += [name for name in columns if name.startswith(TEACHER_PREFIX)]
        if not self._pretrained and not {*kept} & {*columns} - {*LABEL_COLUMNS}:
            extra += columns
        return extra


@dataclass(frozen=True)
class Pair:
    """A student, without wrappers, its teacher, and the chosen feature loss or its name (None for logits alone)."""

    student: nn.Module
    teacher: Teacher | CachedTeacher
    capture: FeatureCapture
    router: InputRouter
    source: LossSource | None

    @property
    def cached_teacher(self) -> CachedTeacher | None:
        """The teacher, where a cache answers for it."""
        return self.teacher if isinstance(self.teacher, CachedTeacher) else None

    @property
    def student_layer_names(self) -> list[str]:
        """Names of the student's captured layers; none where features are not distilled."""
        return [] if self.source is None else self.capture.names()

    @property
    def teacher_layer_names(self) -> list[str]:
        """Names of the teacher's captured layers; none where features are not distilled."""
        return [] if self.source is None else self.teacher.layer_names

    @classmethod
    def of(
        cls, student: nn.Module, teacher: Teacher | CachedTeacher, args: SemCKDConfig, source: LossSource | None
    ) -> Pair:
        """Return a pair for a teacher that is there already; `LayerNotFoundError` when a chosen layer is not."""
        if isinstance(teacher, CachedTeacher):
            # A trial may need other outputs than the one before.
            teacher.request = _request(student, args, source)
        layers = chosen_layers(args.student_layers, source, student, "student")
        capture = FeatureCapture(student, layers, "student", both_sides=compares_both_sides(source))
        router = InputRouter(student, teacher.model)
        return cls(student, teacher, capture, router, source)

    @classmethod
    def open(cls, student: nn.Module, teacher: ModelSource, args: SemCKDConfig, source: LossSource | None) -> Pair:
        """Load the teacher and check that it can teach this student."""
        opened = _open_teacher(student, teacher, args, source)
        check_trainable(student)
        check_reload(student)
        check_encoder_decoder((student, opened.model), args)
        opened.to(args.device)
        return cls.of(student, opened, args, source)


def chosen_layers(given: list[Any] | None, source: LossSource | None, model: nn.Module, role: str) -> list[Any] | None:
    """Return the layers that the user chose, or else those that the feature loss asks for; None for all blocks."""
    return given if given is not None or source is None else find_layers(source, model, role)


def _open_teacher(
    student: nn.Module, source: ModelSource, args: SemCKDConfig, loss: LossSource | None
) -> Teacher | CachedTeacher:
    """Load the teacher, unless it was cached before and may stay where it is."""

    def load() -> Teacher:
        return make(load_model(source, "teacher", like=student, dtype=args.resolved_teacher_dtype()))

    def make(model: nn.Module) -> Teacher:
        # Before it is frozen, and with it whatever it shares.
        check_models(student, model)
        layers = chosen_layers(args.teacher_layers, loss, model, "teacher")
        return Teacher(model, layers, args.teacher_compile, both_sides=compares_both_sides(loss))

    if args.teacher_cache_dir is None:
        return load()
    digest = None if args.teacher_compile else source_digest(source)
    request = _request(student, args, loss)
    # A loss given as an object is tried on the teacher's features, and a reused classifier is copied from it.
    wanted = isinstance(loss, FeatureLoss) or reuses_teacher_head(loss)
    limit = args.teacher_cache_limit_gb
    unloaded = digest is not None and not wanted and is_noted(args.teacher_cache_dir, digest, request)
    return CachedTeacher(
        make(empty_model(source, like=student)) if unloaded else load(),  # type: ignore[arg-type]
        args.teacher_cache_dir,
        load=load if unloaded else None,
        digest=digest,
        request=request,
        dtype=args.resolved_cache_dtype(),
        limit_bytes=None if limit is None else int(limit * GIGABYTE),
    )


def _request(student: nn.Module, args: SemCKDConfig, loss: LossSource | None) -> TeacherRequest:
    """Return what is asked of the teacher, but for the inputs."""
    # A method that captures modules of its own choice has other layers than one that captures blocks.
    named = args.teacher_layers is None and loss is not None and names_layers(loss)
    return TeacherRequest(
        head=type(student).__name__.rpartition("For")[2],
        layers=str(loss) if named else args.teacher_layers,
        dtype=args.teacher_dtype,
        logits=args.distills_logits,
        features=loss is not None,
    )
