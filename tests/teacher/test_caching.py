"""Training with the teacher cache: the live training's numbers without the teacher, and refusals before it starts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caching_worker import JOBS, STREAMS, count_rows
from caching_worker import SAMPLES as SHARED_SAMPLES
from distributed_worker import ACCUMULATED, read
from launching import WORLD, assert_launched, launch_once
from makers import LABELS, VOCABULARY, Samples, Stream, bert, distilbert, images, vit
from paired import collator as paired_collator
from paired import dataset as paired_dataset
from tiny import (
    PROBLEMS,
    Outcome,
    Problem,
    arguments,
    assert_same,
    by_hand,
    fit,
    outcome,
    pictures,
    sentences,
    tokenizer,
)
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    FunnelConfig,
    FunnelForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
    default_data_collator,
)

from hf_semckd import DistillationTrainer, SemCKDTrainer
from hf_semckd.data.views import RepeatableViews
from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.features.targets import TeacherTargets
from hf_semckd.losses import FeatureLoss
from hf_semckd.losses.base import FeatureLossOutput
from hf_semckd.teacher.cache.cache import CachingCollator

SAMPLES = 14
RATE = "teacher_cache/hit_rate"
# Two epochs of seven batches, shuffled anew in each.
QUICK = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "max_tokens": 5}


class LastMeans(FeatureLoss):
    """A user's loss that keeps the teacher's features as they are."""

    def __init__(self, student: int, teacher: int):
        super().__init__()
        self.projection = nn.Linear(student, teacher)

    def compare(self, student_features: Any, targets: TeacherTargets, student_mask: Any) -> FeatureLossOutput:
        ours = _mean(student_features[-1], student_mask)
        whole = [targets.whole(t) for t in range(len(targets.layers))]
        theirs = torch.stack([_mean(feature, targets.mask) for feature in whole]).mean(0)
        rows = (self.projection(ours) - theirs).square().mean(1)
        return FeatureLossOutput(rows.mean(), rows)


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    mask = torch.ones(tokens.shape[:2]) if mask is None else mask
    # NaN times zero is NaN: padding must be finite, too.
    return (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


def left_padding() -> Any:
    """Return a collator that pads in front."""
    left = tokenizer()
    left.padding_side = "left"
    return DataCollatorWithPadding(left)


def few_lengths(count: int) -> Samples:
    """Return sentences of three lengths: some batches need no padding, others do."""
    rows = sentences(count, "class").rows
    for index, row in enumerate(rows):
        length = 3 + index % 3
        row["input_ids"], row["attention_mask"] = (row["input_ids"] * 2)[:length], [1] * length
    return Samples(rows)


PAIRED = Problem(
    distilbert, partial(bert, 4, 24, seed=9, labels=LABELS), lambda count: paired_dataset(), paired_collator()
)
SENTENCES = PROBLEMS["sentences"]
# What is trained, and changes of the arguments.
CASES: dict[str, tuple[Problem, dict[str, Any]]] = {
    "image": (PROBLEMS["vit"], {}),
    "convolutional": (PROBLEMS["resnet"], {}),
    "convolutional teacher": (PROBLEMS["resnet_vit"], {}),
    "padded text": (SENTENCES, {}),
    "padded text, all tokens": (SENTENCES, {"max_tokens": 0}),
    "padding to a multiple": (
        replace(SENTENCES, collator=DataCollatorWithPadding(tokenizer(), pad_to_multiple_of=4)),
        {},
    ),
    "one text at a time": (SENTENCES, {"per_device_train_batch_size": 1, "association": "uniform"}),
    "left padding": (
        replace(SENTENCES, rows=few_lengths, collator=left_padding()),
        {"per_device_train_batch_size": 2, "num_train_epochs": 3},
    ),
    "token classification": (PROBLEMS["tokens"], {}),
    "causal language model": (PROBLEMS["next_word"], {}),
    "two tokenizers": (PAIRED, {"per_device_train_batch_size": 2}),
    "logits only": (SENTENCES, {"feature_weight": 0.0}),
    "logits of tokens only": (PROBLEMS["tokens"], {"feature_weight": 0.0}),
    "features only": (PROBLEMS["vit"], {"logit_weight": 0.0}),
    "features of text only": (SENTENCES, {"logit_weight": 0.0}),
    "whole features": (replace(SENTENCES, parts={"feature_loss": LastMeans(16, 24)}), {}),
    "learned association": (SENTENCES, {"association": "learned"}),
    "published projections": (SENTENCES, {"projector": "pairwise"}),
    "published": (
        PROBLEMS["vit"],
        {"association": "learned", "target_norm": "none", "projector": "pairwise", "dataloader_drop_last": True},
    ),
    "accumulation": (SENTENCES, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}),
    "worker processes": (SENTENCES, {"dataloader_num_workers": 2}),
}


def make(
    problem: Problem | str, folder: Path, kind: Any = SemCKDTrainer, samples: int = SAMPLES, **args: Any
) -> SemCKDTrainer:
    """Return a shuffling trainer in float64; keywords are changes of the arguments, or parts of the trainer."""
    problem = PROBLEMS[problem] if isinstance(problem, str) else problem
    names = ("model", "teacher_model", "train_dataset", "eval_dataset", "data_collator", "callbacks", "feature_loss")
    parts = {key: args.pop(key) for key in names if key in args}
    parts.setdefault("train_dataset", problem.rows(samples))
    return kind(
        args=arguments(folder / "out", **{"association": "similarity", **QUICK, **problem.args, **args}),
        **{
            "model": problem.student().double(),
            "teacher_model": problem.teacher().double(),
            "data_collator": problem.collator,
            **problem.parts,
            **parts,
        },
    )


def train(problem: Problem | str, folder: Path, **args: Any) -> Outcome:
    """Train a problem and return what came out."""
    trainer = make(problem, folder, **args)
    fit(trainer)
    return outcome(trainer)


def watch(model: nn.Module) -> list[str]:
    """Return a list that grows whenever any part of a model runs."""
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


def stored_bytes(cache: Path) -> int:
    """Return what the rows take on the disk."""
    return sum(path.stat().st_size for path in cache.rglob("*.arrow"))


# ---- Invariant 9: cached == filling == live ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_training_that_fills_the_cache_and_one_that_uses_it_are_the_live_one(case, tmp_path):
    problem, args = CASES[case]
    live = train(problem, tmp_path, **args)
    filling = train(problem, tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **args)
    trainer = make(problem, tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **args)
    ran = watch(trainer.teacher)
    fit(trainer)
    assert not ran, "the teacher ran although everything is there"
    assert_same(filling, live, problem.tolerance)
    assert_same(outcome(trainer), live, problem.tolerance)


def test_padding_differs_between_the_epochs_that_were_compared(tmp_path):
    """Guards the test above: padded text must have met its samples at several widths."""
    widths: dict[int, set[int]] = {}

    def collate(rows: list[dict[str, Any]]) -> Any:
        batch = SENTENCES.collator(rows)
        for row in rows:
            widths.setdefault(hash(tuple(row["input_ids"])), set()).add(batch["input_ids"].shape[1])
        return batch

    train(SENTENCES, tmp_path, data_collator=collate)
    assert sum(len(seen) > 1 for seen in widths.values()) > SAMPLES / 2


@pytest.mark.parametrize("limit", [3, 5, 8])
def test_samples_stored_at_any_width_make_one_batch(limit, tmp_path):
    """Of narrow batches all tokens are chosen, of wide ones some: both kinds of rows meet in the next run."""
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "max_tokens": limit}
    train(SENTENCES, tmp_path, per_device_train_batch_size=1, **cache)
    done = train(SENTENCES, tmp_path, per_device_train_batch_size=7, **cache)
    assert_same(done, train(SENTENCES, tmp_path, per_device_train_batch_size=7, max_tokens=limit))


def test_left_padded_samples_stored_with_and_without_padding_make_one_batch(tmp_path):
    problem, _ = CASES["left padding"]
    cache = {"teacher_cache_dir": str(tmp_path / "cache")}
    # Alone, nothing is padded; together, the longest ones are not either and the others are.
    train(problem, tmp_path, per_device_train_batch_size=1, **cache)
    done = train(problem, tmp_path, per_device_train_batch_size=7, **cache)
    assert_same(done, train(problem, tmp_path, per_device_train_batch_size=7))


# ---- How often the teacher runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 5},
        {"feature_weight": 0.2},
        {"association": "similarity", "temperature": 7.0, "learning_rate": 0.001},
        {"model": vit(seed=77).double()},
        {"model": vit(3, 16, seed=3).double()},
        {"per_device_train_batch_size": 3, "num_train_epochs": 1},
    ],
    ids=["seed", "weight", "rates", "initialization", "deeper student", "batch"],
)
def test_what_the_teacher_does_not_depend_on_finds_a_full_cache(changes, tmp_path):
    train("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"))
    trainer = make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **changes)
    ran = watch(trainer.teacher)
    fit(trainer)
    assert not ran
    assert trainer.state.global_step > 0


def test_the_second_epoch_runs_no_teacher(tmp_path):
    trainer = make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), target_norm="none")
    rows = count_rows(trainer.teacher)
    fit(trainer)
    assert rows == [4, 4, 4, 2], "one epoch of two"


def test_only_the_missing_samples_are_given_to_the_teacher(tmp_path):
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "target_norm": "none", "num_train_epochs": 1}
    rows = pictures(SAMPLES).rows
    train("vit", tmp_path, train_dataset=Samples(rows[::2]), **cache)
    trainer = make("vit", tmp_path, train_dataset=Samples(rows), **cache)
    given = count_rows(trainer.teacher)
    fit(trainer)
    assert sum(given) == SAMPLES // 2
    assert max(given) < 4, "batches of both kinds"
    assert_same(outcome(trainer), train("vit", tmp_path, target_norm="none", num_train_epochs=1))


@pytest.mark.parametrize("norm", ["channel", "none"])
def test_the_log_tells_the_share_that_came_from_the_cache(norm, tmp_path, caplog, capsys):
    """Of two epochs the first runs the teacher on every sample; statistics of teachers read the first step twice."""
    caplog.set_level("INFO", "hf_semckd")
    shown = {"logging_strategy": "epoch", "disable_tqdm": False, "max_steps": -1, "num_train_epochs": 2}
    trainer = make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), target_norm=norm, **shown)
    fit(trainer)
    assert [row[RATE] for row in trainer.state.log_history if RATE in row] == [0.0, 1.0]
    said = f"Teacher cache {str(tmp_path / 'cache')!r}: {SAMPLES} of {2 * SAMPLES} samples came from it, "
    said += f"and the teacher ran on {SAMPLES}."
    assert said in [entry.getMessage() for entry in caplog.records]
    assert said in capsys.readouterr().out
    fit(trainer)
    assert [row[RATE] for row in trainer.state.log_history if RATE in row] == [1.0, 1.0], "counted anew"


def test_without_a_cache_nothing_is_said_of_it(tmp_path, caplog):
    caplog.set_level("INFO", "hf_semckd")
    trainer = make("vit", tmp_path)
    fit(trainer)
    assert not any(RATE in row for row in trainer.state.log_history) and "cache" not in caplog.text


def test_training_again_with_the_same_trainer_runs_no_teacher(tmp_path):
    trainer = make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"))
    fit(trainer)
    ran = watch(trainer.teacher)
    fit(trainer)
    assert not ran


# ---- What makes another cache --------------------------------------------------------------------------------------


def folders(tmp_path: Path, **changes: Any) -> set[str]:
    """Make a trainer and return the names of the caches there are."""
    args = {"max_tokens": 3, "teacher_cache_dir": str(tmp_path / "cache"), **changes}
    make(replace(SENTENCES, args={}), tmp_path, **args)
    return {path.name for path in (tmp_path / "cache").iterdir()}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 4},
        {"teacher_layers": [2, 4]},
        {"teacher_layers": [1, 2, 3]},
        {"teacher_cache_dtype": "float16"},
        {"teacher_cache_dtype": "bfloat16"},
        {"logit_weight": 0.0},
        {"feature_weight": 0.0},
        {"teacher_model": bert(4, 24, seed=10).double()},
        {"teacher_model": bert(4, 24, seed=9)},
        {"association": "learned"},
    ],
    ids=lambda changes: " ".join(changes) + str(changes.get("teacher_layers", changes.get("teacher_cache_dtype", ""))),
)
def test_what_changes_the_stored_outputs_is_another_cache(changes, tmp_path):
    if changes.get("association"):
        # The mean of each layer's tokens is what both associations are computed from, in text.
        changes = {**changes, "feature_loss": LastMeans(16, 24)}
    before = folders(tmp_path)
    assert len(before) == 1
    assert len(folders(tmp_path, **changes)) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model": bert(seed=5).double()},
        {"model": bert(3, 8).double()},
        {"feature_weight": 0.1},
        {"logit_weight": 0.1},
        {"temperature": 9.0},
        {"learning_rate": 1.0},
        {"target_norm": "none"},
        {"max_grid": 2},
        {"student_layers": [1]},
        {"teacher_layers": [1, 2, 3, 4]},
    ],
    ids=" ".join,
)
def test_what_does_not_change_the_stored_outputs_shares_the_cache(changes, tmp_path):
    assert folders(tmp_path) == folders(tmp_path, **changes)


# ---- Precision -----------------------------------------------------------------------------------------------------


def test_half_precision_takes_half_the_space_and_leaves_the_losses_close(tmp_path):
    """In float32, as models mostly are."""
    wide = partial(vit, 4, 64, seed=9)

    def run(**args: Any) -> Outcome:
        trainer = make("vit", tmp_path, model=vit(), teacher_model=wide(), train_dataset=images(SAMPLES), **args)
        fit(trainer)
        return outcome(trainer)

    live = run()
    exact = run(teacher_cache_dir=str(tmp_path / "auto"))
    half = {"teacher_cache_dir": str(tmp_path / "half"), "teacher_cache_dtype": "float16"}
    first, second = run(**half), run(**half)
    assert 0.45 < stored_bytes(tmp_path / "half") / stored_bytes(tmp_path / "auto") < 0.6
    assert_same(exact, live, 1e-5)
    assert_same(first, second, 1e-5)
    for step, expected in zip(first.terms, live.terms, strict=True):
        assert step == pytest.approx(expected, rel=1e-2)
    assert any(a["feature_loss"] != b["feature_loss"] for a, b in zip(first.terms, exact.terms, strict=True))


def test_logits_are_not_rounded(tmp_path):
    live = train("vit", tmp_path, feature_weight=0.0)
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_cache_dtype": "float16", "feature_weight": 0.0}
    assert_same(train("vit", tmp_path, **cache), live)
    assert_same(train("vit", tmp_path, **cache), live)


# ---- Samples that change -------------------------------------------------------------------------------------------


class Flickering(Samples):
    """Noise on every picture, new whenever it is read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {**row, "pixel_values": row["pixel_values"] + torch.randn(1).double()}


