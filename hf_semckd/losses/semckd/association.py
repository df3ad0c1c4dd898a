"""The association: how much each student layer learns from each teacher layer, for each sample.

SemCKD's loss of sample i, with association weights alpha (B, S, T) that sum to 1 over the teacher layers:

    loss[i] = 1/S * sum_s sum_t alpha[i,s,t] * error[i,s,t] + penalty[i]

    similarity   alpha[i,s,t] = softmax_t( cos(a_s[i], a_t[i]) / tau )          not trained
    sinkhorn     the same, under the bound sum_s alpha[i,s,t] <= max(1, S/T)    not trained
    learned      alpha[i,s,t] = softmax_t( e^g * <q_s(m_s[i]), k_t(m_t[i])> )   penalty: tau * KL(alpha[i,s] || 1/T)
    published    alpha[i,s,t] = softmax_t( <q_s(A_s[i]), k_t(A_t[i])> / tau )   SemCKD, equations 4 to 6
    fixed        alpha = 1/T; or 1 from the last layer to the last; or 1 from each layer to the one at its depth

    i, s, t      sample, student layer, teacher layer; B samples, S and T layers
    A            (B, B) similarity matrix of a layer, F F^T, where a row of F is a sample's flattened feature
    a            (B, K) cosines of a layer's pooled features with those of K samples, each row minus its mean: the
                 batch itself, or a bank of the latest ones
    m            (B, C) mean feature of a layer over its positions
    q_s, k_t     query and key networks, whose outputs have unit length; g a learned scale
    tau          temperature
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import ConfigurationError
from ...features.geometry import fitting_mask
from ...features.precision import at_least_float32, full_precision
from ..baseline import skip_map
from ..positions import entropy
from ..similarity import by_shape, cosine_matrix, row_cosine, similarity_matrix
from .alignment import AlignedStudent, AlignedTeacher
from .bank import SimilarityBank
from .networks import FeatureEmbedding, LearnedScale, SimilarityEmbedding
from .selection import AssociationInput
from .sinkhorn import sinkhorn_weights

FixedName = Literal["uniform", "last", "one_to_one"]


class Association(ABC):
    """A way to weigh teacher layers. `SemCKDLoss` registers its networks, or the association itself if it is a module.

    It `needs` teacher features, which must be kept. `upper_bound` is the largest weight it can learn to give a layer,
    None when nothing is learned; `required_batch_size` is the only batch size it takes, or None for any.
    """

    name: str = "custom"
    needs: AssociationInput = "summary"
    temperature: float = 1.0
    upper_bound: float | None = None
    required_batch_size: int | None = None

    @abstractmethod
    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return alpha (B, S, T), non-negative, summing to 1 over the teacher layers."""

    def penalty(self, weights: Tensor) -> Tensor | None:
        """Return the penalty of each sample (B), given the weights of the compared layers; None for none."""
        return None

    def taught(self, layers: int) -> int:
        """Return how many of these student layers have any weight: the number that errors are averaged over."""
        return layers

    def forget_collected(self) -> None:
        """Forget what was collected since the last `synchronize`."""
        return

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None, rank: int, world: int) -> None:
        """Take up what was collected in an optimizer step; see `FeatureLoss.synchronize`."""
        return

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Modules by the names under which the loss registers them: `query`, `key`, `scale`, `bank`."""
        return {}


class SimilarityAssociation(Association):
    """Weights by how alike both layers see a sample among others: those of a bank, or without one of the batch.

    Trained weights drift to the teacher layer that is easiest to imitate; these are not trained. They are uniform
    where there is nobody to compare with: in the first step of a bank, and in a batch of one without a bank.
    """

    name = "similarity"

    def __init__(self, temperature: float, bank: SimilarityBank | None = None):
        self.temperature, self.bank = temperature, bank

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The bank, if there is one."""
        return {} if self.bank is None else {"bank": self.bank}

    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return alpha (B, S, T), without gradient."""
        own = [student.summary(s) for s in range(len(student.specs))]
        return self.of_summaries(own, [teacher.summary(t) for t in range(len(teacher.specs))])

    @torch.no_grad()
    def of_summaries(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Return alpha of layers given by S tensors (B, D_s) and T tensors (B, D_t), see `summary`."""
        rows = [*student, *teacher]
        similarities = by_shape(cosine_matrix, rows) if self.bank is None else self.bank(rows)
        counted = None if self.bank is None else self.bank.filled
        own, theirs = torch.stack(similarities[: len(student)]), torch.stack(similarities[len(student) :])
        return self.normalize(row_cosine(own, theirs, counted) / self.temperature)

    def forget_collected(self) -> None:
        """Let the bank forget the samples of a step that was not finished."""
        if self.bank is not None:
            self.bank.forget_collected()

    def synchronize(self, reduce_sum: Callable[[Tensor], Tensor] | None, rank: int, world: int) -> None:
        """Let the bank take up the samples of an optimizer step."""
        if self.bank is not None:
            self.bank.synchronize(reduce_sum, rank, world)

    def normalize(self, scores: Tensor) -> Tensor:
        """Return weights from scores (B, S, T)."""
        return torch.softmax(scores, dim=-1)


