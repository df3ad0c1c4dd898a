"""Losses on attention against loops over their equations, and where queries, keys and values are found."""

import math

import layer_cases
import numpy as np
import pytest
import torch
from embedding_cases import MASK, shape_of
from kept import named
from layer_cases import (
    PAIRED,
    AloneCases,
    B,
    features_of,
    met,
    normal,
)
from torch import nn
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.features.capture import FeatureCapture
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses.attention import ATLoss, MiniLMLoss

# Student layers, teacher layers, masks of both, one tokenization.
# With another tokenization every pair meets at one position: it is refused.
AT_SCENARIOS = {name: entry for name, entry in layer_cases.SCENARIOS.items() if name != "other tokenization"}


def at_problem(scenario):
    students, teachers, own, theirs, aligned = AT_SCENARIOS[scenario]
    torch.manual_seed(0)
    loss = ATLoss(students, teachers, tokens_aligned=aligned).double()
    return loss, features_of(students, 0), features_of(teachers, 50), own, theirs


# Which teacher layer each student layer is paired with, by hand.


def unit(vectors):
    energies = [sum(value**2 for value in vector) / len(vector) for vector in vectors]
    length = math.sqrt(sum(energy**2 for energy in energies))
    return [energy / length for energy in energies]


def oracle(loss, scenario, student, teacher):
    out = np.zeros(B)
    for s, t in enumerate(PAIRED[len(student), len(teacher)]):
        for i in range(B):
            left, right = (unit(vectors) for vectors in zip(*met(scenario, i, s, t, student, teacher), strict=True))
            out[i] += sum((a - b) ** 2 for a, b in zip(left, right, strict=True)) / len(left)
    return out


def test_at_the_published_weight_is_the_default():
    assert ATLoss.default_weight == 1000.0


@pytest.mark.parametrize("scenario", AT_SCENARIOS)
def test_at_gradients_reach_the_student_and_the_parameters_and_not_the_teacher(scenario):
    loss, student, teacher, own, theirs = at_problem(scenario)
    for feature in [*student, *teacher]:
        feature.requires_grad_()
    loss(student, teacher, own, theirs).total.backward()
    compared = range(len(student))
    assert all((feature.grad is not None) == (s in compared) for s, feature in enumerate(student))
    assert all(student[s].grad.abs().sum() > 0 for s in compared)
    assert all(entry.grad is not None and entry.grad.abs().sum() > 0 for entry in loss.parameters())
    assert len(list(loss.parameters())) == 0
    assert all(feature.grad is None for feature in teacher)


def test_at_of_the_teacher_only_the_used_layers_are_kept():
    loss, student, teacher, own, theirs = at_problem("text")
    kept = loss.select(teacher, theirs)
    assert set(named(kept)) == {*(f"whole.{t}" for t in [1, 2]), "mask"}
    assert torch.equal(loss(student, kept, own).per_sample, loss(student, teacher, own, theirs).per_sample)


def test_at_no_layer_is_refused():
    with pytest.raises(InputError, match="no student layer"):
        ATLoss([], [(6, 4)])
    with pytest.raises(InputError, match="no teacher layer"):
        ATLoss([(6, 4)], [])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_at_half_precision_features_are_compared_in_float32(dtype):
    loss, student, teacher, own, theirs = at_problem("text")
    # Squares of these are beyond float16.
    student, teacher = [(500 * entry).to(dtype) for entry in student], [(500 * entry).to(dtype) for entry in teacher]
    out = loss.float()([entry.requires_grad_() for entry in student], teacher, own, theirs)
    wide = [entry.detach().double() for entry in student], [entry.double() for entry in teacher]
    expected = loss.double()(*wide, own, theirs).per_sample.detach()
    assert out.per_sample.dtype is torch.float32
    torch.testing.assert_close(out.per_sample.detach().double(), expected, rtol=2e-4, atol=1e-6)


def test_at_maps_of_the_same_shape_up_to_scale_and_width_have_no_loss():
    loss = ATLoss([(4, 3, 5)], [(8, 3, 5)]).double()
    student = normal(B, 4, 3, 5)
    assert float(loss([student], [-7 * torch.cat([student, student], 1)]).total) < 1e-25
    assert float(loss([student], [torch.cat([student, student.flip(2)], 1)]).total) > 1e-3


