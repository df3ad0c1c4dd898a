"""A Hugging Face Hub on the loopback interface, for tests that use the real ``huggingface_hub`` client.

Everything lives in memory and dies with the context manager. The server speaks the part of the Hub's HTTP interface
that ``huggingface_hub`` and ``transformers`` call to create a repository, push to it and load from it again, and it is
strict where the Hub is strict (tokens, LFS checksums, model-card metadata, unknown commit operations), so that a push
accepted here has a fair chance of being accepted by the Hub.

Where it knowingly differs from the Hub: a new repository starts with an empty commit instead of a ``.gitattributes``;
LFS files are served directly instead of through a redirect to a CDN; there are no pull requests, no organizations, no
Xet storage, no ``.gitignore`` rules, and the listings are not paginated.

The client reads ``HF_ENDPOINT`` once, at import. Client code therefore runs in a subprocess, started with
:meth:`HubServer.environment`.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
import json
import os
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
DEFAULT_TOKEN = "hf_test_token_of_the_loopback_hub"
LFS_SUFFIXES = (
    ".safetensors .bin .pt .pth .ckpt .onnx .h5 .msgpack .npy .npz .pkl .joblib .parquet .arrow .zip .gz .model"
).split()
LFS_SIZE = 10 * 1024 * 1024
# Variables that would let the developer's own settings (offline mode, token, cache) leak into a client under test.
_CLIENT_PREFIXES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")


class HubError(Exception):
    """A refusal, as the Hub words it: a status, a message and the code the client chooses its exception by."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        """Keep the parts; ``extra`` goes to the body."""
        super().__init__(message)
        self.status, self.code, self.extra = status, code, extra
        self.headers: dict[str, str] = {}

    def reply(self) -> Reply:
        """Return the refusal as a response."""
        message = str(self)
        one_line = " ".join(message.split()).encode("ascii", "replace").decode()
        headers = {"X-Error-Message": one_line} | self.headers
        if self.code:
            headers["X-Error-Code"] = self.code
        return Reply.json({"error": message} | self.extra, status=self.status, headers=headers)


@dataclass(frozen=True)
class Request:
    """One request, its body already read. ``authenticated`` is true when it came with the hub's token."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes
    authenticated: bool = False

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""
        return _json_object(self.body)