class SinkhornAssociation(SimilarityAssociation):
    """Weights by similarity, with the total weight of each teacher layer bounded; see `sinkhorn_weights`."""

    name = "sinkhorn"

    def normalize(self, scores: Tensor) -> Tensor:
        """Return weights from scores (B, S, T)."""
        return sinkhorn_weights(scores)


class QueryKeyAssociation(Association):
    """Weights by products of queries and keys, one network per compared student layer and per teacher layer."""

    name = "learned"

    def __init__(self, query: Iterable[nn.Module], key: Iterable[nn.Module], temperature: float):
        self.query, self.key = nn.ModuleList(query), nn.ModuleList(key)
        self.temperature = temperature

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The query and key networks."""
        return {"query": self.query, "key": self.key}

    def of_products(self, queries: Sequence[Tensor], keys: Sequence[Tensor], scale: Any, students: int) -> Tensor:
        """Return alpha (B, S, T) of queries and keys (B, d), uniform for student layers without a query."""
        weights = product_weights(queries, keys, scale)
        batch, compared, teachers = weights.shape
        if compared == students:
            return weights
        return torch.cat([weights, weights.new_full((batch, students - compared, teachers), 1 / teachers)], 1)


class LearnedAssociation(QueryKeyAssociation):
    """Weights by learned embeddings of mean features, which depend neither on batch size nor on order.

    The penalty keeps them from collapsing onto one layer; see `kl_to_uniform`. Its temperature tau > 0 is in units of
    the standardized error.
    """

    needs = "mean"
    upper_bound = 1.0

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], temperature: float):
        super().__init__(map(FeatureEmbedding, student_channels), map(FeatureEmbedding, teacher_channels), temperature)
        self.scale = LearnedScale()

    @property
    def networks(self) -> dict[str, nn.Module]:
        """The query and key networks, and the scale of their products."""
        return {**super().networks, "scale": self.scale}

    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return alpha (B, S, T)."""
        queries = [net(student.mean(s)) for s, net in enumerate(self.query)]
        keys = [net(teacher.mean(t)) for t, net in enumerate(self.key)]
        return self.of_products(queries, keys, self.scale(), len(student.specs))

    def penalty(self, weights: Tensor) -> Tensor:
        """Return the mean of `kl_to_uniform` over the student layers (B)."""
        return kl_to_uniform(weights, self.temperature).mean(1)