def test_at_one_active_position_each_is_worked_out_by_hand():
    loss = ATLoss([(4, 3)], [(4, 2)]).double()
    student, teacher = torch.zeros(1, 4, 3).double(), torch.zeros(1, 4, 2).double()
    student[0, 0], teacher[0, 2] = 5.0, -0.1
    assert float(loss([student], [teacher]).total) == pytest.approx(2 / 4)
    mask = torch.tensor([[1, 1, 1, 0]])
    assert float(loss([student], [teacher], mask, mask).total) == pytest.approx(2 / 3)
    teacher[0, 0] = 0.1
    expected = ((1 - math.sqrt(0.5)) ** 2 + 0.5) / 4
    assert float(loss([student], [teacher]).total) == pytest.approx(expected)


def test_at_a_dead_layer_has_a_finite_gradient():
    loss = ATLoss([(6, 4)], [(6, 3)])
    student = torch.zeros(B, 6, 4, requires_grad=True)
    out = loss([student], [normal(B, 6, 3).float()])
    out.total.backward()
    torch.testing.assert_close(out.per_sample.detach(), torch.full((B,), 1 / 6))
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("students", "teachers", "aligned"),
    [
        ([(6, 4), (6, 5)], [(9, 6), (9, 3)], True),
        ([(6, 4), (6, 5)], [(6, 6), (6, 3)], False),
        ([(4, 5, 5)], [(6, 3)], True),
        ([(4, 5, 5), (4, 1, 1)], [(6, 1, 1), (6, 7, 7)], True),
        ([(4, 5, 1)], [(6, 1, 5)], True),
        ([(1, 4)], [(1, 6)], True),
    ],
)
def test_at_pairs_that_all_meet_at_one_position_are_refused(students, teachers, aligned):
    with pytest.raises(
        ConfigurationError, match=r"(?s)received: pairs that share one position.*expected: .*what to do: "
    ):
        ATLoss(students, teachers, tokens_aligned=aligned)


def test_at_a_pair_that_meets_at_one_position_is_left_out():
    students, teachers = [(4, 6, 6), (5, 3)], [(6, 3, 3), (7, 4, 4)]
    loss, first = ATLoss(students, teachers), ATLoss(students[:1], teachers[:1])
    student, teacher = features_of(students, 0), features_of(teachers, 50)
    assert loss.pairs == [(0, 0)] and set(named(loss.select(teacher))) == {"whole.0"}
    assert torch.equal(loss(student, teacher).per_sample, first(student[:1], teacher[:1]).per_sample)


class TestAttentionTransfer(AloneCases):
    problem = staticmethod(at_problem)
    oracle = staticmethod(oracle)
    scenarios = AT_SCENARIOS

    def test_it_is_what_loops_over_samples_positions_and_channels_give(self, scenario):
        loss, student, teacher, own, theirs = at_problem(scenario)
        out = loss(student, teacher, own, theirs)
        expected = oracle(loss, scenario, student, teacher)
        assert np.std(expected) > 1e-4, "equal losses would not tell the samples apart"
        np.testing.assert_allclose(out.per_sample.detach(), expected, rtol=1e-9)
        assert float(out.total.detach()) == pytest.approx(np.mean(expected), rel=1e-9)
        assert out.association is None and out.errors is None


OTHER_MASK = (torch.arange(6) < torch.tensor([[3], [5], [2], [5], [2], [4], [3], [6]])).long()


def image_tokens(channels, side=2, prefix=1):
    return FeatureSpec("image tokens", "tokens", channels, prefix + side * side, (side, side), prefix)


# Student layers, teacher layers, and the number of relation heads.
MINILM_SCENARIOS = {
    "text": ([(6, 4)] * 3, [(6, 12)] * 3, 4),
    "narrow keys": ([(6, 12), (6, 6), (6, 6)], [(6, 12)] * 3, 6),
    "image tokens": ([image_tokens(6)] * 3, [image_tokens(9)] * 3, 3),
}


def minilm_problem(scenario, batch=8, **options):
    """Return a loss, features of both models, and the masks of both (text only)."""
    students, teachers, _ = MINILM_SCENARIOS[scenario]
    loss = MiniLMLoss(students, teachers, **options)
    student = [normal(batch, *shape_of(spec), seed=s) for s, spec in enumerate(students)]
    teacher = [normal(batch, *shape_of(spec), seed=50 + t) for t, spec in enumerate(teachers)]
    masks = (None, None) if scenario == "image tokens" else (MASK[:batch], OTHER_MASK[:batch])
    return loss, student, teacher, masks


def relation(vectors, position):
    """Return the softmax over keys of the scaled products with one query."""
    powers = [math.exp(vectors[position] @ key / math.sqrt(len(key))) for key in vectors]
    return [power / sum(powers) for power in powers]


