"""A training that was interrupted and resumed is the training that was not, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TESTS, python
from makers import bert, config, resnet, texts, vit, weights
from resuming import ACCUMULATED, FAMILIES, HALF, WHOLE, Stop, assert_equal, checkpoint, fit, flat, trainer_of
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, TrainerCallback

from hf_semckd import SemCKDTrainer
from hf_semckd.errors import CheckpointError
from hf_semckd.training.checkpoint import FEATURE_LOSS_FILE
from hf_semckd.training.sealing import SEAL

# ---- Invariant 4: resume is exact ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [{}, ACCUMULATED], ids=["whole", "accumulated"])
@pytest.mark.parametrize("association", ["similarity", "learned"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_resuming_equals_not_stopping(family, association, cut, tmp_path):
    settings = {**cut, "association": association}
    fit(trainer_of(family, tmp_path / "once", save_steps=WHOLE, **settings))
    fit(trainer_of(family, tmp_path / "twice", [Stop(HALF)], **settings))
    assert not (tmp_path / "twice" / f"checkpoint-{WHOLE}").exists()
    fit(trainer_of(family, tmp_path / "twice", **settings), str(tmp_path / "twice" / f"checkpoint-{HALF}"))
    once = checkpoint(tmp_path / "once")
    assert_equal(once, checkpoint(tmp_path / "twice"))
    # All that has to be equal is there, the statistics among it.
    assert once[f"/{FEATURE_LOSS_FILE}/statistics.0.count"] > 0
    assert sum(name.endswith("feature_loss") for name in once) == WHOLE
    assert any(name.startswith("/optimizer.pt/state") for name in once)


def test_resuming_in_the_trainer_that_stopped_equals_not_stopping(tmp_path):
    """What the last step before left behind, of statistics and of the bank, belongs to another training."""
    fit(trainer_of("vit", tmp_path / "once", save_steps=WHOLE))
    trainer = trainer_of("vit", tmp_path / "twice")
    fit(trainer)
    fit(trainer, str(tmp_path / "twice" / f"checkpoint-{HALF}"))
    assert_equal(checkpoint(tmp_path / "once"), checkpoint(tmp_path / "twice"))


def killed(folder: str) -> None:
    """Train until one step after the checkpoint, and die; runs in a process of its own."""
    torch.set_num_threads(1)
    fit(trainer_of("vit", Path(folder), [Stop(HALF + 1, dead=True)]))


def test_a_killed_training_goes_on_from_its_last_checkpoint_as_if_nothing_had_been(tmp_path):
    code = f"import test_resume; test_resume.killed({str(tmp_path / 'twice')!r})"
    done = python("-c", code, cwd=TESTS / "training")
    assert done.returncode == 9
    assert sorted(path.name for path in (tmp_path / "twice").glob("checkpoint-*")) == [f"checkpoint-{HALF}"]
    resumed = fit(trainer_of("vit", tmp_path / "twice"), True)
    assert resumed.state.global_step == WHOLE
    fit(trainer_of("vit", tmp_path / "once", save_steps=WHOLE))
    assert_equal(checkpoint(tmp_path / "once"), checkpoint(tmp_path / "twice"))


def test_the_first_log_after_resuming_averages_only_the_steps_since(tmp_path):
    """Logs at steps 2, 4, 6, and a resume at 3: the log at 4 is that of step 4 alone."""
    each = fit(trainer_of("vit", tmp_path / "each", [Stop(HALF)])).state.log_history
    resumed = fit(trainer_of("vit", tmp_path / "each", logging_steps=2), True)
    single = fit(trainer_of("vit", tmp_path / "once", save_strategy="no")).state.log_history
    assert [row["step"] for row in each if "loss" in row] == [1, 2, 3]
    (found,) = [row for row in resumed.state.log_history if row["step"] == HALF + 1]
    (expected,) = [row for row in single if row["step"] == HALF + 1]
    for name in ("loss", "task_loss", "logit_loss", "feature_loss", "association/entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def momentum(folder: Path, callbacks: Any = ()) -> SemCKDTrainer:
    """Return a trainer with an optimizer of the user's, whose rate falls."""
    student = FAMILIES["vit"][0]()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return trainer_of("vit", folder, callbacks, student=student, optimizers=(optimizer, scheduler))


