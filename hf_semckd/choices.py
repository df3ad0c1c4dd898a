"""The values that settings take where there are a few to choose from."""

from __future__ import annotations

from typing import Literal

from .errors import ConfigurationError

Association = Literal["similarity", "sinkhorn", "learned", "uniform", "last", "one_to_one"]

TargetNorm = Literal["channel", "none"]

Projector = Literal["shared", "convolutional", "pairwise"]

ProjectionInit = Literal["zero", "random"]

CacheDtype = Literal["auto", "float16", "bfloat16"]

TeacherDtype = Literal["auto", "float32", "bfloat16", "float16"]


def check_projection_init(projector: Projector | None, projection_init: ProjectionInit | None) -> None:
    """Refuse published projections that start at zero.

    Raises:
        ConfigurationError: For the pairwise projector with zero initialization.
    """
    if projection_init == "zero" and projector == "pairwise":
        raise ConfigurationError(
            "The pairwise projector cannot start at zero",
            received="projection_init='zero', projector='pairwise'",
            expected="linear projections, or the published start",
            todo="leave projection_init out, or use projector='shared'",
        )