def masking() -> Any:
    return DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.5)


def noisy(row: dict[str, Any]) -> dict[str, Any]:
    """A transform that draws from all three generators."""
    noise = torch.randn(()).double() + np.random.normal() + random.random()
    return {**row, "pixel_values": row["pixel_values"] + noise}


def test_random_augmentation_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match="RepeatableViews"):
        make("vit", tmp_path, train_dataset=Flickering(pictures(8).rows), teacher_cache_dir=str(tmp_path / "cache"))
    make("vit", tmp_path, train_dataset=Flickering(pictures(8).rows))


def test_random_masking_is_refused_with_the_way_out(tmp_path):
    words = {"train_dataset": sentences(8, "none"), "data_collator": masking()}
    with pytest.raises(InputError, match="RepeatableViews"):
        make("masked_words", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **words)
    make("masked_words", tmp_path, **words)


def test_random_masking_behind_repeatable_views_is_refused_as_well(tmp_path):
    words = {"train_dataset": RepeatableViews(sentences(8, "none"), lambda row: row, views=2)}
    with pytest.raises(InputError, match="collator"):
        make("masked_words", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), data_collator=masking(), **words)


def test_repeatable_views_are_the_live_training_and_fill_the_cache_over_the_epochs(tmp_path):
    def run(**args: Any) -> tuple[Outcome, list[str]]:
        views = RepeatableViews(pictures(6), noisy, views=2)
        trainer = make("vit", tmp_path, train_dataset=views, num_train_epochs=10, target_norm="none", **args)
        rows = count_rows(trainer.teacher)
        fit(trainer)
        return outcome(trainer), rows

    live, rows = run()
    assert sum(rows) == 60
    filling, rows = run(teacher_cache_dir=str(tmp_path / "cache"))
    assert 6 < sum(rows) <= 12, "at most each version of each sample"
    cached, rows = run(teacher_cache_dir=str(tmp_path / "cache"))
    assert sum(rows) == 0
    assert_same(filling, live)
    assert_same(cached, live)


