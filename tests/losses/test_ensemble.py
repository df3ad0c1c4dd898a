"""One feature loss per teacher, joined: the weighted sum of the same losses by themselves."""

import copy

import pytest
import torch
from naive import normal

from hf_semckd.errors import ConfigurationError
from hf_semckd.features.targets import TeacherTargets
from hf_semckd.losses import SemCKDLoss
from hf_semckd.losses.ensemble import EnsembleLoss
from hf_semckd.losses.regression import SimKDLoss

STUDENT, TEACHERS = [(6, 8), (6, 8)], ([(6, 5), (6, 5), (6, 5)], [(6, 7), (6, 7)])
WEIGHTS = [0.75, 0.25]


def features(shapes, seed):
    return [normal(4, *shape, seed=seed + index) for index, shape in enumerate(shapes)]


def members():
    torch.manual_seed(0)
    return [SemCKDLoss(STUDENT, shapes, association_bank=8).double() for shapes in TEACHERS]


def parts(losses):
    """Return what each loss keeps of its teacher's features."""
    return [
        loss.select(features(shapes, 20 * k)) for k, (loss, shapes) in enumerate(zip(losses, TEACHERS, strict=True))
    ]


def test_the_sum_of_several_steps_is_that_of_the_losses_alone():
    """Statistics and banks are those of each layer, and collect as they would alone."""
    alone = members()
    joined = EnsembleLoss(copy.deepcopy(alone), WEIGHTS)
    for step in range(3):
        own = [feature.requires_grad_() for feature in features(STUDENT, 100 + step)]
        single = [loss(own, part) for loss, part in zip(alone, parts(alone), strict=True)]
        both = joined(own, TeacherTargets(parts=tuple(parts(joined.members))))
        expected = sum(w * out.per_sample for w, out in zip(WEIGHTS, single, strict=True))
        torch.testing.assert_close(both.per_sample, expected, rtol=1e-12, atol=0)
        weights = torch.cat([w * out.association for w, out in zip(WEIGHTS, single, strict=True)], 2)
        torch.testing.assert_close(both.association, weights, rtol=1e-12, atol=0)
        torch.testing.assert_close(both.association.sum(2), torch.ones(4, 2).double())
        assert both.errors.shape == (4, 2, 5)
    for one, other in zip(alone, joined.members, strict=True):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_losses_of_other_kinds_keep_the_ratio_of_their_default_weights():
    losses = members()
    losses[0].default_weight, losses[1].default_weight = 100.0, 3.0
    joined = EnsembleLoss(losses, WEIGHTS)
    assert joined.default_weight == 100.0
    assert joined.shares == pytest.approx([0.75, 0.25 * 0.03])


def test_settings_that_differ_are_told_for_each_teacher():
    losses = [SemCKDLoss(STUDENT, TEACHERS[0]), SemCKDLoss(STUDENT, TEACHERS[1], association="sinkhorn")]
    settings = EnsembleLoss(losses, WEIGHTS).settings
    assert settings["association"] == ["similarity", "sinkhorn"] and settings["projector"] == "shared"


def test_the_largest_weight_is_that_of_a_teacher_times_its_own():
    published = [SemCKDLoss.published([(4, 4, 4)], [(4, 4, 4)] * layers, batch_size=4) for layers in (2, 3)]
    bounds = [w * loss.upper_bound for w, loss in zip(WEIGHTS, published, strict=True)]
    assert EnsembleLoss(published, WEIGHTS).upper_bound == max(bounds)
    assert EnsembleLoss(members(), WEIGHTS).upper_bound is None


def test_losses_that_replace_the_classifier_are_refused():
    with pytest.raises(ConfigurationError, match="with one teacher"):
        EnsembleLoss([SimKDLoss([(4, 4, 4)], [(8, 4, 4)]) for _ in range(2)], WEIGHTS)
