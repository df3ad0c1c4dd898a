"""`hf-semckd plan`: the numbers that it prints are those of a training, and its advice is the shorter one."""

import json
import math

import pytest
from launching import TESTS, torchrun
from recipe_parts import command, save_bert, save_gpt2, sentences, write_rows
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from hf_semckd.recipes.estimates import CacheCost, Cost
from hf_semckd.recipes.preview import Plan
from hf_semckd.recipes.training import total_steps


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    save_bert(folder / "teacher")
    write_rows(folder / "rows" / "train.jsonl", sentences(40))
    write_rows(folder / "rows" / "test.jsonl", sentences(6))
    given = ("--teacher", folder / "teacher", "--dataset", folder / "rows", "--num_layers", 1, "--use_cpu", "True")
    return *given, "--per_device_train_batch_size", 4


def test_a_plan_counts_the_steps_of_the_training_and_leaves_nothing(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # The steps of the recipe are not those of so many samples.
    assert command("plan", *flags, "--num_train_epochs", 2, "--max_steps", 5, "--samples", 1001, "--json") == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert (told["samples"], told["steps"]) == (1001, 2 * math.ceil(1001 / 4))
    step, cache = told["step"]["seconds"], told["cache"]
    assert told["seconds"]["live"] == pytest.approx(step * told["steps"])
    cached = 1001 * cache["seconds"] + told["steps"] * cache["step"]["seconds"]
    assert told["seconds"]["cached"] == pytest.approx(cached)
    # Logits and hidden states of a text of some tokens.
    assert 100 < cache["bytes"] < 100_000 and told["step"]["peak_bytes"] > 1e6
    memory = told["memory"]
    parts = [memory["student"], memory["projections"]]
    trained = sum(part[name] for part in parts for name in ("weights", "gradients", "optimizer"))
    assert memory["total"] == trained + sum(memory["teacher"].values()) + memory["activations"]
    assert told["advice"] in err and "advice" in err and not list(tmp_path.iterdir())


def test_tokens_are_counted_in_samples_of_their_length(tmp_path, capsys):
    teacher = save_gpt2(tmp_path / "gpt2", GPT2LMHeadModel)
    data = write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in sentences(90)])
    given = ("--teacher", teacher, "--dataset", data, "--num_layers", 1, "--max_length", 16, "--use_cpu", "True")
    size = ("--per_device_train_batch_size", 2)
    assert command("plan", *given, *size, "--tokens", "1e5", "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 6250


@pytest.mark.parametrize("placement", ["offload", "device_map", "shard"])
def test_a_teacher_that_is_elsewhere_is_planned_with(flags, placement, capsys):
    assert command("plan", *flags, "--teacher_placement", placement, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["cache"]["bytes"] > 100 and told["step"]["seconds"] > 0


@pytest.mark.slow
def test_several_processes_are_refused_before_anything_is_loaded(flags):
    done = torchrun(TESTS / "recipe_worker.py", "plan", *flags)
    assert done.returncode != 0 and "A training is planned in one process" in done.stderr
    assert "torchrun: hf-semckd plan recipe.yaml" in done.stderr and not done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--samples", 0), "argument --samples"),
        (("--samples", 10, "--tokens", 10), "not allowed with"),
        (("--tokenz", 5), "did you mean --tokens"),
        (("--sample", 5), "did you mean --samples"),
        (("--jsn",), "did you mean --json"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags, words, said, capsys):
    assert command("plan", *flags, *words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("samples", "batch", "accumulation", "epochs"),
    [(10, 4, 1, 3), (10, 4, 2, 3), (7, 2, 3, 1), (3, 8, 4, 2), (9, 3, 1, 0.5)],
)
def test_steps_are_those_that_trainer_takes(tmp_path, samples, batch, accumulation, epochs):
    import torch

    rows = [{"x": torch.ones(1), "labels": torch.ones(1)} for _ in range(samples)]

    class Line(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x, labels):
            return {"loss": (self.layer(x) - labels).square().mean()}

    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(Line(), args, train_dataset=rows)
    trainer.train()
    assert total_steps(args, samples, epochs) == trainer.state.global_step


def made(cached, live=1.0, cache_step=0.5):
    cache = CacheCost(seconds=cached, bytes=2**20, step=Cost(cache_step, None))
    return Plan(samples=100, epochs=1, steps=10, step=Cost(live, None), cache=cache, teacher=None)


def test_the_advice_is_the_shorter_training():
    # 100 samples at 0.01 s and 10 steps of 0.5 s are 6 s, in place of 10.
    assert made(0.01).seconds == {"live": 10.0, "cached": 6.0}
    assert "Set teacher_cache_dir: 4 s are saved, for 100 MB" in made(0.01).advice
    assert "Leave teacher_cache_dir out" in made(0.06).advice
    assert "cannot be cached" in Plan(1, 1, 1, Cost(1.0, None), None, None).advice


def test_a_plan_for_people_is_a_table(flags, capsys):
    assert command("plan", *flags, "--samples", 100, "--teacher_epochs", 1) == 0
    out = capsys.readouterr().out
    assert "measured  a step " in out and "calculated for 100 samples" in out and "projections " in out
    assert "live " in out and "cached " in out and "to fine-tune the teacher" in out
