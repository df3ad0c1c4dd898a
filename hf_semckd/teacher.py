"""The frozen teacher: loading it, giving it its inputs, and running it without gradient in its own precision."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig

from .cache import OutputCache, right_padded_lengths, sample_keys, teacher_fingerprint
from .data import TEACHER_PREFIX
from .errors import InputError, TeacherOutputError, message
from .features import FeatureCapture
from .modeling import logits_of, token_attention, tokens_mask

LABEL_COLUMNS = ("labels", "label", "label_ids")


@dataclass
class TeacherOutputs:
    """What the teacher gave for one batch.

    Attributes:
        logits: (B, ...), or None when they were not asked for.
        features: T features; empty when they were not asked for.
        mask: (B, N) mask of the teacher's tokens, or None.
    """

    logits: Tensor | None = None
    features: list[Tensor] = field(default_factory=list)
    mask: Tensor | None = None


class Teacher:
    """A frozen model in evaluation mode, and the layers that are taken from it.

    Handing a model over freezes it: its parameters stop requiring gradients, it is put into evaluation mode and moved
    to the training device. Its precision stays its own.

    Args:
        model: The teacher.
        layers: Hidden-state indices or module names; None finds all blocks.
        cache_folder: Where outputs are kept between epochs and runs; None computes them every time.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[int] | Sequence[str] | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
    ):
        self.cache_folder = cache_folder
        self._cache: OutputCache | None = None
        self.model = model.eval().requires_grad_(False)
        self.capture = FeatureCapture(model, layers, "teacher")
        config: Any = getattr(model, "config", None)
        self._caches_keys = bool(getattr(config, "use_cache", False)) and "use_cache" in forward_parameters(model)

    def to(self, device: torch.device) -> None:
        """Move the teacher, unless it was dispatched or quantised and looks after its own placement."""
        if getattr(self.model, "hf_device_map", None) is None and not getattr(self.model, "is_quantized", False):
            self.model.to(device)

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any], *, features: bool) -> tuple[Any, dict[str, Tensor]]:
        """Run the model on its own inputs; return its raw output and what the hooks recorded."""
        request = self.capture.request(self.model) if features else {}
        # Whoever owns the teacher may have called .train() on it since.
        self.model.eval()
        if not features:
            return self.model(**inputs), {}
        with self.capture.recording(self.model) as recorded:
            return self.model(**inputs, **request), recorded

    def run(self, batch: Mapping[str, Any], *, logits: bool, features: bool) -> TeacherOutputs:
        """Return the teacher's logits and features for a training batch, as asked; from the cache where it can.

        Args:
            batch: The batch as the collator made it; `teacher_*` entries are the teacher's own inputs.
            logits: Whether logits are needed.
            features: Whether the chosen layers' features are needed.
        """
        inputs = self.inputs(batch)
        if self.cache_folder is None:
            own = any(key.startswith(TEACHER_PREFIX) for key in batch)
            labels = batch.get(f"{TEACHER_PREFIX}labels" if own else "labels")
            return self._live(inputs, labels, logits=logits, features=features)
        if self._cache is None:
            layers = self.capture.layers or () if features else ()
            self._cache = OutputCache(self.cache_folder, teacher_fingerprint(self.model, layers, logits))
        return self._cached(self._cache, inputs, logits=logits, features=features)

    def _live(self, inputs: Mapping[str, Any], labels: Any, *, logits: bool, features: bool) -> TeacherOutputs:
        outputs, recorded = self.forward(inputs, features=features)
        taken = [feature.detach() for feature in self.capture.collect(outputs, recorded)] if features else []
        return TeacherOutputs(
            logits=logits_of(outputs, "teacher").detach() if logits else None,
            features=taken,
            mask=tokens_mask(token_attention(inputs, labels, self.model), taken),
        )

    def _cached(self, cache: OutputCache, inputs: dict[str, Any], *, logits: bool, features: bool) -> TeacherOutputs:
        lengths = right_padded_lengths(inputs)
        device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), torch.device("cpu"))
        keys = sample_keys(inputs, lengths)
        rows = [cache.load(key, device) for key in keys]
        missing = [index for index, row in enumerate(rows) if row is None]
        if missing:
            part = {k: v[missing] if isinstance(v, Tensor) else v for k, v in inputs.items()}
            outputs = self._live(part, None, logits=logits, features=features)
            for position, index in enumerate(missing):
                row = _sample(outputs, position, None if lengths is None else lengths[index])
                cache.save(keys[index], *row)
                rows[index] = row
        width = inputs["attention_mask"].shape[1] if lengths is not None else None
        return _batch([row for row in rows if row is not None], width, inputs.get("attention_mask"))

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the teacher's keywords: `teacher_*` entries without the prefix, else what its signature takes.

        Floating-point inputs are cast to the teacher's precision.
        """
        own = {key[len(TEACHER_PREFIX) :]: value for key, value in batch.items() if key.startswith(TEACHER_PREFIX)}
        inputs = select_inputs(self.model, own or batch)
        if self._caches_keys:
            # Generation needs keys and values again; a teacher is asked once.
            inputs["use_cache"] = False
        dtype = next((entry.dtype for entry in self.model.parameters() if entry.is_floating_point()), None)
        if dtype is None:
            return inputs
        return {key: _cast(value, dtype) for key, value in inputs.items()}

    def has_own_tokens(self, batch: Mapping[str, Any]) -> bool:
        """Whether the batch holds another tokenisation for the teacher, so that positions do not correspond."""
        return f"{TEACHER_PREFIX}input_ids" in batch

    def check_finite(self, outputs: TeacherOutputs) -> None:
        """Refuse NaN and infinite teacher outputs, naming the layer and the sample.

        Raises:
            TeacherOutputError: When there are any outside the padding.
        """
        # The first broken layer is the cause, logits are what follows from it.
        named = [(f"layer {name}", x) for name, x in zip(self.capture.names(), outputs.features, strict=False)]
        named += [("logits", outputs.logits)] if outputs.logits is not None else []
        for name, values in named:
            bad = ~torch.isfinite(values)
            if outputs.mask is not None and values.dim() == 3 and values.shape[1] == outputs.mask.shape[1]:
                bad &= outputs.mask.bool().unsqueeze(-1)
            samples = bad.flatten(1).any(1).nonzero().flatten().tolist()
            if samples:
                raise TeacherOutputError(
                    message(
                        f"The teacher's {name} are not finite"
                        if name == "logits"
                        else f"The teacher's {name} is not finite",
                        received=f"NaN or infinity in batch index {', '.join(map(str, samples))}",
                        expected="finite values",
                        todo="check the teacher's weights and these samples, and load the teacher in float32 "
                        "or bfloat16 when it is in float16",
                    )
                )


def _sample(outputs: TeacherOutputs, index: int, length: int | None) -> tuple[dict[str, Tensor], set[str]]:
    """Take one sample out of a batch of outputs, cut to its own length where its padding was."""
    named = {f"feature_{position}": feature for position, feature in enumerate(outputs.features)}
    if outputs.logits is not None:
        named["logits"] = outputs.logits
    width = outputs.mask.shape[1] if outputs.mask is not None else None
    sequences = {name for name, value in named.items() if length is not None and _runs_along(value, width)}
    return {
        name: value[index, :length] if name in sequences else value[index] for name, value in named.items()
    }, sequences


def _batch(rows: Sequence[tuple[dict[str, Tensor], set[str]]], width: int | None, mask: Any) -> TeacherOutputs:
    """Put samples together again, padded with zeros to the batch's width."""
    sequences = rows[0][1]
    stacked = {}
    for name in rows[0][0]:
        values = [row[0][name] for row in rows]
        if name in sequences:
            padded = values[0].new_zeros(len(values), width or 0, *values[0].shape[1:])
            for index, value in enumerate(values):
                padded[index, : len(value)] = value
            stacked[name] = padded
        else:
            stacked[name] = torch.stack(values)
    features = [stacked[f"feature_{position}"] for position in range(len(stacked) - ("logits" in stacked))]
    return TeacherOutputs(stacked.get("logits"), features, tokens_mask(mask, features))


