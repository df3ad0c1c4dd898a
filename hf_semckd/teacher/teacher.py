"""The frozen teacher: its inputs, and running it without gradient, on a CUDA stream or under `torch.compile`."""

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..choices import TeacherPlacement
from ..data.columns import TEACHER_PREFIX, teacher_entries
from ..features.capture import FeatureCapture, remove_capturing_traces
from ..features.targets import TeacherTargets
from ..features.token_sampling import content_phase
from ..losses import FeatureLoss
from ..models.images import ImageAdaptation, fitting_size
from ..models.inputs import InputSelector, run_on_inputs
from ..models.language_head import LanguageHead, recording_head_input
from ..models.outputs import device_of, holds_images, layer_masks, logits_of, token_attention, tokens_mask
from ..models.packing import Documents, check_documents
from .cache.cache import weights_digest
from .outputs import TeacherDescription, TeacherOutputs, check_finite
from .placement import is_placed, is_sharded, place

logger = logging.getLogger(__name__)


class CompiledForward:
    """A model under `torch.compile`, and without it where that fails; the model itself is not changed.

    Hidden states come out of a compiled forward when an eager one has put transformers' hooks in place, so a call that
    finds it not `warm` is eager. `active` until compiling fails.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        # A function: compiling the module itself would leave a mark on it.
        self._compiled: Any = torch.compile(lambda **keywords: model(**keywords))
        self.active, self.warm = True, False

    def __call__(self, **keywords: Any) -> Any:
        """Run the model."""
        warm, self.warm = self.warm, True
        if not self.active or not warm:
            return self.model(**keywords)
        try:
            return self._compiled(**keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler says; an error of the model itself comes again below
            self.active = False
            logger.warning("The teacher runs without torch.compile, which failed: %s", str(error).partition("\n")[0])
            return self.model(**keywords)


class Teacher:
    """A frozen model in evaluation mode, and the layers that are taken from it; see `FeatureCapture`.

    Handing a model over freezes it: its parameters stop requiring gradients, and it is put into evaluation mode.
    With `compiled` it runs under `torch.compile`, where that works; the model itself is not changed. On CUDA it has a
    `stream` of its own, on which `TeacherRunner` runs it.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[Any] | None = None, compiled: bool = False, both_sides: bool = False
    ):
        self.model = model.eval().requires_grad_(False)
        self.capture = FeatureCapture(model, layers, "teacher", both_sides=both_sides)
        self.select_inputs = InputSelector(model)
        self.stream: torch.cuda.Stream | None = None
        self.images = ImageAdaptation()
        config: Any = getattr(model, "config", None)
        self._caches_keys = bool(getattr(config, "use_cache", False)) and "use_cache" in self.select_inputs.parameters
        self.compiled = CompiledForward(model) if compiled else None

    @property
    def layer_names(self) -> list[str]:
        """The chosen layers as text."""
        return self.capture.names()

    def to(self, device: torch.device, placement: TeacherPlacement = "device") -> None:
        """Bring the teacher to the device, or where `placement` says; see `place`."""
        place(self.model, device, placement)
        # A teacher that is spread over several devices, offloaded or sharded has to wait for others.
        alone = device.type == "cuda" and not is_placed(self.model)
        self.stream = torch.cuda.Stream(device) if alone else None

    @property
    def runs_together(self) -> bool:
        """Whether it is divided among processes, all of which have to run it at the same time."""
        return any(is_sharded(entry) for entry in self.model.parameters())

    @functools.cached_property
    def weights(self) -> str:
        """A digest of the weights; they are frozen, so that reading them once is enough."""
        return weights_digest(self.model)

    def remove_traces(self) -> None:
        """Take off what transformers leaves on the model; see `remove_capturing_traces`."""
        remove_capturing_traces(self.model)
        if self.compiled is not None:
            self.compiled.warm = False

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any], *, features: bool) -> tuple[Any, dict[str, Tensor]]:
        """Run the model on its own inputs; return its raw output and what the hooks recorded."""
        # Whoever owns the teacher may have called .train() on it since.
        self.model.eval()
        if self.compiled is not None and self.capture.by_name:
            self.compiled = None
            logger.warning("The teacher runs without torch.compile, which cannot see the hooks for named layers.")
        run = self.model if self.compiled is None else self.compiled
        if not features:
            return run(**inputs), {}
        with self.capture.recording(self.model) as recorded:
            return run(**{**inputs, **self.capture.request()}), recorded

    def run(
        self,
        batch: Mapping[str, Any],
        *,
        logits: bool,
        features: bool,
        loss: FeatureLoss | None = None,
        samples: list[int] | None = None,
        head: LanguageHead | None = None,
    ) -> TeacherOutputs:
        """Return the teacher's logits and features for a training batch as the collator made it.

        Of the features `loss` selects what it needs (None: all), so that the rest is freed before the student runs;
        `samples` are those of the batch to run (None: all). With its `head`, what that reads comes in place of logits.
        """

        def chosen(value: Any) -> Any:
            return value if samples is None or not isinstance(value, Tensor) else value[samples]

        own = any(key.startswith(TEACHER_PREFIX) for key in batch)
        labels = chosen(batch.get(f"{TEACHER_PREFIX}labels" if own else "labels"))
        inputs = {name: chosen(value) for name, value in self.inputs(batch).items()}
        with nullcontext() if head is None else recording_head_input(head) as seen:
            outputs, recorded = self.forward(inputs, features=features)
        hidden = None if seen is None else seen.hidden.detach()
        taken = _together(self.capture.collect(outputs, recorded), inputs) if features else []
        attention = {} if own else {"attention_mask": chosen(batch.get("attention_mask"))}
        documents = Documents.of({**teacher_entries(batch), **attention}) if features else None
        if documents is not None:
            taken, inputs = [documents.unpack(entry) for entry in taken], {"attention_mask": documents.mask}
        layout = self.capture.sides, self.capture.text_places
        told = {**attention, **inputs}
        mask = layer_masks(told, labels, self.model, taken, *layout)
        kept = TeacherTargets()
        if features and loss is not None:
            kept = loss.select(taken, mask, chosen(self._phases(batch)) if loss.samples_tokens else None)
        elif features:
            kept = TeacherTargets.of_whole(taken, mask)
        given = logits_of(outputs, "teacher").detach() if logits and hidden is None else None
        # Logits are the decoder's, whose layers come last.
        of_logits = mask if mask is None or isinstance(mask, Tensor) else mask[-1]
        along = given if hidden is None else hidden
        if along is not None and along.dim() == 3 and not features:
            of_logits = tokens_mask(token_attention(told, labels, self.model), [along], self.model)
        return TeacherOutputs(given, kept, of_logits, hidden)

    @torch.no_grad()
    def describe(self, batch: Mapping[str, Any], *, logits: bool, features: bool) -> TeacherDescription:
        """Run a small batch, resolve the layers, and say what they look like.

        Refuses a batch that the model cannot take, a layer that does not exist, and outputs that are not finite.
        """
        self.model.eval()
        self.images = replace(self.images, interpolates=False, size=None)
        found_size = fitting_size(self.model, {**self.inputs(batch), **self.capture.request()})
        self.images = replace(self.images, interpolates=found_size.interpolates, size=found_size.size)
        inputs = self.inputs(batch)
        taken, specs = [], []
        if features:
            found = run_on_inputs("teacher", batch, lambda: self.capture.find(self.model, inputs))
            outputs, taken = found.outputs, _together(found.features, inputs)
            specs = found.describe(of_image=holds_images(self.model, inputs))
        else:
            outputs, _ = run_on_inputs("teacher", batch, lambda: self.forward(inputs, features=False))
        check_documents(self.model, teacher_entries(batch), inputs, "teacher")
        given = logits_of(outputs, "teacher") if logits else None
        mask = tokens_mask(inputs.get("attention_mask"), [])
        check_finite(TeacherOutputs(given, TeacherTargets.of_whole(taken, mask), mask), self.layer_names)
        return TeacherDescription(None if given is None else tuple(given.shape), specs, taken)

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's keywords: `teacher_*` entries without the prefix, else what its signature takes.

        Floating-point inputs are cast to the teacher's precision, and images brought to its size and normalization.
        """
        inputs = self.select_inputs(teacher_entries(batch))
        if self._caches_keys:
            # Generation needs keys and values again; a teacher is run once a batch.
            inputs["use_cache"] = False
        dtype = next((entry.dtype for entry in self.model.parameters() if entry.is_floating_point()), None)
        for name, value in inputs.items():
            if dtype is not None and isinstance(value, Tensor) and value.is_floating_point():
                inputs[name] = value.to(dtype)
        return self.images(inputs)

    def _phases(self, batch: Mapping[str, Any]) -> Tensor:
        """Return a number in [0, 1) for each sample that follows from its content; see `content_phase`."""
        # As the collator made them: the teacher's precision must not matter. What a sample is lies in its token ids
        # or pixels.
        inputs = self.select_inputs(teacher_entries(batch))
        documents = Documents.of(teacher_entries(batch))
        if documents is not None:
            return content_phase(documents.unpack(inputs["input_ids"]), documents.mask)
        content = inputs.get(getattr(self.model, "main_input_name", ""))
        if not isinstance(content, Tensor):
            content = max((value for value in inputs.values() if isinstance(value, Tensor)), key=Tensor.numel)
        mask = inputs.get("attention_mask")
        if content.dim() == 3 and not content.is_floating_point():
            # Multiple choice: a row of features for each of a sample's choices.
            content, mask = content.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
        return content_phase(content, mask)


def _together(features: Sequence[Tensor], inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return features without their history, where the inputs are: layers of a divided teacher are elsewhere."""
    device = device_of(inputs.values())
    return [feature.detach() if device is None else feature.detach().to(device) for feature in features]