def divergences(student, teacher, heads, masks):
    """Return the loss of each sample: the mean over relations, heads and positions of KL(teacher || student)."""
    found = []
    for i in range(len(student[0])):
        kept = range(student[0].shape[1])
        if masks[0] is not None:
            kept = [n for n in kept if masks[0][i, n] and masks[1][i, n]]
        parts = []
        for own, theirs in zip(student, teacher, strict=True):
            own, theirs = own[i, kept].numpy(), theirs[i, kept].numpy()
            for left, right in zip(np.split(own, heads, 1), np.split(theirs, heads, 1), strict=True):
                for n in range(len(kept)):
                    pairs = zip(relation(right, n), relation(left, n), strict=True)
                    parts.append(sum(t * math.log(t / s) for t, s in pairs))
        found.append(sum(parts) / len(parts))
    return found


def gradients(loss, student, teacher, masks):
    student = [feature.clone().requires_grad_() for feature in student]
    out = loss(student, teacher, *masks)
    out.total.backward()
    return out, [feature.grad for feature in student]


@pytest.mark.parametrize("heads", [None, 1])
@pytest.mark.parametrize("scenario", MINILM_SCENARIOS)
def test_minilm_the_loss_is_that_of_the_equations(scenario, heads):
    loss, student, teacher, masks = minilm_problem(scenario, relation_heads=heads)
    expected = divergences(student, teacher, heads or MINILM_SCENARIOS[scenario][2], masks)
    out = loss(student, teacher, *masks)
    np.testing.assert_allclose(out.per_sample, expected, rtol=1e-10, atol=1e-15)
    assert float(out.total) == pytest.approx(sum(expected) / 8, rel=1e-10) and out.total > 0


