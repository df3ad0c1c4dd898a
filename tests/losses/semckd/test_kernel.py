"""The fused error against a loop over samples, layers, positions: values, gradients, digits, memory."""

import pytest
import torch

from hf_semckd.losses.semckd import kernel
from hf_semckd.losses.semckd.kernel import _groups, weighted_feature_error

MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(actual, expected):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def naive_errors(projected, targets, mask):
    """Average squares one position at a time, over the kept positions of each sample; differentiable (B, S, T)."""
    rows = []
    for i in range(len(projected[0])):
        kept = [n for n in range(projected[0].shape[1]) if mask is None or mask[i, n]]
        pairs = [
            [sum(((p[i, n] - y[i, n]) ** 2).mean() for n in kept) / len(kept) for y in targets] for p in projected
        ]
        rows.append(torch.stack([torch.stack(row) for row in pairs]))
    return torch.stack(rows)


def naive(projected, targets, weights, mask=None):
    return (weights * naive_errors(projected, targets, mask)).sum(2)


def problem(seed=0, students=2, layers=4, channels=5, dtype=torch.float64):
    targets = [normal(3, 6, channels, seed=seed + t, dtype=dtype) * (t + 1) + t for t in range(layers)]
    weights = normal(3, students, layers, seed=seed + 50).abs().to(dtype)
    return [normal(3, 6, channels, seed=seed + 99 + s, dtype=dtype) for s in range(students)], targets, weights