def test_an_optimizer_of_the_user_is_resumed_with_its_momentum(tmp_path):
    fit(momentum(tmp_path / "once"))
    fit(momentum(tmp_path / "twice", [Stop(HALF)]))
    resumed = fit(momentum(tmp_path / "twice"), True)
    assert_equal(checkpoint(tmp_path / "once"), checkpoint(tmp_path / "twice"))
    assert len(resumed.optimizer.param_groups) == 1


# ---- Checkpoints that cannot be gone on from -----------------------------------------------------------------------


@pytest.fixture
def halfway(tmp_path):
    """Return the checkpoint of an interrupted training."""
    fit(trainer_of("vit", tmp_path, [Stop(HALF)]))
    return tmp_path / f"checkpoint-{HALF}"


def resume_with(student: nn.Module, place: Path) -> None:
    """Resume another student, of which nothing may be left changed."""
    before = weights(student)
    try:
        fit(trainer_of("vit", place.parent, student=student), str(place))
    finally:
        assert before.keys() == student.state_dict().keys()
        assert all(torch.equal(value, student.state_dict()[name]) for name, value in before.items())


def test_a_checkpoint_without_calibration_is_refused(halfway):
    (halfway / FEATURE_LOSS_FILE).unlink()
    with pytest.raises(CheckpointError, match=FEATURE_LOSS_FILE):
        fit(trainer_of("vit", halfway.parent), str(halfway))


def test_a_calibration_of_another_kind_is_refused(halfway):
    with pytest.raises(CheckpointError, match="does not fit this run"):
        fit(trainer_of("vit", halfway.parent, association="learned"), str(halfway))