def _runs_along(value: Tensor, width: int | None) -> bool:
    return value.dim() == 3 and value.shape[1] == width


def select_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a batch that a model's forward names, without labels.

    A plain module whose only argument has another name (`forward(self, x)`) gets the batch's one tensor under it.

    Raises:
        InputError: When the model takes nothing of the batch.
    """
    inputs = {
        key: value for key, value in batch.items() if key not in LABEL_COLUMNS and not key.startswith(TEACHER_PREFIX)
    }
    parameters = inspect.signature(_plain_forward(model)).parameters
    chosen = {key: value for key, value in inputs.items() if key in parameters}
    if chosen:
        return chosen
    required = [
        name
        for name, entry in parameters.items()
        if entry.default is entry.empty and entry.kind in (entry.POSITIONAL_ONLY, entry.POSITIONAL_OR_KEYWORD)
    ]
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    if len(required) == 1 and len(tensors) == 1:
        return {required[0]: tensors[0]}
    expected = [name for name in forward_parameters(model) if name not in LABEL_COLUMNS]
    raise InputError(
        message(
            f"{type(model).__name__} takes nothing of the batch",
            received=f"columns {', '.join(map(repr, batch)) or 'none'}",
            expected=f"some of {', '.join(map(repr, expected))}",
            todo="rename the dataset's columns, set remove_unused_columns=False if your collator makes them, "
            "or give the teacher columns of its own named teacher_...",
        )
    )


def forward_parameters(model: nn.Module) -> list[str]:
    """Return the names that a model's forward takes, without catch-alls."""
    parameters = inspect.signature(_plain_forward(model)).parameters
    return [name for name, entry in parameters.items() if entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL)]


