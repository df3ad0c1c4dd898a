"""The picture: what a step costs, of a step of logit distillation, one group of bars a pair."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from pictures import INK, bare, new_figure, save_picture

from .summary import STEP_TARGET, ratios_of

# Okabe and Ito's colors, which any color vision tells apart.
COLORS = {"ce": "#999999", "cached": "#56B4E9", "kd": "#E69F00", "semckd": "#0072B2", "published": "#CC79A7"}
LABELS = {
    "ce": "student alone",
    "cached": "SemCKD, cached teacher",
    "kd": "logit distillation (KD)",
    "semckd": "SemCKD",
    "published": "SemCKD as published",
}
TARGET, TARGET_LABEL = "#D55E00", "target for SemCKD"
# Longer bars are cut, and say so: the published form would leave no room to tell 1.00 from 1.05.
LONGEST = 2.0
BAR = 0.17


def draw(stored: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Draw the step times of a stored measurement and save them as a picture."""
    pairs = [record for record in stored["pairs"].values() if "kd" in record["seconds"]]
    figure, axes = new_figure(8.5, 1.2 + 1.15 * len(pairs))
    for index, record in enumerate(pairs):
        _draw_pair(axes, record, middle=-index)
    _finish(axes, [record["pair"] for record in pairs])
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save_picture(figure, path)


def _draw_pair(axes: Axes, record: Mapping[str, Any], middle: float) -> None:
    ratios = {"kd": {"median": 1.0, "low": 1.0, "high": 1.0}}
    found = ratios_of(record["seconds"])
    ratios |= {name: found[f"{name} / kd"] for name in record["seconds"] if name != "kd"}
    shown = [name for name in COLORS if name in ratios]
    target = STEP_TARGET[record["family"]]
    for place, name in enumerate(shown):
        ratio, height = ratios[name], middle + BAR * ((len(shown) - 1) / 2 - place)
        value = ratio["median"]
        cut = value > LONGEST
        axes.barh(height, min(value, LONGEST), BAR * 0.88, color=COLORS[name], label=LABELS[name])
        if not cut and name != "kd":
            axes.plot([ratio["low"], min(ratio["high"], LONGEST)], [height, height], color=INK, linewidth=1)
        text = f" {value:.1f} (bar cut)" if cut else f" {value:.2f}"
        edge = LONGEST if cut else max(value, min(ratio["high"], LONGEST))
        if name == "semckd":
            axes.plot(
                [target] * 2, [height - BAR / 2, height + BAR / 2], color=TARGET, linewidth=2.5, label=TARGET_LABEL
            )
            # Beside the line, not on it.
            edge = max(edge, target + 0.005)
        axes.text(edge, height, text, va="center", fontsize=8, color=INK)


def _finish(axes: Axes, names: list[str]) -> None:
    axes.set_yticks([-index for index in range(len(names))], labels=names, fontsize=10)
    axes.set_xlim(0, LONGEST * 1.17)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])
    axes.set_xlabel(
        "time of a step, without the optimizer's part; a KD step = 1 (thin lines: quartiles)", fontsize=10, color=INK
    )
    axes.set_ylim(-len(names) + 0.45, 0.55)
    bare(axes, grid="x")
    axes.axvline(1.0, color="#8c959f", linewidth=1, zorder=0.5)
    axes.tick_params(colors=INK, length=2)
