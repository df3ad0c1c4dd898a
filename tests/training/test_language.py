"""Losses of language models without all logits at once: the same training as with them, where that can be proven."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from makers import VOCABULARY, Samples, assert_same_weights, config, gpt2, losses, traces, weights
from tiny import tokenizer
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
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_semckd import DistillationTrainer
from hf_semckd.errors import TeacherOutputError
from hf_semckd.training.language import find_language_distillation

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


@pytest.mark.parametrize(
    "changes",
    [
        {"feature_weight": 1.0},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"max_grad_norm": 0.01},
    ],
    ids=str,
)
def test_with_features_accumulation_checkpointing_and_clipping_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    parts = {"feature_loss": "semckd"} if "feature_weight" in changes else {}
    trainer = compare(tmp_path, "llama", parts=parts, **changes)
    assert bool(losses(trainer, "feature_loss")) == bool(parts)


@pytest.mark.parametrize("columns", [["input_ids"], ["input_ids", "attention_mask"]])
def test_without_labels_every_token_counts_that_is_no_padding(tmp_path: Path, columns: list[str]) -> None:
    rows = Samples([{name: row[name] for name in columns} for row in texts().rows])
    trainer = compare(tmp_path, "gpt2", parts={"train_dataset": rows}, task_weight=0.0)
    assert not losses(trainer, "task_loss") and losses(trainer, "logit_loss")[0] > 0


def test_packed_documents_are_not_predicted_across(tmp_path: Path) -> None:
    places = torch.tensor([0, 1, 2, 3, 0, 1, 2, 0, 1])
    rows = Samples([{"input_ids": row["input_ids"].clamp(min=3), "position_ids": places} for row in texts().rows])
    compare(tmp_path, "llama", parts={"train_dataset": rows}, task_weight=0.0)


def test_a_batch_without_a_label_teaches_nothing(tmp_path: Path) -> None:
    rows = Samples([{**row, "labels": torch.full_like(row["labels"], -100)} for row in texts().rows])
    trainer = compare(tmp_path, "gpt2", parts={"train_dataset": rows})
    assert losses(trainer, "task_loss") == [0.0] * 3


def test_vocabularies_of_different_padding_are_compared_where_both_have_tokens(tmp_path: Path) -> None:
    models = {"model": llama(vocab_size=VOCABULARY + 8), "teacher_model": llama(vocab_size=VOCABULARY + 3, seed=9)}
    trainers = []
    for size in (5, 0):
        parts = {**{name: copy.deepcopy(model) for name, model in models.items()}, "processing_class": tokenizer()}
        trainers.append(trained(tmp_path, "llama", size, parts=parts))
    assert trainers[0].distillation.plan.language.vocabulary == VOCABULARY
    assert_same_training(*trainers)


def test_in_mixed_precision_chunks_are_as_near_as_half_precision_is(tmp_path: Path) -> None:
    fused, dense = (trained(tmp_path, "llama", size, bf16=True, logging_steps=1) for size in (5, 0))
    assert is_fused(fused)
    assert losses(fused)[0] == pytest.approx(losses(dense)[0], rel=1e-5)
    assert_same_training(fused, dense, tolerance=5e-3)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_an_adapter_trains_the_same_and_one_on_the_head_needs_all_logits(
    tmp_path: Path, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(5)
        return peft.get_peft_model(llama(), peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False))

    fused, dense = (trained(tmp_path, "llama", size, parts={"model": adapted()}) for size in (5, 0))
    assert is_fused(fused) == (target != "lm_head")
    assert ("no plain linear layer" in caplog.text) == (target == "lm_head")
    # An adapter's random start multiplies rounding.
    assert_same_training(fused, dense, tolerance=5e-6)


def test_a_loss_that_is_more_than_cross_entropy_needs_all_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A mixture of experts adds a loss of its router."""
    routed = {"num_local_experts": 2, "num_experts_per_tok": 1}
    choices: list[dict[str, Any]] = [
        {"output_router_logits": True},
        # Less than what proving the loss can tell.
        {"output_router_logits": True, "router_aux_loss_coef": 1e-5},
        {"output_router_logits": False},
    ]
    models = [made(MixtralForCausalLM, MixtralConfig, **routed, **chosen) for chosen in choices]
    for model, fused in zip(models, (False, False, True), strict=True):
        parts = {"model": model, "teacher_model": llama(seed=9)}
        assert is_fused(trained(tmp_path, "llama", 5, parts=parts, max_steps=1)) == fused
    said = [record.message for record in caplog.records if "computed at once" in record.message]
    assert len(said) == 2 and all("adds a loss of its router" in text for text in said)