def load_model(source: nn.Module | str | os.PathLike[str], role: str, like: nn.Module | None = None) -> nn.Module:
    """Return a model as it is, or load it by name or folder, without running remote code.

    Args:
        source: A module, or what `from_pretrained` takes.
        role: `student` or `teacher`, for messages.
        like: A model whose task head is wanted (the student, for a teacher); without it the head that the
            configuration names.

    Raises:
        InputError: When it can be neither used nor loaded.
    """
    if isinstance(source, nn.Module):
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            message(
                f"The {role} is not a model",
                received=type(source).__name__,
                expected="a PreTrainedModel, a PEFT model, any nn.Module, or a name or folder for from_pretrained",
                todo=f"pass the {role} itself, or where to load it from",
            )
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        kind = _model_class(config, like)
        model, info = kind.from_pretrained(source, trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            message(
                f"The {role} could not be loaded",
                received=f"{source!r} ({error})",
                expected="a Hub id or a folder with config.json and safetensors weights of a model with a task head",
                todo=f"check the name and the connection, or load the {role} yourself and pass the object",
            )
        ) from error
    if role == "teacher" and info["missing_keys"]:
        raise InputError(
            message(
                "The teacher would have random weights: the checkpoint lacks some of its layers",
                received=f"{source!r} without {', '.join(sorted(map(str, info['missing_keys']))[:5])}",
                expected=f"a checkpoint that was fine-tuned as {type(model).__name__}",
                todo="fine-tune the teacher on the task first, or pass the model object if this is what you want",
            )
        )
    return model


def _model_class(config: Any, like: nn.Module | None) -> Any:
    wanted = type(like).__name__.rpartition("For")[2] if like is not None else ""
    names = list(getattr(config, "architectures", None) or [])
    auto = getattr(transformers, f"AutoModelFor{wanted}", None) if wanted else None
    if auto is not None:
        return auto
    if not names or not hasattr(transformers, names[0]):
        raise ValueError(f"the configuration names no known architecture: {names}")
    return getattr(transformers, names[0])


def _plain_forward(model: nn.Module) -> Any:
    """Return the forward whose signature tells the inputs: that of the base model under PEFT."""
    owner: Any = model
    return owner.get_base_model().forward if hasattr(owner, "get_base_model") else owner.forward


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