# ---- Space ---------------------------------------------------------------------------------------------------------


def test_a_cache_that_would_not_fit_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(InputError, match="teacher_cache_limit_gb"):
        make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), teacher_cache_limit_gb=1e-7)
    assert stored_bytes(tmp_path / "cache") == 0


def test_a_full_cache_is_used_whatever_the_limit(tmp_path):
    cache = str(tmp_path / "cache")
    train("vit", tmp_path, teacher_cache_dir=cache)
    trainer = make("vit", tmp_path, teacher_cache_dir=cache, teacher_cache_limit_gb=1e-7)
    ran = watch(trainer.teacher)
    fit(trainer)
    assert not ran


# A row takes 52 bytes besides its tensors, of which each begins at a multiple of 64.
SMALL = [case for case in ("convolutional", "logits only")]


@pytest.mark.parametrize("case", ["image", "whole features", "token classification", *SMALL])
def test_the_estimate_is_close_to_what_the_files_take(case, tmp_path, monkeypatch):
    estimates: list[int] = []
    monkeypatch.setattr(
        "hf_semckd.training.caching.check_space", lambda folder, needed, limit: estimates.append(needed)
    )
    problem, args = CASES[case]
    args = {**args, "teacher_cache_dir": str(tmp_path / "cache"), "max_tokens": 0}
    make(problem, tmp_path, samples=96, **args).fill_teacher_cache()
    size = stored_bytes(tmp_path / "cache")
    assert estimates == [pytest.approx(size, rel=0.2)]


