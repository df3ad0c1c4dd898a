"""What the losses on layers have in common in their tests: layers that meet in every way, and what all must do."""

from typing import Any

import numpy as np
import pytest
import torch

from hf_semckd.errors import InputError
from hf_semckd.features.layers import FeatureSpec

B = 4

MASK = (torch.arange(6) < torch.tensor([[3], [6], [1], [5]])).long()

SHIFTED = (torch.arange(6) > torch.tensor([[0], [1], [-1], [3]])).long()

OTHER = (torch.arange(9) < torch.tensor([[9], [2], [5], [4]])).long()


def patches(channels, side, prefix):
    return FeatureSpec("patches", "tokens", channels, prefix + side * side, (side, side), prefix)


SCENARIOS = {
    "maps": ([(4, 6, 5), (5, 3, 3), (2, 4, 4)], [(6, 4, 7), (3, 5, 2)], None, None, True),
    "patches to maps": ([patches(4, 4, 1), patches(5, 4, 1)], [(6, 3, 5), (3, 2, 2), (6, 6, 6)], None, None, True),
    "maps to patches": ([(4, 6, 5), (5, 2, 3)], [patches(6, 3, 2), patches(3, 3, 2)], None, None, True),
    "patches": ([patches(4, 3, 1)] * 2, [patches(6, 3, 1)] * 2, None, None, True),
    "text": ([(6, 4), (6, 5)], [(6, 6), (6, 3), (6, 6)], MASK, MASK, True),
    "two paddings": ([(6, 4), (6, 5)], [(6, 6), (6, 3), (6, 2)], MASK, SHIFTED, True),
    "other tokenization": ([(6, 4), (6, 5)], [(9, 6), (9, 3)], MASK, OTHER, False),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spec_of(shape):
    return shape if isinstance(shape, FeatureSpec) else FeatureSpec.from_shape(shape, "layer")


def features_of(shapes, seed, batch=B):
    sizes = [(e.length, e.channels) if isinstance(e, FeatureSpec) else e for e in shapes]
    return [normal(batch, *size, seed=seed + n) * (n + 1) + 0.3 for n, size in enumerate(sizes)]


def cells(feature, spec):
    """Return one sample's map, or its patches, as {(row, column): vector}, with height and width."""
    if feature.ndim == 3:
        height, width = feature.shape[1:]
        return {(y, x): feature[:, y, x] for y in range(height) for x in range(width)}, height, width
    height, width = spec.grid
    rows = range(height)
    return {(y, x): feature[spec.prefix + y * width + x] for y in rows for x in range(width)}, height, width


def pooled(feature, spec, size):
    """Return the averages of the cells that fall into each cell of a smaller grid, row by row."""
    vectors, height, width = cells(feature, spec)
    out = []
    for y in range(size[0]):
        for x in range(size[1]):
            rows = range(y * height // size[0], -(-(y + 1) * height // size[0]))
            columns = range(x * width // size[1], -(-(x + 1) * width // size[1]))
            group = [vectors[row, column] for row in rows for column in columns]
            out.append(sum(group) / len(group))
    return out


def average(tokens, mask):
    kept = [tokens[n] for n in range(len(tokens)) if mask is None or mask[n]]
    return sum(kept) / len(kept)


def met(scenario, i, s, t, student, teacher):
    """Return the vectors of sample i in student layer s and teacher layer t, position by position that counts."""
    students, teachers, own, theirs, aligned = SCENARIOS[scenario]
    first, second = spec_of(students[s]), spec_of(teachers[t])
    left, right = student[s][i].detach().numpy(), teacher[t][i].detach().numpy()
    if first.grid and second.grid and (left.ndim == 3 or right.ndim == 3):
        sizes = cells(left, first)[1:], cells(right, second)[1:]
        size = min(sizes[0][0], sizes[1][0]), min(sizes[0][1], sizes[1][1])
        return list(zip(pooled(left, first, size), pooled(right, second, size), strict=True))
    if not aligned:
        return [(average(left, own[i]), average(right, theirs[i]))]
    positions = range(len(left))
    return [(left[n], right[n]) for n in positions if own is None or (own[i, n] and theirs[i, n])]


PAIRED = {(3, 2): [0, 1, 1], (2, 3): [1, 2], (2, 2): [0, 1]}


def results(loss, student, teacher, own, theirs):
    """Return the loss of each sample and all gradients; None where a layer takes no part."""
    inputs = [feature.clone().requires_grad_() for feature in student]
    out = loss(inputs, teacher, own, theirs)
    wanted = [*inputs, *loss.parameters()]
    return out.per_sample.detach(), torch.autograd.grad(out.total, wanted, allow_unused=True)


class LayerCases:
    """Every loss on layers does this; a subclass has `problem`, `oracle` and `scenarios`."""

    problem: Any
    oracle: Any
    scenarios: Any

    def test_it_is_what_loops_over_samples_positions_and_channels_give(self, scenario):
        loss, student, teacher, own, theirs = self.problem(scenario)
        out = loss(student, teacher, own, theirs)
        expected = self.oracle(loss, scenario, student, teacher)
        assert np.std(expected) > 1e-3, "equal losses would not tell the samples apart"
        np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-9)
        assert float(out.total.detach()) == pytest.approx(np.mean(expected), rel=1e-9)
        assert out.association is None and out.errors is None

    @pytest.mark.parametrize("scenario", ["maps", "two paddings"])
    def test_the_gradient_agrees_with_finite_differences(self, scenario):
        loss, student, teacher, own, theirs = self.problem(scenario)
        for feature in student:
            feature.requires_grad_()
        loss(student, teacher, own, theirs).total.backward()
        for s, feature in enumerate(student):
            if feature.grad is None:
                continue
            direction, step = normal(*feature.shape, seed=90 + s), 1e-6
            with torch.no_grad():
                sides = [[*student[:s], feature + sign * step * direction, *student[s + 1 :]] for sign in (1, -1)]
                ahead, behind = (float(loss(side, teacher, own, theirs).total) for side in sides)
            assert float((feature.grad * direction).sum()) == pytest.approx((ahead - behind) / (2 * step), rel=1e-5)

    @pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e30])
    def test_padding_reaches_neither_the_loss_nor_a_gradient(self, padded, junk):
        loss, student, teacher, own, theirs = self.problem(padded)
        clean, gradients = results(loss, student, teacher, own, theirs)
        student = [feature.masked_fill(own.unsqueeze(-1) == 0, junk) for feature in student]
        teacher = [feature.masked_fill(theirs.unsqueeze(-1) == 0, junk) for feature in teacher]
        dirty, others = results(loss, student, teacher, own, theirs)
        assert torch.equal(dirty, clean) and clean.isfinite().all()
        for left, right in zip(others, gradients, strict=True):
            assert (left is None and right is None) or (torch.equal(left, right) and left.isfinite().all())
        kept = [entry for entry in others[: len(student)] if entry is not None]
        assert kept and all(entry[own == 0].abs().max() == 0 for entry in kept)

    def test_the_loss_follows_a_permutation_of_the_batch(self, scenario):
        loss, student, teacher, own, theirs = self.problem(scenario)
        order = torch.tensor([2, 0, 3, 1])
        out = loss(student, teacher, own, theirs)
        masks = [None if mask is None else mask[order] for mask in (own, theirs)]
        moved = loss([feature[order] for feature in student], [feature[order] for feature in teacher], *masks)
        torch.testing.assert_close(moved.per_sample, out.per_sample[order], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(moved.total, out.total, rtol=1e-10, atol=1e-14)

    @pytest.mark.parametrize(("students", "teachers"), [(1, 3), (3, 3), (2, 2), (2, 4), (0, 0)])
    def test_another_number_of_features_is_refused(self, students, teachers):
        loss, student, teacher, own, theirs = self.problem("text")
        with pytest.raises(InputError, match=r"(?s)number of features.*expected: 2 and 3"):
            loss([*student, *student][:students], [*teacher, *teacher][:teachers], own, theirs)


class AloneCases(LayerCases):
    """A loss of each sample by itself."""

    def test_a_sample_gives_the_same_alone_as_in_a_batch(self, scenario):
        loss, student, teacher, own, theirs = self.problem(scenario)
        whole = loss(student, teacher, own, theirs).per_sample
        for i in range(B):
            masks = [None if mask is None else mask[i : i + 1] for mask in (own, theirs)]
            alone = loss([e[i : i + 1] for e in student], [e[i : i + 1] for e in teacher], *masks)
            torch.testing.assert_close(alone.per_sample, whole[i : i + 1], rtol=1e-10, atol=1e-14)


class RegressionCases(AloneCases):
    """A loss with weights of its own."""

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_features_are_compared_in_float32(self, dtype):
        loss, student, teacher, own, theirs = self.problem("text")
        # Squares of these are beyond float16.
        student, teacher = (
            [(500 * entry).to(dtype) for entry in student],
            [(500 * entry).to(dtype) for entry in teacher],
        )
        out = loss.float()([entry.requires_grad_() for entry in student], teacher, own, theirs)
        wide = [entry.detach().double() for entry in student], [entry.double() for entry in teacher]
        expected = loss.double()(*wide, own, theirs).per_sample.detach()
        assert out.per_sample.dtype is torch.float32
        torch.testing.assert_close(out.per_sample.detach().double(), expected, rtol=2e-4, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_parameters_in_half_precision_give_a_loss_in_float32(self, dtype):
        loss, student, teacher, own, theirs = self.problem("text")
        expected = loss([500 * entry for entry in student], [500 * entry for entry in teacher], own, theirs).per_sample
        student, teacher = (
            [(500 * entry).to(dtype) for entry in student],
            [(500 * entry).to(dtype) for entry in teacher],
        )
        out = loss.to(dtype)(student, teacher, own, theirs).per_sample
        assert out.dtype is torch.float32
        torch.testing.assert_close(out.double(), expected, rtol=5e-2, atol=0)