@dataclass(frozen=True)
class Reply:
    """One response."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        """Return a response whose body is ``value`` as JSON."""
        body = json.dumps(value, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


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


class HubServer:
    """The server. Use it as a context manager; every attribute may be read while it runs.

    Attributes:
        repos: The repositories, ``user/name`` for a model and ``datasets/user/name`` for a dataset.
        requests: The method and the path, without the query, of every request seen so far.
        errors: Tracebacks of bugs in this file. The client got a 501 for them, which it does not retry.
    """

    def __init__(self, token: str = DEFAULT_TOKEN) -> None:
        """Take a free port; requests are answered from ``__enter__`` on."""
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self.tickets: dict[str, tuple[Repo, str, int]] = {}  # the LFS uploads that may be sent: repo, sha256, size
        self._failures: list[list[Any]] = []
        self._lock = threading.RLock()
        self._http = _Server(self)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, name="hub-server", daemon=True
        )

    def __enter__(self) -> HubServer:
        """Start to answer."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and give the port back."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The address to give to the client as ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the whole environment for a client in a subprocess; ``os.environ`` itself is not changed.

        The client's settings of this process are left out, because the test-suite itself may well run offline.

        Args:
            home: The client's ``HF_HOME``. A folder that does not exist yet makes an empty cache.
            token: The token to send, if not the right one. An empty string makes an anonymous client.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_CLIENT_PREFIXES)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # Written out, not only left out, for a caller that merges this into its own environment.
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            # Loading a .bin checkpoint would otherwise ask a Space on the internet to convert it.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add_repo(
        self, name: str, files: Mapping[str, bytes] | None = None, kind: str = "models", private: bool = False
    ) -> Repo:
        """Create a repository from inside the test, without the client."""
        repo = Repo(name, kind, private)
        if files:
            tree = {path: Blob(data, is_lfs(path, len(data), data[:512])) for path, data in files.items()}
            repo.commit("main", tree, "add files")
        self.repos[repo.url_path] = repo
        return repo

    def fail_next(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer the next ``times`` requests whose path matches the regular expression with ``status``.

        Mind the client's retries: it sends a request again after 1, 2, 4, 8 and 8 seconds when the status is 408, 429,
        500, 502, 503 or 504 and the request is ``preupload``, an LFS ``batch``, ``PUT`` or ``verify``, the ``HEAD`` of
        a file that is not in the cache, or (in 2.4, not yet in 1.33) a listing. Every other status fails at once, and
        so does every status for ``repos/create``, ``validate-yaml``, ``commit``, ``whoami-v2`` and a model info. To
        test a push that fails, use 400 or 403, or any status on ``/commit/``.
        """
        with self._lock:
            self._failures.append([re.compile(pattern), status, times])

    def answer(self, request: Request) -> Reply:
        """Answer one request; the requests of all threads are answered one after the other."""
        with self._lock:
            self.requests.append((request.method, request.path))
            try:
                self._maybe_fail(request.path)
                return self._dispatch(request)
            except HubError as error:
                return error.reply()
            except Exception:
                self.errors.append(traceback.format_exc())
                return HubError(501, f"bug in the test hub: {self.errors[-1]}").reply()

    def readable(self, key: str, request: Request) -> Repo:
        """Return a repository that the sender of the request may read."""
        repo = self.repos.get(key)
        if repo and (not repo.private or (request.authenticated and repo.name.startswith(f"{USER}/"))):
            return repo
        # As on the Hub, an anonymous client cannot tell a private repository from one that does not exist.
        if not request.authenticated:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def writable(self, key: str, request: Request) -> Repo:
        """Return a repository that the sender of the request may write to."""
        repo = self.readable(key, request)
        _require_owner(repo.name, request)
        return repo

    def _maybe_fail(self, path: str) -> None:
        for failure in self._failures:
            pattern, status, times = failure
            if times > 0 and pattern.search(path):
                failure[2] -= 1
                raise HubError(status, f"failure {status} asked for by the test")

    def _dispatch(self, request: Request) -> Reply:
        authorization = request.headers.get("Authorization")
        if authorization is not None and authorization != f"Bearer {self.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        request = replace(request, authenticated=authorization is not None)
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, function in _ROUTES:
            match = pattern.fullmatch(request.path)
            if route_method == method and match:
                # Groups are unquoted only now: a quoted slash in a branch name must not split the path.
                groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                return function(self, request, **_with_key(groups))
        raise HubError(404, f"the test hub has no {request.method} {request.path}")


# --- The routes -----------------------------------------------------------------------------------------------------

_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = []
_PARTS = {
    "KIND": "(?P<kind>models|datasets|spaces)",
    "PREFIX": "(?P<prefix>(?:datasets/|spaces/)?)",
    "REPO": "(?P<repo>[^/]+(?:/[^/]+)?)",
    "REV": "(?P<rev>[^/]+)",
}


def _route(method: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    for name, expression in _PARTS.items():
        pattern = pattern.replace(name, expression)

    def register(function: Callable[..., Reply]) -> Callable[..., Reply]:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def _with_key(groups: dict[str, str]) -> dict[str, str]:
    """Replace the parts of a URL that name a repository by its key in ``HubServer.repos``."""
    if "repo" in groups:
        kind = groups.pop("kind", "models")
        prefix = groups.pop("prefix", "" if kind == "models" else f"{kind}/")
        groups["key"] = prefix + groups.pop("repo")
    return groups


@_route("GET", "/api/whoami-v2")
def _whoami(hub: HubServer, request: Request) -> Reply:
    if not request.authenticated:
        raise HubError(401, "Invalid username or password.")
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return Reply.json({"type": "user", "id": "0", "name": USER, "fullname": "Tester", "orgs": [], "auth": access})


@_route("POST", "/api/repos/create")
def _create(hub: HubServer, request: Request) -> Reply:
    asked = request.json()
    name, kind = _named_repo(asked, request)
    key = name if kind == "models" else f"{kind}/{name}"
    url = f"{hub.url}/{key}"
    if key in hub.repos:
        # The client reads the address from the refusal when it was told that the repository may exist.
        raise HubError(409, f"You already created this {kind[:-1]} repo: {name}", url=url)
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    hub.add_repo(name, kind=kind, private=private)
    return Reply.json({"url": url, "name": name, "id": name})


@_route("DELETE", "/api/repos/delete")
def _delete(hub: HubServer, request: Request) -> Reply:
    name, kind = _named_repo(request.json(), request)
    repo = hub.writable(name if kind == "models" else f"{kind}/{name}", request)
    del hub.repos[repo.url_path]
    return Reply(200, b"OK", {"Content-Type": "text/plain"})


@_route("POST", "/api/validate-yaml")
def _validate_yaml(hub: HubServer, request: Request) -> Reply:
    errors, warnings = check_card(str(request.json().get("content", "")))
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Reply.json(found, status=400 if errors else 200)


@_route("POST", "/api/KIND/REPO/preupload/REV")
def _preupload(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo = hub.writable(key, request)
    _no_pull_request(request)
    tree = repo.resolve(rev).tree
    answers = []
    for file in request.json()["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        lfs = is_lfs(path, file["size"], sample)
        known = tree.get(path)
        oid = None if known is None else known.sha256 if known.lfs else known.git_oid
        answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    return Reply.json({"files": answers})


@_route("POST", r"/PREFIXREPO\.git/info/lfs/objects/batch")
def _lfs_batch(hub: HubServer, request: Request, key: str) -> Reply:
    repo = hub.writable(key, request)
    asked = request.json()
    if asked.get("operation") != "upload" or asked.get("hash_algo", "sha256") != "sha256":
        raise HubError(422, "the test hub only takes LFS uploads named by sha256")
    objects = []
    for wanted in asked["objects"]:
        oid, size = str(wanted["oid"]), int(wanted["size"])
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if not re.fullmatch("[0-9a-f]{64}", oid):
            answer["error"] = {"code": 422, "message": f"not a sha256: {oid}"}
        elif oid not in repo.objects:  # without actions, the client knows that it need not send the content again
            ticket = secrets.token_hex(16)
            hub.tickets[ticket] = (repo, oid, size)
            base = f"{hub.url}/{repo.url_path}.git/info/lfs/objects"
            answer["authenticated"] = True
            upload, verify = {"href": f"{base}/{oid}?ticket={ticket}"}, {"href": f"{base}/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return Reply.json({"transfer": "basic", "objects": objects})


@_route("PUT", r"/PREFIXREPO\.git/info/lfs/objects/(?P<oid>[0-9a-f]{64})")
def _lfs_put(hub: HubServer, request: Request, key: str, oid: str) -> Reply:
    # The client sends no token here: as with a signed URL of a store, the ticket is what gives the right to write.
    ticket = request.query.get("ticket", [""])[0]
    repo, expected, size = hub.tickets.get(ticket, (None, "", 0))
    if repo is None or repo.url_path != key or expected != oid:
        raise HubError(403, "this upload was not announced")
    if len(request.body) != size or hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "the content does not match the announced sha256 and size")
    repo.objects[oid] = request.body
    del hub.tickets[ticket]
    return Reply()


@_route("POST", r"/PREFIXREPO\.git/info/lfs/objects/verify")
def _lfs_verify(hub: HubServer, request: Request, key: str) -> Reply:
    repo, asked = hub.writable(key, request), request.json()
    _lfs_object(repo, asked.get("oid"), asked.get("size"))
    return Reply.json({"message": "OK"})


@_route("POST", "/api/KIND/REPO/commit/REV")
def _commit(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo = hub.writable(key, request)
    _no_pull_request(request)
    if rev not in repo.branches:  # one commits on a branch; a tag or a commit hash will not do
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    lines = [_json_object(line) for line in request.body.splitlines() if line.strip()]
    if not lines or lines[0].get("key") != "header" or not lines[0].get("value", {}).get("summary"):
        raise HubError(400, "the first line of a commit must be a header with a summary")
    header, tree = lines[0]["value"], dict(repo.resolve(rev).tree)
    if header.get("parentCommit") not in (None, repo.branches[rev]):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        _apply(repo, tree, line)
    if "README.md" in tree:
        errors, _ = check_card(tree["README.md"].data.decode())
        if errors:
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    commit = repo.commit(rev, tree, header["summary"], header.get("description", ""))
    return Reply.json(
        {"success": True, "commitOid": commit.oid, "commitUrl": f"{hub.url}/{repo.url_path}/commit/{commit.oid}"}
    )


@_route("GET", "/PREFIXREPO/resolve/REV/(?P<path>.+)")
def _resolve(hub: HubServer, request: Request, key: str, rev: str, path: str) -> Reply:
    commit = hub.readable(key, request).resolve(rev)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
    if path not in commit.tree:
        error = HubError(404, "Entry not found", "EntryNotFound")
        error.headers = headers  # the client remembers, for this commit, that the file does not exist
        raise error
    blob = commit.tree[path]
    headers |= {"Content-Type": "application/octet-stream", "ETag": f'"{blob.git_oid}"'}
    if blob.lfs:
        headers |= {"ETag": f'"{blob.sha256}"', "X-Linked-Etag": f'"{blob.sha256}"'}
        headers["X-Linked-Size"] = str(len(blob.data))
    return _ranged(blob.data, headers, request.headers.get("Range"))


@_route("GET", "/api/KIND/REPO")
def _info(hub: HubServer, request: Request, key: str, rev: str = "main") -> Reply:
    repo = hub.readable(key, request)
    commit = repo.resolve(rev)
    card = _card_data(commit.files.get("README.md", b"").decode())
    blobs = request.query.get("blobs", ["false"])[0].lower() in ("true", "1")
    found = {
        "id": repo.name,
        "author": repo.name.split("/")[0],
        "sha": commit.oid,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": repo.commits[0].date,
        "lastModified": commit.date,
        "tags": _items(card.get("tags")),
        "cardData": card or None,
        "siblings": [blob.sibling(path) if blobs else {"rfilename": path} for path, blob in commit.tree.items()],
    }
    names = ("library_name", "pipeline_tag", "model-index")
    return Reply.json(found | {name: card[name] for name in names if name in card})


@_route("GET", "/api/KIND/REPO/revision/REV")
def _info_at(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    return _info(hub, request, key, rev)


@_route("GET", "/api/KIND/REPO/tree/REV(?:/(?P<folder>.*))?")
def _tree(hub: HubServer, request: Request, key: str, rev: str, folder: str) -> Reply:
    commit = hub.readable(key, request).resolve(rev)
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries = _listing(commit.tree, folder.strip("/"), recursive)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {rev}", "EntryNotFound")
    return Reply.json(entries)


@_route("GET", "/api/KIND/REPO/refs")
def _refs(hub: HubServer, request: Request, key: str) -> Reply:
    repo = hub.readable(key, request)

    def listed(refs: Mapping[str, str], folder: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
    return Reply.json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@_route("GET", "/api/KIND/REPO/commits/REV")
def _commits(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    return Reply.json(
        [
            {"id": c.oid, "title": c.message, "message": c.description, "date": c.date, "authors": [{"user": USER}]}
            for c in hub.readable(key, request).log(rev)
        ]
    )


@_route("POST", "/api/KIND/REPO/branch/REV")
def _create_branch(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo = hub.writable(key, request)
    if rev in repo.branches:
        raise HubError(409, f"Reference already exists: {rev}")
    repo.branches[rev] = repo.resolve(request.json().get("startingPoint") or "main").oid
    return Reply.json({"success": True})


@_route("POST", "/api/KIND/REPO/tag/REV")
def _create_tag(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo, tag = hub.writable(key, request), request.json()["tag"]
    if tag in repo.tags:
        raise HubError(409, f"Tag reference exists already: {tag}")
    repo.tags[tag] = repo.resolve(rev).oid
    return Reply.json({"success": True})


# --- What the routes share ------------------------------------------------------------------------------------------


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


def check_card(content: str) -> tuple[list[str], list[str]]:
    """Return the errors and the warnings about the metadata at the top of a README."""
    try:
        data = _front_matter(content)
    except ValueError as error:
        return [str(error)], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return [f"the metadata must be a mapping, not {type(data).__name__}"], []
    errors = []
    for name in ("license", "library_name", "pipeline_tag", "tags", "datasets", "metrics", "base_model"):
        if not all(isinstance(value, str) for value in _items(data.get(name))):
            errors.append(f'"{name}" must be a string or a list of strings')
    return errors + _check_model_index(data.get("model-index")), []


def _front_matter(content: str) -> Any:
    """Return the metadata of a README, or None when it has none."""
    import yaml  # a dependency of huggingface_hub; the standard library has no YAML parser

    class Loader(yaml.SafeLoader):
        """Refuses a repeated key, as the Hub's parser does and PyYAML does not."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            """Build a mapping."""
            names = [self.construct_object(name, deep=True) for name, _ in node.value]
            repeated = sorted({str(name) for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(f"duplicated mapping key: {', '.join(repeated)}")
            return super().construct_mapping(node, deep)

    match = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", content, re.DOTALL | re.MULTILINE)
    try:
        return yaml.load(match[1], Loader) if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"YAML Metadata Error: {error}") from error


def _card_data(content: str) -> dict[str, Any]:
    errors, _ = check_card(content)
    return {} if errors else _front_matter(content) or {}


def _check_model_index(index: Any) -> list[str]:
    """Check the keys without which no client can read the reported results."""
    errors: list[str] = []

    def require(value: Any, names: Iterable[str], where: str) -> None:
        known = value if isinstance(value, dict) else {}
        errors.extend(f'"{where}.{name}" is required' for name in names if known.get(name) is None)

    for i, model in enumerate(_items(index)):
        require(model, ["name", "results"], f"model-index[{i}]")
        for j, result in enumerate(_items(model.get("results")) if isinstance(model, dict) else []):
            where = f"model-index[{i}].results[{j}]"
            require(result, ["task", "dataset", "metrics"], where)
            if isinstance(result, dict):
                require(result.get("task"), ["type"], f"{where}.task")
                require(result.get("dataset"), ["type", "name"], f"{where}.dataset")
                for k, metric in enumerate(_items(result.get("metrics"))):
                    require(metric, ["type", "value"], f"{where}.metrics[{k}]")
    return errors


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise HubError(400, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise HubError(400, "not a JSON object")
    return value


def _require_owner(name: str, request: Request) -> None:
    if not request.authenticated:
        raise HubError(401, "Invalid username or password.")
    if not name.startswith(f"{USER}/"):
        raise HubError(403, f"You don't have the rights to write under the namespace of {name}")


def _named_repo(asked: Mapping[str, Any], request: Request) -> tuple[str, str]:
    """Return the full name and the kind of the repository that a body names, after a look at the sender's rights."""
    name = f"{asked.get('organization') or USER}/{asked.get('name')}"
    _require_owner(name, request)
    kind = f"{asked.get('type') or 'model'}s"
    if kind not in ("models", "datasets", "spaces"):
        raise HubError(400, f"the test hub has no {kind}")
    return name, kind


def _no_pull_request(request: Request) -> None:
    if "create_pr" in request.query:
        raise HubError(400, "the test hub has no pull requests")


def _lfs_object(repo: Repo, oid: Any, size: Any) -> bytes:
    """Return an uploaded LFS object; ``size`` may be left out, as the client does when it copies a file."""
    data = repo.objects.get(oid)
    if data is None or (size is not None and size != len(data)):
        raise HubError(400, f"the LFS object {oid} of {size} bytes was not uploaded")
    return data


def _apply(repo: Repo, tree: dict[str, Blob], operation: Mapping[str, Any]) -> None:
    """Apply one operation of a commit to ``tree``."""
    key, value = operation.get("key"), operation.get("value") or {}
    path = str(value.get("path", ""))
    if not path or any(part in ("", ".", "..") for part in path.rstrip("/").split("/")):
        raise HubError(400, f"not a path in a repository: {path!r}")
    if key == "file":
        if value.get("encoding") != "base64":
            raise HubError(400, f"unknown encoding: {value.get('encoding')!r}")
        try:
            tree[path] = Blob(base64.b64decode(value["content"], validate=True))
        except (KeyError, binascii.Error) as error:
            raise HubError(400, f"the content of {path} is not base64") from error
    elif key == "lfsFile":
        tree[path] = Blob(_lfs_object(repo, value.get("oid"), value.get("size")), lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in tree if name == path or name.startswith(path.rstrip("/") + "/")]
        gone = [path] if key == "deletedFile" and path in tree else gone if key == "deletedFolder" else []
        if not gone:
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        for name in gone:
            del tree[name]
    else:
        raise HubError(400, f"unknown operation in a commit: {key!r}")


def _listing(tree: Mapping[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the files and the folders below ``folder``."""
    start = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, blob in sorted(tree.items()):
        if not path.startswith(start):
            continue
        parts = path[len(start) :].split("/")
        for depth in range(1, len(parts)):
            name = start + "/".join(parts[:depth])
            entries.setdefault(name, {"type": "directory", "oid": _folder_oid(tree, name), "size": 0, "path": name})
            if not recursive:
                break
        if recursive or len(parts) == 1:
            entries[path] = blob.entry(path)
    return list(entries.values())


def _folder_oid(tree: Mapping[str, Blob], folder: str) -> str:
    """Return a name that changes with the content of the folder; git's own is of no use to a client."""
    inside: Iterable[str] = (f"{path} {tree[path].git_oid}" for path in sorted(tree) if path.startswith(f"{folder}/"))
    return hashlib.sha1("\n".join(inside).encode()).hexdigest()


def _ranged(data: bytes, headers: Mapping[str, str], wanted: str | None) -> Reply:
    """Return the content, or the one range of it that was asked for."""
    match = re.fullmatch(r"\s*bytes\s*=\s*(\d*)\s*-\s*(\d*)\s*", wanted or "")
    if not match or not any(match.groups()):
        return Reply(200, data, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


# --- HTTP -----------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that keeps its connection open must not delay the end of the test
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the delayed acknowledgements of TCP cost 40 ms for each request
    timeout = 60
    server: _Server

    def _handle(self) -> None:
        try:
            body = self._read_body()  # always, also for a request that is refused: the next one follows on the line
            url = urlsplit(self.path)
            query = parse_qs(url.query, keep_blank_values=True)
            reply = self.server.hub.answer(Request(self.command, url.path, query, self.headers, body))
            self._send(reply)
        except ConnectionError:  # the client has gone away
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 (the names that http.server looks up)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers, up to the empty line
            pass
        return b"".join(chunks)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: a test reads ``HubServer.requests``."""