class Capped(LlamaForCausalLM):
    """Caps its logits, far above those of a new model, and has no setting that tells."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        logits = 20 * torch.tanh(super().forward(input_ids, attention_mask).logits / 20)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=VOCABULARY)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def odd(kind: str) -> Any:
    """Return a student whose logits are made in a way that cannot be known."""
    if kind == "cap":
        return made(Capped, LlamaConfig)
    student = llama()
    if kind == "layers":
        student.lm_head = torch.nn.Sequential(student.lm_head)
    elif kind == "hook":
        student.lm_head.register_forward_hook(lambda _, __, output: output + 1)
    else:
        weight = student.lm_head.weight
        student.lm_head.forward = lambda states: torch.nn.functional.linear(states, weight) + 1
    return student


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cap", "what it does to the outputs of its output layer is not known"),
        ("layers", "no plain linear layer"),
        ("hook", "was replaced"),
        ("forward", "was replaced"),
    ],
)
def test_where_it_is_not_certain_all_logits_are_computed(
    tmp_path: Path, kind: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trained(tmp_path, "llama", 5, parts={"model": odd(kind)}, task_weight=0.0, max_steps=1)
    assert not is_fused(trainer) and "of the student" in caplog.text and said in caplog.text


@pytest.mark.parametrize(
    ("changes", "parts", "said"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label smoothing"),
        ({}, {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.sum() * 0.0}, "_func"),
        ({"teacher_cache_dir": "cache"}, {}, "teacher cache"),
        ({}, {"teacher_model": [gpt2(seed=8), gpt2(seed=9)]}, "several teachers"),
        ({"teacher_compile": True}, {}, "compiled"),
    ],
    ids=["smoothing", "own loss", "cache", "teachers", "compiled"],
)
def test_what_needs_all_logits_gets_them_and_says_so(
    tmp_path: Path, changes: dict[str, Any], parts: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {**changes, **({"teacher_cache_dir": str(tmp_path / "cache")} if "teacher_cache_dir" in changes else {})}
    models = {"model": gpt2(), "teacher_model": gpt2(3, 24, seed=9), "train_dataset": texts()}
    args = config(tmp_path, **{**STEP, "logit_chunk_size": 5, "feature_weight": 0.0, **changes})
    assert not is_fused(DistillationTrainer(args=args, **{**models, **parts}))
    assert said in caplog.text and caplog.text.count("computed at once") == 1


@pytest.mark.parametrize(("limit", "fused"), [(VOCABULARY, True), (VOCABULARY + 1, False)])
def test_a_large_vocabulary_is_cut_into_chunks_by_itself(
    tmp_path: Path, limit: int, fused: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_semckd.training.language.LARGE_VOCABULARY", limit)
    trainer = trained(tmp_path, "gpt2", None, max_steps=1)
    assert is_fused(trainer) == fused and "computed at once" not in caplog.text


def test_heads_that_may_be_sharded_need_all_logits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = trained(tmp_path, "gpt2", 5, max_steps=1).distillation
    services = dataclasses.replace(found.objective.services, shards=True)
    batch, args = texts().rows[0], config(tmp_path, logit_chunk_size=5)
    assert find_language_distillation(found.pair, found.plan, batch, VOCABULARY, args, services) is None
    assert "FSDP and DeepSpeed may shard the heads" in caplog.text


def test_models_with_a_large_vocabulary_are_tried_on_short_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_semckd.training.language.LARGE_VOCABULARY", VOCABULARY)
    monkeypatch.setattr("hf_semckd.training.language.TRIED_TOKENS", 4)
    student, seen = llama(), []
    student.model.embed_tokens.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    args = config(tmp_path, **STEP, feature_weight=0.0)
    parts: dict[str, Any] = {"args": args, "model": student, "teacher_model": llama(seed=9)}
    trainer = DistillationTrainer(**parts, train_dataset=texts())
    assert {*seen} == {4} and is_fused(trainer)
    seen.clear()
    padded = Samples([{**row, "attention_mask": row["attention_mask"].flip(0)} for row in texts().rows[1:]])
    DistillationTrainer(**parts, train_dataset=padded)
    assert {*seen} == {9}, "padding in front is not cut off"


def test_no_tensor_of_all_logits_is_made(tmp_path: Path) -> None:
    """Neither model's head answers for more than one position a sample, but for what the chunks are made of."""
    trainer = trained(tmp_path, "gpt2", 5, max_steps=1)
    seen: list[torch.Size] = []
    for model in (trainer.student, trainer.teacher):
        model.lm_head.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    trainer.train()
    assert seen and {shape[1] for shape in seen} == {1}


