"""Wherever the teacher's weights are, the student learns the same. Among several processes: tests/engines."""

import pytest
import torch
from makers import bert, distiller, resnet, vit
from tiny import assert_same, make, outcome, train
from torch import nn

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.teacher.placement import blocks, is_placed, place

CPU = torch.device("cpu")


@pytest.mark.parametrize("placement", ["device_map", "shard", "offload"])
@pytest.mark.parametrize("problem", ["vit", "sentences"])
def test_a_teacher_elsewhere_teaches_the_same(placement, problem, tmp_path):
    how = {"samples": 8, "per_device_train_batch_size": 4}
    plain = train(problem, tmp_path / "plain", **how)
    assert_same(train(problem, tmp_path / placement, teacher_placement=placement, **how), plain, 1e-12)


def test_an_offloaded_teacher_has_no_weights_here_between_forwards(tmp_path):
    trainer = make("vit", tmp_path, teacher_placement="offload")
    assert all(entry.is_meta for entry in trainer.teacher.parameters())
    assert outcome(trainer).state.keys() and not trainer.pair.teacher.stream


def test_a_cache_knows_an_offloaded_teacher_by_its_weights(tmp_path):
    how = {"samples": 8, "per_device_train_batch_size": 4, "teacher_cache_dir": str(tmp_path / "cache")}
    plain = train("vit", tmp_path / "plain", **how)
    trainer = make("vit", tmp_path / "offloaded", teacher_placement="offload", **how)
    trainer.train()
    assert_same(outcome(trainer), plain, 1e-12)
    assert trainer.pair.teacher.computed == 0


def test_a_teacher_that_has_a_place_keeps_it():
    teacher = vit()
    place(teacher, CPU, "offload")
    assert is_placed(teacher)
    place(teacher, CPU, "device")
    assert is_placed(teacher)
    with pytest.raises(InputError, match="(?s)placement of its own.*teacher_placement='shard'"):
        place(teacher, CPU, "shard")


def test_a_teacher_whose_classifier_is_reused_stays_whole(tmp_path):
    with pytest.raises(ConfigurationError, match="(?s)teacher's classifier.*teacher_placement='offload'"):
        distiller(
            tmp_path, {"teacher_placement": "offload"}, model=resnet(), teacher_model=resnet(), feature_loss="simkd"
        )


def test_blocks_are_the_outermost_repeated_modules():
    assert [type(block).__name__ for block in blocks(bert(layers=3))] == ["BertLayer"] * 3
    assert [type(block).__name__ for block in blocks(vit(layers=2))] == ["ViTLayer"] * 2
    assert {type(block).__name__ for block in blocks(resnet())} >= {"ResNetStage"}
    assert blocks(nn.Linear(2, 2)) == []
