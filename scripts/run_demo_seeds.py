"""Run an example with several seeds, keep every row, and print its table.

    python scripts/run_demo_seeds.py vit                 # seeds 0 to 4, one and a half minutes each on one thread
    python scripts/run_demo_seeds.py text --seeds 0 1 2  # seven minutes each; needs scripts/fetch_text_parts.py first
    python scripts/run_demo_seeds.py vit --table-only    # the table of the rows that are there

Writes scripts/results/demo/<example>.jsonl, one row a model and seed, and the first seed's association picture.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_tables import format_markdown_table, spread

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results" / "demo"
# Of students that start alike.
BASELINES = ("student alone", "student + KD")
COLUMNS = ("model", "parameters", "accuracy %", "kept %", "minus alone", "minus KD", "ms for 1", "seconds")


def run_seed(example: str, seed: int, picture: Path | None, extra: Sequence[str]) -> list[dict[str, Any]]:
    """Run the example once and return its rows, each with the seed, the settings and the machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "examples" / f"distill_{example}.py"), "--seed", str(seed)]
        subprocess.run([*command, "--output_dir", folder, *extra], check=True, cwd=ROOT)
        report = json.loads((Path(folder) / "report.json").read_text())
        if picture is not None:
            picture.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder) / "association.png", picture)
    shared = {
        "seed": seed,
        "data": report["data"],
        "settings": report["settings"],
        "environment": report["environment"],
    }
    return [{"example": example, **row, **shared} for row in report["rows"]]


def read_rows(example: str) -> list[dict[str, Any]]:
    """Return the rows that were kept for an example."""
    path = RESULTS / f"{example}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, object]]:
    """Return one line a model: mean and standard deviation over seeds, and the paired differences to the baselines.

    Args:
        rows: Rows of one example; every model must have every seed.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    by_name = {name: {row["seed"]: row for row in rows if row["name"] == name} for name in names}
    lines = []
    for name, seeds in by_name.items():
        start = name.partition("student")[0]
        others = [start + other if "student" in name and name != start + other else "" for other in BASELINES]
        differences = [
            spread(
                [100 * (row["metric"] - by_name[other][seed]["metric"]) for seed, row in seeds.items()], signed=True
            )
            if other in by_name
            else ""
            for other in others
        ]
        times = [row["seconds"] for row in seeds.values() if row["seconds"] is not None]
        measured = [row for row in seeds.values() if "kept" in row]
        cells = (
            name,
            f"{next(iter(seeds.values()))['parameters']:,}",
            spread([100 * row["metric"] for row in seeds.values()]),
            spread([100 * row["kept"][0] for row in measured]) if measured else "",
            *differences,
            f"{statistics.median(row['milliseconds'] for row in measured):.2f}" if measured else "",
            f"{statistics.median(times):.0f}" if times else "",
        )
        lines.append(dict(zip(COLUMNS, cells, strict=True)))
    return lines


def table(example: str) -> str:
    """Return the Markdown table of the rows that were kept for an example."""
    return format_markdown_table(summarize(read_rows(example)), COLUMNS)


def main() -> None:
    """Run the seeds that were asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=("vit", "text"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--table-only", action="store_true", help="Run nothing, print the table of the kept rows.")
    options, extra = parser.parse_known_args()
    path = RESULTS / f"{options.example}.jsonl"
    if not options.table_only:
        RESULTS.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_rows(options.example) if row["seed"] not in options.seeds]
        for seed in options.seeds:
            first = RESULTS / f"association_{options.example}.png" if seed == options.seeds[0] else None
            rows += run_seed(options.example, seed, first, extra)
            path.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["seed"])))
    print(table(options.example))


if __name__ == "__main__":
    main()