# ---- Damage and death ----------------------------------------------------------------------------------------------


class Crash(TrainerCallback):
    """Raises in a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("crash")


def test_a_training_that_dies_leaves_its_rows_on_the_disk(tmp_path):
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "target_norm": "none"}
    with pytest.raises(RuntimeError, match="crash"):
        train("vit", tmp_path, callbacks=[Crash(2)], **cache)
    trainer = make("vit", tmp_path, num_train_epochs=1, **cache)
    rows = count_rows(trainer.teacher)
    fit(trainer)
    assert sum(rows) == SAMPLES - 8


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(255 - value for value in content[middle : middle + 64])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (Path.unlink, SAMPLES),
        (_flip, None),
        (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), SAMPLES),
        (lambda path: path.write_bytes(b""), SAMPLES),
    ],
    ids=["deleted", "flipped", "cut off", "empty"],
)
def test_a_damaged_file_is_made_again_and_changes_nothing(damage, again, tmp_path):
    args = {"target_norm": "none", "num_train_epochs": 1}
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), **args}
    live = train("vit", tmp_path, **args)
    train("vit", tmp_path, **cache)
    (shard,) = (tmp_path / "cache").rglob("*.arrow")
    damage(shard)
    trainer = make("vit", tmp_path, **cache)
    rows = count_rows(trainer.teacher)
    fit(trainer)
    assert sum(rows) == again if again else 0 < sum(rows) < SAMPLES
    assert_same(outcome(trainer), live)
    trainer = make("vit", tmp_path, **cache)
    rows = count_rows(trainer.teacher)
    fit(trainer)
    assert sum(rows) == 0, "mended"


# ---- What the student and the collator see -------------------------------------------------------------------------


class PlainStudent(nn.Module):
    """Takes whatever it is given, and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vit().double()
        self.config = self.inner.config
        self.seen: set[str] = set()

    def forward(self, pixel_values: Any = None, labels: Any = None, **rest: Any) -> Any:
        self.seen |= set(rest)
        return self.inner(pixel_values=pixel_values, labels=labels, **rest)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["plain", "transformers"])
