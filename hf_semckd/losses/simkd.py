"""SimKD (Chen et al., CVPR 2022): the student reuses the teacher's classifier behind a projection."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from .base import FeatureLoss, Shapes
from .baseline import BaselineBatch, BaselineLoss
from .positions import regress, squared_error


class SimKDLoss(BaselineLoss):
    """The mean squared error of the projected last maps, so that the teacher's classifier fits the student.

    per_sample = mean over positions and channels of (projection(F_s) - F_t)^2, both pooled to the smaller grid.

    The published projector is a stack of convolutions that stays in the student. Here it is one linear map: the
    average of a map, the projection and the teacher's linear classifier are then one linear classifier, which `finish`
    writes into the student's own, so that the student remains a plain model of its class. Both models must have a
    linear classifier on the average of their last map, as most CNNs do; a trainer checks that before training.

    Published weights: 1, with `task_weight=0` and `logit_weight=0`. With others the student's own classifier trains
    too and is replaced at the end, and a resumed run goes on from that. Raises
    `ConfigurationError` when one of the last layers is no map.

    Source: Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022, the feature loss.
    """

    title = "SimKD with a linear projector"
    default_weight = 1.0
    default_used = (-1,)
    reuses_teacher_head = True

    def __init__(self, student_shapes: Shapes, teacher_shapes: Shapes, *, tokens_aligned: bool = True):
        super().__init__(student_shapes, teacher_shapes, tokens_aligned=tokens_aligned)
        for role, spec in (("student", self.student_specs[-1]), ("teacher", self.teacher_specs[-1])):
            if spec.kind == "map":
                continue
            raise ConfigurationError(
                f"SimKD needs a classifier on the average of the last map, and the {role}'s last layer is no map",
                received=f"layer `{spec.name}` of {spec.length} tokens x {spec.channels}",
                expected="(channels, height, width)",
                todo="use it between convolutional networks, or choose another feature loss",
            )
        self.projection = nn.Linear(self.student_specs[-1].channels, self.teacher_specs[-1].channels)

    def per_sample(self, batch: BaselineBatch) -> Tensor:
        """Return the mean squared error of each sample (B)."""
        own, theirs, mask = batch.pair(-1, -1)
        return squared_error(regress(self.projection, own, mask), theirs, mask)

    @torch.no_grad()
    def finish(self, student: nn.Module, teacher: nn.Module) -> Callable[[], None]:
        """Write projection and teacher's classifier into the student's classifier; return a function to undo it."""
        own, theirs = find_head(student, "student"), find_head(teacher, "teacher")
        weight = theirs.weight.to(self.projection.weight)
        bias = weight @ self.projection.bias
        if theirs.bias is not None:
            bias = bias + theirs.bias.to(bias)
        before = own.weight.clone(), own.bias.clone()
        own.weight.copy_(weight @ self.projection.weight)
        own.bias.copy_(bias)

        @torch.no_grad()
        def undo() -> None:
            own.weight.copy_(before[0])
            own.bias.copy_(before[1])

        return undo


def find_head(model: nn.Module, role: str) -> nn.Linear:
    """Return the last linear module of a student or teacher (`role`), its classifier.

    Raises `ConfigurationError` when there is none, or the student's has no bias to write to.
    """
    # While training the feature loss is a part of the student, and has linear modules too.
    own = {id(part) for module in model.modules() if isinstance(module, FeatureLoss) for part in module.modules()}
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and id(module) not in own]
    if linears and (role == "teacher" or linears[-1].bias is not None):
        return linears[-1]
    raise ConfigurationError(
        f"SimKD reuses the teacher's classifier, and the {role} has no linear one with a bias",
        received=type(model).__name__,
        expected="a model that ends in a linear classifier",
        todo="use another feature loss",
    )
