"""scripts/step_cost/variants.py: a measured step against Trainer.train."""

from __future__ import annotations

import pytest
import torch
from step_cost.pairs import find_pair
from step_cost.variants import NAMES, make_trainer, make_variant
from transformers import TrainerCallback


class Gradients(TrainerCallback):
    """Keeps the gradients that `train()` is about to apply."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = self.trainer.model.named_parameters()
        self.kept = {name: entry.grad.clone() for name, entry in named if entry.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_a_measured_step_has_the_gradients_of_train(name, tmp_path):
    """No dropout in a ResNet: the same batch and weights must give the same gradients."""
    pair = find_pair("resnet34-18", tiny=True)
    student, batch = pair.make_student(), pair.make_batches(1)[0]

    trainer = make_trainer(name, pair, student, pair.make_teacher(), "cpu", tmp_path / "train")
    trainer.args.max_steps, trainer.args.max_grad_norm = 1, 0.0
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        trainer.train_dataset, batch_size=pair.batch_size, collate_fn=trainer.data_collator
    )
    callback = Gradients(trainer)
    trainer.add_callback(callback)
    trainer.train()

    variant = make_variant(name, pair, student, pair.make_teacher(), "cpu", tmp_path / "step")
    variant.compute_gradients(batch)
    measured = {key: entry.grad for key, entry in variant.model.named_parameters() if entry.grad is not None}
    variant.close()
    assert measured.keys() == callback.kept.keys()
    for key, gradient in measured.items():
        torch.testing.assert_close(gradient, callback.kept[key])
    assert any("distillation_feature_loss" in key for key in measured) is (name not in ("ce", "kd"))
