"""Write the small real data sets and new models of the recipes beside this file, all without the Hub.

    python examples/recipes/prepare.py                # all of them, into data/recipes
    python examples/recipes/prepare.py digits

digits: scikit-learn's scans of handwritten digits, as a folder of images by class.
guides: this project's own documentation, as texts for a language model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from transformers import ByT5Tokenizer, GPT2Config, ViTConfig, ViTImageProcessor

ROOT = Path(__file__).resolve().parents[2]
TEST_SHARE = 5


def digits(folder: Path) -> None:
    """Write the digits, and a ViT that has learned nothing yet."""
    data = load_digits()
    for place, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        split = "test" if place % TEST_SHARE == 0 else "train"
        target = folder / "images" / split / str(label) / f"{place}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(target)
    sizes = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384}
    ViTConfig(image_size=8, patch_size=2, initializer_range=0.06, **sizes).save_pretrained(folder / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "vit")


def guides(folder: Path) -> None:
    """Write the documentation's pages, and a GPT-2 that reads bytes."""
    for page in sorted((ROOT / "docs").rglob("*.md")):
        target = (
            folder / "texts" / f"{page.relative_to(ROOT / 'docs').with_suffix('').as_posix().replace('/', '-')}.txt"
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    tokenizer = ByT5Tokenizer()
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    GPT2Config(n_embd=128, n_layer=6, n_head=4, n_positions=256, **tokens).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")


PARTS = {"digits": digits, "guides": guides}


def main() -> None:
    """Write the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--output_dir", type=Path, default=Path("data/recipes"))
    options = parser.parse_args()
    for name in options.parts or PARTS:
        PARTS[name](options.output_dir / name)
        print(f"{name}: {options.output_dir / name}")


if __name__ == "__main__":
    main()
