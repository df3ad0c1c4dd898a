"""Which student layers share a projection, so that all projections stay small beside the student."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Projector
from ..features import FeatureSpec

# Neighbouring student layers share projections where these would weigh more than this share of the student.
MAXIMUM_PROJECTION_SHARE = 0.2


def layers_per_projection(
    student_specs: Sequence[FeatureSpec], teacher_specs: Sequence[FeatureSpec], student_parameters: int | None
) -> int:
    """Return how many neighbouring student layers have to share a projection for all of them to stay small.

    Neighbouring layers of a transformer write into one residual stream, so that one basis serves them.

    Args:
        student_specs: The student's layers.
        teacher_specs: The teacher's layers.
        student_parameters: The size of the student; None when it does not matter.

    Returns:
        The smallest number that keeps the projections under `MAXIMUM_PROJECTION_SHARE` of the student, or the number
        of student layers where none does.
    """
    if student_parameters is None:
        return 1
    widths = {spec.channels for spec in teacher_specs}
    for shared in range(1, len(student_specs) + 1):
        owners = shared_among_neighbours(student_specs, "shared", shared)
        first = [student_specs[owners.index(entry)] for entry in range(max(owners) + 1)]
        parameters = sum((spec.channels + 1) * width for spec in first for width in widths)
        if parameters < MAXIMUM_PROJECTION_SHARE * student_parameters:
            return shared
    return len(student_specs)


def shared_among_neighbours(specs: Sequence[FeatureSpec], projector: Projector, shared: int) -> list[int]:
    """Return the index of each student layer's projections: one for `shared` neighbours of equal width."""
    owners: list[int] = []
    sharing = 0
    for s, spec in enumerate(specs):
        fits = bool(s) and projector == "shared" and spec.channels == specs[s - 1].channels and sharing < shared
        owners.append(owners[-1] if fits else (owners[-1] + 1 if s else 0))
        sharing = sharing + 1 if fits else 1
    return owners
