"""The student and the feature loss as one module while training, so that one wrapped forward holds all that learns."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ..features.capture import FeatureCapture
from ..features.layers import without_hidden_states
from ..features.targets import TeacherTargets
from ..losses import FeatureLoss
from ..models.language_head import recording_head_input
from ..models.outputs import layer_masks
from ..models.packing import Documents
from .language import LanguageTargets

# The name under which the feature loss is a submodule of the student during training, and never after.
FEATURE_LOSS_NAME = "distillation_feature_loss"
# The forward keyword that carries the teacher's features; without it the forward is the student's own.
TARGETS = "distillation_targets"
# What accelerate notes on a model that it has prepared.
PREPARATION = ("_is_accelerate_prepared", "_original_forward")


@dataclass
class DistillationTargets:
    """What the student's forward needs from the teacher.

    Attributes:
        features: T teacher features, or what the feature loss selected of them.
        student_inputs: The student's inputs and labels, which tell the mask of its tokens.
        wait: Called before they are used: the teacher may still be at work beside the student.
        language: What task and logit loss are computed of, where that is done here.
    """

    features: Sequence[Tensor] | TeacherTargets
    student_inputs: Mapping[str, Any] = field(default_factory=dict)
    wait: Callable[[], None] | None = None
    language: LanguageTargets | None = None

    def as_keyword(self) -> dict[str, Any]:
        """Return the forward keyword; wrappers pass the object through, its tensors are on the student's device."""
        return {TARGETS: self}


