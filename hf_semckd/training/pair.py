"""Teacher and student before the first batch: loaded, checked, and with the layers that are to be captured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..choices import layer_list
from ..config import SemCKDConfig
from ..data.columns import CACHED, LABEL_COLUMNS, TEACHER_PREFIX
from ..errors import ConfigurationError
from ..features.capture import FeatureCapture
from ..losses import FeatureLoss
from ..losses.registry import LossSource, compares_both_sides, find_layers, names_layers, reuses_teacher_head
from ..models.inputs import InputSelector
from ..models.loading import ModelSource, TeacherSource, empty_model, load_model, teacher_list
from ..models.quantized import Quantized
from ..teacher.cached import CachedTeacher
from ..teacher.notes import TeacherRequest, is_noted, source_digest
from ..teacher.placement import is_placed
from ..teacher.running import teacher_prefix
from ..teacher.teacher import Teacher
from .checks import (
    check_encoder_decoder,
    check_models,
    check_own_inputs,
    check_placement,
    check_reload,
    check_tokenizers,
    check_trainable,
    pixel_normalization,
)
from .whole_weights import check_same_teacher, complete_weights, whole_loading

GIGABYTE = 2**30


class InputRouter:
    """Takes the teachers' entries out of the student's batches, and keeps them in the data set's columns."""

    def __init__(self, student: nn.Module, teachers: Sequence[nn.Module]):
        self._select = InputSelector(student)
        self.student_takes = self._select.parameters
        taken = (name for teacher in teachers for name in InputSelector(teacher).parameters)
        self._teacher_takes = list(dict.fromkeys(taken))
        self._teacher_only = {*self._teacher_takes} - {*self.student_takes, *LABEL_COLUMNS}
        self._pretrained = isinstance(student, PreTrainedModel)
        self._named_inputs = self._pretrained or hasattr(student, "get_base_model")

    def columns_to_learn_from(self, task_weight: float) -> frozenset[str]:
        """Return the columns that a model may take, with the usual ones of labels where the task counts."""
        labels = {*LABEL_COLUMNS}
        return frozenset({*self.student_takes, *self._teacher_takes} - labels | (labels if task_weight > 0 else set()))

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
    """A student, without wrappers, its teachers, and the chosen feature loss or its name (None for logits alone).

    Attributes:
        teachers: One as a rule. `weights` tell how much each counts, and sum to 1.
        files: Name or folder of each teacher; None for a model that was given.
    """

    student: nn.Module
    teachers: tuple[Teacher | CachedTeacher, ...]
    weights: tuple[float, ...]
    files: tuple[str | os.PathLike[str] | None, ...]
    capture: FeatureCapture
    router: InputRouter
    source: LossSource | None

    @property
    def teacher(self) -> Teacher | CachedTeacher:
        """The teacher, or the first of several."""
        return self.teachers[0]

    @property
    def teacher_models(self) -> list[nn.Module]:
        """The model of each teacher, with or without weights."""
        return [teacher.model for teacher in self.teachers]

    def remove_traces(self) -> None:
        """Take off what transformers leaves on the teachers."""
        for teacher in self.teachers:
            teacher.remove_traces()

    @property
    def cached_teachers(self) -> list[CachedTeacher]:
        """The teachers for which a cache answers: all or none."""
        return [teacher for teacher in self.teachers if isinstance(teacher, CachedTeacher)]

    @property
    def student_layer_names(self) -> list[str]:
        """Names of the student's captured layers; none where features are not distilled."""
        return [] if self.source is None else self.capture.names()

    @property
    def teacher_layer_names(self) -> list[str]:
        """Names of the teachers' captured layers; none where features are not distilled."""
        names = [teacher.layer_names for teacher in self.teachers]
        if self.source is None or len(names) == 1:
            return [] if self.source is None else names[0]
        return [teacher_prefix(number) + name for number, own in enumerate(names) for name in own]

    @classmethod
    def of(
        cls,
        student: nn.Module,
        teachers: Sequence[Teacher | CachedTeacher],
        files: Sequence[str | os.PathLike[str] | None],
        args: SemCKDConfig,
        source: LossSource | None,
    ) -> Pair:
        """Return a pair for teachers that are there already; `LayerNotFoundError` when a chosen layer is not."""
        weights = shared_weights(args.teacher_weights, len(teachers))
        for teacher, layers in zip(teachers, layers_by_teacher(args.teacher_layers, len(teachers)), strict=True):
            if isinstance(teacher, CachedTeacher):
                # A trial may need other outputs than the one before.
                teacher.request = _request(student, args, source, layers)
        own = chosen_layers(args.student_layers, source, student, "student")
        capture = FeatureCapture(student, own, "student", both_sides=compares_both_sides(source))
        router = InputRouter(student, [teacher.model for teacher in teachers])
        return cls(student, tuple(teachers), weights, tuple(files), capture, router, source)

    @classmethod
    def open(
        cls,
        student: nn.Module,
        teacher: TeacherSource,
        args: SemCKDConfig,
        source: LossSource | None,
        accelerator: Accelerator,
    ) -> Pair:
        """Load the teacher, or several, check that they can teach this student, and bring them to their place."""
        given = teacher_list(teacher)
        objects = [entry for entry in given if isinstance(entry, nn.Module)]
        # A teacher that was placed before has its weights, elsewhere.
        complete_weights([student, *(entry for entry in objects if not is_placed(entry))], accelerator)
        check_same_teacher(objects, accelerator)
        # Before anything is loaded.
        check_placement(args, source)
        shared_weights(args.teacher_weights, len(given))
        shares = layers_by_teacher(args.teacher_layers, len(given))
        opened = [_open_teacher(student, *entry, args, source) for entry in zip(given, shares, strict=True)]
        check_trainable(student)
        check_reload(student)
        check_encoder_decoder((student, *(entry.model for entry in opened)), args)
        for entry in opened:
            # A quantized one was loaded to its place.
            entry.to(args.device, "device" if args.teacher_bits else args.teacher_placement)
        files = [None if isinstance(entry, nn.Module) else entry for entry in given]
        return cls.of(student, opened, files, args, source)

    def prepare_inputs(self, processor: Any, batch: Mapping[str, Any]) -> None:
        """Refuse teachers that read other tokens than the batch has; convert images to each one's normalization."""
        check_own_inputs(self.files, batch)
        for teacher, files in zip(self.teachers, self.files, strict=True):
            check_tokenizers(files, processor, batch)
            teacher.images = pixel_normalization(files, processor, batch)