def test_the_student_sees_nothing_of_the_cache(kind, workers, tmp_path):
    student = PlainStudent() if kind == "plain" else vit().double()
    seen: set[str] = set()
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "dataloader_num_workers": workers}
    trainer = make("vit", tmp_path, model=student, eval_dataset=pictures(4), remove_unused_columns=False, **cache)
    forward = type(student).forward

    def note(self: Any, *args: Any, **keywords: Any) -> Any:
        seen.update(keywords)
        return forward(self, *args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(student), "forward", note)
        fit(trainer)
        trainer.evaluate()
        trainer.predict(pictures(4))
    assert "pixel_values" in seen
    assert not [name for name in seen if "cache" in name]


def test_the_collator_is_plain_outside_the_training_loader(tmp_path):
    trainer = make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"), eval_dataset=pictures(4))
    loader = trainer.get_train_dataloader()
    assert trainer.data_collator is default_data_collator
    assert "cached_teacher" in next(iter(loader))
    assert "cached_teacher" not in next(iter(trainer.get_eval_dataloader()))
    assert "cached_teacher" not in next(iter(trainer.get_test_dataloader(pictures(4))))
    fit(trainer)
    assert trainer.data_collator is default_data_collator


def test_the_collator_is_plain_after_a_loader_that_could_not_be_made(tmp_path, monkeypatch):
    trainer = make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"))

    def broken(*_: Any) -> None:
        assert isinstance(trainer.data_collator, CachingCollator)
        raise RuntimeError("no sampler")

    monkeypatch.setattr(trainer, "_get_train_sampler", broken)
    with pytest.raises(RuntimeError, match="no sampler"):
        trainer.get_train_dataloader()
    assert trainer.data_collator is default_data_collator


