"""The frozen teacher: loading it, giving it its inputs, and running it without gradient in its own precision."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..data.columns import TEACHER_PREFIX, teacher_entries
from ..errors import InputError, TeacherOutputError
from ..features.capture import FeatureCapture, remove_capturing_traces
from ..features.token_sampling import content_phase
from ..models.inputs import InputSelector
from ..models.outputs import logits_of, token_attention, tokens_mask
from .cache.cache import TeacherCache, lookup_of
from .cache.keys import teacher_fingerprint, token_count, weights_digest
from .cache.rows import plain_names, to_batch
from .cache.shard import row_bytes
from .notes import TeacherNote

logger = logging.getLogger(__name__)

# Takes features, their mask and what gives the phases of their samples.
FeatureSelector = Callable[[Any, Tensor | None, Callable[[], Tensor]], Sequence[Tensor] | Mapping[str, Tensor]]

# What features are called in a cache where all of them are kept.
WHOLE_FEATURE = "feature_"


@dataclass
class TeacherOutputs:
    """What the teacher gave for one batch.

    Attributes:
        logits: (B, ...), or None when they were not asked for.
        features: T features, or what the feature loss selected of them; empty when they were not asked for.
        mask: (B, N) mask of the teacher's tokens, or None.
    """

    logits: Tensor | None = None
    features: Sequence[Tensor] | Mapping[str, Tensor] = field(default_factory=list)
    mask: Tensor | None = None


class Teacher:
    """A frozen model in evaluation mode, and the layers that are taken from it.

    Handing a model over freezes it: its parameters stop requiring gradients, it is put into evaluation mode and moved
    to the training device. Its precision stays its own.

    Args:
        model: The teacher.
        layers: Hidden-state indices or module names; None finds all blocks.
        compiled: Whether to run it under `torch.compile`, where that works; the model itself is not changed.
        load: Loads the model when it is needed, where `model` is an empty one; None when it is there.

    Attributes:
        note: What is known of a model that is not loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | Sequence[str] | None = None,
        compiled: bool = False,
        load: Callable[[], nn.Module] | None = None,
    ):
        self.cache: TeacherCache | None = None
        self.note: TeacherNote | None = None
        self._load = load
        self._device: torch.device | None = None
        self._weights: str | None = None
        self.model = model.eval().requires_grad_(False)
        self.capture = FeatureCapture(model, layers, "teacher")
        self._select = InputSelector(model)
        config: Any = getattr(model, "config", None)
        self._caches_keys = bool(getattr(config, "use_cache", False)) and "use_cache" in self._select.parameters
        self._request = self.capture.request(model)
        self._compiled = self._compile() if compiled else None
        # Hidden states come out of a compiled forward when an eager one has put transformers' hooks in place.
        self._warm = False
        self._stream: torch.cuda.Stream | None = None

    def to(self, device: torch.device) -> None:
        """Move the teacher, unless it was dispatched or quantized and looks after its own placement."""
        self._device = device
        if self.unloaded:
            return
        if getattr(self.model, "hf_device_map", None) is None and not getattr(self.model, "is_quantized", False):
            self.model.to(device)
        alone = device.type == "cuda" and runs_by_itself(self.model)
        self._stream = torch.cuda.Stream(device) if alone else None

    @property
    def unloaded(self) -> bool:
        """Whether the weights are not there yet."""
        return self._load is not None

    def materialize(self) -> None:
        """Load the weights, if they are not there.

        Raises:
            InputError: When they are others than those that the cache was opened for.
        """
        if self._load is None:
            return
        logger.info("The teacher is needed, and loaded now.")
        load, self._load = self._load, None
        self.model = load().eval().requires_grad_(False)
        known, self.note, self._weights = self.note, None, None
        if self._device is not None:
            self.to(self._device)
        if known is not None and self.cache is not None and known.weights != self.weights():
            raise InputError(
                "The teacher's files are not those that the cache knows",
                received="other weights than when this teacher was noted beside the cache",
                expected="the same weights under the same name",
                todo="start again: the new weights get a cache of their own",
            )

    def weights(self) -> str:
        """Return a digest of the weights; they are frozen, so that reading them once is enough."""
        if self._weights is None:
            self._weights = weights_digest(self.model) if self.note is None else self.note.weights
        return self._weights

    def remove_traces(self) -> None:
        """Take off what transformers leaves on the model; see `remove_capturing_traces`."""
        remove_capturing_traces(self.model)
        self._warm = False

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any], *, features: bool) -> tuple[Any, dict[str, Tensor]]:
        """Run the model on its own inputs; return its raw output and what the hooks recorded."""
        self.materialize()
        request = self._request if features else {}
        # Whoever owns the teacher may have called .train() on it since.
        self.model.eval()
        if not features:
            return self._call(inputs), {}
        with self.capture.recording(self.model) as recorded:
            return self._call({**inputs, **request}), recorded

    def _call(self, keywords: Mapping[str, Any]) -> Any:
        compiled = self._compiled if self._warm else None
        self._warm = True
        if compiled is None:
            return self.model(**keywords)
        try:
            return compiled(**keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler says; an error of the model itself comes again below
            self._compiled = None
            logger.warning("The teacher runs without torch.compile, which failed: %s", str(error).partition("\n")[0])
            return self.model(**keywords)

    def _compile(self) -> Any:
        if self.capture.by_name:
            logger.warning(
                "The teacher runs without torch.compile: named layers are recorded by hooks, which it cannot see."
            )
            return None
        model = self.model

        def call(**keywords: Any) -> Any:
            return model(**keywords)

        # A function: compiling the module itself would leave a mark on it.
        return torch.compile(call)

    def aside(self, compute: Callable[[], TeacherOutputs]) -> TeacherOutputs:
        """Compute on a stream of the teacher's own on CUDA, beside what the student does; elsewhere at once.

        Whoever uses the outputs calls `wait` first.

        Args:
            compute: Runs the teacher, and whatever else is to be done with its outputs there.
        """
        if self._stream is None:
            return compute()
        current = torch.cuda.current_stream(self._stream.device)
        # The batch is ready when what was queued before is done.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = compute()
        features: Any = outputs.features.values() if isinstance(outputs.features, Mapping) else outputs.features
        for tensor in (outputs.logits, outputs.mask, *features):
            if tensor is not None:
                # Its memory must not be given away before the student's stream is done with it.
                tensor.record_stream(current)
        return outputs

    def wait(self) -> None:
        """Make what is queued from now on wait for the teacher; the host does not. Nothing to do without `aside`."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def open_cache(
        self,
        folder: str | os.PathLike[str],
        *,
        logits: bool,
        features: bool,
        kept: str,
        dtype: torch.dtype | None,
        limit_bytes: int | None,
        cut: bool = True,
    ) -> TeacherCache:
        """Use a cache from now on; layers must be resolved.

        Args:
            folder: Where all caches live.
            logits: Whether logits are stored.
            features: Whether the chosen layers' features are stored.
            kept: What of them is kept; a cache is shared by those who keep the same.
            dtype: Precision of stored features; None for the teacher's own.
            limit_bytes: Most that it may take; None for what the disk can spare.
            cut: Whether padding is cut off; see `TeacherCache`.
        """
        layers = self.capture.layers or () if features else ()
        fingerprint = teacher_fingerprint(self.weights(), layers, logits, f"{kept} {dtype}")
        self.cache = TeacherCache(folder, fingerprint, self._select, dtype=dtype, limit_bytes=limit_bytes, cut=cut)
        return self.cache

    def run(
        self, batch: Mapping[str, Any], *, logits: bool, features: bool, select: FeatureSelector | None = None
    ) -> TeacherOutputs:
        """Return the teacher's logits and features for a training batch, as asked; from the cache where it can.

        Args:
            batch: The batch as the collator made it; `teacher_*` entries are the teacher's own inputs.
            logits: Whether logits are needed.
            features: Whether the chosen layers' features are needed.
            select: Takes what is needed out of the features, given their mask and the samples' `phases`; None keeps
                all.
        """
        if self.cache is not None:
            return self._cached(self.cache, batch, logits=logits, features=features, select=select)
        self.materialize()
        own = any(key.startswith(TEACHER_PREFIX) for key in batch)
        labels = batch.get(f"{TEACHER_PREFIX}labels" if own else "labels")
        outputs = self._live(self.inputs(batch), labels, logits=logits, features=features)
        if select is not None:
            outputs.features = select(outputs.features, outputs.mask, lambda: self.phases(batch))
        return outputs

    def stored_bytes(self, batch: Mapping[str, Any], run: Callable[[Mapping[str, Any]], TeacherOutputs]) -> float:
        """Return how many bytes the cache would take for a sample of a batch, on average.

        Args:
            batch: A few samples.
            run: Computes the outputs as training does.
        """
        self.materialize()
        cache, self.cache = self.cache, None
        assert cache is not None
        try:
            outputs = run(batch)
        finally:
            self.cache = cache
        self.wait()
        rows = cache.rows(_stored_names(outputs), self.inputs(batch))
        return sum(map(row_bytes, rows)) / len(rows)

    def _live(self, inputs: Mapping[str, Any], labels: Any, *, logits: bool, features: bool) -> TeacherOutputs:
        outputs, recorded = self.forward(inputs, features=features)
        taken = [feature.detach() for feature in self.capture.collect(outputs, recorded)] if features else []
        return TeacherOutputs(
            logits=logits_of(outputs, "teacher").detach() if logits else None,
            features=taken,
            mask=tokens_mask(token_attention(inputs, labels, self.model), taken),
        )

    def _cached(
        self,
        cache: TeacherCache,
        batch: Mapping[str, Any],
        *,
        logits: bool,
        features: bool,
        select: FeatureSelector | None,
    ) -> TeacherOutputs:
        lookup, inputs = lookup_of(batch), self.inputs(batch)
        width = token_count(inputs)
        if lookup is None:
            lookup = cache.look_up(batch)
        elif not all(lookup.present):
            # What was missing when the batch was made may be there by now.
            lookup = cache.read(lookup.keys, width)
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        missing = [index for index, present in enumerate(lookup.present) if not present]
        stored = {name: value.to(device, non_blocking=True) for name, value in lookup.values.items()}
        if missing:
            if self.unloaded:
                self.materialize()
                inputs = self.inputs(batch)
            part = {name: value[missing] if isinstance(value, Tensor) else value for name, value in inputs.items()}
            outputs = self._live(part, None, logits=logits, features=features)
            if select is not None:
                outputs.features = select(outputs.features, outputs.mask, lambda: self.phases(batch)[missing])
            rows = cache.rows(_stored_names(outputs), part)
            cache.store.write([lookup.keys[index] for index in missing], rows)
            # As stored, in the stored precision: a sample is the same when it is met again.
            stored = to_batch(_merged(stored, lookup.present, rows, device), width)
        named = plain_names(stored)
        mask = inputs.get("attention_mask")
        logit_values = named.pop("logits", None)
        kept: Any = named
        if named and all(name.startswith(WHOLE_FEATURE) for name in named):
            kept = [named[f"{WHOLE_FEATURE}{layer}"] for layer in range(len(named))]
        return TeacherOutputs(logit_values, kept or [], tokens_mask(mask, kept if isinstance(kept, list) else []))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's keywords: `teacher_*` entries without the prefix, else what its signature takes.

        Floating-point inputs are cast to the teacher's precision.
        """
        inputs = self._select(teacher_entries(batch))
        if self._caches_keys:
            # Generation needs keys and values again; a teacher is asked once.
            inputs["use_cache"] = False
        dtype = next((entry.dtype for entry in self.model.parameters() if entry.is_floating_point()), None)
        if dtype is None:
            return inputs
        return {key: _cast(value, dtype) for key, value in inputs.items()}

    def phases(self, batch: Mapping[str, Any]) -> Tensor:
        """Return a number in [0, 1) for each sample that follows from its content; see `content_phase`."""
        # As the collator made them: the teacher's precision must not matter. What a sample is lies in its token ids
        # or pixels.
        inputs = self._select(teacher_entries(batch))
        content = inputs.get(getattr(self.model, "main_input_name", ""))
        if not isinstance(content, Tensor):
            content = max((value for value in inputs.values() if isinstance(value, Tensor)), key=Tensor.numel)
        mask = inputs.get("attention_mask")
        if content.dim() == 3 and not content.is_floating_point():
            # Multiple choice: a row of features for each of a sample's choices.
            content, mask = content.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
        return content_phase(content, mask)

    def has_own_tokens(self, batch: Mapping[str, Any]) -> bool:
        """Whether the batch holds another tokenization for the teacher, so that positions do not correspond."""
        return f"{TEACHER_PREFIX}input_ids" in batch

    def check_finite(self, outputs: TeacherOutputs) -> None:
        """Refuse NaN and infinite teacher outputs, naming the layer and the sample.

        Raises:
            TeacherOutputError: When there are any outside the padding.
        """
        for name, values in self._named(outputs):
            bad = ~torch.isfinite(values)
            if outputs.mask is not None and values.dim() == 3 and values.shape[1] == outputs.mask.shape[1]:
                bad &= outputs.mask.bool().unsqueeze(-1)
            samples = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()
            if samples:
                raise TeacherOutputError(
                    f"The teacher's {name} are not finite"
                    if name == "logits"
                    else f"The teacher's {name} is not finite",
                    received=f"NaN or infinity in batch index {', '.join(map(str, samples))}",
                    expected="finite values",
                    todo="check the teacher's weights and these samples; train with bf16 instead of fp16, in "
                    "which the teacher runs too, and load it in float32 or bfloat16 when it is in float16",
                )

    def _named(self, outputs: TeacherOutputs) -> list[tuple[str, Tensor]]:
        """Return the outputs with what messages call them: the first broken layer is the cause, logits follow."""
        layers, features = self.capture.names(), outputs.features
        if isinstance(features, Mapping):
            numbered = [(name.partition(".")[2], value) for name, value in features.items()]
            kept = [(int(layer), value) for layer, value in numbered if layer and value.is_floating_point()]
            named = [(f"layer {layers[layer]}", value) for layer, value in sorted(kept, key=itemgetter(0))]
        else:
            named = [(f"layer {name}", value) for name, value in zip(layers, features, strict=False)]
        return named + ([("logits", outputs.logits)] if outputs.logits is not None else [])


def _stored_names(outputs: TeacherOutputs) -> dict[str, Tensor]:
    """Return all tensors of the outputs that a cache keeps, by name."""
    features = outputs.features
    if not isinstance(features, Mapping):
        features = {f"{WHOLE_FEATURE}{layer}": feature for layer, feature in enumerate(features)}
    return dict(features) if outputs.logits is None else {**features, "logits": outputs.logits}


def _merged(
    stored: Mapping[str, Tensor], present: Sequence[bool], computed: Sequence[dict[str, Tensor]], device: torch.device
) -> list[dict[str, Tensor]]:
    """Return the rows of a batch in order: those that were stored, and those that were missing."""
    found = iter([{name: value[index] for name, value in stored.items()} for index in range(sum(present))])
    missing = iter([{name: value.to(device) for name, value in row.items()} for row in computed])
    return [next(found if there else missing) for there in present]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def runs_by_itself(model: nn.Module) -> bool:
    """Whether a model is on one device, whole: not dispatched over several, offloaded, or sharded."""
    wrapped = any(hasattr(module, "_hf_hook") or hasattr(module, "_fsdp_wrapped_module") for module in model.modules())
    # DTensor (FSDP2, tensor parallelizm) and ZeRO-3 mark the parameters that they shard.
    sharded = any(hasattr(entry, "placements") or hasattr(entry, "ds_id") for entry in model.parameters())
    return getattr(model, "hf_device_map", None) is None and not wrapped and not sharded
