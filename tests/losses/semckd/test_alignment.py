"""Where layers meet: every pair once, at the right positions, from tensors that are made once."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_semckd.features.geometry import Alignment
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.features.targets import TeacherTargets
from hf_semckd.features.token_sampling import flat_positions, take_positions
from hf_semckd.losses import SemCKDLoss
from hf_semckd.losses.semckd import alignment
from hf_semckd.losses.semckd.alignment import AlignedStudent, AlignedTeacher, PairGroup, find_pair_groups
from hf_semckd.losses.semckd.selection import TeacherSelection

B = 4
MASK = (torch.arange(8) < torch.tensor([[3], [8], [1], [5]])).long()
PHASE = torch.tensor([0.0, 0.3, 0.99, 0.5])


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def text(channels, length=8):
    return FeatureSpec("text", "tokens", channels, length)


def image_tokens(channels, side, prefix=1):
    return FeatureSpec("patches", "tokens", channels, prefix + side * side, (side, side), prefix)


def map_layer(channels, height, width):
    return FeatureSpec("map", "map", channels, height * width, (height, width))


def features_of(specs, seed=0):
    shapes = [(s.channels, *s.grid) if s.kind == "map" else (s.length, s.channels) for s in specs]
    return [normal(B, *shape, seed=seed + n) for n, shape in enumerate(shapes)]


# Student layers, teacher layers, masked.
LAYERS = {
    "text": ([text(3), text(5), text(3)], [text(4), text(6), text(4), text(6)], True),
    "pyramids": (
        [map_layer(3, 8, 8), map_layer(4, 4, 4), map_layer(5, 2, 2), map_layer(5, 2, 2)],
        [map_layer(6, 6, 6), map_layer(6, 3, 5), map_layer(7, 2, 2), map_layer(6, 1, 1)],
        False,
    ),
    "vit": ([image_tokens(3, 3)] * 3, [image_tokens(5, 3)] * 2 + [image_tokens(6, 3)], False),
    "mixed": (
        [image_tokens(3, 3), map_layer(4, 6, 6), text(3), map_layer(4, 2, 6), text(5)],
        [image_tokens(5, 3), text(5), map_layer(5, 3, 3), text(7), text(5, 11), image_tokens(5, 2)],
        False,
    ),
}


def setting(layers, limit=4, tokens=4, student_mask=None, shown=False):
    students, teachers, masked = LAYERS[layers]
    alignments = [[Alignment.of(s, t, True) for t in teachers] for s in students]
    chooser = TeacherSelection(teachers, alignments, "summary", tokens, limit)
    mask = MASK if masked else None
    targets = chooser(features_of(teachers, 50), mask, PHASE)
    student_mask = mask if student_mask is None else student_mask
    teacher = AlignedTeacher(targets, teachers)
    views = AlignedStudent(features_of(students), students, student_mask, teacher, limit, [shown] * len(students))
    return views, teacher, find_pair_groups(views, alignments)


def expected_place(student, teacher, limit):
    """Return the kind and grid where two layers meet, from the shapes alone."""
    if student.kind == teacher.kind == "tokens" and (student.length, student.grid) == (teacher.length, teacher.grid):
        return "tokens", None
    if student.grid is None or teacher.grid is None:
        return "mean", None
    sides = zip(student.grid, teacher.grid, strict=True)
    return "grid", tuple(min(*pair, 1000 if limit is None else limit) for pair in sides)


@pytest.mark.parametrize("limit", [None, 1, 2, 4])
@pytest.mark.parametrize("layers", LAYERS)
def test_every_pair_of_layers_is_in_exactly_one_meeting_at_the_right_place(layers, limit):
    _, _, meetings = setting(layers, limit)
    students, teachers, _ = LAYERS[layers]
    pairs = [(s, t) for place, members in meetings.items() for s in members for t in place.teachers]
    assert sorted(pairs) == list(itertools.product(range(len(students)), range(len(teachers))))
    for place, members in meetings.items():
        for s, t in itertools.product(members, place.teachers):
            assert (place.kind, place.size) == expected_place(students[s], teachers[t], limit)
            assert place.width == teachers[t].channels


def test_layers_that_meet_alike_meet_together():
    _, _, meetings = setting("text")
    assert meetings == {
        PairGroup("tokens", None, 4, (0, 2)): [0, 1, 2],
        PairGroup("tokens", None, 6, (1, 3)): [0, 1, 2],
    }
    _, _, meetings = setting("pyramids", limit=2)
    assert meetings == {
        PairGroup("grid", (2, 2), 6, (0, 1)): [0, 1, 2, 3],
        PairGroup("grid", (2, 2), 7, (2,)): [0, 1, 2, 3],
        PairGroup("grid", (1, 1), 6, (3,)): [0, 1, 2, 3],
    }


@pytest.mark.parametrize("layers", LAYERS)
def test_both_sides_of_a_meeting_have_the_same_positions(layers):
    views, teacher, meetings = setting(layers)
    for place, members in meetings.items():
        shapes = {views.at(s, place).shape[:2] for s in members}
        taught = {teacher.at(t, place).shape[:2] for t in place.teachers}
        assert len(shapes | taught) == 1
        for mask in (views.mask_at(s, place) for s in members):
            assert mask is None or {mask.shape} == shapes


def naive_pool(maps, size):
    out = np.zeros((*maps.shape[:2], *size))
    for h, w in np.ndindex(*size):
        top, bottom = h * maps.shape[2] // size[0], -(-(h + 1) * maps.shape[2] // size[0])
        left, right = w * maps.shape[3] // size[1], -(-(w + 1) * maps.shape[3] // size[1])
        out[:, :, h, w] = maps[:, :, top:bottom, left:right].mean((2, 3))
    return out


def test_a_student_is_seen_at_its_chosen_tokens():
    views, teacher, meetings = setting("text")
    positions = teacher.choice(0).positions
    for place, members in meetings.items():
        for s, i in itertools.product(members, range(B)):
            seen = views.at(s, place)[i]
            assert torch.equal(seen, torch.stack([views.features[s][i, n] for n in positions[i].tolist()]))


@pytest.mark.parametrize("limit", [None, 2, 4])
def test_a_student_is_seen_as_a_map_pooled_to_the_limit_and_then_to_the_meeting(limit):
    views, _, meetings = setting("pyramids", limit)
    for place, members in meetings.items():
        for s in members:
            feature = views.features[s].numpy()
            first = feature.shape[2:] if limit is None else tuple(min(limit, side) for side in feature.shape[2:])
            cells = naive_pool(naive_pool(feature, first), place.size)
            expected = cells.reshape(B, cells.shape[1], -1).transpose(0, 2, 1)
            np.testing.assert_allclose(views.at(s, place), expected, rtol=1e-12, atol=1e-14)


def test_a_student_is_seen_as_the_mean_over_what_counts():
    specs = [text(3)]
    chooser = TeacherSelection([text(5, 11)], [[Alignment("mean")]], None, 4, 4)
    features = features_of(specs)
    features[0][MASK == 0] = float("nan")
    teacher = AlignedTeacher(chooser(features_of([text(5, 11)])), [text(5, 11)])
    views = AlignedStudent(features, specs, MASK, teacher, 4)
    place = PairGroup("mean", None, 5, (0,))
    expected = np.stack([features[0][i][MASK[i] == 1].numpy().mean(0) for i in range(B)])
    np.testing.assert_allclose(views.at(0, place)[:, 0], expected, rtol=1e-12)
    assert views.mask_at(0, place) is None


@pytest.mark.parametrize("limit", [None, 2, 4])
@pytest.mark.parametrize("shown", [True, False])
def test_summaries_are_maps_of_at_most_four_and_carry_no_gradient(limit, shown):
    views, _, _ = setting("pyramids", limit, shown=shown)
    for s in range(4):
        views.features[s].requires_grad_()
        side = min(4, views.features[s].shape[2])
        expected = naive_pool(views.features[s].detach().numpy(), (side, side)).reshape(B, -1)
        actual = views.summary(s)
        assert not actual.requires_grad
        np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_the_mask_of_a_meeting_is_what_counts_for_both():
    own = MASK.clone()
    own[:, 2] = 0
    views, teacher, meetings = setting("text", student_mask=own)
    positions, kept = teacher.choice(0).positions, teacher.choice(0).mask
    for place, members in meetings.items():
        for s in members:
            mask = views.mask_at(s, place)
            assert mask.shape == kept.shape
            for i, k in np.ndindex(*mask.shape):
                assert bool(mask[i, k]) == (bool(kept[i, k]) and int(positions[i, k]) != 2)
            assert (mask.sum(1) < kept.sum(1)).any(), "the student's mask took nothing away"
    views.masks = None
    assert views.mask_at(0, next(iter(meetings))) is kept


@pytest.mark.parametrize("tokens", [None, 8, 100])
def test_the_mask_of_a_meeting_is_the_students_where_the_teacher_has_none(tokens):
    views, teacher, meetings = setting("text", tokens=tokens)
    place = next(iter(meetings))
    own, choice = MASK.flip(0), replace(teacher.choice(0), mask=None)
    layers = tuple(replace(layer, choice=choice) for layer in teacher.targets.layers)
    views.teacher = AlignedTeacher(replace(teacher.targets, layers=layers), teacher.specs)
    views.masks = own
    assert torch.equal(views.mask_at(0, place) != 0, own != 0)
    views.masks = torch.ones(B, 5)
    assert views.mask_at(0, place) is None, "a mask of another length speaks of something else"


@pytest.mark.parametrize("tokens", [None, 1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_no_mask_speaks_of_a_vector(side, tokens):
    vector = FeatureSpec("pooler", "tokens", 4, 1)
    students, teachers = [text(3), vector], [text(5), vector]
    mask = MASK if side == "right" else MASK.flip(1)
    alignments = [[Alignment.of(s, t, True) for t in teachers] for s in students]
    chooser = TeacherSelection(teachers, alignments, None, tokens, 4)
    features = [[normal(B, 8, spec.channels), normal(B, 4)] for spec in (students[0], teachers[0])]
    teacher = AlignedTeacher(chooser(features[1], mask, PHASE), teachers)
    views = AlignedStudent(features[0], students, mask, teacher, 4)
    masks = {
        (s, place.teachers): views.mask_at(s, place)
        for place, members in find_pair_groups(views, alignments).items()
        for s in members
        if place.kind == "tokens"
    }
    assert set(masks) == {(0, (0,)), (1, (1,))} and masks[1, (1,)] is None
    expected = [min(length, tokens or 8) for length in mask.sum(1).tolist()]
    assert (masks[0, (0,)] != 0).sum(1).tolist() == expected


@pytest.mark.parametrize("association", ["similarity", "learned", "uniform"])
@pytest.mark.parametrize("layers", LAYERS)
def test_the_views_of_a_student_layer_are_made_once(layers, association, monkeypatch):
    calls = {"as_map": [], "average": []}
    original = alignment.as_map

    def as_map(feature, *arguments):
        calls["as_map"].append(feature.data_ptr())
        return original(feature, *arguments)

    class Counting(alignment.Average):
        def __call__(self, feature):
            if any(feature is entry for entry in features):
                # Not a detached one, of which a summary is made.
                calls["average"].append(feature.data_ptr())
            return super().__call__(feature)

    monkeypatch.setattr(alignment, "as_map", as_map)
    monkeypatch.setattr(alignment, "Average", Counting)
    students, teachers, masked = LAYERS[layers]
    loss = SemCKDLoss(students, teachers, association=association, max_tokens=4, max_grid=4).double()
    features, mask = features_of(students), MASK if masked else None
    loss(features, features_of(teachers, 50), mask, mask).total.backward()
    own = [feature.data_ptr() for feature in features]
    for name, made in calls.items():
        assert len(set(made)) == len(made), f"{name} was called again"
        assert set(made) <= set(own)
    gridded = {
        own[s]
        for s, t in itertools.product(range(len(own)), range(len(teachers)))
        if expected_place(students[s], teachers[t], 4)[0] == "grid"
    }
    assert set(calls["as_map"]) == gridded


@pytest.mark.parametrize("association", ["similarity", "learned", "uniform"])
def test_no_value_is_waited_for(association):
    students, teachers, _ = LAYERS["mixed"]
    # Fake tensors have no values: whatever had to look at one, on a GPU after waiting for it, would fail here.
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = SemCKDLoss(students, teachers, association=association, max_tokens=4, max_grid=4)
        loss.automatic_synchronization = False
        mask, phase = torch.ones(B, 8), torch.zeros(B)
        student = [torch.empty(x.shape).requires_grad_() for x in features_of(students)]
        targets = loss.select([torch.empty(x.shape) for x in features_of(teachers)], mask, phase)
        out = loss(student, targets, mask, mask)
        out.total.backward()
        assert out.per_sample.shape == (B,) and out.errors.shape == (B, len(students), len(teachers))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(out.total.detach())


def test_the_backward_of_a_layers_view_waits_for_that_of_the_layer_above():
    """Else the gradients of all layers, each as large as the layer, are there before the first is used."""
    order = []

    def told(tensor, name):
        tensor.grad_fn.register_hook(lambda *_: order.append(name))
        return tensor

    features = [torch.ones(2, 9, 4, requires_grad=True)]
    for layer in range(3):
        features.append(told(features[-1] * 2, f"layer {layer}"))
    states, first = features[1:], torch.zeros(2, 1, dtype=torch.long)
    views = [alignment._with_late_backward(take_positions(state, flat_positions(first, 9)), state) for state in states]
    views = [told(view, f"view {index}") for index, view in enumerate(views)]
    (states[-1].sum() + sum(view.sum() for view in views)).backward()
    assert order == ["view 2", "layer 2", "view 1", "layer 1", "view 0", "layer 0"]
    gradient = features[0].grad
    assert gradient[:, 0].unique().tolist() == [8 + 8 + 4 + 2] and gradient[:, 1:].unique().tolist() == [8]


@pytest.mark.parametrize("name", ["embedding", "mean", "map"])
@pytest.mark.parametrize("spec", [image_tokens(4, 4, 1), map_layer(4, 8, 8)])
def test_every_view_of_a_layer_waits_for_the_layer_above(name, spec):
    order = []

    def told(tensor, name):
        tensor.grad_fn.register_hook(lambda *_: order.append(name))
        return tensor

    states = [features_of([spec])[0].requires_grad_()]
    for layer in range(3):
        states.append(told(states[-1] * 2, f"layer {layer}"))
    specs = [spec] * 3
    views = AlignedStudent(states[1:], specs, None, AlignedTeacher(TeacherTargets(), specs), 4)
    made = [told(getattr(views, name)(s), f"view {s}") for s in range(3)]
    (states[-1].sum() + sum(view.sum() for view in made)).backward()
    assert order == ["view 2", "layer 2", "view 1", "layer 1", "view 0", "layer 0"]
