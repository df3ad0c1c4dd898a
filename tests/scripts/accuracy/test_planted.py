"""scripts/accuracy/planted.py: the order of layers, and layers from which nothing can be learned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from accuracy.models import make_model
from accuracy.planted import PlantedTeacher, plant
from accuracy_cases import TEACHER
from torch import Tensor


@pytest.fixture(scope="module")
def plain(digits) -> Any:
    return make_model({**TEACHER, "depth": 4}, digits.pool, 0).eval()


@torch.no_grad()
def states(model: Any, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = model(pixel_values=images, output_hidden_states=True)
    return out.logits, out.hidden_states


def test_hidden_states_come_in_the_planted_order(digits, plain):
    images = digits.test.columns["pixel_values"][:20]
    logits, own = states(plain, images)
    planted_logits, found = states(PlantedTeacher(plain, [2, -1, 0, 3, 1]), images)
    assert torch.equal(planted_logits, logits) and len(found) == 6
    for place, source in {0: 0, 1: 3, 3: 1, 4: 4, 5: 2}.items():
        assert torch.equal(found[place], own[source])
    assert found[2].shape == own[-1].shape
    assert all(not torch.allclose(found[2], state, atol=0.1) for state in own)
    without = PlantedTeacher(plain, [2, -1, 0])(pixel_values=images)
    assert torch.equal(without.logits, logits) and without.hidden_states is None


def test_a_useless_layer_is_the_same_for_the_same_image(digits, plain):
    images = digits.test.columns["pixel_values"][:40]
    teacher = PlantedTeacher(plain, [0, -1, -2])
    whole = states(teacher, images)[1]
    assert torch.equal(states(teacher, images)[1][2], whole[2])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:13]
    part = states(teacher, images[order])[1]
    for place in (2, 3):
        torch.testing.assert_close(part[place], whole[place][order], rtol=0, atol=0.02)
    assert not torch.allclose(whole[2], whole[3], atol=0.1)


def test_nothing_can_be_learned_from_a_useless_layer(digits, plain):
    """The mean of a class is as far from the others' as that of a random set of the same size."""
    rows = digits.pool
    layer = states(PlantedTeacher(plain, [-1]), rows.columns["pixel_values"])[1][1].flatten(1)
    own = states(plain, rows.columns["pixel_values"])[1][-1].flatten(1)
    labels = rows.columns["labels"]
    assert 0.5 < float(layer.std() / own.std()) < 2

    def between(values: Tensor, groups: Tensor) -> float:
        values = values - values.mean(0)
        means = torch.stack([values[groups == label].mean(0) for label in range(10)])
        return float(means.square().sum() / values.square().sum(1).mean() / 10)

    generator = torch.Generator().manual_seed(0)
    chance = [between(layer, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(20)]
    spread = float(np.std(chance))
    assert abs(between(layer, labels) - np.mean(chance)) < 4 * spread
    assert between(own, labels) > np.mean(chance) + 20 * spread
    # Neither do like images have like values: the nearest neighbor of the pixels is any image.
    flat = rows.columns["pixel_values"].flatten(1)
    nearest = torch.cdist(flat, flat).fill_diagonal_(math.inf).argmin(1)
    cosine = torch.cosine_similarity(layer, layer[nearest]).mean()
    assert abs(float(cosine)) < 0.05


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("useless", [0, 1, 3])
def test_the_last_layer_is_never_the_teachers_own(plain, seed, useless):
    order = plant(plain, layers=4, seed=seed, useless=useless).order
    assert sorted(order) == [-place for place in range(useless, 0, -1)] + [0, 1, 2, 3]
    assert order[-1] != 3 and (order[-1] < 0) == (useless > 0)
    assert plant(plain, layers=4, seed=seed, useless=useless).order == order


def test_a_teacher_may_keep_its_order(plain):
    teacher = plant(plain, layers=4, seed=0, useless=2, permute=False)
    assert [place for place in teacher.order if place >= 0] == [0, 1, 2, 3] and teacher.order[-1] == -1
    assert not teacher.training and teacher.config is plain.config
