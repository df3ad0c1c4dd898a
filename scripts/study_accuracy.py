"""Repeat the studies of the SemCKD paper: run what is missing, print a table and draw a picture.

    python scripts/study_accuracy.py negative-map scripts/protocols/negative_map.yaml
    python scripts/study_accuracy.py curve scripts/protocols/few_labels.yaml scripts/protocols/noisy_labels.yaml
    python scripts/study_accuracy.py curve scripts/protocols/batch_size.yaml scripts/protocols/feature_weight.yaml
    python scripts/study_accuracy.py mismatch scripts/protocols/*_fashion.yaml --table-only
    python scripts/study_accuracy.py association scripts/protocols/resnet_fashion.yaml --table-only

negative-map forces one student layer onto one teacher layer and compares with logit distillation; curve follows
accuracy along the value that a protocol sweeps; mismatch tells how differently associated layers see the validation
samples (lower is better calibrated; a table alone); association shows which teacher layers the default weighs. The
runs are those of scripts/benchmark_accuracy.py, and are kept as rows where it keeps them; it says what the data of the
protocols need.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accuracy.protocol import METHODS, Method, Protocol, read_protocols
from accuracy.rows import RESULTS, read_rows
from accuracy.studies import (
    association_table,
    curve_table,
    curves,
    mean_association,
    mismatch_table,
    negative_map,
    negative_sentence,
    negative_table,
)
from accuracy.study_pictures import plot_curves, plot_negative_map
from benchmark_accuracy import run_protocol
from pictures import save_picture

from hf_semckd.errors import InputError
from hf_semckd.publishing.plots import plot_association

PICTURES = RESULTS / "pictures"
# What a swept key is called below a curve.
LABELS = {
    "data.train": "labeled training samples",
    "data.noise": "share of wrong labels",
    "training.per_device_train_batch_size": "batch size",
    "training.feature_weight": "weight of the feature loss",
}


def run_missing(path: Path, protocols: Sequence[Protocol], study: str, results: Path) -> None:
    """Run what is not there yet, of the methods that a study shows."""
    for protocol in protocols:
        methods = [entry.name for entry in protocol.methods if _shows(study, entry)]
        if methods:
            run_protocol(str(path), protocol.name, methods, results)


def kept_rows(protocols: Sequence[Protocol], results: Path) -> list[dict[str, Any]]:
    """Return the rows that are there."""
    return [row for protocol in protocols for row in read_rows(results / f"{protocol.name}.jsonl")]


def show_negative_map(path: Path, protocols: Sequence[Protocol], results: Path, pictures: Path) -> None:
    """Print and draw the map of a protocol."""
    found = negative_map(kept_rows(protocols, results), path.stem)
    print(f"{negative_table(found)}\n\n{negative_sentence(found)}\n")
    figure, _ = plot_negative_map(found, title="forced pairs of layers")
    _save(figure, pictures / f"{path.stem}.png")


def show_curve(path: Path, protocols: Sequence[Protocol], results: Path, pictures: Path) -> None:
    """Print and draw the curves of a sweep."""
    names = [method.name for method in protocols[0].methods]
    key = yaml.safe_load(path.read_text(encoding="utf-8"))["sweep"]["key"]
    found = curves(kept_rows(protocols, results), path.stem, names)
    label = LABELS.get(key, key)
    print(f"{label}: mean ± standard error, in %\n\n{curve_table(found)}\n")
    figure, _ = plot_curves(found, label=label)
    _save(figure, pictures / f"{path.stem}.png")


def show_association(path: Path, protocols: Sequence[Protocol], results: Path, pictures: Path) -> None:
    """Print and draw the mean association weights of the default, for each protocol."""
    for protocol in protocols:
        weights, seeds = mean_association(kept_rows([protocol], results), protocol.name)
        print(f"{protocol.name}, mean of {seeds} seeds:\n\n{association_table(weights)}\n")
        _save(plot_association(weights, title=protocol.name)[0], pictures / f"association_{protocol.name}.png")


SHOWN = {"negative-map": show_negative_map, "curve": show_curve, "association": show_association}


def main() -> None:
    """Run what is missing of a study, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*SHOWN, "mismatch"])
    parser.add_argument("protocols", nargs="+", type=Path, metavar="protocol.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the rows.")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="Folder of the pictures.")
    parser.add_argument("--table-only", action="store_true", help="Run nothing, show what the kept rows tell.")
    options = parser.parse_args()
    # The file of the methods lies beside the protocols: a pattern may well name it.
    paths = [path for path in options.protocols if path.resolve() != METHODS]
    found = {path: read_protocols(path) for path in paths}
    for path, protocols in found.items():
        if options.study == "curve" and protocols[0].name == path.stem:
            parser.error(f"{path} sweeps nothing")
        if not options.table_only:
            run_missing(path, protocols, options.study, options.results)
    try:
        if options.study == "mismatch":
            protocols = [protocol for entry in found.values() for protocol in entry]
            print(mismatch_table(kept_rows(protocols, options.results), [protocol.name for protocol in protocols]))
            return
        for path, protocols in found.items():
            SHOWN[options.study](path, protocols, options.results, options.pictures)
    except InputError as error:
        raise SystemExit(str(error)) from error


def _shows(study: str, method: Method) -> bool:
    if study == "association":
        return method.name == "semckd"
    return study != "mismatch" or (method.loss is not None and "semckd" in method.loss.split("+"))


def _save(figure: Any, path: Path) -> None:
    print(f"picture: {save_picture(figure, path)}", file=sys.stderr)


if __name__ == "__main__":
    main()
