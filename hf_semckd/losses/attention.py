"""Losses on attention: AT on where layers are active, MiniLM on the relations within the last self-attention."""

import math
from itertools import compress, starmap

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..features.geometry import Alignment
from ..features.layers import FeatureSpec
from ..features.precision import at_least_float32, full_precision, smallest_length, unit_vectors
from .base import Shapes
from .baseline import BaselineBatch, BaselineLoss, SkipMapLoss
from .positions import masked_mean, zero_masked

# What query, key and value are called in one attention block.
NAMES = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"))
# Attention from one sequence to another, whose queries and keys are not of the same tokens.
CROSS_ATTENTION = ("cross", "encoder_attn", "encdec")
# The published number of relation heads for base models.
MAXIMUM_HEADS = 48


class ATLoss(SkipMapLoss):
    """The squared difference of attention maps between each student layer and the teacher layer at its depth.

    per_sample[i] = sum over pairs (s, t) of the mean over positions n that count of (q_s[i, n] - q_t[i, n])^2, with q
    the attention map of a layer: the mean over channels of squared activations, scaled to unit length over the
    positions that count. Pairs are those of `skip_map`, summed as in the published code that the weight belongs to.

    A pair that shares a single position (other tokenizations, vectors, maps of one cell) is left out: its map is
    always 1. Raises `ConfigurationError` where none is left. There are no parameters.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, the activation-based loss, with
        the map F^2_sum (its scale cancels) and the mean square of the published code. Weight: Tian et al. (ICLR 2020).
    """

    default_weight = 1000.0

    def choose_pairs(self, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the pairs that share more than one position; raise `ConfigurationError` for none."""
        layers = [(self.student_specs[s], self.teacher_specs[t]) for s, t in pairs]
        shared = [not _share_one(*pair, self.tokens_aligned) for pair in layers]
        if any(shared):
            return list(compress(pairs, shared))
        named = (f"{student.name} ({student.kind}) with {teacher.name}" for student, teacher in layers)
        raise ConfigurationError(
            "Attention transfer compares where layers are active, and no pair of layers shares positions",
            received=f"pairs that share one position only: {', '.join(named)}",
            expected="a pair of maps or image tokens, or of token sequences of one tokenization",
            todo="choose other layers with student_layers / teacher_layers, or another method",
        )

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the sum over pairs of each sample's mean (B)."""
        losses = []
        for *layers, mask in starmap(batch.pair, self.pairs):
            own, theirs = (_attention_map(tokens, mask) for tokens in layers)
            losses.append(masked_mean((own - theirs).square(), mask))
        return torch.stack(losses).sum(0)


def _attention_map(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squares over channels (B, N) of (B, N, C), at unit length."""
    activity = zero_masked(at_least_float32(tokens), mask).square().mean(-1)
    return unit_vectors(activity, smallest_length(tokens.dtype) ** 2)


def _share_one(student: FeatureSpec, teacher: FeatureSpec, tokens_aligned: bool) -> bool:
    """Whether two layers are compared at a single position, where an attention map says nothing."""
    kind = Alignment.of(student, teacher, tokens_aligned).kind
    if kind == "grid" and student.grid is not None and teacher.grid is not None:
        return min(student.grid[0], teacher.grid[0]) * min(student.grid[1], teacher.grid[1]) == 1
    return kind == "mean" or student.length == 1


class MiniLMLoss(BaselineLoss):
    """The divergence of the last self-attentions' relations between queries, between keys and between values.

    total = mean over samples, the three relations, relation heads and positions of KL(R_t || R_s), where X (B, N, C)
    is cut into relation heads of width d, and R = softmax(X X^T / sqrt(d)). Padding takes part neither as a position
    nor in a softmax.

    The layers are three each, tokens at the same positions: the outputs of the modules that `find_layers` names.
    `relation_heads`, which need not be the models' attention heads, divide all widths; None for the largest up to 48.
    There are no parameters. The paper takes a layer below the last of 24-layer teachers: name its modules in
    `teacher_layers`. Raises `ConfigurationError` for other layers or heads.

    Source: Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
        Transformers", Findings of ACL 2021, section 3, with the pairs Q-Q, K-K and V-V, each with weight 1/3.
    """

    default_weight = 1.0

    def __init__(
        self,
        student_shapes: Shapes,
        teacher_shapes: Shapes,
        *,
        tokens_aligned: bool = True,
        relation_heads: int | None = None,
    ):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        self._check_layers()
        common = math.gcd(*(spec.channels for spec in (*self.student_specs, *self.teacher_specs)))
        if relation_heads is None:
            relation_heads = max(heads for heads in range(1, MAXIMUM_HEADS + 1) if common % heads == 0)
        if relation_heads < 1 or common % relation_heads:
            raise ConfigurationError(
                "The layers cannot be cut into this many relation heads",
                received=f"relation_heads={relation_heads}",
                expected=f"a divisor of {common}, the greatest that all widths have in common",
                todo="leave relation_heads out, or choose a divisor",
            )
        self.relation_heads = relation_heads

    @classmethod
    def find_layers(cls, model: nn.Module, role: str) -> list[str]:
        """Return the names of the linear layers of query, key and value in the last self-attention, in this order."""
        found: list[str] = []
        for path, parent in model.named_modules():
            if any(mark in path.lower() for mark in CROSS_ATTENTION):
                continue
            for names in NAMES:
                if all(isinstance(getattr(parent, name, None), nn.Linear) for name in names):
                    found = [f"{path}.{name}" if path else name for name in names]
        if found:
            return found
        known = "; ".join(", ".join(names) for names in NAMES)
        raise ConfigurationError(
            f"The {role} has no attention block whose queries, keys and values can be read",
            received=type(model).__name__,
            expected=f"linear layers side by side that are called {known}",
            todo=f"name three modules in {role}_layers, in the order query, key, value, or choose another method",
        )

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean divergence of each sample (B) over the three relations."""
        losses = []
        for layer in range(len(self.student_specs)):
            own, theirs, mask = batch.pair(layer, layer)
            student, teacher = self._log_relations(own, mask), self._log_relations(theirs, mask)
            divergences = (teacher.exp() * (teacher - student)).sum(-1).mean(1)
            losses.append(masked_mean(divergences, mask))
        return torch.stack(losses).mean(0)

    def _log_relations(self, vectors: Tensor, mask: Tensor | None) -> Tensor:
        # Padding comes out as a finite number, the same in both models: its share is zero and its logarithms cancel.
        vectors = zero_masked(at_least_float32(vectors), mask)
        heads = vectors.unflatten(2, (self.relation_heads, -1)).transpose(1, 2)
        with full_precision(heads):
            logits = heads @ heads.mT / math.sqrt(heads.shape[-1])
        if mask is None:
            return logits.log_softmax(-1)
        padding = (mask == 0)[:, None, None, :]
        return logits.masked_fill(padding, torch.finfo(logits.dtype).min).log_softmax(-1)

    def _check_layers(self) -> None:
        counts = len(self.student_specs), len(self.teacher_specs)
        if counts != (3, 3):
            raise ConfigurationError(
                "Attention relations are those of queries, keys and values",
                received=f"{counts[0]} student and {counts[1]} teacher layers",
                expected="three each, in this order",
                todo="leave student_layers and teacher_layers out, or name the three modules of one attention",
            )
        for own, theirs in zip(self.student_specs, self.teacher_specs, strict=True):
            if Alignment.of(own, theirs, self.tokens_aligned).kind == "tokens":
                continue
            same = "the same" if self.tokens_aligned else "another"
            raise ConfigurationError(
                "Attention relations can be compared only between the same tokens",
                received=f"{_described(own)} for the student, {_described(theirs)} for the teacher, with {same} "
                "tokenization",
                expected="as many tokens of the same inputs in both models",
                todo="use models with one tokenizer or one patch size, or choose another method",
            )


def _described(spec: FeatureSpec) -> str:
    if spec.kind == "map":
        return f"a map at `{spec.name}`"
    return f"{spec.length} tokens ({spec.prefix} in front of a grid of {spec.grid}) at `{spec.name}`"
