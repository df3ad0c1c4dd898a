"""Which entries of a batch a model takes."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..data.columns import LABEL_COLUMNS, TEACHER_PREFIX
from ..errors import InputError, SemCKDError
from .outputs import base_model, is_encoder_decoder

Result = TypeVar("Result")
# What models raise for inputs that they were not made for.
FAILURES = (ValueError, RuntimeError, IndexError, TypeError, AssertionError, AttributeError)


class InputSelector:
    """Picks out of batches what a model's forward names: its `parameters`, without catch-alls.

    A plain module whose only argument has another name (`forward(self, x)`) gets the batch's one tensor under it.
    """

    def __init__(self, model: nn.Module):
        self._model = type(model).__name__
        self._has_decoder = is_encoder_decoder(base_model(model))
        entries = inspect.signature(base_model(model).forward).parameters.values()
        named = [entry for entry in entries if entry.kind not in (entry.VAR_KEYWORD, entry.VAR_POSITIONAL)]
        self.parameters = [entry.name for entry in named]
        positional = [entry for entry in named if entry.kind is not entry.KEYWORD_ONLY]
        self._required = [entry.name for entry in positional if entry.default is entry.empty]

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a batch that the forward names; `InputError` if there are none.

        Labels are not among them, unless a decoder makes its inputs from them.
        """
        names = [key for key in batch if key not in LABEL_COLUMNS and not key.startswith(TEACHER_PREFIX)]
        chosen = {key: batch[key] for key in names if key in self.parameters}
        if chosen:
            return {**chosen, "labels": batch["labels"]} if self.needs_labels(batch) else chosen
        tensors = [batch[key] for key in names if isinstance(batch[key], Tensor)]
        if len(self._required) == 1 and len(tensors) == 1:
            return {self._required[0]: tensors[0]}
        expected = [name for name in self.parameters if name not in LABEL_COLUMNS]
        raise InputError(
            f"{self._model} takes nothing of the batch",
            received=f"columns {', '.join(map(repr, batch)) or 'none'}",
            expected=f"some of {', '.join(map(repr, expected))}",
            todo="rename the dataset's columns, set remove_unused_columns=False if your collator makes them, "
            "or give the teacher columns of its own named teacher_...",
        )

    def needs_labels(self, batch: Mapping[str, Any]) -> bool:
        """Whether the model's decoder has nothing to start from but the labels of the batch, (B, N)."""
        labels = batch.get("labels")
        sequences = isinstance(labels, Tensor) and labels.dim() == 2 and not labels.is_floating_point()
        return self._has_decoder and sequences and "labels" in self.parameters and "decoder_input_ids" not in batch


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch whose tensors are where the model runs, and numbers in its precision."""
    like, device = next(model.parameters(), None), input_device(model)
    if like is None:
        return dict(batch)
    tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    return {**batch, **{name: v.to(like.dtype) if v.is_floating_point() else v for name, v in tensors.items()}}


def input_device(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: with its first weights, and those of an offloaded one where it runs."""
    for module in model.modules():
        first = next(module.parameters(recurse=False), None)
        if first is not None and not first.is_meta:
            return first.device
        if first is not None:
            hook = getattr(module, "_hf_hook", None)
            places = (getattr(entry, "execution_device", None) for entry in getattr(hook, "hooks", [hook]))
            return torch.device(next((place for place in places if place is not None), first.device))
    return torch.device("cpu")


def inference_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model takes of a batch when it is deployed: no labels, but what a decoder makes of them."""
    selector = InputSelector(model)
    chosen = selector(batch)
    prepare = getattr(base_model(model), "prepare_decoder_input_ids_from_labels", None)
    if selector.needs_labels(batch) and prepare is not None:
        chosen["decoder_input_ids"] = prepare(labels=chosen.pop("labels"))
    return on_device(model, chosen)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and afterwards back into the mode that they were in."""
    # Each module's own: some may have been frozen.
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def run_on_inputs(role: str, batch: Mapping[str, Any], forward: Callable[[], Result]) -> Result:
    """Return what a forward pass returns; where it fails, `InputError` says what the model was given."""
    try:
        return forward()
    except SemCKDError:
        raise
    except FAILURES as error:
        raise refused_batch(role, batch, error) from error


def refused_batch(role: str, batch: Mapping[str, Any], error: Exception) -> InputError:
    """Return the error for a batch that a model failed on, with the model's own words."""
    shapes = {key: tuple(value.shape) for key, value in batch.items() if isinstance(value, Tensor)}
    todo = "preprocess with the model's own processor; when both need different inputs (image size, tokenizer), "
    todo += "give the teacher columns of its own named teacher_pixel_values, teacher_input_ids, ..."
    if "decoder_input_ids" not in batch and len(shapes.get("labels", ())) == 2:
        todo += "; a decoder that does not start from the labels needs decoder_input_ids "
        todo += "(DataCollatorForSeq2Seq(tokenizer, model=student) makes them)"
    return InputError(
        f"The {role} cannot take the training data",
        received=f"a batch of {shapes}; the {role} said: {error}",
        expected=f"inputs of the size, type and vocabulary that the {role} was made for",
        todo=todo,
    )
