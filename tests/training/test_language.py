"""Losses of language models without all logits at once: the same training as with them, where that can be proven."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import VOCABULARY, Samples, config, gpt2, losses, weights
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hf_semckd import DistillationTrainer

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def made(model: Any, config_class: Any, layers: int = 2, width: int = 16, seed: int = 0, **changes: Any) -> Any:
    """Return a small causal language model."""
    torch.manual_seed(seed)
    settings = {**SMALL, "hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 2 * width, **changes}
    # Large enough for a cap to show.
    return model(config_class(initializer_range=0.3, **settings))


def llama(**changes: Any) -> Any:
    """Return a Llama, whose head has weights of its own."""
    return made(LlamaForCausalLM, LlamaConfig, **changes)


def gemma2(**changes: Any) -> Any:
    """Return a Gemma 2, which caps its logits."""
    return made(Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=1.5, **changes)


def cohere(**changes: Any) -> Any:
    """Return a Cohere model, which multiplies its logits."""
    return made(CohereForCausalLM, CohereConfig, logit_scale=0.3, **changes)


def granite(**changes: Any) -> Any:
    """Return a Granite, which divides its logits."""
    return made(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0, **changes)


def opt(layers: int = 2, width: int = 16, **changes: Any) -> Any:
    """Return an OPT, whose decoder projects its states before the head."""
    sizes = {"ffn_dim": 2 * width, "word_embed_proj_dim": width // 2, "dropout": 0.0}
    return made(OPTForCausalLM, OPTConfig, layers, width, **sizes, **changes)


MODELS = {"gpt2": gpt2, "llama": llama, "gemma2": gemma2, "cohere": cohere, "granite": granite, "opt": opt}
STEP = {"per_device_train_batch_size": 2, "optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "max_grad_norm": 0.0}


def texts(labeled: str = "some", count: int = 12) -> Samples:
    """Return padded texts; labels for `some` tokens, or `none`, and one text without any."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        ids = torch.randint(3, VOCABULARY, (9,), generator=generator)
        mask = (torch.arange(9) < 9 - index % 4).long()
        row = {"input_ids": ids * mask, "attention_mask": mask}
        if labeled == "some":
            kept = (mask == 1) & (torch.rand(9, generator=generator) < 0.7) & (index not in (4, 5))
            row["labels"] = ids.where(kept, -100)
        rows.append(row)
    return Samples(rows)


def trained(folder: Path, name: str, size: int, *, parts: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Return a trainer after three steps."""
    make = MODELS[name]
    args = config(folder, **{**STEP, "logit_chunk_size": size, "feature_weight": 0.0, **changes})
    models = {"model": make(), "teacher_model": make(layers=3, width=24, seed=9)}
    trainer = DistillationTrainer(args=args, **{**models, "train_dataset": texts(), **(parts or {})})
    trainer.train()
    return trainer


def is_fused(trainer: Any) -> bool:
    return trainer.distillation.plan.language is not None


def assert_same_training(first: Any, second: Any, tolerance: float = 1e-6) -> None:
    """Compare logged terms, and the weights of both students."""
    names = [name for name in ("loss", "task_loss", "logit_loss", "feature_loss") if losses(second, name)]
    for name in names:
        assert losses(first, name) == pytest.approx(losses(second, name), abs=tolerance, rel=tolerance), name
    assert len(losses(first, "loss")) == 3
    others = weights(second.student)
    far = {name: float((value - others[name]).abs().max()) for name, value in weights(first.student).items()}
    assert max(far.values()) < tolerance, far


def compare(folder: Path, name: str, size: int = 5, **changes: Any) -> Any:
    """Train in chunks and densely, compare, and return the first trainer."""
    fused, dense = (trained(folder, name, chosen, **changes) for chosen in (size, 0))
    assert is_fused(fused) and not is_fused(dense)
    assert_same_training(fused, dense)
    return fused


@pytest.mark.parametrize("name", MODELS)
def test_training_is_that_with_all_logits(tmp_path: Path, name: str) -> None:
    compare(tmp_path, name, temperature=2.0, task_weight=0.7, logit_weight=1.3)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_any_chunk_gives_the_same(tmp_path: Path, size: int) -> None:
    compare(tmp_path, "gpt2", size)