# ---- Filling ahead of training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_filling_runs_the_teacher_once_a_sample_and_training_not_at_all(workers, tmp_path):
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "dataloader_num_workers": workers}
    trainer = make(SENTENCES, tmp_path, **cache)
    before = {name: value.clone() for name, value in trainer.student.state_dict().items()}
    rows = count_rows(trainer.teacher)
    assert trainer.fill_teacher_cache() == SAMPLES
    assert sum(rows) == SAMPLES
    ran = watch(trainer.teacher)
    assert trainer.fill_teacher_cache() == SAMPLES
    assert not ran
    assert all(torch.equal(value, before[name]) for name, value in trainer.student.state_dict().items())
    fit(trainer)
    assert not ran
    assert_same(outcome(trainer), train(SENTENCES, tmp_path))


def test_filling_leaves_the_training_its_randomness(tmp_path):
    shaky = replace(PROBLEMS["vit"], student=partial(vit, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3))
    live = train(shaky, tmp_path)
    trainer = make(shaky, tmp_path, teacher_cache_dir=str(tmp_path / "cache"))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    trainer.fill_teacher_cache()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()
    fit(trainer)
    assert_same(outcome(trainer), live)


def test_filling_reaches_every_version_of_repeatable_views(tmp_path):
    views = RepeatableViews(pictures(6), noisy, views=2)
    trainer = make("vit", tmp_path, train_dataset=views, teacher_cache_dir=str(tmp_path / "cache"))
    assert trainer.fill_teacher_cache() == 12


@pytest.mark.parametrize("order", ["evaluate first", "fill first"])
def test_evaluation_and_filling_do_not_share_a_loader(order, tmp_path):
    """With persistent workers Trainer keeps its evaluation loader."""
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "dataloader_num_workers": 1}
    trainer = make("vit", tmp_path, eval_dataset=pictures(3), dataloader_persistent_workers=True, **cache)
    loader = trainer.get_eval_dataloader() if order == "evaluate first" else None
    assert trainer.fill_teacher_cache() == SAMPLES
    later = trainer.get_eval_dataloader()
    assert len(later.dataset) == 3
    assert not isinstance(later.collate_fn, CachingCollator)
    assert loader is None or later is loader
    for kept in trainer.accelerator._dataloaders:
        # The garbage collector would wait for each persistent worker for five seconds.
        if getattr(kept, "_iterator", None) is not None:
            kept._iterator._shutdown_workers()


@pytest.mark.parametrize("args", [{}, {"logit_weight": 0.0, "feature_weight": 0.0, "task_weight": 1.0}])
def test_there_is_nothing_to_fill_without_a_cache(args, tmp_path):
    cache = {"teacher_cache_dir": str(tmp_path / "cache")} if args else {}
    with pytest.raises(ConfigurationError, match="teacher_cache_dir"):
        make("vit", tmp_path, **args, **cache).fill_teacher_cache()


