"""Commits, and what goes through LFS before them."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Any

from .card import check_card
from .messages import HubError, Reply, Request, json_object
from .repository import Blob, Repo, is_lfs
from .routing import route
from .server import HubServer


@route("POST", "/api/KIND/REPO/preupload/REV")
def _preupload(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo = hub.writable(key, request)
    no_pull_request(request)
    tree = repo.resolve(rev).tree
    answers = []
    for file in request.json()["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        lfs = is_lfs(path, file["size"], sample)
        known = tree.get(path)
        oid = None if known is None else known.sha256 if known.lfs else known.git_oid
        answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    return Reply.json({"files": answers})


@route("POST", r"/PREFIXREPO\.git/info/lfs/objects/batch")
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


@route("PUT", r"/PREFIXREPO\.git/info/lfs/objects/(?P<oid>[0-9a-f]{64})")
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


@route("POST", r"/PREFIXREPO\.git/info/lfs/objects/verify")
def _lfs_verify(hub: HubServer, request: Request, key: str) -> Reply:
    repo, asked = hub.writable(key, request), request.json()
    _lfs_object(repo, asked.get("oid"), asked.get("size"))
    return Reply.json({"message": "OK"})


@route("POST", "/api/KIND/REPO/commit/REV")
def _commit(hub: HubServer, request: Request, key: str, rev: str) -> Reply:
    repo = hub.writable(key, request)
    no_pull_request(request)
    if rev not in repo.branches:  # one commits on a branch; a tag or a commit hash will not do
        raise HubError(404, f"Invalid rev id: {rev}", "RevisionNotFound")
    lines = [json_object(line) for line in request.body.splitlines() if line.strip()]
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


def no_pull_request(request: Request) -> None:
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