BOTH = "optimizer and schedule of the learning rate"
ANEW = {
    "optimizer.pt": BOTH,
    "scheduler.pt": BOTH,
    "rng_state.pth": "random numbers",
}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was said of things that start anew."""
    return [record.getMessage() for record in caplog.records if "start anew" in record.getMessage()]


@pytest.mark.parametrize("weight", [0.0, 3.0])
@pytest.mark.parametrize("name", list(ANEW))
def test_what_an_unsealed_checkpoint_lacks_is_told_with_what_starts_anew(name, weight, tmp_path, caplog):
    fit(trainer_of("vit", tmp_path, [Stop(HALF)], feature_weight=weight))
    place = tmp_path / f"checkpoint-{HALF}"
    (place / SEAL).unlink()
    (place / name).unlink()
    resumed = fit(trainer_of("vit", tmp_path, feature_weight=weight), True)
    assert resumed.state.global_step == WHOLE
    (text,) = said(caplog)
    assert text.startswith(f"checkpoint-{HALF} lacks {name}: {ANEW[name]} start anew")


def test_a_feature_loss_is_gone_on_with_where_the_optimizer_is_missing(halfway):
    trained = load_file(halfway / FEATURE_LOSS_FILE)
    (halfway / SEAL).unlink()
    (halfway / "optimizer.pt").unlink()
    first: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            first.append(weights(trainer.feature_loss))

    trainer = trainer_of("vit", halfway.parent, [Look()])
    fit(trainer, str(halfway))
    assert_equal(trained, first[0])


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_a_checkpoint_of_the_student_alone_is_told(weight, tmp_path, caplog):
    settings = {"feature_weight": weight, "save_only_model": True}
    fit(trainer_of("vit", tmp_path, [Stop(HALF)], **settings))
    fit(trainer_of("vit", tmp_path, **settings), True)
    (text,) = said(caplog)
    assert text.startswith(
        "The checkpoint holds the student alone (save_only_model): optimizer and schedule of the learning rate, "
    )
    assert ("projections and association" in text) == (weight > 0)


def test_a_whole_checkpoint_is_gone_on_from_without_a_word(halfway, caplog):
    fit(trainer_of("vit", halfway.parent), True)
    assert not said(caplog)


@pytest.mark.parametrize(
    "student", [partial(vit, width=32), partial(vit, layers=3), partial(vit, layers=1), partial(vit, patch_size=8)]
)
def test_a_student_of_another_shape_is_refused(halfway, student):
    with pytest.raises(CheckpointError, match="does not fit the student"):
        resume_with(student(), halfway)


def test_a_student_of_another_family_is_refused(halfway):
    with pytest.raises(CheckpointError):
        resume_with(resnet(), halfway)


def frozen() -> Any:
    student = vit()
    student.vit.embeddings.requires_grad_(False)
    return student


def swapped(first: bool) -> Any:
    """Return a student one of whose two matrices of other shapes is frozen."""
    student = vit()
    for half, part in ((first, "fc1"), (not first, "fc2")):
        for name, parameter in student.named_parameters():
            if part in name and parameter.dim() > 1:
                parameter.requires_grad_(half)
    return student


OTHER: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no features": (
        {"feature_weight": 0.0},
        ("trained with", "feature_weight=3.0", "feature_weight=0.0", "groups of"),
    ),
    "frozen": ({"student": frozen}, ("parameter groups of", "frozen weights")),
    "sgd": ({"optim": "sgd"}, ("optim='adamw", "optim='sgd'", "momentum", "SGD")),
    "adafactor": ({"optim": "adafactor"}, ("optim='adafactor'", "Adafactor, which has")),
}


@pytest.mark.parametrize("kind", list(OTHER))
def test_an_optimizer_of_another_kind_is_refused_before_the_first_step(kind, halfway):
    changes, words = OTHER[kind]
    settings = {name: value() if name == "student" else value for name, value in changes.items()}
    trainer = trainer_of("vit", halfway.parent, **settings)
    with pytest.raises(CheckpointError, match="optimizer does not fit this run") as refused:
        fit(trainer, str(halfway))
    assert not [word for word in words if word not in str(refused.value)], str(refused.value)
    # What the error advises.
    anew = AutoModelForImageClassification.from_pretrained(halfway)
    assert_equal(anew.state_dict(), weights(trainer.student))
    done = fit(trainer_of("vit", halfway.parent / "anew", **{**settings, "student": anew}))
    assert done.state.global_step == WHOLE


def test_another_method_is_refused_with_both_names(halfway):
    student, teacher, data = FAMILIES["vit"]
    trainer = SemCKDTrainer(
        student(), config(halfway.parent), teacher_model=teacher(), train_dataset=data(), feature_loss="rkd"
    )
    with pytest.raises(CheckpointError, match=r"method='SemCKD'(.|\n)*method='RKD'"):
        fit(trainer, str(halfway))


def test_as_many_other_weights_that_are_frozen_are_refused(tmp_path):
    fit(trainer_of("vit", tmp_path, [Stop(HALF)], student=swapped(True)))
    with pytest.raises(CheckpointError, match="moments of shape"):
        fit(trainer_of("vit", tmp_path, student=swapped(False)), True)


def test_an_optimizer_of_the_user_that_is_refused_is_as_it_was(halfway):
    trainer = momentum(halfway.parent)
    before = flat(trainer.optimizer.state_dict())
    with pytest.raises(CheckpointError, match="optimizer does not fit"):
        fit(trainer, str(halfway))
    assert flat(trainer.optimizer.state_dict()) == before


@pytest.mark.parametrize(
    "changes", [{"lr_scheduler_type": "cosine"}, {"optim": "adamw_torch"}, {"learning_rate": 0.1}]
)
def test_arguments_that_leave_the_optimizer_its_shape_may_change(changes, halfway):
    assert fit(trainer_of("vit", halfway.parent, **changes), str(halfway)).state.global_step == WHOLE


def test_an_adapter_is_no_checkpoint_of_a_whole_student(tmp_path):
    fit(trainer_of("bert", tmp_path, [Stop(HALF)], student=adapted()))
    with pytest.raises(CheckpointError, match="cannot be read|does not fit the student"):
        fit(trainer_of("bert", tmp_path), True)


# ---- The best checkpoint -------------------------------------------------------------------------------------------


class Damage(TrainerCallback):
    """Does something to the first checkpoint, which is the best, when the last one has been written."""

    def __init__(self, do: Callable[[Path], object] | None):
        self.do = do

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.do is not None and state.global_step == state.max_steps:
            self.do(Path(args.output_dir) / "checkpoint-1")


def best_of_three(
    family: str,
    folder: Path,
    damage: Callable[[Path], object] | None = None,
    student: Any = None,
    feature_loss: Any = None,
    **changes: Any,
) -> SemCKDTrainer:
    """Train three steps, after the first of which the student was best."""
    scores = iter([3.0, 2.0, 1.0, 0.0])
    make_student, teacher, data = FAMILIES[family]
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = SemCKDTrainer(
        model=make_student() if student is None else student,
        teacher_model=teacher(),
        args=config(folder, **settings, **best, **changes),
        train_dataset=data(),
        eval_dataset=data(),
        compute_metrics=lambda _: {"score": next(scores)},
        callbacks=[Damage(damage)],
        feature_loss=feature_loss,
    )
    return fit(trainer)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 64]))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def halve_unsealed(folder: Path) -> None:
    (folder / SEAL).unlink()
    halve(folder / "model.safetensors")


def refit(folder: Path) -> None:
    (folder / SEAL).unlink()
    vit(3).save_pretrained(folder)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip(folder / "model.safetensors"), "model.safetensors was changed"),
    "halved": (lambda folder: halve(folder / "model.safetensors"), "model.safetensors has"),
    "deleted": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
    "unsealed": (halve_unsealed, "model.safetensors cannot be read"),
    "of another student": (refit, "does not fit the student"),
    "gone": (shutil.rmtree, "there is no such folder"),
}


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_a_damaged_best_checkpoint_leaves_the_last_weights_and_is_told(kind, tmp_path, caplog):
    damage, told = DAMAGES[kind]
    trainer = best_of_three("vit", tmp_path, damage, save_total_limit=1)
    assert trainer.state.global_step == 3 and trainer.state.best_model_checkpoint is None
    (text,) = [record.getMessage() for record in caplog.records if "best checkpoint" in record.getMessage()]
    assert told in text and "checkpoint-1" in text and "last weights, of step 3" in text
    # With a limit of one, Trainer would keep the best alone.
    last = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert_equal(last.state_dict(), weights(trainer.student))


def test_a_student_that_takes_the_teachers_classifier_has_it_without_its_best_checkpoint(tmp_path):
    trainer = best_of_three("resnet", tmp_path, DAMAGES["flipped"][0], feature_loss="simkd")
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert trainer.state.best_model_checkpoint is None
    assert_equal(last, weights(trainer.student))


def test_a_damaged_best_checkpoint_is_not_loaded_without_distillation(tmp_path, caplog):
    trainer = best_of_three("vit", tmp_path, DAMAGES["flipped"][0], logit_weight=0.0, feature_weight=0.0)
    assert trainer.state.best_model_checkpoint is None and "model.safetensors was changed" in caplog.text


def test_a_damaged_best_adapter_is_not_loaded(tmp_path, caplog):
    trainer = best_of_three(
        "bert", tmp_path, lambda folder: flip(folder / "adapter_model.safetensors"), student=adapted()
    )
    assert trainer.state.best_model_checkpoint is None and "adapter_model.safetensors was changed" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "feature_loss.safetensors", "trainer_state.json"])
def test_what_only_resuming_needs_may_be_gone_from_the_best_checkpoint(name, tmp_path):
    trainer = best_of_three("vit", tmp_path, lambda folder: (folder / name).unlink())
    assert Path(str(trainer.state.best_model_checkpoint)).name == "checkpoint-1"
    best = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
    assert_equal(best.state_dict(), weights(trainer.student))


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_the_best_model_is_loaded_whole(family, tmp_path):
    """The first evaluation is the best one here; a lenient reload would leave most of a ViT at the last step."""
    trainer = best_of_three(family, tmp_path)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"
    first, last = [
        AutoModelForImageClassification.from_pretrained(tmp_path / f"checkpoint-{step}").state_dict()
        for step in (1, 3)
    ]
    now = trainer.student.state_dict()
    assert now.keys() == first.keys()
    assert not [name for name, value in now.items() if not torch.equal(value, first[name])]
    same = [name for name, value in last.items() if value.is_floating_point() and torch.equal(value, first[name])]
    assert not same


def test_a_moved_checkpoint_can_be_resumed(halfway, tmp_path_factory):
    """Nothing in it depends on where it was written."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.move(halfway, folder / halfway.name)
    fit(trainer_of("vit", folder), True)
    fit(trainer_of("vit", folder / "once", save_steps=WHOLE))
    assert_equal(checkpoint(folder / "once"), checkpoint(folder))


