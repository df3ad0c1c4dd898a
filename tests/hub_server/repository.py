"""A repository with its history, in memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .messages import HubError

LFS_SUFFIXES = (
    ".safetensors .bin .pt .pth .ckpt .onnx .h5 .msgpack .npy .npz .pkl .joblib .parquet .arrow .zip .gz .model"
).split()
LFS_SIZE = 10 * 1024 * 1024


@dataclass(frozen=True)
class Blob:
    """The content of one file, and whether it is stored through LFS."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """The LFS name of the content."""
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """The text that git keeps in the place of an LFS file."""
        lines = [
            "version https://git-lfs.github.com/spec/v1",
            f"oid sha256:{self.sha256}",
            f"size {len(self.data)}",
            "",
        ]
        return "\n".join(lines).encode()

    @cached_property
    def git_oid(self) -> str:
        """The name git gives to what it stores: the content, or for an LFS file its pointer."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """Return the file as a line of a tree listing."""
        entry: dict[str, Any] = {"type": "file", "oid": self.git_oid, "size": len(self.data), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry

    def sibling(self, path: str) -> dict[str, Any]:
        """Return the file as a line of the ``siblings`` of a model info with ``blobs=true``."""
        sibling: dict[str, Any] = {"rfilename": path, "blobId": self.git_oid, "size": len(self.data)}
        if self.lfs:
            sibling["lfs"] = {"sha256": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return sibling


@dataclass(frozen=True)
class Commit:
    """A commit: ``files`` is everything the repository holds at that point, not only what the commit changed."""

    oid: str
    message: str
    description: str
    parent: str | None
    date: str
    tree: Mapping[str, Blob]

    @property
    def files(self) -> dict[str, bytes]:
        """The content of every file, by path."""
        return {path: blob.data for path, blob in self.tree.items()}


class Repo:
    """One repository, with its history."""

    def __init__(self, name: str, kind: str = "models", private: bool = False) -> None:
        """Start with one empty commit, so that ``main`` exists."""
        self.name, self.kind, self.private = name, kind, private
        self.history: dict[str, Commit] = {}
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}  # what was uploaded through LFS, by sha256
        self.commit("main", {}, "initial commit")

    @property
    def files(self) -> dict[str, bytes]:
        """The content of every file on ``main``, by path."""
        return self.resolve("main").files

    @property
    def card(self) -> str:
        """The text of the README on ``main``; empty when there is none."""
        return self.files.get("README.md", b"").decode()

    @property
    def commits(self) -> list[Commit]:
        """The commits of ``main``, the oldest first."""
        return list(self.log("main"))[::-1]

    @property
    def url_path(self) -> str:
        """The path of the repository's page."""
        return self.name if self.kind == "models" else f"{self.kind}/{self.name}"

    def resolve(self, revision: str) -> Commit:
        """Return the commit that a branch, a tag or a commit hash names."""
        revision = revision.removeprefix("refs/heads/")
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.history:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.history[oid]

    def log(self, revision: str) -> Iterator[Commit]:
        """Yield the commits that lead to ``revision``, the newest first."""
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self.history[commit.parent] if commit.parent else None

    def commit(self, branch: str, tree: Mapping[str, Blob], message: str, description: str = "") -> Commit:
        """Put ``tree`` on top of ``branch``."""
        parent = self.branches.get(branch)
        names = [(path, blob.git_oid) for path, blob in sorted(tree.items())]
        oid = hashlib.sha1(json.dumps([self.name, parent, message, description, names]).encode()).hexdigest()
        date = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        self.history[oid] = Commit(oid, message, description, parent, date, dict(tree))
        self.branches[branch] = oid
        return self.history[oid]


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Tell whether a file must go through LFS: weights, archives, large or binary files; never an empty one."""
    if size == 0:
        return False
    try:
        # The sample is the start of the file and may end in the middle of a character, hence the incremental decoder.
        text = codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return True
    return "\0" in text or size > LFS_SIZE or path.endswith(tuple(LFS_SUFFIXES))