def shared_weights(weights: Sequence[float] | None, teachers: int) -> tuple[float, ...]:
    """Return the weights of so many teachers, which sum to 1; `ConfigurationError` where they are not as many."""
    if weights is None:
        return (1 / teachers,) * teachers
    if len(weights) != teachers or teachers == 1:
        raise ConfigurationError(
            "`teacher_weights` do not fit the teachers",
            received=f"{len(weights)} weights for {teachers} teacher{'s' * (teachers > 1)}",
            expected="one weight for each of several teachers, and none for a single one",
            todo="leave teacher_weights out, or list one weight for each entry of teacher_model",
        )
    return tuple(weight / sum(weights) for weight in weights)


def layers_by_teacher(layers: Sequence[Any] | None, teachers: int) -> list[Any]:
    """Return the chosen layers of each teacher: all of them, or its own where all names say whose they are."""
    prefixes = tuple(map(teacher_prefix, range(teachers)))
    if layers is None or teachers == 1 or not all(str(layer).startswith(prefixes) for layer in layers):
        return [layers] * teachers
    shares = [[layer.removeprefix(start) for layer in layers if layer.startswith(start)] for start in prefixes]
    return [layer_list("teacher_layers", share) for share in shares]


def chosen_layers(given: list[Any] | None, source: LossSource | None, model: nn.Module, role: str) -> list[Any] | None:
    """Return the layers that the user chose, or else those that the feature loss asks for; None for all blocks."""
    return given if given is not None or source is None else find_layers(source, model, role)


def _open_teacher(
    student: nn.Module, source: ModelSource, chosen: list[Any] | None, args: SemCKDConfig, loss: LossSource | None
) -> Teacher | CachedTeacher:
    """Load the teacher, unless it was cached before and may stay where it is."""

    def load() -> Teacher:
        # A cached teacher is loaded when it is needed.
        with whole_loading(args):
            dtype, quantized = args.resolved_teacher_dtype(), _quantized(args)
            return make(load_model(source, "teacher", like=student, dtype=dtype, quantized=quantized))

    def make(model: nn.Module) -> Teacher:
        # Before it is frozen, and with it whatever it shares.
        check_models(student, model)
        layers = chosen_layers(chosen, loss, model, "teacher")
        return Teacher(model, layers, args.teacher_compile, both_sides=compares_both_sides(loss))

    if args.teacher_cache_dir is None:
        return load()
    digest = None if args.teacher_compile else source_digest(source)
    request = _request(student, args, loss, chosen)
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


def _quantized(args: SemCKDConfig) -> Quantized | None:
    """Return how the teacher is quantized; None where it keeps its precision or gets another one."""
    if args.teacher_bits is None:
        return None
    if args.teacher_placement == "device_map":
        return Quantized(args.teacher_bits, "auto")
    return Quantized(args.teacher_bits, None if args.device.type == "cpu" else {"": args.device})


def _request(
    student: nn.Module, args: SemCKDConfig, loss: LossSource | None, layers: list[Any] | None
) -> TeacherRequest:
    """Return what is asked of the teacher, but for the inputs."""
    # A method that captures modules of its own choice has other layers than one that captures blocks.
    named = layers is None and loss is not None and names_layers(loss)
    return TeacherRequest(
        head=type(student).__name__.rpartition("For")[2],
        layers=str(loss) if named else layers,
        dtype=args.teacher_dtype,
        logits=args.distills_logits,
        features=loss is not None,
    )