def test_logits_alone_are_cached_without_a_feature_loss(tmp_path):
    live = make("vit", tmp_path, DistillationTrainer)
    fit(live)
    trainer = make("vit", tmp_path, DistillationTrainer, teacher_cache_dir=str(tmp_path / "cache"))
    trainer.fill_teacher_cache()
    ran = watch(trainer.teacher)
    fit(trainer)
    assert not ran
    assert_same(outcome(trainer), outcome(live))


# ---- What cannot be cached -----------------------------------------------------------------------------------------


def choices(count: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, 4, 5), generator=generator)
    return Samples([{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": 1} for row in ids])


def multiple_choice(width: int) -> Any:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": VOCABULARY}
    return BertForMultipleChoice(BertConfig(hidden_size=width, **sizes))


CHOICES = Problem(partial(multiple_choice, 16), partial(multiple_choice, 24), choices)


def test_features_of_several_rows_a_sample_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(InputError, match="several rows|one row for each sample"):
        make(CHOICES, tmp_path, teacher_cache_dir=str(tmp_path / "cache"))
    make(CHOICES, tmp_path)


def test_logits_of_several_choices_are_cached(tmp_path):
    # Without dropout in the student a training can be repeated.
    problem = replace(CHOICES, student=lambda: _without_dropout(multiple_choice(16)))
    live = train(problem, tmp_path, feature_weight=0.0)
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "feature_weight": 0.0}
    assert_same(train(problem, tmp_path, **cache), live)
    assert_same(train(problem, tmp_path, **cache), live)


def _without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


# ---- Two processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared(tmp_path_factory: Any, request: Any) -> Path:
    """The folder of one launch of `caching_worker`."""
    return launch_once("caching_worker.py", "two-processes-one-cache", tmp_path_factory, request)


def told(folder: Path, job: str, name: str) -> list[int]:
    """Return what each process said under a name."""
    return [json.loads((folder / job / f"told.{rank}.json").read_text())[name] for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_two_processes_with_one_cache_train_as_one_does_by_hand(job, shared, tmp_path):
    assert_launched(shared)
    done, world = read(shared, job)
    assert world == WORLD
    micro, parts = ACCUMULATED
    assert_same(
        done, by_hand(job.partition("-")[0], tmp_path, micro=micro, parts=parts * WORLD, samples=SHARED_SAMPLES)
    )
    assert told(shared, job, "training") == [0, 0], "each reads what either has written"


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["vit", "sentences"])
def test_two_processes_share_the_filling(problem, shared):
    job = f"{problem}-filled"
    read(shared, job)
    assert told(shared, job, "held") == [SHARED_SAMPLES] * WORLD
    assert told(shared, job, "again") == [SHARED_SAMPLES] * WORLD
    given = told(shared, job, "filling")
    # Half of the samples each, in whole batches of four; a batch more may fill up the last round.
    assert all(SHARED_SAMPLES / 2 - 2 <= rows <= SHARED_SAMPLES / 2 + 2 for rows in given)
    assert sum(given) >= SHARED_SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("job", STREAMS)
def test_two_processes_share_the_filling_from_a_stream(job, shared):
    read(shared, job)
    assert told(shared, job, "held") == told(shared, job, "again") == [SHARED_SAMPLES] * WORLD
    given = told(shared, job, "filling")
    assert sum(given) >= SHARED_SAMPLES and min(given) >= SHARED_SAMPLES / 2 - 2
    assert told(shared, job, "training") == [0, 0]


# ---- Shapes that do not follow the mask ----------------------------------------------------------------------------


def funnel(width: int) -> Any:
    torch.manual_seed(width)
    return FunnelForSequenceClassification(
        FunnelConfig(
            vocab_size=VOCABULARY,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=width,
            n_head=2,
            d_head=8,
            d_inner=16,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            num_labels=LABELS,
        )
    )


def wav2vec2(width: int) -> Any:
    torch.manual_seed(width)
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            conv_dim=(8, 8),
            conv_kernel=(4, 3),
            conv_stride=(3, 2),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            num_labels=LABELS,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
            classifier_proj_size=8,
        )
    )


def waves(count: int) -> Samples:
    """Return sounds of different lengths."""
    generator = torch.Generator().manual_seed(3)
    lengths = [40 + 7 * (5 * index % 8) for index in range(count)]
    return Samples(
        [{"input_values": torch.randn(n, generator=generator).double(), "labels": n % LABELS} for n in lengths]
    )


