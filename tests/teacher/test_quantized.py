"""A quantized teacher teaches what it says itself; needs bitsandbytes or torchao (the extra `quantized`)."""

from typing import Any

import pytest
import torch
from makers import bert, distiller, losses, texts
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig


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
