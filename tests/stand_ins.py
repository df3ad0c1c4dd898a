"""Tiny models and data on disk, which take the place of those that README.md and docs name on the Hub."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

try:  # the one that needs no torchvision
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before transformers 5.4
    from transformers import ViTImageProcessor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "good", "bad", "film", "a"]


def save(folder: Path, auto: type, config: PreTrainedConfig, words: list[str]) -> None:
    """Save a new model and, where it reads text, a tokenizer that knows the words."""
    auto.from_config(config).save_pretrained(folder)
    if words:
        vocabulary = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "[UNK]"))
        vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "<|endoftext|>", "model_max_length": 32}
        PreTrainedTokenizerFast(tokenizer_object=vocabulary, **special).save_pretrained(folder)


def bert(folder: Path, words: list[str] = WORDS) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 12}
    save(folder, AutoModelForSequenceClassification, BertConfig(vocab_size=len(words), **sizes), words)


def other_bert(folder: Path) -> None:
    bert(folder, [*WORDS[:6], "very", *WORDS[6:]])


def gpt2(folder: Path) -> None:
    config = GPT2Config(vocab_size=len(WORDS), n_embd=24, n_layer=2, n_head=2, n_positions=32)
    save(folder, AutoModelForCausalLM, config, WORDS)


def vit(folder: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = ViTConfig(image_size=16, patch_size=8, num_labels=10, **sizes)
    save(folder, AutoModelForImageClassification, config, [])
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def wav2vec2(folder: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C"]
    config = Wav2Vec2Config(vocab_size=len(letters), conv_dim=[16] * 7, num_conv_pos_embedding_groups=4, **sizes)
    save(folder, AutoModelForCTC, config, [])
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(vocabulary))).save_pretrained(folder)


def sounds(folder: Path) -> None:
    folder.mkdir()
    generator = np.random.default_rng(0)
    tracks = [{"array": generator.normal(size=8000 + 900 * n).tolist(), "sampling_rate": 16000} for n in range(4)]
    Dataset.from_dict({"audio": tracks, "text": ["A B", "C", "BA", "C A"]}).to_parquet(folder / "validation.parquet")


def sentences(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 6), ("validation", 4)):
        rows = [f"a {'good' if index % 2 else 'bad'} film,{index % 2}" for index in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]))


def pictures(folder: Path) -> None:
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    rows = {"img": [Picture.fromarray(entry) for entry in pixels], "label": list(range(8))}
    features = Features({"img": Image(), "label": ClassLabel(num_classes=10)})
    Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")


def reviews(path: Path) -> None:
    """Write a table of texts."""
    rows = [f"a {'good' if index % 2 else 'bad'} film,{'yes' if index % 2 else 'no'}" for index in range(20)]
    path.write_text("\n".join(["review,verdict", *rows]))


def articles(folder: Path) -> None:
    folder.mkdir()
    for split in ("train", "validation"):
        (folder / f"{split}.csv").write_text("\n".join(["text", *["a good film a bad film" for _ in range(12)]]))


def photos(folder: Path) -> None:
    """Write images by class."""
    generator = np.random.default_rng(0)
    for index in range(20):
        place = folder / ("cat" if index % 2 else "dog") / f"{index}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Picture.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place)


STAND_INS: dict[str, Callable[[Path], None]] = {
    "textattack/bert-base-uncased-SST-2": bert,
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english": bert,
    "textattack/roberta-base-SST-2": other_bert,
    "stanfordnlp/sst2": sentences,
    "google-bert/bert-base-uncased": bert,
    "distilbert/distilbert-base-uncased": bert,
    "google/vit-base-patch16-224-in21k": vit,
    "Salesforce/wikitext": articles,
    "openai-community/gpt2": gpt2,
    "distilbert/distilgpt2": gpt2,
    "nateraw/vit-base-patch16-224-cifar10": vit,
    "uoft-cs/cifar10": pictures,
    "facebook/wav2vec2-base-960h": wav2vec2,
    "hf-internal-testing/librispeech_asr_dummy": sounds,
}


def with_stand_ins(code: str, folder: Path) -> str:
    """Return code with every name of the Hub replaced by a folder that is made for it."""
    for name, make in STAND_INS.items():
        if f'"{name}"' in code:
            place = folder / name.replace("/", "--")
            if not place.exists():
                make(place)
            code = code.replace(f'"{name}"', repr(str(place)))
    return code


def recipe_with_stand_ins(code: str, folder: Path) -> str:
    """Return a recipe in which every name is replaced by a folder or file that is made for it."""
    for name, make in {**STAND_INS, "reviews.csv": reviews, "photos": photos}.items():
        value = re.compile(rf"(?<=: ){re.escape(name)}(?=\s)")
        if value.search(code):
            place = folder / "made" / name.replace("/", "--")
            place.parent.mkdir(exist_ok=True)
            make(place)
            code = value.sub(str(place), code)
    # What is made has no configurations.
    return "".join(line for line in code.splitlines(keepends=True) if not line.startswith("dataset_config:"))
