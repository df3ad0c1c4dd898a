"""The account, and repositories: made, deleted, described, listed and read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .card import card_data, check_card, items
from .messages import USER, HubError, Reply, Request, require_owner
from .repository import Blob
from .routing import route
from .server import HubServer


@route("GET", "/api/whoami-v2")
def _whoami(hub: HubServer, request: Request) -> Reply:
    if not request.authenticated:
        raise HubError(401, "Invalid username or password.")
    access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return Reply.json({"type": "user", "id": "0", "name": USER, "fullname": "Tester", "orgs": [], "auth": access})


@route("POST", "/api/repos/create")
def _create(hub: HubServer, request: Request) -> Reply:
    asked = request.json()
    name, kind = named_repo(asked, request)
    key = name if kind == "models" else f"{kind}/{name}"
    url = f"{hub.url}/{key}"
    if key in hub.repos:
        # The client reads the address from the refusal when it was told that the repository may exist.
        raise HubError(409, f"You already created this {kind[:-1]} repo: {name}", url=url)
    private = bool(asked.get("private")) or asked.get("visibility") == "private"
    hub.add_repo(name, kind=kind, private=private)
    return Reply.json({"url": url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def _delete(hub: HubServer, request: Request) -> Reply:
    name, kind = named_repo(request.json(), request)
    repo = hub.writable(name if kind == "models" else f"{kind}/{name}", request)
    del hub.repos[repo.url_path]
    return Reply(200, b"OK", {"Content-Type": "text/plain"})


@route("POST", "/api/validate-yaml")
def _validate_yaml(hub: HubServer, request: Request) -> Reply:
    errors, warnings = check_card(str(request.json().get("content", "")))
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Reply.json(found, status=400 if errors else 200)


@route("GET", "/PREFIXREPO/resolve/REV/(?P<path>.+)")
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


@route("GET", "/api/KIND/REPO")
def _info(hub: HubServer, request: Request, key: str, rev: str = "main") -> Reply:
    repo = hub.readable(key, request)
    commit = repo.resolve(rev)
    card = card_data(commit.files.get("README.md", b"").decode())
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
        "tags": items(card.get("tags")),
        "cardData": card or None,
        "siblings": [blob.sibling(path) if blobs else {"rfilename": path} for path, blob in commit.tree.items()],
    }
    names = ("library_name", "pipeline_tag", "model-index")
    return Reply.json(found | {name: card[name] for name in names if name in card})


@route("GET", "/api/KIND/REPO/revision/REV")
def _info_at(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    return _info(hub, request, key, rev)


@route("GET", "/api/KIND/REPO/tree/REV(?:/(?P<folder>.*))?")
def _tree(hub: HubServer, request: Request, key: str, rev: str, folder: str) -> Reply:
    commit = hub.readable(key, request).resolve(rev)
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries = _listing(commit.tree, folder.strip("/"), recursive)
    if folder and not entries:
        raise HubError(404, f"{folder} does not exist on {rev}", "EntryNotFound")
    return Reply.json(entries)


@route("GET", "/api/KIND/REPO/refs")
def _refs(hub: HubServer, request: Request, key: str) -> Reply:
    repo = hub.readable(key, request)

    def listed(refs: Mapping[str, str], folder: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": oid} for name, oid in refs.items()]

    branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
    return Reply.json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})


@route("GET", "/api/KIND/REPO/commits/REV")
def _commits(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    return Reply.json(
        [
            {"id": c.oid, "title": c.message, "message": c.description, "date": c.date, "authors": [{"user": USER}]}
            for c in hub.readable(key, request).log(rev)
        ]
    )


@route("POST", "/api/KIND/REPO/branch/REV")
def _create_branch(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo = hub.writable(key, request)
    if rev in repo.branches:
        raise HubError(409, f"Reference already exists: {rev}")
    repo.branches[rev] = repo.resolve(request.json().get("startingPoint") or "main").oid
    return Reply.json({"success": True})


@route("POST", "/api/KIND/REPO/tag/REV")
def _create_tag(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo, tag = hub.writable(key, request), request.json()["tag"]
    if tag in repo.tags:
        raise HubError(409, f"Tag reference exists already: {tag}")
    repo.tags[tag] = repo.resolve(rev).oid
    return Reply.json({"success": True})


def named_repo(asked: Mapping[str, Any], request: Request) -> tuple[str, str]:
    """Return the full name and the kind of the repository that a body names, after a look at the sender's rights."""
    name = f"{asked.get('organization') or USER}/{asked.get('name')}"
    require_owner(name, request)
    kind = f"{asked.get('type') or 'model'}s"
    if kind not in ("models", "datasets", "spaces"):
        raise HubError(400, f"the test hub has no {kind}")
    return name, kind


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
