"""The tables of the kept runs and their headline, all computed from rows alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from markdown_tables import format_markdown_table

from .rows import STUDENT, TEACHER, accuracies, canonical
from .statistics import ROUNDING, Ari, Comparison, ari, compare, compare_all

# What main_table writes beside an accuracy, by the verdict on the reference.
MARKS = {"better": " ▼", "worse": " ▲", "level": ""}
LEGEND = (
    "Mean ± standard deviation over seeds, in %; bold: the best student of the pair. ▼: significantly worse than the "
    "reference, ▲: significantly better (paired t-test at 5 %, after Holm over all comparisons of the table). "
    "ARI: average relative improvement of the reference over the method, without pairs where the method gains nothing "
    "over the student alone. The mean difference is that over pairs and common seeds, in points."
)
DIFFERENCE_COLUMNS = ("pair", "other", "difference", "std", "95 % interval", "n", "p", "adjusted p", "verdict")
TUNED_COLUMNS = ("pair", "method", "tried", "chosen", "default − tuned, points")

Rows = Sequence[Mapping[str, Any]]


def main_table(rows: Rows, protocols: Sequence[str], methods: Sequence[str], reference: str = "semckd") -> str:
    """Return the Markdown table with a line for every method and a column for every pair; see `LEGEND`.

    Args:
        rows: As `rows.read_rows` returns them.
        protocols: The pairs, one column each.
        methods: The methods, one line each, below those of the teacher and the student alone.
        reference: The method that the others are compared with.
    """
    found = accuracies(rows, protocols, _students(methods, reference))
    teachers = accuracies(rows, protocols, [TEACHER])
    compared = {(entry.pair, entry.other): entry for entry in compare_all(found, reference)}
    best = {protocol: _best(values) for protocol, values in found.items()}
    difference = f"{reference} − method"
    lines = []
    for method in (TEACHER, *_students(methods, reference)):
        line: dict[str, str | None] = {"method": method}
        for protocol in protocols:
            values = {**found[protocol], **teachers[protocol]}[method]
            line[protocol] = _accuracy(values, method in best[protocol], compared.get((protocol, method)))
        means = [entry.mean for (_, other), entry in compared.items() if other == method]
        line["ARI"] = _ari_cell(relative_improvement(rows, protocols, method, reference))
        line[difference] = f"{100 * mean(means):+.2f}" if means else None
        lines.append(line)
    return format_markdown_table(lines, ["method", *protocols, "ARI", difference])


def relative_improvement(rows: Rows, protocols: Sequence[str], method: str, reference: str = "semckd") -> Ari:
    """Return the average relative improvement of the reference over a method, of means over the seeds all three have.

    The teacher, the student alone and the reference have none.
    """
    if method in (TEACHER, STUDENT, reference):
        return ari([])
    pairs = []
    for found in accuracies(rows, protocols, [reference, method, STUDENT]).values():
        values = [found[name] for name in (reference, method, STUDENT)]
        seeds = sorted(values[0].keys() & values[1].keys() & values[2].keys())
        if seeds:
            ours, other, student = (mean(entry[seed] for seed in seeds) for entry in values)
            pairs.append((ours, other, student))
    return ari(pairs)


def difference_table(
    rows: Rows, protocols: Sequence[str], methods: Sequence[str], reference: str = "semckd", gaps: bool = True
) -> str:
    """Return the Markdown table of paired differences, reference - other in points, a line for every pair and other.

    The verdict is on the reference. A comparison with fewer than two common seeds has a line
    without numbers, or with `gaps=False` none.
    """
    students = _students(methods, reference)
    found = compare_all(accuracies(rows, protocols, students), reference)
    compared = {(entry.pair, entry.other): entry for entry in found}
    lines: list[dict[str, object]] = []
    for protocol in protocols:
        for method in students:
            if method == reference:
                continue
            line: dict[str, object] = dict.fromkeys(DIFFERENCE_COLUMNS)
            entry = compared.get((protocol, method))
            if entry is None and not gaps:
                continue
            if entry is not None:
                cells = (_points(entry.mean), f"{100 * entry.std:.2f}", _interval(entry), entry.n, _p(entry.p))
                line.update(zip(DIFFERENCE_COLUMNS[2:], (*cells, _p(entry.adjusted), entry.verdict), strict=True))
            lines.append({**line, "pair": protocol, "other": method})
    return format_markdown_table(lines, DIFFERENCE_COLUMNS)


def headline(
    rows: Rows, protocols: Sequence[str], methods: Sequence[str], reference: str = "semckd"
) -> dict[str, Any]:
    """Return how often the reference is better, worse and level, and how often it is the best.

    Returns:
        "reference"; "pairs": on how many it and another student were tested; "comparisons": how many were corrected
        for together; "best": on how many pairs its mean exceeds every other student's; "best_shared": on how many
        another's equals it and none exceeds it; "baselines": by method "pairs", the significant "wins" and "losses",
        the rest "level" and of it "level_higher" and "level_lower" by the mean, and "mean_difference" over pairs in
        points (None: no pair).
    """
    students = _students(methods, reference)
    found = accuracies(rows, protocols, students)
    comparisons = compare_all(found, reference)
    tested = [values for values in found.values() if values[reference] and sum(map(bool, values.values())) > 1]
    bests = [_best(values) for values in tested]
    baselines = {
        method: _counts([entry for entry in comparisons if entry.other == method])
        for method in students
        if method != reference
    }
    return {
        "reference": reference,
        "pairs": len(tested),
        "comparisons": len(comparisons),
        "best": sum(names == {reference} for names in bests),
        "best_shared": sum(reference in names and len(names) > 1 for names in bests),
        "baselines": baselines,
    }


def headline_sentence(counts: Mapping[str, Any], against: str = "kd") -> str:
    """Return the counts of `headline` as one sentence, for and against the reference alike.

    Args:
        counts: What `headline` returned.
        against: The method that is named on its own; the student trained alone is in no total.
    """
    reference, parts = counts["reference"], []
    entry = counts["baselines"].get(against)
    if entry is not None and entry["pairs"]:
        even = entry["level"] - entry["level_higher"] - entry["level_lower"]
        parts.append(
            f"{reference} is more accurate than {against} on {entry['wins'] + entry['level_higher']} of "
            f"{_count(entry['pairs'], 'pair')} ({entry['wins']} significantly), less accurate on "
            f"{entry['losses'] + entry['level_lower']} ({entry['losses']} significantly) and equal on {even}, "
            f"{entry['mean_difference']:+.2f} points on average"
        )
    baselines = {name: entry for name, entry in counts["baselines"].items() if name != STUDENT and entry["pairs"]}
    total = {key: sum(entry[key] for entry in baselines.values()) for key in ("pairs", "wins", "losses", "level")}
    parts.append(
        f"of {_count(total['pairs'], 'comparison')} with {_count(len(baselines), 'other method')} {reference} is "
        f"significantly better in {total['wins']}, significantly worse in {total['losses']} "
        f"and level in {total['level']}"
    )
    parts.append(
        f"{reference} alone has the best mean on {counts['best']} of {_count(counts['pairs'], 'pair')}"
        + (f", and shares it on {counts['best_shared']}" if counts["best_shared"] else "")
    )
    return (
        "; ".join(parts) + f" (paired t-tests at 5 % after Holm over {_count(counts['comparisons'], 'comparison')})."
    )


def fresh_sentence(rows: Rows, pairs: Sequence[str]) -> str:
    """Say on how many pairs the default is better than logit distillation with fresh seeds, and by how much."""
    found = compare_all(accuracies(rows, pairs, ["semckd", "kd"]), "semckd")
    higher, lower = (sum(sign * entry.mean > ROUNDING for entry in found) for sign in (1, -1))
    better, worse = (sum(entry.verdict == verdict for entry in found) for verdict in ("better", "worse"))
    seeds = sorted({entry.n for entry in found})
    return (
        f"With {' or '.join(map(str, seeds))} fresh seeds a pair, semckd is more accurate than kd on {higher} of "
        f"{len(found)} pairs ({better} significantly) and less accurate on {lower} ({worse} significantly), "
        f"{100 * mean(entry.mean for entry in found):+.2f} points on average (paired t-tests at 5 % after Holm "
        f"over these {len(found)} comparisons)."
    )


def fresh_table(rows: Rows, pairs: Sequence[str]) -> str:
    """Return the Markdown table of what `fresh_sentence` counts, a line a pair; differences in points."""
    found = accuracies(rows, pairs, ["semckd", "kd"])
    lines = []
    for entry in compare_all(found, "semckd"):
        means = {name: 100 * mean(values.values()) for name, values in found[entry.pair].items()}
        lines.append(
            {
                "pair": entry.pair, "seeds": entry.n, "kd": f"{means['kd']:.2f}", "semckd": f"{means['semckd']:.2f}",
                "difference": f"{_points(entry.mean)} ± {100 * entry.std:.2f}", "95 % interval": _interval(entry),
                "adjusted p": f"{entry.adjusted:.2g}", "semckd is": entry.verdict,
            }
        )  # fmt: skip
    return format_markdown_table(lines, list(lines[0]) if lines else ["pair"])


def tuned_table(rows: Rows, protocols: Sequence[str], methods: Sequence[str], default: str = "semckd") -> str:
    """Return the Markdown table of what was tried and chosen, a line for every pair and method with tuned settings.

    The line of the default's tuned form, `<default>-tuned`, also holds the paired difference default - tuned on test,
    with its 95 % interval, not corrected for others; methods that were tuned but not tested yet have no choice.
    """
    lines: list[dict[str, object]] = []
    for protocol, found in accuracies(rows, protocols, [*methods, default]).items():
        for method in dict.fromkeys(methods):
            ours, values = found[default], found[method]
            own = [row for row in rows if (row["protocol"], row["method"]) == (protocol, method)]
            tried = {canonical(row["settings"]["tuned"]) for row in own if row["split"] == "tuning"}
            chosen = {canonical(row["settings"]["tuned"]) for row in own if row["split"] == "test"} - {"{}"}
            if not tried and not chosen:
                continue
            paired = method == f"{default}-tuned" and len(ours.keys() & values.keys()) > 1
            entry = compare(protocol, default, method, ours, values) if paired else None
            cells = (len(tried), _settings(chosen), f"{_points(entry.mean)} {_interval(entry)}" if entry else None)
            lines.append(dict(zip(TUNED_COLUMNS, (protocol, method, *cells), strict=True)))
    return format_markdown_table(lines, TUNED_COLUMNS)


def _students(methods: Sequence[str], reference: str) -> list[str]:
    """Return the student alone, the methods and the reference, each once."""
    return [name for name in dict.fromkeys((STUDENT, *methods, reference)) if name != TEACHER]


def _best(values: Mapping[str, Mapping[int, float]]) -> set[str]:
    """Return the methods whose mean no other exceeds: several when they are equal."""
    means = {method: mean(entry.values()) for method, entry in values.items() if entry}
    return {method for method, value in means.items() if value >= max(means.values()) - ROUNDING}


def _counts(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    level = [entry.mean for entry in comparisons if entry.verdict == "level"]
    return {
        "pairs": len(comparisons),
        "wins": sum(entry.verdict == "better" for entry in comparisons),
        "losses": sum(entry.verdict == "worse" for entry in comparisons),
        "level": len(level),
        "level_higher": sum(value > ROUNDING for value in level),
        "level_lower": sum(value < -ROUNDING for value in level),
        "mean_difference": 100 * mean(entry.mean for entry in comparisons) if comparisons else None,
    }


def _accuracy(values: Mapping[int, float], best: bool, comparison: Comparison | None) -> str | None:
    if not values:
        return None
    shares = [100 * value for value in values.values()]
    text = f"{mean(shares):.2f}" + (f" ± {stdev(shares):.2f}" if len(shares) > 1 else "")
    return (f"**{text}**" if best else text) + (MARKS[comparison.verdict] if comparison else "")


def _ari_cell(found: Ari) -> str | None:
    pairs = found.used + found.left_out
    if not pairs:
        return None
    text = "-" if found.percent is None else f"{found.percent:+.1f} %"
    return text + (f" ({found.used} of {_count(pairs, 'pair')})" if found.left_out else "")


def _settings(chosen: Iterable[str]) -> str | None:
    """Return the settings of a JSON object as `name=value`."""
    return next((", ".join(f"{key}={value}" for key, value in json.loads(text).items()) for text in chosen), None)


def _interval(entry: Comparison) -> str:
    return f"[{_points(entry.interval[0])}, {_points(entry.interval[1])}]"


def _points(share: float) -> str:
    return f"{100 * share:+.2f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
