"""On a GPU: the same training as by hand on the CPU, streams that wait for one another, and no waiting of the host."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from makers import config, distiller, images, losses, plain_arguments, vit
from methods import CASES, make
from tiny import PROBLEMS, assert_same, by_hand, fit, outcome, train
from tiny import make as make_problem
from transformers import Trainer

from hf_semckd import DistillationTrainer, SemCKDTrainer
from hf_semckd.data.views import preserved_random_state
from hf_semckd.errors import TeacherOutputError

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

CUT = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
# About 50 ms on a current GPU: longer than everything else in a step of a tiny model.
LONG = 100_000_000


def sleep(*_: Any) -> None:
    """Keep the current stream busy; the host goes on."""
    torch.cuda._sleep(LONG)


# ---- The same training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("association", ["uniform", "learned"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_training_equals_the_one_by_hand_on_the_cpu(problem, association, tmp_path):
    others = {"projector": "shared"} if problem == "resnet" else {}
    if problem == "unlabeled_words":
        others["terms"] = "feature"
    done = train(problem, tmp_path, association=association, use_cpu=False, **CUT, **others)
    hand = by_hand(problem, tmp_path, micro=4, parts=2, association=association, **others)
    assert_same(done, hand, max(PROBLEMS[problem].tolerance, 1e-8))


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_neither_model_reads_what_the_other_stream_has_not_written(who, tmp_path):
    trainer = make_problem("vit", tmp_path, use_cpu=False, dataloader_pin_memory=True, **CUT)
    slow = trainer.student if who == "student" else trainer.teacher
    handles = [slow.register_forward_pre_hook(sleep), slow.register_forward_hook(sleep)]
    fit(trainer)
    assert trainer.args.device.type == "cuda"
    for handle in handles:
        handle.remove()
    assert_same(outcome(trainer), by_hand("vit", tmp_path, micro=4, parts=2), 1e-8)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("name", "family"), CASES)
def test_every_method_trains_every_family_in_mixed_precision(tmp_path, name, family, precision):
    trainer = make(tmp_path, name, family, max_steps=4, use_cpu=False, **{precision: True})
    trainer.train()
    assert next(trainer.student.parameters()).is_cuda
    seen = losses(trainer, "feature_loss")
    assert len(seen) == 4 and all(math.isfinite(value) for value in seen)


def test_building_and_probing_leave_the_gpus_randomness_alone():
    torch.cuda.manual_seed(3)
    before = torch.cuda.get_rng_state()
    with preserved_random_state(7):
        torch.rand(3, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.slow
def test_student_and_teacher_train_compiled(tmp_path):
    trainer = distiller(tmp_path, {"use_cpu": False, "torch_compile": True, "teacher_compile": True, "bf16": True})
    trainer.train()
    assert all(math.isfinite(value) for value in losses(trainer)) and len(losses(trainer)) == 3


# ---- The host ------------------------------------------------------------------------------------------------------


def synchronizations(action: Callable[[], Any]) -> tuple[list[str], Any]:
    """Do something; return where the host waited for the GPU meanwhile, and the result."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = action()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = [entry for entry in caught if "synchronizing" in str(entry.message)]
    return [f"{entry.filename}:{entry.lineno}" for entry in found], result


def in_training(trainer: Trainer) -> tuple[list[str], int]:
    """Train; return the same for the last forward and backward, and how often one of the teacher alone waits."""
    plain, seen, teacher = trainer.training_step, [], 0

    def watched(model: Any, inputs: Any, *others: Any) -> Any:
        nonlocal teacher
        inputs = trainer._prepare_inputs(inputs)
        if isinstance(trainer, SemCKDTrainer):
            asked = trainer._teacher.inputs(inputs)
            teacher = len(synchronizations(lambda: trainer.teacher(**asked))[0])
        seen[:], loss = synchronizations(lambda: plain(model, inputs, *others))
        return loss

    trainer.training_step = watched  # type: ignore[method-assign]
    trainer.train()
    return seen, teacher


@pytest.mark.parametrize("problem", ["vit", "resnet", "resnet_vit", "sentences", "tokens"])
def test_the_host_waits_no_more_than_for_the_two_models_themselves(problem, tmp_path):
    settings = {"use_cpu": False, "dtype": torch.float32, "association": "similarity"}
    settings |= {"dataloader_pin_memory": True, "samples": 16}
    distilled, teacher = in_training(make_problem(problem, tmp_path / "ours", **settings))
    alone, _ = in_training(
        Trainer(
            PROBLEMS[problem].student(),
            plain_arguments(tmp_path / "plain", use_cpu=False, dataloader_pin_memory=True),
            train_dataset=make_problem(problem, tmp_path / "data", **settings).train_dataset,
            data_collator=PROBLEMS[problem].collator,
        )
    )
    # A model of transformers may look at its attention mask.
    assert len(distilled) <= len(alone) + teacher, distilled


def test_a_loss_that_breaks_is_found_and_named(tmp_path):
    data = images(16)
    data.rows[5]["pixel_values"] = data.rows[5]["pixel_values"] * torch.inf
    trainer = distiller(tmp_path, {"use_cpu": False, "max_steps": 8}, train_dataset=data)
    with pytest.raises(TeacherOutputError, match=r"(?s)not finite.*batch index"):
        trainer.train()


# ---- What people do afterwards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DistillationTrainer, SemCKDTrainer])
def test_a_trained_student_evaluates_saves_and_resumes(tmp_path, kind):
    def trainer(steps: int) -> DistillationTrainer:
        args = config(tmp_path, use_cpu=False, bf16=True, max_steps=steps, save_strategy="steps", save_steps=2)
        return kind(
            vit(), args, teacher_model=vit(3, 24, seed=9), train_dataset=images(), eval_dataset=images(6, seed=2)
        )

    first = trainer(2)
    first.train()
    assert math.isfinite(first.evaluate()["eval_loss"])
    assert len(first.predict(first.eval_dataset).predictions) == 6
    second = trainer(4)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    second.save_model(str(tmp_path / "kept"))
    kept = type(second.student).from_pretrained(tmp_path / "kept")
    assert torch.equal(kept.classifier.weight, second.student.classifier.weight.cpu())


def test_a_warm_cache_gives_the_training_of_a_live_teacher(tmp_path):
    def run(name: str, **args: Any) -> list[float]:
        trainer = make_problem("sentences", tmp_path / name, use_cpu=False, dtype=torch.float32, **CUT, **args)
        fit(trainer)
        return losses(trainer)

    live = run("live")
    for _ in range(2):
        cached = run("cached", teacher_cache_dir=str(tmp_path / "cache"), teacher_cache_dtype="auto")
        assert cached == pytest.approx(live, rel=1e-4)
