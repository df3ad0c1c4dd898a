"""The loopback hub, against the real client.

The functions named ``client_...`` run in a subprocess, because the client reads ``HF_ENDPOINT`` when it is imported.
They return what the test needs to know as JSON.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import DEFAULT_TOKEN, HubServer, Repo, check_card, is_lfs
from launching import python

MODEL = "tester/tiny-bert"
CARD = """---
license: mit
library_name: transformers
tags: [distillation, test]
---
# Tiny BERT, pushed by a test
"""


# --- What the clients do --------------------------------------------------------------------------------------------


def client_push(folder: str) -> dict[str, Any]:
    """Save a tiny BERT and push the folder, then push it again, on main and on a branch."""
    from huggingface_hub import HfApi
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    model: Any = BertModel(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes))
    model.save_pretrained(folder)
    Path(folder, "README.md").write_text(CARD)
    Path(folder, "empty.txt").touch()
    api = HfApi()
    url = api.create_repo(MODEL)
    first = api.upload_folder(repo_id=MODEL, folder_path=folder, commit_message="the model")
    unchanged = api.upload_folder(repo_id=MODEL, folder_path=folder, commit_message="nothing new")
    api.create_branch(MODEL, branch="run/1", revision=first.oid)
    model.embeddings.word_embeddings.weight.data += 1  # other weights, easy to tell from the first
    on_branch = model.push_to_hub(MODEL, revision="run/1", commit_message="other weights")
    api.create_tag(MODEL, tag="v1", revision=first.oid)
    api.delete_file("empty.txt", MODEL)
    return {
        "name": api.whoami()["name"],
        "url": url,
        "repo_id": url.repo_id,
        "again": _error(api.create_repo, MODEL),
        "exist_ok": api.create_repo(MODEL, exist_ok=True),
        "foreign": _error(api.create_repo, "somebody/else"),
        "first": first.oid,
        "unchanged": unchanged.oid,
        "on_branch": on_branch.oid,
    }


def client_read(first: str) -> dict[str, Any]:
    """Load the model by several names of its revision, and list what the repository holds."""
    from huggingface_hub import HfApi, ModelCard
    from transformers import BertModel

    def weight(**options: Any) -> float:
        return BertModel.from_pretrained(MODEL, **options).embeddings.word_embeddings.weight.sum().item()

    api = HfApi()
    info: Any = api.model_info(MODEL, files_metadata=True)
    refs = api.list_repo_refs(MODEL)
    return {
        "main": weight(),
        "sha": weight(revision=first),
        "tag": weight(revision="v1"),
        "branch": weight(revision="run/1"),
        "no revision": _error(BertModel.from_pretrained, MODEL, revision="nowhere"),
        "no file": _error(api.hf_hub_download, MODEL, "nothing.txt"),
        "no repo": _error(api.model_info, "tester/nothing"),
        "card": ModelCard.load(MODEL).data.to_dict(),
        "info": {"sha": info.sha, "tags": info.tags, "library": info.library_name, "private": info.private},
        "sizes": {sibling.rfilename: sibling.size for sibling in info.siblings},
        "lfs": {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings if sibling.lfs},
        "files": sorted(api.list_repo_files(MODEL, revision="run/1")),
        "no folder": _error(lambda: list(api.list_repo_tree(MODEL, "nothing"))),
        "branches": {branch.name: branch.target_commit for branch in refs.branches},
        "titles": [commit.title for commit in api.list_repo_commits(MODEL)],
    }


def client_secrets(folder: str) -> dict[str, Any]:
    """Use a private repository with the token, without one, and with a wrong one; and push what must be refused."""
    from huggingface_hub import HfApi

    right, anonymous, wrong = HfApi(), HfApi(token=False), HfApi(token="hf_wrong")
    right.create_repo("tester/secret", private=True)
    right.upload_file(path_or_fileobj=b"secret", path_in_repo="sub/a.txt", repo_id="tester/secret")
    right.create_repo("tester/data", repo_type="dataset")
    right.upload_file(path_or_fileobj=b"\0\1", path_in_repo="x", repo_id="tester/data", repo_type="dataset")
    secret: dict[str, Any] = {"repo_id": "tester/secret", "filename": "sub/a.txt"}
    bad_card: dict[str, Any] = {
        "path_or_fileobj": b"---\na: [1\n---\n",
        "path_in_repo": "README.md",
        "repo_id": "tester/secret",
    }
    return {
        "read": Path(right.hf_hub_download(**secret)).read_text(),
        "listed": [entry.path for entry in right.list_repo_tree("tester/secret", recursive=True)],
        "data": Path(right.hf_hub_download("tester/data", "x", repo_type="dataset")).read_bytes().hex(),
        "anonymous": _error(anonymous.hf_hub_download, **secret, force_download=True),
        "anonymous info": _error(anonymous.model_info, "tester/secret"),
        "anonymous create": _error(anonymous.create_repo, "tester/x"),
        "wrong": _error(wrong.hf_hub_download, **secret, force_download=True),
        "wrong whoami": _error(wrong.whoami),
        "wrong push": _error(wrong.upload_folder, repo_id="tester/secret", folder_path=folder),
        "bad card": _error(right.upload_file, **bad_card),
        "pull request": _error(right.upload_folder, repo_id="tester/secret", folder_path=folder, create_pr=True),
        "deleted": right.delete_repo("tester/data", repo_type="dataset"),
    }


def client_upload(folder: str) -> dict[str, Any]:
    """Push a folder to a repository that exists."""
    from huggingface_hub import HfApi

    return {"error": _error(HfApi().upload_folder, repo_id="tester/fails", folder_path=folder)}


def _error(call: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """Return the names of the exceptions that the call raised, the outermost first, and the status of the response."""
    try:
        call(*arguments, **options)
    except Exception as error:
        names: list[str] = []
        status: int | None = None
        cause: BaseException | None = error
        while cause is not None:
            names.append(type(cause).__name__)
            status = status or getattr(getattr(cause, "response", None), "status_code", None)
            cause = cause.__cause__ or cause.__context__
        return [status, *names]
    return []


def run_client(name: str, *arguments: str, env: dict[str, str]) -> dict[str, Any]:
    """Run one of the functions above in a fresh process."""
    done = python(__file__, name, *arguments, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    sys.exit()


# --- The real client ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """One hub for the file; at the end it must not have met a bug of its own."""
    with HubServer() as hub:
        yield hub
        assert hub.errors == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the first client saves its model."""
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def pushed(hub: HubServer, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the first client saw when it pushed its model."""
    return run_client("client_push", str(folder), env=hub.environment(tmp_path_factory.mktemp("home")))


def test_a_push_arrives_bit_by_bit(hub: HubServer, folder: Path, pushed: dict[str, Any]) -> None:
    """The server holds exactly the files of the disk, and the weights went through LFS."""
    on_disk = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    commit = hub.repos[MODEL].history[pushed["first"]]
    assert commit.files == on_disk
    assert {path for path, blob in commit.tree.items() if blob.lfs} == {"model.safetensors"}
    assert hub.repos[MODEL].card == CARD
    put = [path for method, path in hub.requests if method == "PUT"]
    assert f"/{MODEL}.git/info/lfs/objects/{hashlib.sha256(on_disk['model.safetensors']).hexdigest()}" in put
    assert len(put) == 2  # once for main and once for the branch: the second push of the same folder sent nothing


def test_the_history_is_that_of_the_pushes(hub: HubServer, pushed: dict[str, Any]) -> None:
    """Each push is a commit on its branch, except the one that changed nothing."""
    repo = hub.repos[MODEL]
    assert [commit.message.split()[0] for commit in repo.commits] == ["initial", "the", "Delete"]
    assert pushed["unchanged"] == pushed["first"] == repo.tags["v1"]
    assert repo.branches["run/1"] == pushed["on_branch"]
    assert "empty.txt" not in repo.files and repo.resolve("run/1").files["empty.txt"] == b""
    assert not repo.private


def test_the_repository_is_created_once(hub: HubServer, pushed: dict[str, Any]) -> None:
    """The second creation is refused, unless the client says that it may exist; other names are off limits."""
    assert pushed["name"] == "tester" and pushed["repo_id"] == MODEL
    assert pushed["url"] == pushed["exist_ok"] == f"{hub.url}/{MODEL}"
    assert pushed["again"][:2] == [409, "HfHubHTTPError"]
    assert pushed["foreign"][:2] == [403, "HfHubHTTPError"]


def test_a_fresh_process_reads_it_back(hub: HubServer, folder: Path, pushed: dict[str, Any], tmp_path: Path) -> None:
    """An anonymous client with an empty cache loads the model from every name of a revision, and sees the listings."""
    before = len(hub.requests)
    read = run_client("client_read", pushed["first"], env=hub.environment(tmp_path / "home", token=""))
    weights_path = re.compile(f"/{MODEL}/resolve/[^/]+/model.safetensors")  # which name of main varies by version
    fetched = [path for method, path in hub.requests[before:] if method == "GET" and weights_path.fullmatch(path)]
    assert len(fetched) == 2  # the cache was empty, and main, the tag and its commit share their weights
    assert read["main"] == read["sha"] == read["tag"]
    assert read["branch"] == pytest.approx(read["main"] + 32 * 16, abs=1e-2)
    assert read["no revision"][0] == 404 and "RevisionNotFoundError" in read["no revision"]
    assert read["no file"][:2] == [404, "RemoteEntryNotFoundError"]
    assert read["no repo"][:2] == [401, "RepositoryNotFoundError"]
    assert read["no folder"][:2] == [404, "RemoteEntryNotFoundError"]
    assert read["card"]["license"] == "mit"
    main = hub.repos[MODEL].resolve("main")
    assert read["info"] == {
        "sha": main.oid,
        "tags": ["distillation", "test"],
        "library": "transformers",
        "private": False,
    }
    assert read["sizes"] == {path: len(data) for path, data in main.files.items()}
    weights = (folder / "model.safetensors").read_bytes()
    assert read["lfs"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert read["files"] == sorted(path.name for path in folder.iterdir() if path.is_file())
    assert read["branches"] == {"main": main.oid, "run/1": pushed["on_branch"]}
    assert read["titles"] == [commit.message for commit in hub.repos[MODEL].commits][::-1]


def test_private_repositories_and_tokens(hub: HubServer, tmp_path: Path) -> None:
    """A private repository opens to the token only; a wrong token and a broken card are refused."""
    (tmp_path / "a.txt").write_text("a")
    seen = run_client("client_secrets", str(tmp_path), env=hub.environment(tmp_path / "home"))
    assert (seen["read"], seen["listed"], seen["data"]) == ("secret", ["sub", "sub/a.txt"], "0001")
    assert hub.repos["tester/secret"].private
    assert seen["anonymous"][0] == 401 and "RepositoryNotFoundError" in seen["anonymous"]
    assert seen["anonymous info"][:2] == [401, "RepositoryNotFoundError"]
    for name in ("anonymous create", "wrong", "wrong whoami", "wrong push"):
        assert seen[name][0] == 401 and "HfHubHTTPError" in seen[name], name
        assert "RepositoryNotFoundError" not in seen[name], name
    assert seen["bad card"][:3] == [400, "ValueError", "BadRequestError"]
    assert seen["pull request"][:2] == [400, "BadRequestError"]
    assert set(hub.repos["tester/secret"].files) == {"sub/a.txt"}
    assert "datasets/tester/data" not in hub.repos


@pytest.mark.parametrize(
    ("pattern", "status", "requests"),
    [("/commit/", 403, 1), ("/commit/", 503, 1), ("lfs/objects/[0-9a-f]{64}$", 400, 1), ("/preupload/", 503, 2)],
)
def test_a_push_fails_when_asked_to(
    pattern: str, status: int, requests: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client reports the status at once, but for a 503 on ``preupload``, which it tries again and gets through."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # a setting of the test-suite, which must not reach the client
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights.bin").write_bytes(b"\0" * 8)
    with HubServer(token="hf_other") as hub:
        repo = hub.add_repo("tester/fails")
        hub.fail_next(pattern, status)
        error = run_client("client_upload", str(source), env=hub.environment(tmp_path / "home"))["error"]
        assert error[:1] == ([] if requests > 1 else [status])
        assert repo.files == ({"weights.bin": b"\0" * 8} if requests > 1 else {})
        assert len([path for _, path in hub.requests if re.search(pattern, path)]) == requests


# --- The protocol ---------------------------------------------------------------------------------------------------


@pytest.fixture
def line(hub: HubServer) -> Iterator[Callable[..., tuple[int, bytes, Any]]]:
    """One connection, kept open from one request to the next."""
    connection = http.client.HTTPConnection("127.0.0.1", int(hub.url.rsplit(":", 1)[1]))

    def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes, Any]:
        headers = {"Authorization": f"Bearer {DEFAULT_TOKEN}"} | headers
        chunked = not (body is None or isinstance(body, bytes))
        connection.request(method, path, body, headers, encode_chunked=chunked)
        response = connection.getresponse()
        return response.status, response.read(), response.headers

    yield ask
    connection.close()


def ndjson(*operations: dict[str, Any], summary: str = "a test") -> bytes:
    """Return the body of a commit."""
    header = {"key": "header", "value": {"summary": summary}}
    return b"\n".join(json.dumps(operation).encode() for operation in [header, *operations])


def test_only_good_commits_are_taken(hub: HubServer, line: Callable[..., Any]) -> None:
    """A commit is refused as a whole, and its body does not disturb the next request on the connection."""
    repo = hub.add_repo("tester/commits", {"old.txt": b"old", "a/b.txt": b"b"})
    path = "/api/models/tester/commits/commit/main"
    content = {"path": "new.txt", "content": base64.b64encode(b"new").decode()}
    new = {"key": "file", "value": content}  # without the encoding
    good: dict[str, Any] = {"key": "file", "value": content | {"encoding": "base64"}}
    refused = [
        (b"", 400),
        (b"not json", 400),
        (ndjson(good, summary=""), 400),
        (ndjson(good, {"key": "copyFile", "value": {"path": "x"}}), 400),
        (ndjson(good, new), 400),
        (ndjson({"key": "file", "value": good["value"] | {"content": "*"}}), 400),
        (ndjson({"key": "file", "value": good["value"] | {"path": "../new.txt"}}), 400),
        (ndjson({"key": "lfsFile", "value": {"path": "x", "oid": "0" * 64, "size": 1}}), 400),
        (ndjson({"key": "deletedFile", "value": {"path": "a"}}), 404),
        (ndjson({"key": "deletedFolder", "value": {"path": "b/"}}), 404),
    ]
    for body, status in refused:
        assert line("POST", path, body)[0] == status, body
    assert line("POST", path.replace("main", "v0"), ndjson(good))[2]["X-Error-Code"] == "RevisionNotFound"
    stale = json.dumps({"key": "header", "value": {"summary": "late", "parentCommit": repo.commits[0].oid}}).encode()
    assert line("POST", path, stale)[0] == 412
    assert repo.files == {"old.txt": b"old", "a/b.txt": b"b"}
    status, body, _ = line("POST", path, ndjson(good, {"key": "deletedFolder", "value": {"path": "a/"}}))
    assert (status, json.loads(body)["commitOid"]) == (200, repo.commits[-1].oid)
    assert repo.files == {"old.txt": b"old", "new.txt": b"new"}


def test_lfs_content_is_checked(hub: HubServer, line: Callable[..., Any]) -> None:
    """What was not announced, or is not what was announced, is refused; the right content may come in chunks."""
    repo = hub.add_repo("tester/lfs")
    data, root = b"weights" * 99, "/tester/lfs.git/info/lfs/objects"
    named = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    batch = json.dumps({"operation": "upload", "hash_algo": "sha256", "objects": [named, {"oid": "no", "size": 1}]})
    found = json.loads(line("POST", f"{root}/batch", batch.encode())[1])["objects"]
    assert found[1]["error"]["code"] == 422
    upload = found[0]["actions"]["upload"]["href"].removeprefix(hub.url)
    assert line("PUT", upload.split("?")[0], data)[0] == 403
    assert line("PUT", upload, data[::-1])[0] == 400
    assert line("POST", f"{root}/verify", json.dumps(named).encode())[0] == 400
    assert line("PUT", upload, iter([data[:100], data[100:]]), **{"Transfer-Encoding": "chunked"})[0] == 200
    assert line("POST", f"{root}/verify", json.dumps(named).encode())[0] == 200
    assert line("POST", f"{root}/verify", json.dumps(named | {"size": 1}).encode())[0] == 400
    assert "actions" not in json.loads(line("POST", f"{root}/batch", batch.encode())[1])["objects"][0]
    assert repo.objects == {named["oid"]: data}


def test_files_are_served_with_their_headers(hub: HubServer, line: Callable[..., Any]) -> None:
    """The headers let the client name the content, and it may ask for a part of it."""
    repo = hub.add_repo("tester/files", {"a.txt": b"0123456789", "w.safetensors": b"\0" * 20})
    status, body, headers = line("HEAD", "/tester/files/resolve/main/a.txt")
    assert (status, body, headers["Content-Length"]) == (200, b"", "10")
    assert headers["ETag"] == f'"{hashlib.sha1(b"blob 10" + bytes(1) + b"0123456789").hexdigest()}"'
    assert headers["X-Repo-Commit"] == repo.commits[-1].oid and headers["X-Linked-Etag"] is None
    headers = line("HEAD", f"/tester/files/resolve/{repo.commits[-1].oid}/w.safetensors")[2]
    assert headers["X-Linked-Etag"] == f'"{hashlib.sha256(bytes(20)).hexdigest()}"'
    assert headers["X-Linked-Size"] == "20"
    wanted = {"2-4": b"234", "7-": b"789", "-3": b"789", "8-99": b"89", "-99": b"0123456789"}
    for part, expected in wanted.items():
        status, body, headers = line("GET", "/tester/files/resolve/main/a.txt", Range=f"bytes={part}")
        assert (status, body) == (206, expected)
    status, body, headers = line("GET", "/tester/files/resolve/main/a.txt", Range="bytes=10-")
    assert (status, headers["Content-Range"]) == (416, "bytes */10")
    status, _, headers = line("HEAD", "/tester/files/resolve/main/b.txt")
    assert (status, headers["X-Error-Code"]) == (404, "EntryNotFound")
    assert headers["X-Repo-Commit"] == repo.commits[-1].oid
    assert line("GET", "/tester/files/resolve/v0/a.txt")[2]["X-Error-Code"] == "RevisionNotFound"
    assert line("GET", "/tester/nothing/resolve/main/a.txt")[2]["X-Error-Code"] == "RepoNotFound"
    assert line("GET", "/gpt2/resolve/main/a.txt")[2]["X-Error-Code"] == "RepoNotFound"


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: mit\ntags: [a, b]", None),
        ("tags: [a", "YAML"),
        ("a: 1\na: 2", "duplicated"),
        ("- a", "mapping"),
        ("tags: [1]", '"tags"'),
        ("model-index:\n- name: m\n  results: []", None),
        ("model-index:\n- results: []", "name"),
        ("model-index:\n- name: m\n  results:\n  - task: {type: t}\n    metrics: []", "dataset"),
    ],
)
def test_the_metadata_of_a_card_is_read(metadata: str, error: str | None) -> None:
    """The metadata is parsed; a card without any only gets a warning."""
    errors, warnings = check_card(f"---\n{metadata}\n---\n# Title\n")
    assert (errors == []) if error is None else (error in " ".join(errors))
    assert warnings == []
    assert check_card("# Title\n") == ([], ["empty or missing yaml metadata in repo card"])


def test_which_files_go_through_lfs() -> None:
    """Weights and binary files do, text does not, even when the sample stops within a character."""
    assert is_lfs("model.safetensors", 1, b"a") and is_lfs("x", 2, b"\0\1") and is_lfs("x", 2, b"\xff\xfe")
    assert is_lfs("tokenizer.json", 20_000_000, b"{")
    assert not is_lfs("config.json", 2, b"{}") and not is_lfs("x.bin", 0, b"")
    assert not is_lfs("vocab.txt", 600, "é".encode()[:1])


def test_environment_is_for_the_subprocess_only(hub: HubServer, tmp_path: Path) -> None:
    """The environment is whole, and the one of this process stays what it was."""
    before = dict(os.environ)
    env = hub.environment(tmp_path)
    assert (env["HF_ENDPOINT"], env["HF_HOME"], env["HF_TOKEN"]) == (hub.url, str(tmp_path), hub.token)
    assert env["PATH"] == os.environ["PATH"] and dict(os.environ) == before


def test_a_repository_can_be_made_without_a_client(hub: HubServer) -> None:
    """``add_repo`` is what a test uses that only wants to load."""
    repo = hub.add_repo("tester/seed", {"a.txt": b"a"}, kind="datasets", private=True)
    assert isinstance(repo, Repo) and hub.repos["datasets/tester/seed"] is repo
    assert repo.files == {"a.txt": b"a"} and repo.private
