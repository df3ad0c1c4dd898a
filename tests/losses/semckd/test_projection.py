"""How the projections of student layers start, and what that does to a student's first step."""

import numpy as np
import pytest
import torch
from naive import normal
from torch import nn

from hf_semckd.config import SemCKDConfig
from hf_semckd.errors import ConfigurationError
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses import SemCKDLoss
from hf_semckd.losses.semckd.projection import ConvolutionalProjection, ZeroLinear
from hf_semckd.training.options import loss_options

TEXT = ([(5, 4), (5, 4)], [(5, 6), (5, 6), (5, 3)])
MAPS = ([(4, 6, 6), (5, 3, 3)], [(7, 6, 6), (8, 3, 3)])
PATCHES = tuple([FeatureSpec("block", "tokens", width, 5, (2, 2), 1)] * 2 for width in (4, 6))


def specs(shapes):
    return [shape if isinstance(shape, FeatureSpec) else FeatureSpec.from_shape(shape, "layer") for shape in shapes]


def configured(tmp_path, pair, **arguments):
    torch.manual_seed(3)
    config = SemCKDConfig(str(tmp_path), use_cpu=True, report_to="none", **arguments)
    return SemCKDLoss.for_layers(specs(pair[0]), specs(pair[1]), loss_options(config))


def linears(loss):
    return [entry for entry in loss.projection.modules() if isinstance(entry, nn.Linear)]


def features(shapes, seed):
    return [normal(8, *shape, seed=seed + index).float().requires_grad_() for index, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("pair", "arguments", "expected"),
    [
        (TEXT, {}, "zero"),
        (TEXT, {"projection_init": "random"}, "random"),
        (MAPS, {}, "random"),
        (MAPS, {"projection_init": "zero"}, "zero"),
        (MAPS, {"projector": "shared", "projection_init": "zero"}, "zero"),
        (PATCHES, {}, "random"),
        (PATCHES, {"projection_init": "zero"}, "zero"),
        (TEXT, {"projector": "pairwise"}, "random"),
    ],
)
def test_projections_start_as_configured_and_at_zero_on_text(tmp_path, pair, arguments, expected):
    loss = configured(tmp_path, pair, **arguments)
    assert loss.settings["projection_init"] == expected
    if arguments.get("projector") == "pairwise":
        assert not linears(loss)
        return
    assert linears(loss)
    for linear in linears(loss):
        assert bool(linear.weight.any() or linear.bias.any()) is (expected == "random")


def test_a_decoder_before_a_projection_at_zero_is_random(tmp_path):
    loss = configured(tmp_path, MAPS, projection_init="zero")
    assert all(parameter.any() for parameter in loss.decoder.parameters() if parameter.dim() == 4)


def test_a_projection_at_zero_learns_before_the_student_is_pushed(tmp_path):
    loss = configured(tmp_path, TEXT)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    student, teacher = features(TEXT[0], 1), features(TEXT[1], 20)
    loss(student, teacher).total.backward()
    assert all(not feature.grad.any() for feature in student)
    assert all(linear.weight.grad.any() for linear in linears(loss))
    optimizer.step()
    loss(student, teacher).total.backward()
    assert all(feature.grad.any() for feature in student)


def test_at_zero_the_error_is_the_variance_of_standardized_targets(tmp_path):
    loss = configured(tmp_path, TEXT, association="uniform", target_norm="none")
    teacher = features(TEXT[1], 20)
    errors = loss(features(TEXT[0], 1), teacher).errors
    expected = torch.stack([(feature**2).mean((1, 2)) for feature in teacher], 1)
    torch.testing.assert_close(errors, expected.detach().unsqueeze(1).expand_as(errors))


def test_a_layer_at_zero_returns_to_zero():
    layer = ZeroLinear(3, 2)
    nn.init.normal_(layer.weight)
    layer.reset_parameters()
    assert not layer.weight.any() and not layer.bias.any()


def test_pairwise_projections_start_as_published():
    loss = SemCKDLoss(*TEXT, projector="pairwise")
    assert loss.settings["projection_init"] == "random"
    assert all(parameter.any() for parameter in loss.projection.parameters() if parameter.dim() == 4)


def test_pairwise_projections_at_zero_are_refused():
    with pytest.raises(ConfigurationError, match="cannot start at zero"):
        SemCKDLoss(*TEXT, projector="pairwise", projection_init="zero")


def test_a_loss_made_by_hand_starts_at_random():
    loss = SemCKDLoss(*TEXT)
    assert loss.settings["projection_init"] == "random"
    assert all(linear.weight.any() for linear in linears(loss))


def test_convolutional_projection_has_the_published_layout():
    layers = list(ConvolutionalProjection(5, 7))
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert [type(layer) for layer in layers] == kinds
    shapes = [tuple(layer.weight.shape) for layer in layers if isinstance(layer, nn.Conv2d)]
    assert shapes == [(14, 5, 1, 1), (14, 14, 3, 3), (7, 14, 1, 1)]
    assert all(layer.bias is None for layer in layers if isinstance(layer, nn.Conv2d))


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutional_projection_keeps_the_grid(kernel):
    assert ConvolutionalProjection(5, 7, kernel)(torch.randn(2, 5, 3, 4)).shape == (2, 7, 3, 4)


def numpy_projection(rows, projection):
    """Project (rows, C_s) with 1x1 convolutions and batch statistics."""
    for layer in projection:
        if isinstance(layer, nn.Conv2d):
            rows = rows @ layer.weight.detach().numpy()[:, :, 0, 0].T
        elif isinstance(layer, nn.BatchNorm2d):
            rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + layer.eps)
        else:
            rows = np.maximum(rows, 0)
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_project_tokens_sees_kept_tokens_only_and_gives_zero_elsewhere(masked):
    torch.manual_seed(0)
    projection, tokens = ConvolutionalProjection(5, 3, 1).double(), normal(4, 6, 5)
    mask = (torch.arange(6) < torch.tensor([[2], [6], [1], [4]])).long() if masked else torch.ones(4, 6).long()
    tokens[mask == 0] = 1e5
    actual = projection.project_tokens(tokens, mask if masked else None).detach()
    np.testing.assert_allclose(
        actual[mask.bool()], numpy_projection(tokens[mask.bool()].numpy(), projection), rtol=1e-10
    )
    assert (actual[mask == 0] == 0).all()


@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutional_projection_trains_on_a_single_position(kernel):
    projection = ConvolutionalProjection(5, 3, kernel)
    out = projection(torch.randn(1, 5, 1, 1))
    out.sum().backward()
    assert out.shape == (1, 3, 1, 1) and out.isfinite().all()
    assert all(entry.grad is not None for entry in projection.parameters())
