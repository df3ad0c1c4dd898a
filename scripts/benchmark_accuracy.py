"""Compare ways to train a student, from a protocol file to a table, with every run kept as a row.

    python scripts/benchmark_accuracy.py scripts/protocols/smoke.yaml            # minutes: a check that it works
    python scripts/benchmark_accuracy.py scripts/protocols/*_fashion.yaml --jobs 2    # two runs at a time
    python scripts/benchmark_accuracy.py scripts/protocols/deep_vit_fashion_full.yaml --device cuda --jobs 8
    python scripts/benchmark_accuracy.py scripts/protocols/vit_fashion.yaml --methods kd semckd
    python scripts/benchmark_accuracy.py scripts/protocols/*.yaml --table-only    # the tables of the kept rows

Every method is tuned with the same number of runs, on tuning seeds and the validation split, and reported on other
seeds and the test split. Rows go to scripts/results/accuracy/<protocol>.jsonl, one a run, as soon as it is known: a
stopped benchmark goes on where it was. One thread a job; the same seed gives the same row on the same machine and
versions, but for what a GPU adds up in another order. Needs the extra `demo`, and for some protocols what
scripts/fetch_text_parts.py, scripts/fetch_image_parts.py or the Debian package dataset-fashion-mnist bring.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from accuracy.protocol import Protocol, read_protocols
from accuracy.rows import OUTPUTS, RESULTS, read_rows
from accuracy.tables import (
    LEGEND,
    difference_table,
    headline,
    headline_sentence,
    main_table,
    tuned_table,
)

ROOT = Path(__file__).resolve().parents[1]


def run_protocol(
    path: str,
    name: str,
    methods: Sequence[str] | None,
    results: Path,
    seeds: Sequence[int] | None = None,
    device: str = "cpu",
    jobs: int = 1,
    outputs: Path = OUTPUTS,
) -> None:
    """Run what is not there yet of one protocol: in this process, on one thread, or several runs at once in others."""
    from accuracy.parallel import make_bench, run_ahead

    place = (path, name, results, device, outputs)
    bench = make_bench(*place)
    if jobs > 1:
        run_ahead(bench, place, methods, seeds, jobs)
    bench.run(methods, seeds)


def chosen_methods(protocols: Sequence[Protocol], methods: Sequence[str] | None) -> list[str]:
    """Return the methods to show, in the order in which they are first named."""
    named = [method.name for protocol in protocols for method in protocol.methods]
    return [name for name in dict.fromkeys(named) if methods is None or name in methods]


def tables(protocols: Sequence[Protocol], methods: Sequence[str], results: Path) -> str:
    """Return the tables of the rows that are there."""
    names = [protocol.name for protocol in protocols]
    rows = [row for name in names for row in read_rows(results / f"{name}.jsonl")]
    parts = [main_table(rows, names, methods), LEGEND]
    if "semckd" in methods:
        parts += [headline_sentence(headline(rows, names, methods)), difference_table(rows, names, methods)]
        parts += [tuned_table(rows, names, methods)]
    return "\n\n".join(parts)


def main() -> None:
    """Run the chosen protocols and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="*", metavar="protocol.yaml")
    parser.add_argument("--methods", nargs="+", help="Only these methods of the protocols.")
    parser.add_argument("--seeds", nargs="+", type=int, help="Test with these seeds instead of the protocols' own.")
    parser.add_argument("--jobs", type=int, default=1, help="Runs at once, in a process of one thread each; 1.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="Where models are trained; cpu.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Folder of the rows.")
    parser.add_argument("--table-only", action="store_true", help="Run nothing, print the tables of the kept rows.")
    options = parser.parse_args()
    if not options.protocols:
        parser.error("name one or more protocol files, such as scripts/protocols/smoke.yaml")
    # A pattern such as protocols/*.yaml names the file of the methods too.
    paths = [path for path in options.protocols if Path(path).name != "methods.yaml"]
    found = [(path, protocol) for path in paths for protocol in read_protocols(path)]
    unknown = set(options.methods or ()) - {method.name for _, entry in found for method in entry.methods}
    if unknown:
        parser.error(f"no protocol compares {', '.join(sorted(unknown))}")
    if not options.table_only:
        for path, protocol in found:
            run_protocol(
                path, protocol.name, options.methods, options.results, options.seeds, options.device, options.jobs
            )
    protocols = [protocol for _, protocol in found]
    print(tables(protocols, chosen_methods(protocols, options.methods), options.results))


if __name__ == "__main__":
    main()