@pytest.fixture(params=[2**22, 1], ids=["whole batch", "sample by sample"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK_BYTES", request.param)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("mask", [None, MASK])
def test_it_is_the_naive_weighted_sum(mask, layers, blocks):
    projected, targets, weights = problem(layers=layers)
    value, errors = weighted_feature_error(projected, targets, weights, mask)
    torch.testing.assert_close(errors, naive_errors(projected, targets, mask), rtol=1e-12, atol=0)
    torch.testing.assert_close(value, naive(projected, targets, weights, mask), rtol=1e-12, atol=0)


@pytest.mark.parametrize("trained_weights", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_it_has_the_gradients_of_the_naive_form(mask, trained_weights, blocks):
    upstream = normal(3, 2, seed=40)
    gradients = []
    for form in (lambda *args: weighted_feature_error(*args)[0], naive):
        projected, targets, weights = problem()
        [entry.requires_grad_() for entry in projected]
        weights.requires_grad_(trained_weights)
        (form(projected, targets, weights, mask) * upstream).sum().backward()
        gradients.append([*(entry.grad for entry in projected), *([weights.grad] if trained_weights else [])])
    for actual, expected in zip(*gradients, strict=True):
        assert relative(actual, expected) < 1e-10


def test_only_what_needs_a_gradient_gets_one():
    projected, targets, weights = problem()
    projected[1].requires_grad_()
    targets[0].requires_grad_()
    value, errors = weighted_feature_error(projected, targets, weights)
    value.sum().backward()
    assert projected[0].grad is None and targets[0].grad is None and projected[1].grad.abs().min() > 0
    assert not errors.requires_grad


def test_it_passes_gradcheck_for_projections_and_weights():
    projected, targets, weights = problem(channels=2, layers=3)
    inputs = [entry.requires_grad_() for entry in (weights, *projected)]
    assert torch.autograd.gradcheck(
        lambda w, *p: weighted_feature_error(p, targets, w, MASK)[0], inputs, fast_mode=False
    )


def test_targets_are_standardized_on_the_way():
    projected, targets, weights = problem()
    center, scale = normal(4, 5, seed=7), normal(4, 5, seed=8).abs()
    value, errors = weighted_feature_error(projected, targets, weights, MASK, center=center, scale=scale)
    standard = [(target - center[t]) * scale[t] for t, target in enumerate(targets)]
    torch.testing.assert_close(value, naive(projected, standard, weights, MASK), rtol=1e-12, atol=0)
    torch.testing.assert_close(errors, naive_errors(projected, standard, MASK), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sharpness", [1.0, 30.0], ids=["spread weights", "nearly all on one layer"])
def test_it_keeps_six_digits_in_float32_with_outlier_channels(sharpness):
    projected, targets, weights = problem(channels=64)
    weights = (weights * sharpness).softmax(2)
    for tensor in (*projected, *targets):
        tensor[..., 3] += 1000.0
        tensor[..., 17] -= 3000.0
    narrow = [entry.float().requires_grad_() for entry in (weights, *projected)]
    wide = [entry.detach().double().requires_grad_() for entry in narrow]
    stored = [target.float() for target in targets]
    value, errors = weighted_feature_error(narrow[1:], stored, narrow[0], MASK)
    expected = naive(wide[1:], [target.double() for target in stored], wide[0], MASK)
    value.sum().backward(), expected.sum().backward()
    assert relative(value.detach(), expected.detach()) < 1e-6
    assert relative(narrow[0].grad, wide[0].grad) < 1e-6
    assert torch.equal(errors, narrow[0].grad)
    quiet = [c for c in range(64) if c not in (3, 17)]
    for one, other in zip(narrow[1:], wide[1:], strict=True):
        assert relative(one.grad[..., quiet], other.grad[..., quiet]) < 1e-6


def test_six_digits_stay_when_a_student_layer_has_learned_its_target():
    projected, targets, weights = problem(channels=64, students=1)
    weights = (weights * 30).softmax(2)
    projected = [sum(weights[:, 0, t, None, None] * y for t, y in enumerate(targets)) + 0.01 * projected[0]]
    narrow = [entry.float() for entry in (weights, *projected, *targets)]
    value, _ = weighted_feature_error(narrow[1:2], narrow[2:], narrow[0])
    wide = [entry.double() for entry in narrow]
    assert relative(value, naive(wide[1:2], wide[2:], wide[0])) < 1e-6


def test_a_group_without_weight_is_zero_without_gradient_to_the_projection():
    projected, targets, weights = problem()
    weights[1] = 0
    inputs = [entry.requires_grad_() for entry in (weights, *projected)]
    value, errors = weighted_feature_error(projected, targets, weights)
    value.sum().backward()
    assert value[1].abs().max() == 0
    torch.testing.assert_close(errors, naive_errors(projected, targets, None).detach(), rtol=1e-12, atol=0)
    for entry in inputs[1:]:
        assert entry.grad[1].abs().max() == 0 and entry.grad[0].abs().min() > 0
    assert torch.equal(weights.grad, errors)


def test_nan_in_masked_positions_of_targets_and_projections_is_ignored():
    projected, targets, weights = problem()
    clean = [entry.clone().requires_grad_() for entry in projected]
    expected = naive(clean, targets, weights, MASK)
    expected.sum().backward()
    for tensor in (*projected, *targets):
        tensor[MASK == 0] = float("nan")
    [entry.requires_grad_() for entry in projected]
    value, errors = weighted_feature_error(projected, targets, weights, MASK)
    value.sum().backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    assert errors.isfinite().all()
    for one, other in zip(projected, clean, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outliers_neither_overflow_nor_round(dtype):
    projected, targets, weights = problem(dtype=dtype)
    projected[0][..., 0] += 1000  # its square is beyond float16
    weights = weights.float()
    [entry.requires_grad_() for entry in projected]
    value, errors = weighted_feature_error(projected, targets, weights, MASK)
    value.sum().backward()
    wide = [entry.detach().double() for entry in projected]
    expected = naive(wide, [target.double() for target in targets], weights.double(), MASK)
    assert value.dtype == errors.dtype == torch.float32
    assert relative(value.detach(), expected) < 1e-6
    assert projected[0].grad.dtype == dtype and projected[0].grad.isfinite().all()


def test_autocast_changes_nothing():
    projected, targets, weights = problem(dtype=torch.float32)
    [entry.requires_grad_() for entry in projected]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value, errors = weighted_feature_error(projected, targets, weights, MASK)
        results.append((value, errors, *torch.autograd.grad(value.sum(), projected)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_nothing_of_the_size_of_all_pairs_is_kept_or_made():
    students, layers = 6, 8
    projected = [torch.randn(2, 50, 32, requires_grad=True) for _ in range(students)]
    targets = [torch.randn(2, 50, 32) for _ in range(layers)]
    weights = torch.full((2, students, layers), 1 / layers)
    one = projected[0].numel()
    kept, made = [], []

    class Made(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                entry.numel() for entry in (out if isinstance(out, tuple) else (out,)) if torch.is_tensor(entry)
            )
            return out

    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x), Made():
        value, _ = weighted_feature_error(projected, targets, weights)
        value.sum().backward()
    assert max(made) == layers * one
    assert students * one <= sum(kept) < (students + 1) * one


@pytest.mark.slow
def test_it_compiles_without_a_break():
    projected, targets, weights = problem(dtype=torch.float32)
    [entry.requires_grad_() for entry in projected]

    def run(function):
        value, errors = function(projected, targets, weights, MASK)
        return value, errors, *torch.autograd.grad(value.sum(), projected)

    compiled = torch.compile(weighted_feature_error, fullgraph=True)
    for one, other in zip(run(weighted_feature_error), run(compiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# With the projection inside


@pytest.fixture(params=[(4, 7), (4, 4), "together"], ids=["unlike layers", "like layers", "like layers, together"])
def widths(request, monkeypatch):
    """Widths of two student layers, which a GPU projects together where they are equal."""
    if request.param != "together":
        return request.param
    monkeypatch.setattr(kernel, "UNSTACKED_DEVICES", ())
    # The other way would go unnoticed.
    assert _groups([torch.zeros(2)] * 6) == [slice(0, 2)]
    return (4, 4)


def projected_problem(widths, dtype=torch.float64):
    _, targets, weights = problem(dtype=dtype)
    features = [normal(3, 6, width, seed=30 + s, dtype=dtype) for s, width in enumerate(widths)]
    linears = [
        (normal(5, width, seed=32 + width + 9 * s, dtype=dtype), normal(5, seed=33 + s, dtype=dtype))
        for s, width in enumerate(widths)
    ]
    return features, linears, targets, weights


@pytest.mark.parametrize("mask", [None, MASK])
def test_projections_inside_equal_projections_outside(mask, blocks, widths):
    results = []
    for inside in (True, False):
        features, linears, targets, weights = projected_problem(widths)
        leaves = [entry.requires_grad_() for entry in (weights, *features, *(x for pair in linears for x in pair))]
        if inside:
            value, errors = weighted_feature_error(features, targets, weights, mask, projections=linears)
        else:
            outside = [x @ weight.T + bias for x, (weight, bias) in zip(features, linears, strict=True)]
            value, errors = naive(outside, targets, weights, mask), naive_errors(outside, targets, mask)
        results.append((value, errors, *torch.autograd.grad((value * normal(3, 2, seed=9)).sum(), leaves)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_projections_inside_pass_gradcheck(widths):
    features, linears, targets, weights = projected_problem(widths)
    inputs = [entry.requires_grad_() for entry in (weights, *features, *(x for pair in linears for x in pair))]

    def form(weights, first, second, *linear):
        pairs = [linear[:2], linear[2:]]
        return weighted_feature_error([first, second], targets[:2], weights[:, :, :2], MASK, projections=pairs)[0]

    assert torch.autograd.gradcheck(form, inputs, fast_mode=False)


def test_a_shared_projection_adds_up_its_gradients(widths):
    features, linears, targets, weights = projected_problem(widths)
    weight, bias = (entry.requires_grad_() for entry in linears[0])
    both = [features[0], features[0] * 2]
    value, _ = weighted_feature_error(both, targets, weights, projections=[(weight, bias)] * 2)
    expected = naive([x @ weight.T + bias for x in both], targets, weights)
    wanted = torch.autograd.grad(expected.sum(), (weight, bias))
    for one, other in zip(torch.autograd.grad(value.sum(), (weight, bias)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_projections_inside_follow_autocast(widths):
    features, linears, targets, weights = projected_problem(widths, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, _ = weighted_feature_error(features, targets, weights, MASK, projections=linears)
    rounded = [
        torch.nn.functional.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()).double()
        for x, (weight, bias) in zip(features, linears, strict=True)
    ]
    expected = naive(rounded, [target.double() for target in targets], weights.double(), MASK)
    assert value.dtype == torch.float32
    assert relative(value, expected) < 1e-6


def test_nan_in_masked_features_reaches_no_gradient(widths):
    features, linears, targets, weights = projected_problem(widths)
    leaves = [entry.requires_grad_() for pair in linears for entry in pair]
    clean = torch.autograd.grad(
        weighted_feature_error(features, targets, weights, MASK, projections=linears)[0].sum(), leaves
    )
    for feature in features:
        feature[MASK == 0] = float("nan")
    dirty = torch.autograd.grad(
        weighted_feature_error(features, targets, weights, MASK, projections=linears)[0].sum(), leaves
    )
    for one, other in zip(clean, dirty, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_only_what_needs_a_gradient_gets_one_through_projections(widths):
    features, linears, targets, weights = projected_problem(widths)
    wanted = [features[1].requires_grad_(), linears[0][0].requires_grad_()]
    value, _ = weighted_feature_error(features, targets, weights, MASK, projections=linears)
    found = torch.autograd.grad(value.sum(), wanted)
    outside = [x @ weight.T + bias for x, (weight, bias) in zip(features, linears, strict=True)]
    expected = torch.autograd.grad(naive(outside, targets, weights, MASK).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert features[0].grad is None and linears[1][0].grad is None
