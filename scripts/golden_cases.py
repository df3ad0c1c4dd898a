"""What `golden_runs.py` trains: tiny models and data, made from configurations and seeds, and the table of runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

PROCESSES = 2
CLASSES, WORDS, LONGEST, PIXELS, PATCH = 3, 40, 28, 48, 8
# Of random weights: the usual 0.02 leaves all samples of an untrained transformer alike.
SPREAD = 0.3
# What each column of a text is padded with.
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}
STUDENT, TEACHER = {"seed": 1, "layers": 2, "width": 16}, {"seed": 2, "layers": 3, "width": 24}


class Family(NamedTuple):
    """A student, its teacher and what they train on; every function makes a new, equal object."""

    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    rows: Callable[[], list[dict[str, Any]]]


def build(head: Any, kind: str, seed: int, **settings: Any) -> nn.Module:
    """Return a float32 model of a configuration with random weights of a seed."""
    torch.manual_seed(seed)
    return head.from_config(AutoConfig.for_model(kind, **settings))


def transformer(head: Any, kind: str, seed: int, layers: int, width: int, **changes: Any) -> nn.Module:
    """Return a BERT or ViT with two attention heads and dropout."""
    own = {"vocab_size": WORDS, "max_position_embeddings": LONGEST, "pad_token_id": 0}
    shared = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "num_labels": CLASSES}
    shared |= {"intermediate_size": 2 * width, "hidden_dropout_prob": 0.1, "initializer_range": SPREAD}
    settings = {**(own if kind == "bert" else {"image_size": PIXELS, "patch_size": PATCH}), **shared, **changes}
    return build(head, kind, seed, **settings)


def gpt2(seed: int, layers: int, width: int) -> nn.Module:
    """Return a GPT-2 with dropout."""
    sizes = {"vocab_size": WORDS, "n_positions": LONGEST, "n_embd": width, "n_layer": layers, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return build(AutoModelForCausalLM, "gpt2", seed, **sizes, **tokens, initializer_range=SPREAD)


def resnet(seed: int, widths: tuple[int, ...]) -> nn.Module:
    """Return a ResNet with one basic block a stage; maps of 12, 6, 3 and 2 rows."""
    sizes = {"embedding_size": 6, "hidden_sizes": list(widths), "depths": [1] * len(widths), "layer_type": "basic"}
    return build(AutoModelForImageClassification, "resnet", seed, **sizes, num_labels=CLASSES)


class Plain(nn.Module):
    """A convolutional network that transformers knows nothing of, with layers `stem` and `body`."""

    def __init__(self, seed: int, width: int):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.body = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.body(self.stem(pixel_values).relu()).relu().mean((2, 3)))


def texts(kind: str) -> list[dict[str, Any]]:
    """Return 13 texts of 3 to 28 tokens: in batches of four, the last one is a text alone.

    Args:
        kind: Of the labels: `single` (a class a text), `multi` (0 or 1 for each class), `number`, `token` (a class a
            token, every third one ignored) or `next` (the text itself).
    """
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(13):
        length = 3 + (11 * index + 7) % (LONGEST - 2)
        ids = torch.randint(3, WORDS, (length,), generator=generator)
        classes = torch.randint(CLASSES, (length,), generator=generator)
        number = torch.randn((), generator=generator)
        labels = {
            "single": classes[0],
            "multi": (torch.arange(CLASSES) <= classes[0]).float(),
            "number": number,
            "token": classes.where(torch.arange(length) % 3 > 0, -100),
            "next": ids,
        }[kind]
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def images() -> list[dict[str, Any]]:
    """Return 14 images of random patches with a class each: in batches of four, the last one has two."""
    generator = torch.Generator().manual_seed(3)
    side = PIXELS // PATCH
    patches = torch.randn(14, 3, side, side, generator=generator) * torch.linspace(0.5, 2, 14).view(-1, 1, 1, 1)
    pixels = F.interpolate(patches, PIXELS) + 0.1 * torch.randn(14, 3, PIXELS, PIXELS, generator=generator)
    classes = torch.randint(CLASSES, (14,), generator=generator)
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, classes, strict=True)]


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch, with texts padded to the longest one."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=FILL[name])
        if name in FILL and values[0].dim() == 1
        else torch.stack(values)
        for name, values in columns.items()
    }


def _text(head: Any, labels: str, **changes: Any) -> Family:
    return Family(
        lambda: transformer(head, "bert", **STUDENT, **changes),
        lambda: transformer(head, "bert", **TEACHER, **changes),
        lambda: texts(labels),
    )


def _vit(size: dict[str, int]) -> nn.Module:
    return transformer(AutoModelForImageClassification, "vit", **size)


_SENTENCE = AutoModelForSequenceClassification
FAMILIES = {
    "text": _text(_SENTENCE, "single"),
    "multi_label": _text(_SENTENCE, "multi", problem_type="multi_label_classification"),
    "regression": _text(_SENTENCE, "number", problem_type="regression", num_labels=1),
    "tokens": _text(AutoModelForTokenClassification, "token"),
    "causal": Family(lambda: gpt2(**STUDENT), lambda: gpt2(**TEACHER), lambda: texts("next")),
    "vit": Family(lambda: _vit(STUDENT), lambda: _vit(TEACHER), images),
    "cnn": Family(lambda: resnet(1, (6, 8, 12)), lambda: resnet(2, (8, 8, 12, 16)), images),
    "cnn_vit": Family(lambda: _vit(STUDENT), lambda: resnet(2, (8, 8, 12, 16)), images),
    "vit_cnn": Family(lambda: resnet(1, (6, 8, 12)), lambda: _vit(TEACHER), images),
    "plain": Family(lambda: Plain(1, 6), lambda: Plain(2, 8), images),
}


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        family: Models and data, one of `FAMILIES`.
        args: Changes of the configuration, under the new names.
        method: The feature loss; None for the logits alone.
        published: Whether the configuration is `SemCKDConfig.published`.
        how: `once`; `resumed` from a checkpoint after a crash; or with a teacher cache that is empty (`cached`), was
            filled by an equal run (`full`), or ahead of training (`filled`).
        teacher_folder: Whether the teacher is given as a folder.
        processes: Number of processes.
    """

    family: str
    args: dict[str, Any] = field(default_factory=dict)
    method: str | None = "semckd"
    published: bool = False
    how: str = "once"
    teacher_folder: bool = False
    processes: int = 1


