"""A teacher in 8 or 4 bits teaches what it says itself; needs bitsandbytes (the extra `quantized`)."""

import pytest
import torch
from makers import bert, distiller, losses, texts
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_teacher_teaches_what_it_says(bits, tmp_path):
    bert(3, 128, seed=9, initializer_range=0.2).save_pretrained(tmp_path / "teacher")
    quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=["classifier"])
    teacher = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "teacher", quantization_config=quantization
    )
    student, rows = bert(), texts(4)
    batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows.rows]) for name in rows[0]}
    with torch.no_grad():
        own, theirs = (model.eval()(**batch).logits / 4 for model in (student, teacher))
    expected = 16 * (theirs.softmax(-1) * (theirs.log_softmax(-1) - own.log_softmax(-1))).sum(-1).mean()
    trainer = distiller(tmp_path, {"max_steps": 2}, model=student, teacher_model=teacher, train_dataset=rows)
    trainer.train()
    assert trainer.teacher is teacher and teacher.is_quantized
    assert losses(trainer, "logit_loss")[0] == pytest.approx(float(expected), rel=1e-3)
    assert losses(trainer, "feature_loss")[1] < losses(trainer, "feature_loss")[0]