def test_with_outputs_the_loss_is_that_of_all_logits(tmp_path: Path) -> None:
    found: list[tuple[float, float, Any]] = []

    class Both(DistillationTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, *args: Any, **kwargs: Any
        ) -> Any:
            fused = super().compute_loss(model, inputs)
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            found.append((float(fused.detach()), float(loss.detach()), outputs.logits.shape))
            return fused

    args = config(tmp_path, **STEP, logit_chunk_size=5)
    trainer = Both(args=args, model=gpt2(), teacher_model=gpt2(3, 24, seed=9), train_dataset=texts())
    trainer.train()
    assert is_fused(trainer) and len(found) == 3
    for fused, dense, shape in found:
        assert fused == pytest.approx(dense, rel=1e-6) and shape == (2, 9, VOCABULARY)


def test_neither_model_keeps_a_trace(tmp_path: Path) -> None:
    student, teacher = llama(), llama(seed=9)
    before = traces(student), traces(teacher.eval())
    parts = {"model": student, "teacher_model": teacher}
    trainer = trained(tmp_path, "llama", 5, parts=parts)
    assert is_fused(trainer)
    assert (traces(student.eval()), traces(teacher)) == (before[0], before[1])


def test_evaluation_and_saving_are_the_plain_students(tmp_path: Path) -> None:
    parts = {"eval_dataset": texts()}
    trainer = trained(tmp_path, "llama", 5, parts=parts, save_strategy="steps", save_steps=2)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert plain.num_parameters() == trainer.student.num_parameters()
    resumed = DistillationTrainer(
        args=config(tmp_path, **STEP, logit_chunk_size=5, feature_weight=0.0),
        model=llama(),
        teacher_model=llama(layers=3, width=24, seed=9),
        train_dataset=texts(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_weights(weights(resumed.student), weights(trainer.student))
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(texts(count=2)).predictions.shape == (2, 9, VOCABULARY)


def test_a_broken_teacher_is_named(tmp_path: Path) -> None:
    teacher = llama(seed=9)
    args = config(tmp_path, **STEP, logit_chunk_size=5, feature_weight=0.0)
    trainer = DistillationTrainer(args=args, model=llama(), teacher_model=teacher, train_dataset=texts())
    teacher.lm_head.weight.data[3] = float("nan")
    with pytest.raises(TeacherOutputError, match="(?s)logits are not finite.*batch index 0"):
        trainer.train()
