"""What a report says in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..rows import Row
from .groups import teacher_groups
from .parts import AssociationHistory, Comparison, Curve, DeployTable, LayerError

# A layer's largest weight counts as a preference from this many times the uniform level, and the next one, on.
PREFERENCE = 1.25
# An association this near to uniform says nothing.
NEAR_UNIFORM = 0.02
MOST_NAMED = 6


@dataclass(frozen=True)
class EntropyRange:
    """The entropy (nats) of uniform weights, and of weights that lie on one layer (of each of several teachers)."""

    uniform: float
    single: float

    def concentration(self, entropy: float) -> float | None:
        """Return how far an entropy is from uniform (0) to one layer (1); None where there is one layer only."""
        width = self.uniform - self.single
        return None if width < 1e-9 else min(max((self.uniform - entropy) / width, 0.0), 1.0)


def entropy_range(association: AssociationHistory) -> EntropyRange:
    """Return the range of the entropy: from log T to 0 with one teacher of T layers.

    With several, a student layer's weights sum to a fixed share w_k over the layers T_k of each: it then is from
    sum_k w_k (log T_k - log w_k) to -sum_k w_k log w_k.
    """
    weights, groups = association.maps[-1].weights, teacher_groups(association.teacher_layers)
    shares = [sum(row[t] for row in weights for t in group.places) / len(weights) for group in groups]
    known = [(share, len(group.places)) for share, group in zip(shares, groups, strict=True) if share > 0]
    single = -sum(share * math.log(min(share, 1.0)) for share, _ in known)
    return EntropyRange(single + sum(share * math.log(layers) for share, layers in known), single)


def deploy_pair(deploy: DeployTable) -> tuple[Row, Row] | None:
    """Return the reference and the last model, run in the same way; None where only one model was evaluated."""
    first = deploy.rows[0]
    same_way = [row for row in deploy.rows if (row.runtime, row.device) == (first.runtime, first.device)]
    return None if same_way[-1].model == first.model else (first, same_way[-1])


def headline(deploy: DeployTable | None) -> str | None:
    """Return what the student keeps and costs in a sentence, or None where it was not evaluated beside another."""
    pair = None if deploy is None else deploy_pair(deploy)
    if deploy is None or pair is None:
        return None
    (teacher, student), metric = pair, deploy.metric
    kept, latency = student.kept, student.latency[0]
    size = student.parameters / teacher.parameters
    speed = teacher.latency[0].p50 / latency.p50
    of = "single samples" if latency.samples == 1 else f"batches of {latency.samples}"
    costs = f"with {size:.2g} times the parameters, {speed:.2g} times as fast for {of}"
    if not math.isfinite(kept.value):
        return f"The student's {metric} is {student.quality:.4g} (the teacher's {teacher.quality:.4g}), {costs}."
    if not deploy.higher_is_better:
        change = f"{abs(1 / kept.value - 1):.1%} {'below' if kept.value >= 1 else 'above'} the teacher's"
        return f"The student's {metric} of {student.quality:.4g} is {change} ({teacher.quality:.4g}), {costs}."
    interval = f"95%: {100 * kept.low:.1f} - {100 * kept.high:.1f}%"
    return f"The student keeps {kept.value:.1%} ({interval}) of the teacher's {metric} {costs}."


def association_words(association: AssociationHistory) -> list[str]:
    """Return how far the association is from uniform, and which teacher layers the student layers prefer."""
    said = _distance(association.entropy, entropy_range(association))
    weights = association.maps[-1].weights
    preferred = []
    for name, row in zip(association.student_layers, weights, strict=True):
        for group in teacher_groups(association.teacher_layers):
            share = sum(row[t] for t in group.places)
            best = max(group.places, key=lambda t: row[t])
            others = [row[t] for t in group.places if t != best]
            level = max(share / len(group.places), *others, 0.0) if share > 0 else 0.0
            if others and level and row[best] >= PREFERENCE * level:
                preferred.append((row[best], name, association.teacher_layers[best]))
    if not preferred:
        return [*said, "No student layer clearly prefers one teacher layer."]
    shown = sorted(preferred, reverse=True)[:MOST_NAMED]
    named = [f"student layer {own} from teacher layer {other} ({weight:.0%})" for weight, own, other in shown]
    more = f", and {len(preferred) - len(shown)} more" if len(preferred) > len(shown) else ""
    return [*said, f"In the last quarter, these learn most from one layer: {', '.join(named)}{more}."]


def _distance(entropy: Curve | None, levels: EntropyRange) -> list[str]:
    if entropy is None:
        return []
    first, last = (levels.concentration(value) for value in (entropy.values[0], entropy.values[-1]))
    if first is None or last is None:
        return []
    said = f"On average the association ended {last:.0%} of the way from uniform to a single layer "
    said += f"({first:.0%} in the first logging window)."
    return [said + (' association="uniform" would teach much the same.' if last <= NEAR_UNIFORM else "")]


def comparison_words(comparison: Comparison) -> str:
    """Return quality and agreement on the compared samples in a sentence."""
    quality = " and ".join(f"{value:.4g} ({role})" for role, value in comparison.quality.items())
    agree = f"they agree on {comparison.agreement:.1%}"
    if not comparison.reliability:
        agree = f"their predictions correlate by {comparison.agreement:.3f}"
    return f"On {comparison.samples:,} samples, {comparison.metric} is {quality}; {agree}."


def error_words(errors: Sequence[LayerError]) -> str:
    """Return the change of the layers' errors in a sentence; nothing where an error was 0."""
    changes = [entry.last / entry.first - 1 for entry in errors if entry.first > 0]
    if len(changes) < len(errors) or not errors:
        return ""
    least, most = f"{min(changes):+.0%}", f"{max(changes):+.0%}"
    between = least if least == most else f"{least} to {most}"
    return f"From the first to the last logging window the errors changed by {between}."
