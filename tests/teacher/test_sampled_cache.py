"""Training causal language models on sampled cached logits: the same again, small, and close to whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from makers import bert_tokens, config, gpt2, texts
from resuming import Stop
from tiny import fit, sentences, tokenizer
from transformers import DataCollatorForLanguageModeling, GPT2Config, GPT2LMHeadModel

from hf_semckd import DistillationTrainer
from hf_semckd.errors import ConfigurationError
from hf_semckd.teacher.cache.draws import drawn_logits

NEXT = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
DRAWS = 4


class FewIds:
    """What tells of a tokenizer how many ids it gives out."""

    def get_vocab(self) -> dict[str, int]:
        return {f"w{number}": number for number in range(40)}


def made(folder: Path, teacher: Any = None, **args: Any) -> DistillationTrainer:
    """Return a trainer of a GPT-2 by logits alone, with a cache of drawn tokens."""
    parts = {name: args.pop(name) for name in ("model", "train_dataset", "processing_class") if name in args}
    settings = {
        "teacher_cache_dir": str(folder / "cache"),
        "teacher_cache_samples": DRAWS,
        "feature_weight": 0.0,
        "logging_steps": 1,
        "num_train_epochs": 2,
        "max_steps": -1,
        "per_device_train_batch_size": 4,
        **args,
    }
    return DistillationTrainer(
        args=config(folder / "out", **settings),
        teacher_model=gpt2(3, 24, seed=9) if teacher is None else teacher,
        data_collator=NEXT,
        **{"model": gpt2(), "train_dataset": sentences(14, "none"), **parts},
    )


def losses(trainer: DistillationTrainer, name: str = "logit_loss", **how: Any) -> list[float]:
    fit(trainer, **how)
    return [row[name] for row in trainer.state.log_history if name in row]


def stored(trainer: DistillationTrainer) -> list[dict[str, torch.Tensor]]:
    """Return the cached rows of the training data."""
    cache = trainer.pair.teacher.cache
    cache.store.refresh()
    rows = [cache.store.read(cache.keys(NEXT([row])))[0] for row in trainer.train_dataset]
    return [row for row in rows if row is not None]


# ---- The same again ------------------------------------------------------------------------------------------------


def test_a_full_cache_gives_the_losses_of_the_run_that_filled_it_without_the_teacher(tmp_path):
    first, ran = losses(made(tmp_path)), []
    again = made(tmp_path)
    again.teacher.register_forward_hook(lambda *_: ran.append(1))
    assert losses(again) == first and len(first) == 8 and not ran
    assert len(stored(again)) == 14


def test_a_resumed_training_is_the_one_that_was_not_stopped(tmp_path):
    once = losses(made(tmp_path / "once", save_strategy="no"))
    saving = {"save_strategy": "steps", "save_steps": 4}
    half = made(tmp_path / "twice", **saving)
    half.add_callback(Stop(4))
    fit(half)
    resumed = made(tmp_path / "twice", **saving)
    found = losses(resumed, resume_from_checkpoint=str(tmp_path / "twice" / "out" / "checkpoint-4"))
    assert resumed.state.global_step == 8 and found == once


def test_draws_depend_on_the_sample_and_not_on_its_batch(tmp_path):
    alone, together = (made(tmp_path / str(size), per_device_train_batch_size=size) for size in (1, 7))
    rows = []
    for trainer in (alone, together):
        trainer.fill_teacher_cache()
        rows.append(stored(trainer))
    assert len(rows[0]) == len(rows[1]) == 14
    same = [torch.equal(one["drawn|all"], other["drawn|all"]) for one, other in zip(*rows, strict=True)]
    # Rounding differs between batches: a point on the border of two tokens may fall to either.
    assert sum(same) >= 13
    assert not torch.equal(rows[0][0]["drawn|all"][0], rows[0][1]["drawn|all"][0])


# ---- Close to whole logits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_many_draws_the_loss_is_that_of_whole_logits(temperature, tmp_path):
    """The teacher's vocabulary is padded with ids that it likes best, and the student's with others."""
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
    teacher = gpt2(3, 24, seed=9)
    teacher.resize_token_embeddings(64, mean_resizing=False)
    with torch.no_grad():
        # Sure of itself, so that the divergence is large beside the error of the estimate.
        teacher.lm_head.weight.mul_(20)
        teacher.lm_head.weight[40:].mul_(1000)
    start = GPT2LMHeadModel(GPT2Config(vocab_size=48, **sizes)).state_dict()
    found = {}
    for draws in (0, 2000):
        student = GPT2LMHeadModel(GPT2Config(vocab_size=48, **sizes))
        student.load_state_dict(start)
        args = {"teacher_cache_samples": draws, "temperature": temperature}
        trainer = made(tmp_path, teacher, model=student, processing_class=FewIds(), **args)
        found[draws] = losses(trainer)
        assert {name for row in stored(trainer) for name in row} == (
            {"drawn|all", "entropy|all"} if draws else {"logits|all"}
        )
        if draws:
            drawn = [drawn_logits(row["drawn|all"], row["entropy|all"]).ids for row in stored(trainer)]
            assert max(int(ids.max()) for ids in drawn) < 40
    assert found[2000] == pytest.approx(found[0], rel=1e-2)
    assert found[2000] != found[0] and min(found[0]) > 0.1


# ---- Small ---------------------------------------------------------------------------------------------------------


def test_a_token_of_a_large_vocabulary_takes_at_most_120_bytes_on_the_disk(tmp_path, caplog):
    """By default, all that the folder holds counted; 50,000 whole logits in half precision take 100,000 bytes."""
    sizes = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2}
    teacher, student = (GPT2LMHeadModel(GPT2Config(vocab_size=50_000, **sizes)) for _ in range(2))
    rows = [{"input_ids": torch.randint(3, 50_000, (64,)).tolist(), "attention_mask": [1] * 64} for _ in range(8)]
    caplog.set_level("INFO", "hf_semckd")
    trainer = made(tmp_path, teacher, model=student, train_dataset=rows, teacher_cache_samples=None)
    assert trainer.fill_teacher_cache() == 8
    assert "32 stratified draws of 50000 ids at 1.0" in caplog.text
    assert trainer.distillation.settings["teacher_cache_samples"] == 32
    size = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert size / (8 * 64) <= 120


@pytest.mark.parametrize(("vocabulary", "names"), [(60, {"logits|all"}), (61, {"drawn|all", "entropy|all"})])
def test_logits_that_take_no_more_stay_whole(vocabulary, names, tmp_path):
    sizes = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 2}
    teacher, student = (GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes)) for _ in range(2))
    trainer = made(tmp_path, teacher, model=student, teacher_cache_samples=None)
    trainer.fill_teacher_cache()
    assert {name for row in stored(trainer) for name in row} == names


# ---- Not mixed up, and refused -------------------------------------------------------------------------------------


def test_every_way_of_keeping_logits_has_a_cache_of_its_own(tmp_path):
    for changes in ({}, {"teacher_cache_samples": 0}, {"teacher_cache_samples": 5}, {"temperature": 2.0}, {}):
        made(tmp_path, **changes)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.name != "sources"]) == 4


def test_samples_of_other_logits_are_refused(tmp_path):
    args = config(tmp_path, teacher_cache_dir=str(tmp_path / "cache"), teacher_cache_samples=8)
    with pytest.raises(ConfigurationError, match="single causal language model") as refused:
        DistillationTrainer(
            bert_tokens(), args, teacher_model=bert_tokens(layers=3), train_dataset=texts(8, labels="token")
        )
    assert "task tokens" in str(refused.value)


def test_samples_of_several_teachers_are_refused_and_by_default_they_are_whole(tmp_path):
    several = [gpt2(3, 24, seed=9), gpt2(2, 24, seed=8)]
    with pytest.raises(ConfigurationError, match="several teachers"):
        made(tmp_path, several)
    trainer = made(tmp_path, several, teacher_cache_samples=None)
    assert all(teacher.cache.sampling is None for teacher in trainer.pair.cached_teachers)