class PublishedAssociation(QueryKeyAssociation):
    """The paper's weights: learned embeddings of the rows of similarity matrices, whose length is the batch size.

    The temperature is 1 in the paper; `students` layers are compared. `ConfigurationError` without a batch size.
    """

    needs = "whole"

    def __init__(self, students: int, teachers: int, batch_size: int | None, temperature: float = 1.0):
        if batch_size is None or batch_size < 1:
            raise ConfigurationError(
                "The published association needs the batch size",
                received=f"batch_size={batch_size}",
                expected="the number of samples in every batch",
                todo="pass batch_size, or use target_norm='channel', whose learned association takes any batch",
            )
        query, key = (map(SimilarityEmbedding, [batch_size] * layers) for layers in (students, teachers))
        super().__init__(query, key, temperature)
        self.required_batch_size = batch_size
        self.upper_bound = bound_of_cosine_weights(temperature, teachers)

    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return alpha (B, S, T); `RaggedBatchError` for a batch of another size."""
        queries = [net(_similarity(student.features[s], student.mask(s))) for s, net in enumerate(self.query)]
        keys = [net(_similarity(teacher.targets.whole(t), teacher.mask(t))) for t, net in enumerate(self.key)]
        return self.of_products(queries, keys, 1.0 / self.temperature, len(student.specs))


class FixedAssociation(Association):
    """The weights of a control; see `fixed_weights`. The temperature has no effect."""

    needs = None

    def __init__(self, name: FixedName, temperature: float = 1.0):
        self.name: FixedName = name
        self.temperature = temperature

    def weights(self, student: AlignedStudent, teacher: AlignedTeacher) -> Tensor:
        """Return alpha (B, S, T)."""
        return fixed_weights(self.name, len(student.specs), len(teacher.specs), at_least_float32(student.features[0]))

    def taught(self, layers: int) -> int:
        """Return 1 for `last`: an average over layers without any weight would only shrink the loss."""
        return 1 if self.name == "last" else layers


def fixed_weights(name: FixedName, students: int, teachers: int, like: Tensor) -> Tensor:
    """Return equal weights, or 1 from last to last, or 1 as by `skip_map`: (B, S, T) for a tensor (B, ...) `like`."""
    shape = (len(like), students, teachers)
    if name == "uniform":
        return like.new_full(shape, 1.0 / teachers)
    weights = like.new_zeros(shape)
    if name == "last":
        weights[:, -1, -1] = 1.0
        return weights
    for s, t in enumerate(skip_map(students, teachers)):
        weights[:, s, t] = 1.0
    return weights


def product_weights(query: Sequence[Tensor], key: Sequence[Tensor], scale: Tensor | float) -> Tensor:
    """Return softmax over t of scale * <Q_s, K_t> (B, S, T), given S queries and T keys (B, d)."""
    queries, keys = at_least_float32(torch.stack(list(query), 1)), at_least_float32(torch.stack(list(key), 1))
    with full_precision(queries):
        return torch.softmax(torch.einsum("bsd,btd->bst", queries, keys) * scale, dim=-1)


def kl_to_uniform(weights: Tensor, temperature: float) -> Tensor:
    """Return temperature * KL(weights || uniform) (B, S) of weights (B, S, T).

    For errors e, sum_t w_t e_t + temperature * KL(w || uniform) is strictly convex in w, and its only minimum over
    the simplex is the Gibbs distribution w_t ~ exp(-e_t / temperature). Every weight there is at least
    exp(-(max e - min e) / temperature) / T: the minimum is never on the border, so training cannot collapse onto
    one layer, as it does without this term.
    """
    return temperature * (math.log(weights.shape[-1]) - entropy(weights))


def bound_of_cosine_weights(temperature: float, teachers: int) -> float:
    """Return the largest weight that a softmax over cosines / temperature can give one of T layers."""
    return 1.0 / (1.0 + (teachers - 1) * math.exp(-2.0 / temperature))


def _similarity(feature: Tensor, mask: Tensor | None) -> Tensor:
    return similarity_matrix(feature, fitting_mask(mask, feature))
