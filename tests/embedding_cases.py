"""What the losses on embeddings have in common in their tests."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from kept import named

from hf_semckd.errors import InputError
from hf_semckd.features.layers import FeatureSpec

MASK = (torch.arange(6) < torch.tensor([[3], [6], [1], [5], [2], [4], [6], [2]])).long()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image_tokens(channels, side):
    return FeatureSpec("image tokens", "tokens", channels, 1 + side * side, (side, side), 1)


SCENARIOS = {
    "maps": ([(4, 3, 3), (5, 2, 3)], [(6, 4, 4), (7, 3, 3)]),
    "image tokens": ([image_tokens(4, 2), image_tokens(5, 2)], [image_tokens(6, 3), image_tokens(7, 3)]),
    "text": ([(6, 4), (6, 5)], [(6, 6), (6, 7)]),
}


def shape_of(spec):
    return (spec.length, spec.channels) if isinstance(spec, FeatureSpec) else spec


def vectors(features, scenario):
    """Return what stands for each sample in the last layer, one sum at a time."""
    rows = []
    for i, sample in enumerate(features[-1].tolist()):
        if scenario == "image tokens":
            rows.append(np.array(sample[0]))
        elif scenario == "maps":
            rows.append(np.array([np.mean(channel) for channel in sample]))
        else:
            rows.append(np.mean([token for token, kept in zip(sample, MASK[i], strict=True) if kept], 0))
    return rows


def gradients(loss, student, teacher, masks):
    student = [feature.clone().requires_grad_() for feature in student]
    out = loss(student, teacher, *masks)
    out.total.backward()
    return out, student[-1].grad, [parameter.grad for parameter in loss.parameters()]


class EmbeddingCases:
    """Every loss on embeddings does this; a subclass has `problem`, and says how many parameters there are."""

    problem: Any
    parameters: int
    scenarios: Any = SCENARIOS

    @pytest.mark.parametrize("filling", [float("nan"), float("inf"), 1e30])
    def test_padding_never_enters(self, filling):
        (loss, student, teacher, masks), (other, clean, clean_teacher, _) = self.problem("text"), self.problem("text")
        for feature in (*student, *teacher):
            feature[MASK == 0] = filling
        out, gradient, parameters = gradients(loss, student, teacher, masks)
        expected, expected_gradient, expected_parameters = gradients(other, clean, clean_teacher, masks)
        assert torch.equal(out.per_sample, expected.per_sample)
        assert torch.equal(gradient, expected_gradient) and gradient[MASK == 0].abs().max() == 0
        for left, right in zip(parameters, expected_parameters, strict=True):
            assert torch.equal(left, right)

    def test_a_permutation_of_the_batch_permutes_the_losses(self, scenario):
        loss, student, teacher, masks = self.problem(scenario)
        order, other = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4]), copy.deepcopy(loss)
        out, gradient, _ = gradients(loss, student, teacher, masks)
        moved_masks = [mask if mask is None else mask[order] for mask in masks]
        parts = [feature[order] for feature in student], [feature[order] for feature in teacher]
        moved, moved_gradient, _ = gradients(other, *parts, moved_masks)
        assert out.per_sample.std() > 0
        torch.testing.assert_close(moved.per_sample, out.per_sample[order], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(moved_gradient, gradient[order], rtol=1e-9, atol=1e-14)

    def test_a_batch_of_one_has_a_finite_loss_and_finite_gradients(self, scenario):
        loss, student, teacher, masks = self.problem(scenario, batch=1)
        out, gradient, parameters = gradients(loss, student, teacher, masks)
        assert out.per_sample.shape == (1,) and out.total.isfinite()
        assert all(entry.isfinite().all() for entry in (gradient, *parameters))

    def test_identical_samples_and_empty_ones_have_finite_gradients(self):
        loss, student, teacher, _ = self.problem("text")
        for feature in (*student, *teacher):
            feature[2:5] = feature[1]
        mask = MASK.clone()
        mask[1:5], mask[6:] = 1, 0
        out, gradient, parameters = gradients(loss, student, teacher, (mask, mask))
        assert out.total.isfinite() and all(entry.isfinite().all() for entry in (gradient, *parameters))
        assert gradient[6:].abs().max() == 0
        same = [feature[:1].expand(8, -1, -1).contiguous() for feature in student]
        out, gradient, parameters = gradients(loss, same, teacher, (None, None))
        assert out.total.isfinite() and all(entry.isfinite().all() for entry in (gradient, *parameters))

    def test_only_the_last_layers_are_kept_and_compared(self):
        loss, student, teacher, masks = self.problem("text")
        loss.eval()
        kept = loss.select(teacher, masks[1])
        assert set(named(kept)) == {"whole.1", "mask"}
        out = loss(student, kept, masks[0])
        again = loss([student[0] + 1, student[1]], [teacher[0] - 1, teacher[1]], *masks)
        assert torch.equal(out.per_sample, again.per_sample)

    def test_another_number_of_features_is_refused(self):
        loss, student, teacher, masks = self.problem("text")
        with pytest.raises(InputError, match="1 student and 2 teacher features"):
            loss(student[:1], teacher, *masks)
        with pytest.raises(InputError, match="2 student and 1 teacher features"):
            loss(student, teacher[:1], *masks)

    def settle(self, loss, student, teacher, masks):
        """Let a loss say the same of the same batch from now on."""
        loss.eval()

    def test_the_gradient_of_features_agrees_with_finite_differences(self, scenario):
        loss, student, teacher, masks = self.problem(scenario)
        self.settle(loss, student, teacher, masks)
        _, gradient, _ = gradients(loss, student, teacher, masks)
        direction, step = normal(*student[-1].shape, seed=9), 1e-6
        ahead = loss([student[0], student[-1] + step * direction], teacher, *masks).total
        behind = loss([student[0], student[-1] - step * direction], teacher, *masks).total
        slope = (ahead - behind).detach() / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-5)

    def test_gradients_reach_the_student_and_the_parameters_but_not_the_teacher(self, scenario):
        loss, student, teacher, masks = self.problem(scenario)
        teacher = [feature.requires_grad_() for feature in teacher]
        _, gradient, parameters = gradients(loss, student, teacher, masks)
        assert gradient.isfinite().all() and gradient.abs().max() > 0
        assert len(parameters) == self.parameters
        assert all(entry.isfinite().all() and entry.abs().max() > 0 for entry in parameters)
        assert all(feature.grad is None for feature in teacher)


class RelationCases(EmbeddingCases):
    """A loss without parameters."""

    parameters = 0

    def test_half_precision_features_are_compared_in_float32(self):
        loss, student, teacher, masks = self.problem("text")
        loss.float().eval()
        small = [[feature.bfloat16() for feature in features] for features in (student, teacher)]
        wide = [[feature.float() for feature in features] for features in small]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = loss(*small, *masks)
        assert out.per_sample.dtype == torch.float32
        torch.testing.assert_close(out.per_sample, loss(*wide, *masks).per_sample, rtol=1e-4, atol=1e-7)


class HeadCases(EmbeddingCases):
    """A loss with a trained layer on either side."""

    parameters = 4

    def test_half_precision_features_are_compared_in_float32(self):
        loss, student, teacher, masks = self.problem("text")
        loss.float().eval()
        small = [[feature.bfloat16() for feature in features] for features in (student, teacher)]
        wide = [[feature.float() for feature in features] for features in small]
        out = loss(*small, *masks)
        assert out.per_sample.dtype == torch.float32
        torch.testing.assert_close(out.per_sample, loss(*wide, *masks).per_sample, rtol=1e-4, atol=1e-7)
