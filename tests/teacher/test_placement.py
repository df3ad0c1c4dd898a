"""Wherever the teacher's weights are, the student learns the same. Among several processes: tests/engines."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from makers import assert_same_weights, bert, distiller, gpt2, images, resnet, vit, weights
from tiny import assert_same, make, outcome, train
from torch import nn

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.teacher.cache.cache import weights_digest
from hf_semckd.teacher.placement import blocks, is_placed, named_weights, place, placement_of

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


def test_a_teacher_is_offloaded_in_one_of_several_processes_on_cpus():
    # Whose device has a number there.
    teacher, batch = vit(), torch.ones(1, 3, 16, 16)
    expected = teacher(batch).logits
    place(teacher, torch.device("cpu", 0), "offload")
    assert all(torch.equal(teacher(batch).logits, expected) for _ in range(2))


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
    with pytest.raises(InputError, match="(?s)placement of its own.*teacher_placement='shard'.*placed by 'offload'"):
        place(teacher, CPU, "shard")


@pytest.mark.parametrize("placement", ["device_map", "shard", "offload"])
def test_a_second_trainer_takes_the_teacher_where_the_first_one_placed_it(placement, tmp_path):
    teacher = vit(3)
    kept = weights(teacher)
    made = []
    for name, given in (("first", teacher), ("second", teacher), ("other", copy.deepcopy(teacher))):
        own = {"teacher_placement": placement, "max_steps": 2}
        trainer = distiller(tmp_path / name, own, model=vit(1), teacher_model=given, train_dataset=images(8))
        trainer.train()
        made.append(weights(trainer.student))
    assert_same_weights(made[0], made[1])
    assert_same_weights(made[0], made[2])
    found = dict(named_weights(teacher))
    assert_same_weights({name: found[name] for name in kept}, kept)


def test_a_user_who_placed_the_teacher_in_the_same_way_is_no_contradiction():
    teacher = cpu_offload(vit(), CPU)
    place(teacher, CPU, "offload")
    assert placement_of(teacher) == "offload"
    with pytest.raises(InputError, match="(?s)teacher_placement='device_map'.*placed by 'offload'"):
        place(teacher, CPU, "device_map")


@pytest.mark.parametrize("placement", ["device_map", "offload"])
def test_a_model_is_digested_alike_wherever_it_is(placement):
    # Tied weights count once.
    for model in (vit(), gpt2(), resnet()):
        before = weights_digest(model)
        place(model, CPU, placement)
        assert weights_digest(model) == before


@pytest.mark.parametrize("placement", ["device_map", "offload"])
def test_a_second_trainer_caches_what_a_placed_teacher_gives(placement, tmp_path):
    how = {"samples": 8, "per_device_train_batch_size": 4}
    plain = train("vit", tmp_path / "plain", **how)
    first = make("vit", tmp_path / "first", teacher_placement=placement, **how)
    cached = {"teacher_cache_dir": str(tmp_path / "cache"), "teacher_placement": placement, **how}
    second = make("vit", tmp_path / "second", teacher_model=first.teacher, **cached)
    second.train()
    assert_same(outcome(second), plain, 1e-12)
    assert second.pair.teacher.computed == 8


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