class StudentAttachment:
    """Attaches a feature loss to a student for the time of training, and takes it off without a trace.

    While attached, the loss is a submodule of the student, and the student's class is a subclass of its own that
    runs the loss *inside* its forward, beside those of a language model's head; without a feature loss (None) these
    alone. A wrapper (DDP, FSDP, a compiler) around the student therefore sees every trained parameter, synchronizes
    its gradient and shards it. Without the teacher's features as an extra keyword the forward is unchanged, so
    evaluation, saving and inspection work as ever.
    """

    def __init__(self, student: nn.Module, loss: FeatureLoss | None, capture: FeatureCapture):
        self.student = student
        self.loss = loss
        self._plain_class = type(student)
        self._bound_forward: Callable[..., Any] | None = None
        self._training_class = _training_class(type(student), capture, self._plain_forward)

    @property
    def attached(self) -> bool:
        """Whether losses are computed in the student's forward now; FSDP2 may have put a class of its own on top."""
        return isinstance(self.student, self._training_class)

    def attach(self) -> None:
        """Make the loss part of the student; nothing happens when it already is."""
        if not self.attached:
            forget_preparation(self.student)
            # A forward bound to the object (by an offloading hook, say) would hide that of the training class.
            self._bound_forward = self.student.__dict__.pop("forward", None)
            self._put_on()

    def detach(self) -> None:
        """Restore the student: class, submodules and any forward that a mixed-precision wrapper bound to it."""
        if self.attached:
            self._take_off()
            for name in (*PREPARATION, "forward"):
                self.student.__dict__.pop(name, None)
            if self._bound_forward is not None:
                self.student.__dict__["forward"] = self._bound_forward

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Show the plain student for a moment (to save, reload or count it), and attach again."""
        if not self.attached:
            yield
            return
        self._take_off()
        try:
            yield
        finally:
            self._put_on()

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Make the loss part of the student for a moment, unless it already is."""
        before = self.attached
        self.attach()
        try:
            yield
        finally:
            if not before:
                self.detach()

    def plain_view(self) -> nn.Module:
        """Return a plain model that shares all parts and weights with the student, but not the feature loss.

        For callbacks: what they average, save or push of it is the student's alone.
        """
        plain = _rebased(type(self.student), self._training_class, self._plain_class)
        # Not `copy.copy`: the class that FSDP2 puts on top makes another object when it is asked for one.
        view: nn.Module = object.__new__(plain)
        view.__dict__.update(self.student.__dict__)
        view._modules = {name: part for name, part in view._modules.items() if name != FEATURE_LOSS_NAME}
        # What accelerate bound to the student would run the feature loss; the copy of a copy must run itself.
        for name in (*PREPARATION, "forward"):
            view.__dict__.pop(name, None)
        return view

    def _put_on(self) -> None:
        if self.loss is not None:
            setattr(self.student, FEATURE_LOSS_NAME, self.loss)
        self.student.__class__ = _rebased(type(self.student), self._plain_class, self._training_class)

    def _take_off(self) -> None:
        if self.loss is not None:
            delattr(self.student, FEATURE_LOSS_NAME)
        self.student.__class__ = _rebased(type(self.student), self._training_class, self._plain_class)

    def _plain_forward(self, student: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._bound_forward is not None:
            return self._bound_forward(*args, **kwargs)
        return self._plain_class.forward(student, *args, **kwargs)


def forget_preparation(model: nn.Module) -> None:
    """Undo what accelerate left on a model that it prepared: a note, and a forward with autocast bound to it.

    Evaluation prepares the model too, without a gradient-synchronizing wrapper; training must be free to prepare it
    anew, or processes would drift apart.
    """
    kept = model.__dict__
    original = kept.get("_original_forward")
    if original is not None:
        kept.pop("forward", None)
        if getattr(original, "__func__", None) is not type(model).forward:
            kept["forward"] = original
    for name in PREPARATION:
        kept.pop(name, None)


def forget_wrappers(accelerator: Accelerator, model: nn.Module) -> None:
    """Drop wrappers that accelerate made for a student in another state; the next training wraps it again."""
    wraps = [entry for entry in accelerator._models if any(module is model for module in entry.modules())]
    accelerator._models = [entry for entry in accelerator._models if entry not in wraps]


def without_feature_loss(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict without the entries of the feature loss."""
    return {key: value for key, value in state_dict.items() if FEATURE_LOSS_NAME not in key.split(".")}


def _rebased(current: type, old: type, new: type) -> type:
    """Return `new` in place of `old`: as the class itself, or below the one that an engine (FSDP2) has put on top."""
    if current is old:
        return new
    bases = tuple(new if entry is old else entry for entry in current.__bases__)
    kept = {name: value for name, value in vars(current).items() if name not in ("__dict__", "__weakref__")}
    return type(current.__name__, bases, kept)


def _training_class(base: type[nn.Module], capture: FeatureCapture, plain_forward: Callable[..., Any]) -> type:
    """Return a subclass of `base` with the same name, which runs the feature loss inside its forward."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        targets: DistillationTargets | None = kwargs.pop(TARGETS, None)
        if targets is None:
            return plain_forward(self, *args, **kwargs)
        loss: FeatureLoss | None = getattr(self, FEATURE_LOSS_NAME, None)
        language = targets.language
        with ExitStack() as hooks:
            seen = None if language is None else hooks.enter_context(recording_head_input(language.distillation.head))
            recorded = {} if loss is None else hooks.enter_context(capture.recording(self))
            request = {} if loss is None else capture.request()
            outputs = plain_forward(self, *args, **{**kwargs, **request})
        if targets.wait is not None:
            targets.wait()
        losses: dict[str, Tensor] = {}
        if loss is not None:
            losses |= _feature_losses(loss, self, capture, capture.collect(outputs, recorded), targets)
        if language is not None and seen is not None:
            losses |= language.losses(seen.hidden)
        return without_hidden_states(outputs), losses

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"forward": forward, **names})


def _feature_losses(
    loss: FeatureLoss,
    student: nn.Module,
    capture: FeatureCapture,
    features: list[Tensor],
    targets: DistillationTargets,
) -> dict[str, Tensor]:
    """Return the loss per sample, and what is shown of it, for the student's captured features."""
    inputs, documents = targets.student_inputs, Documents.of(targets.student_inputs)
    if documents is not None:
        features, inputs = [documents.unpack(entry) for entry in features], {"attention_mask": documents.mask}
    masks = layer_masks(inputs, inputs.get("labels"), student, features, capture.sides, capture.text_places)
    result = loss(features, targets.features, masks)
    shown = {"per_sample": result.per_sample, "association": result.association, "errors": result.errors}
    return {name: value for name, value in shown.items() if value is not None}
