"""A quantized teacher teaches what it says itself; needs bitsandbytes or torchao (the extra `quantized`)."""

import importlib.util
from typing import Any

import pytest
import torch
from makers import assert_same_weights, bert, distiller, losses, resnet, texts, weights
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, TrainerCallback

from hf_semckd.errors import ConfigurationError, InputError, MissingDependencyError
from hf_semckd.models.loading import load_model
from hf_semckd.models.quantized import Quantized


def settings(kind: str) -> Any:
    """Return how a teacher is quantized, all but its classifier; the test is skipped without the package."""
    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=["classifier"])
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**{f"load_in_{kind}": True}, llm_int8_skip_modules=["classifier"])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", ["8bit", "4bit", "torchao"])
def test_a_quantized_teacher_teaches_what_it_says(kind, cached, tmp_path):
    how = settings(kind)
    bert(3, 128, seed=9, initializer_range=0.2).save_pretrained(tmp_path / "teacher")
    # torchao keeps the precision that is asked for, bitsandbytes its own.
    precision = {"dtype": torch.float32} if kind == "torchao" else {}
    teacher = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "teacher", quantization_config=how, **precision
    )
    student, rows = bert(), texts(4)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows.rows]) for name in rows[0]}
    with torch.no_grad():
        own, theirs = (model.eval()(**batch).logits / 4 for model in (student, teacher))
    expected = 16 * (theirs.softmax(-1) * (theirs.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean()
    args = {"max_steps": 2, **({"teacher_cache_dir": str(tmp_path / "cache")} if cached else {})}
    trainer = distiller(tmp_path, args, model=student, teacher_model=teacher, train_dataset=rows)
    trainer.train()
    assert trainer.teacher is teacher
    assert losses(trainer, "logit_loss")[0] == pytest.approx(float(expected), rel=1e-3)
    assert losses(trainer, "feature_loss")[1] < losses(trainer, "feature_loss")[0]


class Gradient(TrainerCallback):
    """Keeps the student's first gradient."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.found = torch.cat([entry.grad.flatten() for entry in model.parameters() if entry.grad is not None])


def first_gradient(folder: Any, teacher: Any, **args: Any) -> tuple[Any, torch.Tensor]:
    kept = Gradient()
    settings = {"max_steps": 1, "projection_init": "random", "max_grad_norm": 0, **args}
    trainer = distiller(
        folder, settings, model=bert(), teacher_model=teacher, train_dataset=texts(4), callbacks=[kept]
    )
    trainer.train()
    return trainer, kept.found


@pytest.mark.parametrize("given", ["name", "object"])
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 2e-3), (4, 2e-2)])
def test_the_students_gradient_is_near_that_of_the_plain_teacher(bits, tolerance, given, tmp_path):
    """Of the norm: in random weights, whose 8-bit and 4-bit steps are coarse."""
    pytest.importorskip("bitsandbytes")
    teacher = bert(3, 128, seed=9)
    teacher.save_pretrained(tmp_path / "teacher")
    before = weights(teacher)
    _, expected = first_gradient(tmp_path, teacher)
    trainer, found = first_gradient(
        tmp_path, teacher if given == "object" else str(tmp_path / "teacher"), teacher_dtype=f"{bits}bit"
    )
    assert 0 < (found - expected).norm() < tolerance * expected.norm()
    assert_same_weights(before, weights(teacher))
    assert trainer.teacher.is_quantized and trainer.teacher.classifier.weight.dtype.is_floating_point
    # The same, quantized by hand.
    nf4 = {"bnb_4bit_quant_type": "nf4"} if bits == 4 else {}
    how = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["dropout", "classifier"], **nf4)
    by_hand = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher", quantization_config=how)
    torch.testing.assert_close(found, first_gradient(tmp_path, by_hand)[1], rtol=1e-5, atol=1e-7)
    # One that is quantized already is not quantized again.
    again, same = first_gradient(tmp_path, by_hand, teacher_dtype="8bit")
    assert again.teacher is by_hand
    torch.testing.assert_close(found, same, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("placement", ["shard", "offload"])
def test_a_quantized_teacher_stays_where_it_is(placement, tmp_path):
    with pytest.raises(ConfigurationError, match=f"(?s)quantized teacher.*'4bit'.*'{placement}'.*leave"):
        distiller(tmp_path, {"teacher_dtype": "4bit", "teacher_placement": placement})


@pytest.mark.parametrize("given", ["folder", "object"])
def test_convolutions_are_not_quantized(given, tmp_path):
    pytest.importorskip("bitsandbytes")
    resnet().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="(?s)nothing in the teacher that 8 bits.*convolutions.*bfloat16"):
        load_model(resnet() if given == "object" else str(tmp_path), "teacher", quantized=Quantized(8))


def test_what_cannot_be_quantized_is_refused(monkeypatch):
    with pytest.raises(InputError, match="(?s)teacher cannot be quantized.*a Linear.*'auto'"):
        load_model(torch.nn.Linear(2, 2), "teacher", quantized=Quantized(8))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"(?s)in 4 bits.*hf-semckd\[quantized\]"):
        load_model(bert(), "teacher", quantized=Quantized(4))
