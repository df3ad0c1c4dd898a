"""Tiny tokenizers, models and data on disk for the tests of recipes, and a quick way to run one."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
    TrainerCallback,
    ViTConfig,
    ViTForImageClassification,
)

from hf_semckd.cli import main
from hf_semckd.cli.distill import defaults
from hf_semckd.evaluation.evaluate import evaluate
from hf_semckd.recipes.progress import Voice
from hf_semckd.recipes.reading import Reading, RecipeParser, read_recipe

try:  # the one that needs no torchvision
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before transformers 5.4
    from transformers import ViTImageProcessor

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIGNS = string.ascii_lowercase + string.digits + string.punctuation
WORDS = ("good", "bad", "odd", "film", "the", "was")
KINDS = ("good", "bad", "odd")
SILENT = Voice(speaks=False)
# A run of a second: no bar, no GPU, two steps.
QUICK = ("--use_cpu", "True", "--max_steps", "2", "--per_device_train_batch_size", "4", "--eval_strategy", "no")


def tokenizer(words: tuple[str, ...] = WORDS, length: int = 32, **changes: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows some words, and spells all others letter by letter."""
    vocabulary = [*SPECIAL, *words, *SIGNS, *(f"##{sign}" for sign in SIGNS)]
    made = Tokenizer(models.WordPiece({word: place for place, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    how = {"model_max_length": length, "model_input_names": names, **marks, **changes}
    return PreTrainedTokenizerFast(tokenizer_object=made, **how)


def bert_config(names: Any = KINDS, layers: int = 2, width: int = 16, **changes: Any) -> BertConfig:
    """Return a configuration for the tokenizer, with classes by name, so many without names, or none of its own."""
    head = {"num_labels": names} if isinstance(names, int) else {"id2label": dict(enumerate(names))}
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(
        vocab_size=len(tokenizer()), max_position_embeddings=32, initializer_range=0.2, **{**sizes, **head, **changes}
    )


def save_bert(folder: Path, names: Any = KINDS, head: Any = BertForSequenceClassification, **changes: Any) -> Path:
    """Save a BERT and its tokenizer."""
    torch.manual_seed(0)
    head(bert_config(names, **changes)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_tagger(folder: Path, names: Any = KINDS, **changes: Any) -> Path:
    """Save a BERT that classifies words, and its tokenizer."""
    return save_bert(folder, names, BertForTokenClassification, **changes)


def save_gpt2(folder: Path, head: Any, length: int = 32, **changes: Any) -> Path:
    """Save a GPT-2 and a tokenizer that neither pads nor begins a text by itself."""
    torch.manual_seed(0)
    made = tokenizer(length=length, pad_token=None, eos_token="[SEP]")
    made.backend_tokenizer.post_processor = processors.Sequence([])
    made.save_pretrained(folder)
    config = GPT2Config(vocab_size=len(made), n_positions=length, n_embd=16, n_layer=2, n_head=2, **changes)
    config.bos_token_id, config.eos_token_id = None, 3
    head(config).save_pretrained(folder)
    return folder


def save_vit(folder: Path, names: Any = KINDS, size: int = 8, layers: int = 2) -> Path:
    """Save a ViT and its processor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=size, patch_size=4, id2label=dict(enumerate(names)), **sizes)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def sentences(count: int) -> list[dict[str, Any]]:
    """Return texts whose class is one of their words."""
    return [{"text": f"the film {place} was {KINDS[place % 3]}", "label": KINDS[place % 3]} for place in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(*words: object, path: object = None) -> Reading:
    """Return what `hf-semckd distill` reads in a recipe and flags."""
    file = None if path is None else str(path)
    return read_recipe(RecipeParser("hf-semckd distill", "", ""), file, [str(word) for word in words], defaults(file))


quick_evaluate = partial(evaluate, memory=False, seconds=0.01, latency_batches=(1,))


class _Stop(TrainerCallback):
    def __init__(self, step: int, how: Callable[[], None]):
        self.step, self.how = step, how

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.how()


def _interrupt() -> None:
    raise KeyboardInterrupt


def interrupt_at(step: int, how: Callable[[], None] = _interrupt) -> Callable[..., None]:
    """Return what takes the place of `use_progress`, and stops a training after a step."""

    def stop(trainer: Any, name: str, voice: Voice) -> None:
        trainer.add_callback(_Stop(step, how))

    return stop


def command(*words: object) -> int:
    """Run `hf-semckd` in this process."""
    return main([str(word) for word in words])