def pad_waves(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    values = [row["input_values"] for row in rows]
    return {
        "input_values": torch.nn.utils.rnn.pad_sequence(values, batch_first=True),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones(len(v)).long() for v in values], True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


ODD = {
    "sound": Problem(partial(wav2vec2, 16), partial(wav2vec2, 24), waves, pad_waves),
    "funnel": replace(SENTENCES, student=partial(funnel, 16), teacher=partial(funnel, 32)),
}


@pytest.mark.parametrize("limit", [0, 5])
@pytest.mark.parametrize("case", ["sound", "funnel"])
def test_features_that_do_not_follow_the_mask_are_those_of_the_live_training(case, limit, tmp_path):
    live = train(ODD[case], tmp_path, max_tokens=limit)
    cache = {"teacher_cache_dir": str(tmp_path / "cache"), "max_tokens": limit}
    assert_same(train(ODD[case], tmp_path, **cache), live)
    assert_same(train(ODD[case], tmp_path, **cache), live)


def test_encoder_decoders_are_refused(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    student, teacher = T5ForConditionalGeneration(config), T5ForConditionalGeneration(config)
    rows = Samples([{**row, "labels": row["input_ids"]} for row in sentences(8, "class").rows])
    parts = {"model": student, "teacher_model": teacher, "train_dataset": rows}
    with pytest.raises(ConfigurationError, match="encoder-decoder"):
        make(SENTENCES, tmp_path, teacher_cache_dir=str(tmp_path / "cache"), **parts)


# ---- What a review found ------------------------------------------------------------------------------------------


def test_a_stream_is_cached_without_being_counted(tmp_path):
    losses = []
    for folder in (None, str(tmp_path / "cache"), str(tmp_path / "cache")):
        args = arguments(tmp_path, "all", max_steps=4, per_device_train_batch_size=4, teacher_cache_dir=folder)
        problem = PROBLEMS["vit"]
        trainer = SemCKDTrainer(
            problem.student().double(), args, None, Stream(problem.rows(8)), teacher_model=problem.teacher().double()
        )
        ran = watch(trainer.teacher)
        fit(trainer)
        losses.append(outcome(trainer))
    assert_same(losses[0], losses[1])
    assert_same(losses[0], losses[2])
    assert not ran


def test_filling_reaches_the_tail_that_training_drops(tmp_path):
    trainer = make("vit", tmp_path, samples=11, teacher_cache_dir=str(tmp_path / "cache"), dataloader_drop_last=True)
    assert trainer.fill_teacher_cache() == 11
    assert trainer.args.dataloader_drop_last


def test_filling_a_folder_that_takes_nothing_is_an_error(tmp_path):
    (tmp_path / "cache").write_text("no folder")
    trainer = make("vit", tmp_path, teacher_cache_dir=str(tmp_path / "cache"))
    with pytest.raises(InputError, match="could not be filled"):
        trainer.fill_teacher_cache()


def test_values_beyond_float16_are_refused_by_the_name_of_the_field(tmp_path):
    trainer = make("vit", tmp_path, teacher_cache_dir=None, feature_weight=1.0)
    loud = trainer.teacher
    with torch.no_grad():
        loud.vit.embeddings.position_embeddings.mul_(1e7)
    args = arguments(tmp_path, "all", teacher_cache_dir=str(tmp_path / "cache"), teacher_cache_dtype="float16")
    problem = PROBLEMS["vit"]
    with pytest.raises(InputError, match="teacher_cache_dtype"):
        SemCKDTrainer(problem.student().double(), args, None, problem.rows(8), teacher_model=loud)


def test_images_of_several_sizes_can_be_cached_where_batches_have_one(tmp_path):
    problem = PROBLEMS["resnet"]
    small, large = (images(4, size=size).rows for size in (16, 24))
    rows = Samples([{**row, "pixel_values": row["pixel_values"].double()} for row in small + large])
    args = arguments(tmp_path, "all", teacher_cache_dir=str(tmp_path / "cache"), per_device_train_batch_size=1)
    trainer = SemCKDTrainer(problem.student().double(), args, None, rows, teacher_model=problem.teacher().double())
    fit(trainer)
    assert len(trainer.pair.teacher.cache.store) == 8
