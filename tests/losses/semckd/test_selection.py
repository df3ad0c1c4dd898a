"""What is kept of the teacher's features: nothing that is not needed, and the right values of what is."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from kept import named

from hf_semckd.features.geometry import Alignment, fitting_mask, limited_grid
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses.semckd.alignment import AlignedTeacher, PairGroup
from hf_semckd.losses.semckd.selection import TeacherSelection

B = 5
MASK = (torch.arange(8) < torch.tensor([[3], [8], [1], [5], [6]])).long()
PHASE = torch.tensor([0.0, 0.3, 0.99, 0.5, 0.75])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text(channels, length=8):
    return FeatureSpec("text", "tokens", channels, length)


def image_tokens(channels, side=3, prefix=1):
    return FeatureSpec("patches", "tokens", channels, prefix + side * side, (side, side), prefix)


def map_layer(channels, height, width):
    return FeatureSpec("map", "map", channels, height * width, (height, width))


VECTOR = FeatureSpec("vector", "tokens", 4, 1)


def features_of(specs, seed=0):
    shapes = [(s.channels, *s.grid) if s.kind == "map" else (s.length, s.channels) for s in specs]
    shapes = [shape[1:] if spec is VECTOR else shape for spec, shape in zip(specs, shapes, strict=True)]
    return [normal(B, *shape, seed=seed + n) for n, shape in enumerate(shapes)]


def selection(students, teachers, association, tokens_aligned=True, **options):
    alignments = [[Alignment.of(s, t, tokens_aligned) for t in teachers] for s in students]
    return TeacherSelection(teachers, alignments, association, **options)


TEXT = [text(3)], [text(4), text(6)]
VIT = [image_tokens(3)], [image_tokens(4), image_tokens(6)]
MAPS = [map_layer(3, 8, 8)], [map_layer(4, 6, 8), map_layer(5, 2, 3)]
SAMPLED = {"max_tokens": 4}
RELATIONS = {**SAMPLED, "relations": True}

# Layers, association, options, masked: the names that are kept.
KEPT = [
    (TEXT, None, {}, False, "tokens.0 tokens.1"),
    (TEXT, None, {}, True, "tokens.0 tokens.1 mask.0"),
    (TEXT, None, SAMPLED, False, "tokens.0 tokens.1 positions.0"),
    (TEXT, None, SAMPLED, True, "tokens.0 tokens.1 positions.0 mask.0"),
    (TEXT, "summary", SAMPLED, True, "tokens.0 tokens.1 positions.0 mask.0 mean.0 mean.1"),
    (TEXT, "mean", SAMPLED, True, "tokens.0 tokens.1 positions.0 mask.0 mean.0 mean.1"),
    (VIT, None, SAMPLED, False, "tokens.0 tokens.1 positions.0"),
    (VIT, "mean", SAMPLED, False, "tokens.0 tokens.1 positions.0 mean.0 mean.1"),
    (VIT, "summary", SAMPLED, False, "tokens.0 tokens.1 positions.0 summary.0 summary.1"),
    (MAPS, None, {"max_grid": 4}, False, "grid.0 grid.1"),
    (MAPS, "mean", {"max_grid": 4}, False, "grid.0 grid.1 mean.0 mean.1"),
    (MAPS, "summary", {"max_grid": 4}, False, "grid.0 grid.1"),
    (MAPS, "summary", {"max_grid": 2}, False, "grid.0 grid.1 summary.0 summary.1"),
    (MAPS, "summary", {}, False, "grid.0 grid.1 summary.0"),
    (MAPS, "summary", SAMPLED, False, "grid.0 grid.1 summary.0"),
    (([map_layer(3, 8, 8)], VIT[1]), "summary", SAMPLED, False, "grid.0 grid.1"),
    (([text(3)], MAPS[1]), None, SAMPLED, True, "mean.0 mean.1"),
    (([text(3)], MAPS[1]), "summary", SAMPLED, True, "mean.0 mean.1 summary.0 summary.1"),
    (([text(3)], [text(4), text(6, 9), text(5)]), None, SAMPLED, True, "tokens.0 mean.1 tokens.2 positions.0 mask.0"),
    (
        ([text(3), text(3, 9)], [text(4), text(6, 9)]),
        None,
        SAMPLED,
        True,
        "tokens.0 tokens.1 mean.0 mean.1 positions.0 positions.1 mask.0",
    ),
    (TEXT, None, RELATIONS, True, "tokens.0 tokens.1 positions.0 mask.0 embedding.0 embedding.1"),
    (VIT, None, RELATIONS, False, "tokens.0 tokens.1 positions.0 embedding.0 embedding.1"),
    (MAPS, None, RELATIONS, False, "grid.0 grid.1 embedding.0 embedding.1"),
    (([], TEXT[1]), "whole", SAMPLED, True, "whole.0 whole.1 mask"),
    (([], TEXT[1]), "whole", SAMPLED, False, "whole.0 whole.1"),
]


@pytest.mark.parametrize(("layers", "association", "options", "masked", "names"), KEPT)
def test_nothing_is_kept_that_is_not_needed(layers, association, options, masked, names):
    kept = named(selection(*layers, association, **options)(features_of(layers[1]), MASK if masked else None, PHASE))
    assert set(kept) == set(names.split())
    assert all(len(value) == B and not value.requires_grad for value in kept.values())


def test_another_tokenization_keeps_means_alone():
    kept = named(selection(*TEXT, "summary", tokens_aligned=False, max_tokens=4)(features_of(TEXT[1]), MASK))
    assert set(kept) == {"mean.0", "mean.1"}


@pytest.mark.parametrize(("layers", "association", "options", "masked", "names"), KEPT)
def test_the_full_features_can_be_freed(layers, association, options, masked, names):
    features = features_of(layers[1])
    kept = named(selection(*layers, association, **options)(features, MASK if masked else None, PHASE))
    full = {feature.untyped_storage().data_ptr(): tuple(feature.shape) for feature in features}
    for name, value in kept.items():
        if value.untyped_storage().data_ptr() in full and value.is_floating_point():
            # Where everything is compared, everything is kept; a view of the patches holds the CLS token too.
            held = full[value.untyped_storage().data_ptr()]
            assert value.numel() >= 0.9 * math.prod(held), f"{name} {tuple(value.shape)} holds on to {held}"
        elif not name.startswith("positions"):
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_sampled_tokens_are_smaller_than_what_they_were_taken_from():
    specs = [text(64, 128)] * 3
    features = features_of(specs)
    kept = named(selection([text(3, 128)], specs, "summary", max_tokens=32)(features, None, PHASE))
    bytes_of = [sum(value.untyped_storage().nbytes() for value in entries) for entries in (kept.values(), features)]
    assert bytes_of[0] < 0.28 * bytes_of[1]


def chosen_positions(row, limit, phase):
    tokens = [n for n, kept in enumerate(row) if kept]
    count = min(len(tokens), limit)
    return [tokens[math.floor((k + Fraction(phase)) * len(tokens) / count)] for k in range(count)]


@pytest.mark.parametrize("filling", [7.0, float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_kept_tokens_are_the_chosen_ones_and_zeros(side, filling):
    mask = MASK if side == "right" else MASK.flip(1)
    features = features_of(TEXT[1])
    for feature in features:
        feature[mask == 0] = filling
    chooser = selection(*TEXT, "summary", max_tokens=4)
    kept = named(chooser(features, mask, PHASE))
    for t, i in np.ndindex(2, B):
        places = chosen_positions(mask[i].tolist(), 4, float(PHASE[i]))
        assert kept["positions.0"][i, : len(places)].tolist() == places
        assert torch.equal(kept[f"tokens.{t}"][i, : len(places)], features[t][i, places])
        assert kept[f"tokens.{t}"][i, len(places) :].abs().sum() == 0
        assert kept["mask.0"][i].tolist() == [k < len(places) for k in range(4)]
        expected = features[t][i][mask[i] == 1].double().mean(0)
        torch.testing.assert_close(kept[f"mean.{t}"][i].double(), expected, rtol=1e-5, atol=1e-6)
    assert all(value.isfinite().all() for value in kept.values())


def test_a_sample_without_tokens_keeps_zeros():
    mask = MASK.clone()
    mask[2] = 0
    features = features_of(TEXT[1])
    features[0][2] = float("nan")
    kept = named(selection(*TEXT, "summary", max_tokens=4)(features, mask, PHASE))
    assert not kept["mask.0"][2].any() and kept["mask.0"][[0, 1, 3, 4]].any(1).all()
    assert kept["tokens.0"][2].abs().max() == 0 and kept["mean.0"][2].abs().max() == 0


def test_without_a_phase_the_first_token_is_chosen():
    kept = named(selection(*TEXT, None, max_tokens=4)(features_of(TEXT[1]), MASK))
    assert kept["positions.0"][:, 0].tolist() == [0] * B
    assert kept["positions.0"][1].tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize("limit", [4, 10])
def test_layers_of_one_layout_share_positions_and_others_have_their_own(limit):
    specs = [text(4), text(6, 12), text(5), text(3, 12)]
    chooser = selection([text(3), text(3, 12)], specs, None, max_tokens=limit)
    features = features_of(specs)
    targets = chooser(features, MASK, PHASE)
    kept = named(targets)
    shapes = {name: tuple(kept[name].shape) for name in kept if name.startswith("positions")}
    assert shapes == {"positions.0": (B, min(8, limit)), "positions.1": (B, min(12, limit))}
    assert [targets.layers[t].choice.positions is kept[f"positions.{t % 2}"] for t in range(4)] == [True] * 4
    assert targets.layers[2].choice.mask is kept["mask.0"] and targets.layers[3].choice.mask is None
    for t, i in np.ndindex(4, B):
        row = [1] * 12 if t % 2 else MASK[i].tolist()
        places = chosen_positions(row, limit, float(PHASE[i]))
        assert torch.equal(kept[f"tokens.{t}"][i, : len(places)], features[t][i, places])


def test_a_vector_is_one_token_that_no_mask_speaks_of():
    specs = [text(4), VECTOR]
    chooser = selection([text(3), VECTOR], specs, None, max_tokens=2)
    features = features_of(specs)
    vector = chooser(features, MASK.flip(1), PHASE).layers[1]
    assert torch.equal(vector.tokens, features[1][:, None]) and vector.choice.mask is None


def naive_pool(maps, size):
    out = np.zeros((*maps.shape[:2], *size))
    for h, w in np.ndindex(*size):
        top, bottom = h * maps.shape[2] // size[0], -(-(h + 1) * maps.shape[2] // size[0])
        left, right = w * maps.shape[3] // size[1], -(-(w + 1) * maps.shape[3] // size[1])
        out[:, :, h, w] = maps[:, :, top:bottom, left:right].mean((2, 3))
    return out


@pytest.mark.parametrize("limit", [None, 1, 2, 3, 4, 5, 100])
def test_grids_are_pooled_to_the_limit_and_summaries_to_four(limit):
    specs = [map_layer(4, 7, 5), map_layer(3, 2, 6), image_tokens(5, side=5, prefix=2)]
    features = features_of(specs)
    chooser = selection([map_layer(3, 8, 8)], specs, "summary", max_grid=limit)
    targets = chooser(features)
    kept, teacher = named(targets), AlignedTeacher(targets, specs)
    patches = features[2][:, 2:].unflatten(1, (5, 5)).permute(0, 3, 1, 2)
    for t, (maps, spec) in enumerate(zip([*features[:2], patches], specs, strict=True)):
        size = spec.grid if limit is None else tuple(min(limit, side) for side in spec.grid)
        assert limited_grid(features[t], spec, limit) == size
        np.testing.assert_allclose(kept[f"grid.{t}"], naive_pool(maps.numpy(), size), rtol=1e-4, atol=1e-5)
        expected = naive_pool(maps.numpy(), tuple(min(4, side) for side in spec.grid)).reshape(B, -1)
        np.testing.assert_allclose(teacher.summary(t), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_is_read_at_a_smaller_grid_as_a_mean_or_as_its_tokens():
    specs = [map_layer(4, 6, 6), text(5)]
    chooser = selection([map_layer(3, 8, 8), text(3)], specs, None, max_grid=4)
    features = features_of(specs)
    teacher = AlignedTeacher(chooser(features, MASK), specs)
    pooled = naive_pool(naive_pool(features[0].numpy(), (4, 4)), (2, 3)).reshape(B, 4, 6).transpose(0, 2, 1)
    np.testing.assert_allclose(teacher.at(0, PairGroup("grid", (2, 3), 4, (0,))), pooled, rtol=1e-4, atol=1e-5)
    mean = features[0].numpy().mean((2, 3))[:, None]
    np.testing.assert_allclose(teacher.at(0, PairGroup("mean", None, 4, (0,))), mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(teacher.at(1, PairGroup("tokens", None, 5, (1,))), features[1])


@pytest.mark.parametrize("association", ["summary", "mean", None])
def test_statistics_are_taken_from_what_is_compared(association):
    specs = [text(4), text(5, 9), map_layer(3, 6, 6)]
    chooser = selection([text(3), map_layer(3, 8, 8)], specs, association, max_tokens=4, max_grid=3)
    targets = chooser(features_of(specs), MASK, PHASE)
    kept, teacher = named(targets), AlignedTeacher(targets, specs)
    values, mask = teacher.values(0)
    assert values is kept["tokens.0"] and mask is kept["mask.0"]
    values, mask = teacher.values(1)
    assert torch.equal(values, kept["mean.1"][:, None]) and mask is None
    values, mask = teacher.values(2)
    assert values is kept["grid.2"] and mask is None


def test_statistics_of_whole_features_leave_out_padding_of_token_layers_only():
    specs = [text(4), map_layer(3, 6, 6), VECTOR]
    features = features_of(specs)
    chooser = selection([], specs, "whole")
    teacher = AlignedTeacher(chooser(features, MASK), specs)
    assert [teacher.values(t)[1] is MASK for t in range(3)] == [True, False, False]
    assert [tuple(teacher.values(t)[0].shape) for t in range(3)] == [(B, 8, 4), (B, 3, 6, 6), (B, 1, 4)]


@pytest.mark.parametrize(
    ("layers", "limit", "samples"),
    [(TEXT, 4, True), (TEXT, None, False), (MAPS, 4, False), (VIT, 4, True), (([], TEXT[1]), 4, False)],
)
def test_whether_tokens_may_be_left_out_is_known_beforehand(layers, limit, samples):
    assert selection(*layers, "summary", max_tokens=limit).samples_tokens is samples


@pytest.mark.parametrize(("layers", "association", "options", "masked", "names"), KEPT)
def test_a_batch_is_selected_sample_by_sample(layers, association, options, masked, names):
    chooser, features = selection(*layers, association, **options), features_of(layers[1])
    whole = named(chooser(features, MASK if masked else None, PHASE))
    order = torch.tensor([3, 0, 4, 2, 1])
    other = named(chooser([feature[order] for feature in features], MASK[order] if masked else None, PHASE[order]))
    parts = [
        named(chooser([feature[i] for feature in features], MASK[i] if masked else None, PHASE[i]))
        for i in (slice(0, 1), slice(1, 5))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value[order], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layers", "association", "options", "masked", "names"), KEPT)
def test_shapes_follow_from_shapes_alone(layers, association, options, masked, names):
    # Tensors without values: whatever had to look at one, on a GPU after waiting for it, would fail here.
    chooser, features = selection(*layers, association, **options), features_of(layers[1])
    real = named(chooser(features, MASK if masked else None, PHASE))
    hollow = named(chooser([x.to("meta") for x in features], MASK.to("meta") if masked else None, PHASE.to("meta")))
    assert {name: x.shape for name, x in hollow.items()} == {name: x.shape for name, x in real.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_compared_tensors_keep_the_teachers_precision(dtype):
    features = [feature.to(dtype) for feature in features_of(TEXT[1])]
    kept = named(selection(*TEXT, None, max_tokens=4)(features, MASK, PHASE))
    assert kept["tokens.0"].dtype == kept["tokens.1"].dtype == dtype
    maps = [feature.to(dtype) for feature in features_of(MAPS[1])]
    assert named(selection(*MAPS, None, max_grid=4)(maps))["grid.0"].dtype == dtype


def test_features_that_carry_a_gradient_are_kept_without_it():
    features = [feature.requires_grad_() for feature in features_of(TEXT[1])]
    for association in ("summary", "whole"):
        kept = named(selection(*TEXT, association, max_tokens=4)(features, MASK, PHASE))
        assert not any(value.requires_grad for value in kept.values())


def test_a_mask_fits_tokens_of_its_length():
    mask = torch.ones(2, 4)
    assert fitting_mask(mask, torch.zeros(2, 4, 3)) is mask
    for shape in [(2, 5, 3), (2, 4), (2, 4, 4, 4)]:
        assert fitting_mask(mask, torch.zeros(*shape)) is None
    assert fitting_mask(None, torch.zeros(2, 4, 3)) is None


# Student layers, association and options: what is kept for some of them is the same.
CHOICES = [
    ([text(3)], "summary", {"max_tokens": 4}),
    ([text(300)] * 2, "summary", {"max_tokens": 4}),
    ([text(3)], "summary", {"max_tokens": 4, "max_grid": 4}),
    ([text(3)], "summary", {"max_tokens": 2}),
    ([text(3)], "summary", {}),
    ([text(3)], "summary", {"max_grid": 2}),
    ([text(3)], "mean", {"max_tokens": 4}),
    ([text(3)], None, {"max_tokens": 4}),
    ([text(3)], "summary", {"max_tokens": 4, "tokens_aligned": False}),
    ([text(3)], "summary", {"max_tokens": 2, "max_grid": 2, "tokens_aligned": False}),
    ([], "summary", {"max_tokens": 4}),
    ([], "whole", {"max_tokens": 4, "max_grid": 2}),
    ([], "whole", {}),
    ([map_layer(3, 8, 8)], "summary", {"max_grid": 4}),
    ([map_layer(3, 8, 8)], "summary", {"max_grid": 4, "max_tokens": 4}),
    ([map_layer(3, 8, 8)] * 2, "summary", {"max_grid": 1}),
    ([map_layer(3, 8, 8)], "summary", {}),
    ([map_layer(3, 8, 8)], "summary", {"max_tokens": 2}),
    ([map_layer(3, 8, 8), image_tokens(3)], "summary", {"max_grid": 2, "max_tokens": 4}),
    ([map_layer(3, 8, 8), image_tokens(3)], "summary", {"max_grid": 2, "max_tokens": 2}),
    ([map_layer(3, 8, 8), image_tokens(3)], "summary", {"max_grid": 1, "max_tokens": 4}),
]


@pytest.mark.parametrize("teachers", [TEXT[1], VIT[1], MAPS[1], [text(4), map_layer(3, 6, 6), image_tokens(5)]])
def test_equal_words_are_said_of_equal_tensors_and_other_words_of_others(teachers):
    features = features_of(teachers)
    choosers = [selection(students, teachers, association, **options) for students, association, options in CHOICES]
    kept = [named(chooser(features, MASK, PHASE)) for chooser in choosers]
    alike = 0
    for (one, left), (other, right) in itertools.combinations(zip(choosers, kept, strict=True), 2):
        same = set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)
        assert (one.describe() == other.describe()) <= same, (one.describe(), other.describe())
        alike += same
    assert 0 < alike < len(CHOICES) * (len(CHOICES) - 1) / 2


@pytest.mark.parametrize(
    ("layers", "options", "others"),
    [
        (TEXT, SAMPLED, {**SAMPLED, "max_grid": 4}),
        (TEXT, {}, {"max_grid": 1}),
        (MAPS, {"max_grid": 4}, {"max_grid": 4, **SAMPLED}),
        (([map_layer(3, 8, 8)], VIT[1]), {}, SAMPLED),
        (([text(3)], MAPS[1]), {}, {**SAMPLED, "max_grid": 4}),
        (([], TEXT[1]), {}, {**SAMPLED, "max_grid": 4}),
    ],
)
def test_a_limit_without_an_effect_is_not_told(layers, options, others):
    for association in ("summary", "mean", "whole", None):
        one, other = (selection(*layers, association, **entry) for entry in (options, others))
        assert one.describe() == other.describe()


def test_a_selection_says_what_it_keeps():
    one = selection([text(3)], TEXT[1], "summary", max_tokens=4).describe()
    assert one == selection([text(300)] * 2, TEXT[1], "summary", max_tokens=4).describe()
    for other in [
        selection([text(3)], TEXT[1], "summary", max_tokens=2),
        selection([text(3)], TEXT[1], "summary"),
        selection([text(3)], TEXT[1], "mean", max_tokens=4),
        selection([text(3)], TEXT[1], "summary", tokens_aligned=False, max_tokens=4),
        selection([], TEXT[1], "summary", max_tokens=4),
    ]:
        assert other.describe() != one
    grids = [selection(*MAPS, "summary", max_grid=limit).describe() for limit in (None, 1, 2, 4)]
    assert len(set(grids)) == 4