# ---- Adapters ------------------------------------------------------------------------------------------------------


def adapted(bias: str = "none") -> Any:
    """Return a BERT with LoRA adapters and a head that is trained whole."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        lora_dropout=0.1,
        bias=bias,
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    student = bert()
    torch.manual_seed(1)
    return peft.get_peft_model(student, lora)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_an_adapter_trains_and_is_saved_alone(bias, tmp_path):
    student = adapted(bias)
    before = weights(student)
    trainer = fit(trainer_of("bert", tmp_path, student=student, save_strategy="no", learning_rate=0.1))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert before.keys() == student.state_dict().keys()
    assert any("lora_B" in name for name in moved)
    assert moved <= {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    trainer.save_model(str(tmp_path / "saved"))
    written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert written.keys() == expected_adapter(student, tmp_path / "plain").keys()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def expected_adapter(student: Any, folder: Path) -> dict[str, Tensor]:
    """Return what peft writes of the student without any trainer."""
    student.save_pretrained(str(folder))
    return load_file(folder / "adapter_model.safetensors")


def test_a_saved_adapter_is_the_student_again(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = fit(trainer_of("bert", tmp_path, student=adapted(), save_strategy="no", learning_rate=0.1))
    trainer.save_model(str(tmp_path / "saved"))
    again = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "saved")).eval()
    rows = texts(4)
    batch = {key: torch.stack([rows[index][key] for index in range(4)]) for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, trainer.student.eval()(**batch).logits)


@pytest.mark.parametrize("bias", ["none", "all"])
def test_resuming_an_adapter_equals_not_stopping(bias, tmp_path):
    fit(trainer_of("bert", tmp_path / "once", student=adapted(bias), save_steps=WHOLE))
    fit(trainer_of("bert", tmp_path / "twice", [Stop(HALF)], student=adapted(bias)))
    fit(trainer_of("bert", tmp_path / "twice", student=adapted(bias)), True)
    once = checkpoint(tmp_path / "once")
    assert_equal(once, checkpoint(tmp_path / "twice"))
    assert {name.split("/")[1] for name in once if "safetensors" in name} == {
        "adapter_model.safetensors",
        FEATURE_LOSS_FILE,
    }
    assert not [name for name in once if "adapter_model" in name and "calibration" in name.split("/", 2)[2]]