def test_minilm_one_mask_holds_for_both_models():
    loss, student, teacher, _ = minilm_problem("text")
    expected = divergences(student, teacher, 4, (MASK, MASK))
    np.testing.assert_allclose(loss(student, teacher, MASK).per_sample, expected, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(loss(student, teacher, None, MASK).per_sample, expected, rtol=1e-10, atol=1e-15)


def test_minilm_each_relation_has_a_third_of_the_weight():
    loss, student, teacher, masks = minilm_problem("text")
    total = 0
    for layer in range(3):
        own, theirs = [student[layer]] * 3, [teacher[layer]] * 3
        total += loss(own, theirs, *masks).total / 3
    torch.testing.assert_close(loss(student, teacher, *masks).total, total)


def test_minilm_equal_relations_have_no_loss():
    loss, student, _, masks = minilm_problem("narrow keys", relation_heads=2)
    same = MiniLMLoss(MINILM_SCENARIOS["narrow keys"][0], MINILM_SCENARIOS["narrow keys"][0])
    assert same(student, student, *masks).total.abs() < 1e-15
    assert loss.relation_heads == 2 and not list(loss.parameters())


@pytest.mark.parametrize("scenario", MINILM_SCENARIOS)
def test_minilm_gradients_reach_the_student_and_not_the_teacher(scenario):
    loss, student, teacher, masks = minilm_problem(scenario)
    teacher = [feature.requires_grad_() for feature in teacher]
    _, features = gradients(loss, student, teacher, masks)
    assert all(feature.isfinite().all() and feature.abs().max() > 0 for feature in features)
    assert all(feature.grad is None for feature in teacher)


@pytest.mark.parametrize("scenario", MINILM_SCENARIOS)
def test_minilm_the_gradient_of_features_agrees_with_finite_differences(scenario):
    loss, student, teacher, masks = minilm_problem(scenario)
    _, features = gradients(loss, student, teacher, masks)
    for layer in range(3):
        direction, step = normal(*student[layer].shape, seed=9 + layer), 1e-6
        moved = [list(student), list(student)]
        moved[0][layer], moved[1][layer] = student[layer] + step * direction, student[layer] - step * direction
        slope = (loss(moved[0], teacher, *masks).total - loss(moved[1], teacher, *masks).total) / (2 * step)
        assert float((features[layer] * direction).sum()) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("filling", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("side", ["left", "right"])
def test_minilm_padding_never_enters(side, filling):
    loss, student, teacher, _ = minilm_problem("text")
    mask = MASK if side == "right" else MASK.flip(1)
    expected, expected_features = gradients(loss, student, teacher, (mask, mask))
    for feature in (*student, *teacher):
        feature[mask == 0] = filling
    out, features = gradients(loss, student, teacher, (mask, mask))
    assert torch.equal(out.per_sample, expected.per_sample)
    for left, right in zip(features, expected_features, strict=True):
        assert torch.equal(left, right) and left[mask == 0].abs().max() == 0


def test_minilm_longer_padding_makes_no_difference():
    loss, student, teacher, masks = minilm_problem("text")

    def longer(features):
        return [nn.functional.pad(feature, (0, 0, 0, 3), value=5.0) for feature in features]

    wide = [nn.functional.pad(mask, (0, 3)) for mask in masks]
    out = loss(longer(student), longer(teacher), *wide)
    torch.testing.assert_close(out.per_sample, loss(student, teacher, *masks).per_sample, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_minilm_a_sample_without_any_token_has_no_loss_and_finite_gradients(dtype):
    loss, student, teacher, _ = minilm_problem("text")
    mask = MASK.clone()
    mask[4] = 0
    for feature in (*student, *teacher):
        feature[4] = float("nan")
    parts = [[feature.to(dtype) for feature in features] for features in (student, teacher)]
    out, features = gradients(loss, *parts, (mask, mask))
    assert out.per_sample[4] == 0 and out.per_sample.isfinite().all()
    assert all(feature.isfinite().all() and feature[4].abs().max() == 0 for feature in features)


@pytest.mark.parametrize("scenario", MINILM_SCENARIOS)
def test_minilm_a_permutation_of_the_batch_permutes_the_losses(scenario):
    loss, student, teacher, masks = minilm_problem(scenario)
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    parts = [feature[order] for feature in student], [feature[order] for feature in teacher]
    moved = loss(*parts, *[mask if mask is None else mask[order] for mask in masks])
    out = loss(student, teacher, *masks)
    assert out.per_sample.std() > 0
    torch.testing.assert_close(moved.per_sample, out.per_sample[order], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scenario", MINILM_SCENARIOS)
def test_minilm_a_batch_of_one_has_the_loss_that_it_has_among_others(scenario):
    loss, student, teacher, masks = minilm_problem(scenario)
    cut = [[feature[:1] for feature in features] for features in (student, teacher)]
    out, features = gradients(loss, *cut, [mask if mask is None else mask[:1] for mask in masks])
    torch.testing.assert_close(out.per_sample, loss(student, teacher, *masks).per_sample[:1])
    assert all(feature.isfinite().all() for feature in features)


def test_minilm_half_precision_features_are_compared_in_float32():
    loss, student, teacher, masks = minilm_problem("text")
    small = [[feature.bfloat16() for feature in features] for features in (student, teacher)]
    wide = [[feature.float() for feature in features] for features in small]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = loss(*small, *masks)
    assert out.per_sample.dtype == torch.float32
    torch.testing.assert_close(out.per_sample, loss(*wide, *masks).per_sample, rtol=1e-5, atol=1e-7)


def test_minilm_large_vectors_stay_finite():
    loss, student, teacher, masks = minilm_problem("text")
    large = [[1e4 * feature.float() for feature in features] for features in (student, teacher)]
    out, features = gradients(loss, *large, masks)
    assert out.total.isfinite() and all(feature.isfinite().all() for feature in features)


@pytest.mark.parametrize(
    ("student", "teacher", "heads"), [(384, 768, 48), (768, 1024, 32), (312, 768, 24), (5, 7, 1), (192, 768, 48)]
)
def test_minilm_the_default_number_of_heads_is_the_largest_that_divides_both_widths(student, teacher, heads):
    assert MiniLMLoss([(6, student)] * 3, [(6, teacher)] * 3).relation_heads == heads


@pytest.mark.parametrize("heads", [0, -1, 3, 8])
def test_minilm_a_number_of_heads_that_does_not_divide_both_widths_is_refused(heads):
    with pytest.raises(ConfigurationError, match=rf"(?s)relation_heads={heads}\n.*a divisor of 4"):
        MiniLMLoss([(6, 4)] * 3, [(6, 12)] * 3, relation_heads=heads)


@pytest.mark.parametrize(
    ("students", "teachers", "aligned", "text"),
    [
        ([(6, 4)] * 3, [(6, 4)] * 3, False, "with another tokenization"),
        ([(4, 6, 6)] * 3, [(6, 4)] * 3, True, "a map at `student 0`"),
        ([(6, 4)] * 3, [(4, 6, 6)] * 3, True, "a map at `teacher 0`"),
        ([(4, 6, 6)] * 3, [(4, 6, 6)] * 3, True, "a map at `student 0` for the student, a map at"),
        ([image_tokens(4, 2)] * 3, [image_tokens(4, 3)] * 3, True, "5 tokens .*10 tokens"),
        ([(6, 4)] * 3, [(9, 4)] * 3, True, "6 tokens .*9 tokens"),
        ([(6, 4)] * 2, [(6, 4)] * 3, True, "2 student and 3 teacher layers"),
        ([(6, 4)] * 3, [(6, 4)] * 4, True, "3 student and 4 teacher layers"),
    ],
)
def test_minilm_layers_that_cannot_be_compared_are_refused(students, teachers, aligned, text):
    with pytest.raises(ConfigurationError, match=f"(?s){text}"):
        MiniLMLoss(students, teachers, tokens_aligned=aligned)


def test_minilm_another_number_of_features_is_refused():
    loss, student, teacher, masks = minilm_problem("text")
    with pytest.raises(InputError, match="2 student and 3 teacher features"):
        loss(student[:2], teacher, *masks)
    with pytest.raises(InputError, match="3 student and 2 teacher features"):
        loss(student, teacher[:2], *masks)


def test_minilm_the_weight_is_the_published_one():
    assert MiniLMLoss.default_weight == 1.0


COMMON = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
TEXT = {"input_ids": torch.tensor([[3, 4, 5, 6, 7]] * 2), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
IMAGES = {"pixel_values": torch.zeros(2, 3, 8, 8)}
DISTILBERT = {"vocab_size": 20, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
MODELS = {
    "BERT": lambda: BertForSequenceClassification(BertConfig(vocab_size=20, **COMMON)),
    "DistilBERT": lambda: DistilBertForSequenceClassification(DistilBertConfig(**DISTILBERT)),
    "MPNet": lambda: MPNetForSequenceClassification(MPNetConfig(vocab_size=20, **COMMON)),
    "ViT": lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **COMMON)),
    "DINOv2": lambda: Dinov2ForImageClassification(Dinov2Config(image_size=8, patch_size=4, **COMMON)),
}


@pytest.mark.parametrize("name", MODELS)
def test_minilm_queries_keys_and_values_of_the_last_block_are_found_and_captured(name):
    model = MODELS[name]().eval()
    found = MiniLMLoss.find_layers(model, "student")
    parents, own = zip(*(entry.rsplit(".", 1) for entry in found), strict=True)
    assert len(set(parents)) == 1 and "1" in parents[0].split(".") and "0" not in parents[0].split(".")
    assert [entry[0] for entry in own] == ["q", "k", "v"]
    capture = FeatureCapture(model, found, "student")
    inputs = IMAGES if name in ("ViT", "DINOv2") else TEXT
    with torch.no_grad(), capture.recording(model) as recorded:
        outputs = model(**inputs)
    features = capture.collect(outputs, recorded)
    assert [tuple(feature.shape) for feature in features] == [(2, 5, 8)] * 3
    shapes = [tuple(feature.shape[1:]) for feature in features]
    assert float(MiniLMLoss(shapes, shapes)(features, features).total) == pytest.approx(0, abs=1e-6)


def test_minilm_attention_to_another_sequence_is_passed_over():
    settings = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartModel(BartConfig(vocab_size=20, d_model=8, max_position_embeddings=16, **settings, **heads))
    found = MiniLMLoss.find_layers(model, "teacher")
    assert found == [f"decoder.layers.0.self_attn.{name}_proj" for name in "qkv"]


class Block(nn.Module):
    def __init__(self, *names, kind=nn.Linear):
        super().__init__()
        for name in names:
            setattr(self, name, kind(4, 4))


def test_minilm_the_last_complete_three_linear_layers_side_by_side_are_taken():
    def find(*blocks):
        return MiniLMLoss.find_layers(nn.Sequential(*blocks), "student")

    assert find(Block("query", "key", "value"), Block("q", "k")) == ["0.query", "0.key", "0.value"]
    assert find(Block("v", "q", "k"), Block("key", "value", "query")) == ["1.query", "1.key", "1.value"]
    assert find(Block("q_lin", "k_lin", "v_lin"), Block("q", "k", "v", kind=nn.Embedding))[0] == "0.q_lin"
    assert MiniLMLoss.find_layers(Block("q", "k", "v"), "student") == ["q", "k", "v"]


def test_minilm_models_without_attention_are_refused():
    model = ResNetForImageClassification(
        ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    )
    with pytest.raises(ConfigurationError, match="(?s)The teacher has no attention block.*ResNetForImage.*q_lin"):
        MiniLMLoss.find_layers(model, "teacher")
    with pytest.raises(ConfigurationError, match="The student has no attention block"):
        MiniLMLoss.find_layers(nn.Sequential(Block("q", "k"), Block("v")), "student")
