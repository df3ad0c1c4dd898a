"""Write the small data sets and new models that the recipes beside this file read, all without the Hub.

    python examples/recipes/prepare.py                # all of them, into data/recipes
    python examples/recipes/prepare.py digits guides

digits   scans of handwritten digits (scikit-learn's), as a folder of images by class
guides   the pages of this project's documentation, as texts for a language model
casing   their sentences in lower case, and for every word how it is really written
spans    their paragraphs, with a question for the sentence that begins with certain words
repair   their sentences without capitals and punctuation, and as they are
tones    made-up sounds of four wave forms, since no recordings come with Python
"""

from __future__ import annotations

import argparse
import json
import random
import re
import wave
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    ByT5Tokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
)

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEST_SHARE = 5
RATE = 8_000


def digits(folder: Path) -> None:
    """Write images by class, and a ViT that has learned nothing yet."""
    data = load_digits()
    for place, (pixels, label) in enumerate(zip(data.images, data.target, strict=True)):
        target = folder / "images" / split_of(place) / str(label) / f"{place}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype("uint8")).save(target)
    sizes = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384}
    ViTConfig(image_size=8, patch_size=2, initializer_range=0.06, **sizes).save_pretrained(folder / "vit")
    size = {"height": 8, "width": 8}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "vit")


def guides(folder: Path) -> None:
    """Write texts, and a GPT-2 that reads bytes."""
    for name, text in pages().items():
        target = folder / "texts" / f"{name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    tokenizer = ByT5Tokenizer()
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    GPT2Config(n_embd=128, n_layer=4, n_head=4, n_positions=256, **tokens).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")


def casing(folder: Path) -> None:
    """Write words and how they are written, and a BERT."""

    def tag(word: str) -> str:
        return "capitals" if word.isupper() and len(word) > 1 else "capital" if word[0].isupper() else "small"

    rows = [
        {"tokens": [word.lower() for word in words], "tags": [tag(word) for word in words]} for words in sentences()
    ]
    write_rows(folder, rows)
    small_bert(folder, (" ".join(row["tokens"]) for row in rows))


def spans(folder: Path) -> None:
    """Write questions, contexts and answers, and a BERT."""
    rows = []
    for text in paragraphs():
        for found in re.finditer(r"[A-Z][^.]{40,200}\.", text):
            begin = " ".join(found.group().split()[:3])
            answers = {"text": [found.group()], "answer_start": [found.start()]}
            rows.append({"question": f"what follows {begin}?", "context": text, "answers": answers})
    write_rows(folder, rows)
    small_bert(folder, (row["context"] for row in rows))


def repair(folder: Path) -> None:
    """Write sources and targets, and a T5."""
    rows = []
    for words in sentences():
        target = " ".join(words)
        rows.append({"source": " ".join(re.findall(r"\w+", target.lower())), "target": target})
    write_rows(folder, rows)
    tokenizer = trained_tokenizer((text for row in rows for text in row.values()), folder / "model")
    sizes = {"d_model": 96, "d_kv": 24, "d_ff": 256, "num_layers": 4, "num_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    T5Config(**sizes, **tokens).save_pretrained(folder / "model")


def tones(folder: Path) -> None:
    """Write sounds by class, and a wav2vec 2.0."""
    generator = np.random.default_rng(0)
    time = np.arange(RATE // 2) / RATE
    for place in range(200):
        phase = 2 * np.pi * (generator.uniform(200, 800) * time + generator.uniform())
        saw = (phase / np.pi) % 2 - 1
        forms = {"sine": np.sin(phase), "square": np.sign(np.sin(phase)), "saw": saw, "noise": 0 * saw}
        name = list(forms)[place % 4]
        sound = 0.5 * forms[name] + generator.normal(0, 0.05 if name != "noise" else 0.3, len(time))
        target = folder / "sounds" / split_of(place // 4) / name / f"{place}.wav"
        target.parent.mkdir(parents=True, exist_ok=True)
        with wave.open(str(target), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
            file.writeframes((sound.clip(-1, 1) * 32767).astype("<i2").tobytes())
    sizes: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 96, "conv_dim": (32, 32, 32), "conv_stride": (5, 4, 4), "conv_kernel": (10, 8, 4)}
    sizes |= {"num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    Wav2Vec2Config(**sizes, classifier_proj_size=48, apply_spec_augment=False).save_pretrained(folder / "model")
    Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(folder / "model")


def pages() -> dict[str, str]:
    """Return the documentation by name."""
    found = sorted(DOCS.rglob("*.md"))
    return {"-".join(page.relative_to(DOCS).with_suffix("").parts): page.read_text(encoding="utf-8") for page in found}


def paragraphs() -> list[str]:
    """Return the documentation's paragraphs of prose."""
    found = [" ".join(part.split()) for text in pages().values() for part in text.split("\n\n")]
    return [text for text in found if text[:1].isalpha() and len(text) > 80]


def sentences() -> list[list[str]]:
    """Return their sentences as words, in an order by chance."""
    found = [part.split() for text in paragraphs() for part in re.split(r"(?<=[.:]) ", text)]
    kept = [words for words in found if 5 <= len(words) <= 40]
    random.Random(0).shuffle(kept)
    return kept


def split_of(place: int) -> str:
    """Return the split of a row."""
    return "test" if place % TEST_SHARE == 0 else "train"


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, a file for each split."""
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps(row) for place, row in enumerate(rows) if split_of(place) == split]
        (folder / "rows" / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def small_bert(folder: Path, texts: Iterable[str]) -> None:
    """Write a BERT that has learned nothing yet, and a tokenizer of the texts."""
    tokenizer = trained_tokenizer(texts, folder / "model")
    sizes = {"hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 384}
    BertConfig(vocab_size=len(tokenizer), initializer_range=0.06, **sizes).save_pretrained(folder / "model")


def trained_tokenizer(texts: Iterable[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train a tokenizer of 2,000 pieces of words on texts, and write it."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2_000, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "eos_token": "[SEP]",
    }
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **marks)
    made.save_pretrained(folder)
    return made


PARTS: dict[str, Callable[[Path], None]] = {
    part.__name__: part for part in (digits, guides, casing, spans, repair, tones)
}


def main() -> None:
    """Write the parts that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; default: all")
    parser.add_argument("--output_dir", type=Path, default=Path("data/recipes"), help="default: data/recipes")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    for name in options.parts or PARTS:
        PARTS[name](options.output_dir / name)
        print(f"{name}: {options.output_dir / name}")


if __name__ == "__main__":
    main()