NO_LOGITS, ALONE = {"logit_weight": 0.0}, {"task_weight": 0.0, "logit_weight": 0.0}
LAYERS = {"student_layers": ["stem", "body"], "teacher_layers": ["stem", "body"]}
WHOLE = {"dataloader_drop_last": True}
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1}
METHODS = ("fitnet", "at", "sp", "vid", "pkt", "rkd", "cc", "crd")
RUNS: dict[str, Run] = {
    **{name: Run(name) for name in FAMILIES if name not in ("plain", "causal")},
    # Given: the default of language models has changed since the first recordings.
    "causal": Run("causal", {"temperature": 4.0}),
    "plain": Run("plain", {"label_names": ["labels"], **LAYERS}),
    "published_vit": Run("vit", WHOLE, published=True),
    "published_cnn": Run("cnn", WHOLE, published=True),
    "learned": Run("text", {"association": "learned"}),
    "learned_vit": Run("vit", {"association": "learned"}),
    "uniform": Run("text", {"association": "uniform"}),
    "last": Run("text", {"association": "last"}),
    "one_to_one": Run("vit", {"association": "one_to_one"}),
    "sinkhorn_text": Run("text", {"association": "sinkhorn"}),
    "similarity_cnn": Run("cnn", {"association": "similarity", "association_temperature": 0.1}),
    "relations_text": Run("text", {"relation_weight": 5.0}),
    "no_relations_vit": Run("vit", {"relation_weight": 0.0}),
    "all_tokens": Run("text", {"max_tokens": 0}),
    "all_patches": Run("vit", {"max_tokens": 0}),
    "few_tokens": Run("tokens", {"max_tokens": 3}),
    "whole_grid": Run("cnn", {"max_grid": 0}),
    "whole_grid_vit_cnn": Run("vit_cnn", {"max_grid": 0}),
    "projection_zero": Run("cnn", {"projector": "shared", "projection_init": "zero"}),
    "projection_random": Run("text", {"projection_init": "random", "projection_learning_rate": 0.02}),
    "pairwise": Run("text", {"projector": "pairwise"}),
    "raw_targets": Run("text", {"target_norm": "none"}),
    "chosen_layers": Run("text", {"student_layers": [1, 2], "teacher_layers": [0, 3]}),
    **{f"cached_{family}": Run(family, how="cached") for family in ("text", "cnn", "tokens")},
    **{f"full_{family}": Run(family, how="full") for family in ("text", "cnn", "tokens")},
    "cached_folder": Run("text", how="cached", teacher_folder=True),
    "full_folder": Run("text", how="full", teacher_folder=True),
    "full_half_precision": Run("vit", {"teacher_cache_dtype": "float16"}, how="full"),
    "filled": Run("text", how="filled"),
    "accumulated": Run("text", {"gradient_accumulation_steps": 2}),
    "accumulated_vit": Run("vit", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "adam": Run("text", ADAM),
    "resumed": Run("text", ADAM, how="resumed"),
    "resumed_cnn": Run("cnn", ADAM, how="resumed"),
    "resumed_learned": Run("vit", {"association": "learned", **ADAM}, how="resumed"),
    "resumed_crd": Run("cnn", ADAM, how="resumed", method="semckd+crd"),
    "two_processes": Run("text", processes=PROCESSES),
    "two_processes_cnn": Run("cnn", processes=PROCESSES),
    "two_processes_learned": Run("vit", {"association": "learned"}, processes=PROCESSES),
    "two_processes_filled": Run("text", how="filled", processes=PROCESSES),
    "two_processes_resumed": Run("text", ADAM, how="resumed", processes=PROCESSES),
    **{name: Run("cnn", method=name) for name in METHODS},
    "simkd": Run("cnn", ALONE, method="simkd"),
    **{name: Run("text", method=name) for name in ("pkd", "minilm", "layer_map")},
    **{f"{name}_text": Run("text", method=name) for name in METHODS},
    "semckd_crd": Run("cnn", method="semckd+crd"),
    "kd": Run("text", method=None),
    "kd_tokens": Run("tokens", method=None),
    "feature_only": Run("text", NO_LOGITS),
    "feature_only_cnn": Run("cnn", NO_LOGITS),
    "no_task": Run("text", {"task_weight": 0.0}),
    "no_task_vit": Run("vit", {"task_weight": 0.0}),
    "evaluated": Run("text", {"eval_strategy": "steps", "eval_steps": 2}),
    "evaluated_simkd": Run("cnn", {"eval_strategy": "steps", "eval_steps": 2, **ALONE}, method="simkd"),
    "smoothed": Run("tokens", {"label_smoothing_factor": 0.1}),
    "checkpointed": Run("vit", {"gradient_checkpointing": True}),
    "teacher_bf16": Run("text", {"teacher_dtype": "bfloat16"}),
    "bf16": Run("text", {"bf16": True}),
    "bf16_cnn": Run("cnn", {"bf16": True}),
}
