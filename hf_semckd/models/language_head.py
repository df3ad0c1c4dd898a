"""How a causal language model goes from hidden states to logits: found in its configuration, proven on its outputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.columns import IGNORED
from ..errors import SemCKDError
from .outputs import base_model

# Fields of configurations that scale logits (Cohere, Granite, Falcon-H1), up or down, and that cap them (Gemma).
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Outputs of the head that a model is tried on: far beyond the usual, since a cap hardly changes small logits.
PROBED = 60.0
# Two ways to compute the same logits differ by less, by the bits of their precision.
TOLERANCE = {16: 2e-2, 32: 1e-5, 64: 1e-5}


class UnprovenHeadError(SemCKDError):
    """Why it is not certain how a model makes its logits, or its loss, of its last hidden states."""


@dataclass(frozen=True, eq=False)
class LanguageHead:
    """Makes logits (..., V) of hidden states (..., D): `soft_cap * tanh(scale * (W h + b) / soft_cap)`."""

    linear: nn.Linear
    scale: float = 1.0
    soft_cap: float | None = None

    def finish(self, outputs: Tensor) -> Tensor:
        """Return the logits that the outputs of the linear layer become."""
        logits = outputs if self.scale == 1.0 else outputs * self.scale
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return all logits at once."""
        return self.finish(self.linear(hidden))


@dataclass
class HeadInput:
    """What the head got in a forward pass: `hidden` (B, N, D), and how often it was called."""

    calls: list[Tensor] = field(default_factory=list)

    @property
    def hidden(self) -> Tensor:
        """The hidden states of the only call."""
        if len(self.calls) != 1:
            raise UnprovenHeadError(f"the head was called {len(self.calls)} times in one forward pass")
        return self.calls[0]


@contextmanager
def recording_head_input(head: LanguageHead) -> Iterator[HeadInput]:
    """Record what the head gets, and let it answer for the last position only; no hook survives the context."""
    seen = HeadInput()

    def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen.calls.append(args[0])
        return (args[0][:, -1:],)

    handle = head.linear.register_forward_pre_hook(keep_last)
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def find_language_head(model: nn.Module, inputs: Mapping[str, Any], *, loss: bool) -> LanguageHead:
    """Return the head of a causal language model, proven on a small batch; `UnprovenHeadError` says why not.

    The linear layer is made to answer with known numbers, so that what the model does to them shows, and with `loss`
    what its own loss is of them: it must be the mean cross-entropy of the next tokens.

    Args:
        model: Whole, on one device, in the mode in which it will run.
        inputs: What it takes of a batch, with `input_ids` (B, N) and without labels.
        loss: Whether the model's own loss has to be known too.
    """
    linear = _output_layer(model)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        raise UnprovenHeadError("the batch has no input_ids of at least two tokens")
    # Every third label is left out, and those of padding are not.
    places = torch.arange(ids.shape[1], device=ids.device)
    labels = ids.where(places % 3 != 0, IGNORED)
    outputs, answer = _answer_with_probe(model, linear, {**inputs, "labels": labels} if loss else dict(inputs))
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape != answer.shape:
        raise UnprovenHeadError("its logits are not those of its output layer at every token")
    candidates = (LanguageHead(linear, scale, cap) for scale, cap in _constants(model))
    head = next((head for head in candidates if _same(head.finish(answer), logits)), None)
    if head is None:
        raise UnprovenHeadError("what it does to the outputs of its output layer is not known")
    if loss:
        expected = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        own = outputs.get("loss")
        # Which may be too small to show.
        if outputs.get("aux_loss") is not None:
            raise UnprovenHeadError("it adds a loss of its router to its own")
        if own is None or not _same(expected, own.to(expected.dtype)):
            raise UnprovenHeadError("its own loss is not the mean cross-entropy of the next tokens")
    return head


def _output_layer(model: nn.Module) -> nn.Linear:
    """Return the linear layer that makes the logits."""
    find = getattr(base_model(model), "get_output_embeddings", None)
    layer = None if find is None else find()
    # A subclass (of a quantizer, say) may compute something else.
    if type(layer) is not nn.Linear:
        found = "none" if layer is None else f"{type(layer).__module__}.{type(layer).__name__}"
        raise UnprovenHeadError(f"its output layer is no plain linear layer ({found})")
    replaced = "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks
    if replaced or hasattr(layer, "parametrizations") or not layer.weight.is_floating_point():
        raise UnprovenHeadError("the forward or the weight of its output layer was replaced, or has hooks")
    return layer


def _answer_with_probe(model: nn.Module, linear: nn.Linear, inputs: Mapping[str, Any]) -> tuple[Any, Tensor]:
    """Run a model whose output layer answers with known numbers; return its output and these numbers."""
    answers: list[Tensor] = []

    def answer(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        numbers = torch.rand(output.shape, generator=generator) * 2 * PROBED - PROBED
        answers.append(numbers.to(output))
        return answers[-1]

    handle = linear.register_forward_hook(answer)
    try:
        outputs = model(**inputs)
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError) as error:
        raise UnprovenHeadError(f"its forward fails when its head is looked at: {error}") from error
    finally:
        handle.remove()
    if len(answers) != 1:
        raise UnprovenHeadError(f"the head was called {len(answers)} times in one forward pass")
    return outputs, answers[0]


def _constants(model: nn.Module) -> Iterator[tuple[float, float | None]]:
    """Yield scales and caps that a configuration may mean; some multiply by theirs, others divide."""
    config: Any = getattr(base_model(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0]

    scales = [1.0, *itertools.chain.from_iterable((value, 1 / value) for value in numbers(SCALES))]
    yield from itertools.product(scales, [None, *numbers(CAPS)])


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of the less precise one."""
    tolerance = max(TOLERANCE[torch.finfo(entry.dtype).bits] for entry in (first, second))
    return torch.allclose(first.float(), second.float(), rtol=tolerance, atol=tolerance * PROBED / 100)
