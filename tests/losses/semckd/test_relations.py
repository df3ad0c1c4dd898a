"""Relations between samples: their errors by naive loops, and how SemCKDLoss weighs, keeps and switches them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import makers
import numpy as np
import pytest
import torch
from kept import named
from torch import Tensor

from hf_semckd import SemCKDConfig
from hf_semckd.errors import ConfigurationError
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses import SemCKDLoss
from hf_semckd.losses.semckd.kernel import weighted_relation_error
from hf_semckd.losses.similarity import by_shape, relative_distances
from hf_semckd.training.options import loss_options


def rows(batch: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_distances(embeddings: np.ndarray) -> np.ndarray:
    """Distances divided by the mean over ordered pairs of different samples, one pair at a time."""
    count = len(embeddings)
    found = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            found[i, j] = np.sqrt(sum((a - b) ** 2 for a, b in zip(embeddings[i], embeddings[j], strict=True)))
    pairs = [found[i, j] for i in range(count) for j in range(count) if i != j]
    return found / np.mean(pairs) if pairs else found


def naive_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> np.ndarray:
    batch = len(student[0])
    found = np.zeros((batch, len(student), len(teacher)))
    for s, own in enumerate(student):
        for t, theirs in enumerate(teacher):
            first, second = naive_distances(own.numpy()), naive_distances(theirs.numpy())
            for i in range(batch):
                squares = [(first[i, j] - second[i, j]) ** 2 for j in range(batch) if j != i]
                found[i, s, t] = np.mean(squares) if squares else 0.0
    return found


def relation_errors(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the error of every pair of layers (B, S, T): each as the only one that weighs anything."""
    weights = torch.zeros(len(student[0]), len(student), len(teacher), dtype=torch.float64)
    parts = []
    for t in range(len(teacher)):
        alone = weights.clone()
        alone[:, :, t] = 1.0
        parts.append(weighted_relation_error(student, teacher, alone))
    return torch.stack(parts, 2)


# ---- Distances and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 3, 40])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_distances_by_naive_loops(batch, width):
    embeddings = rows(batch, width)
    found = relative_distances(embeddings)
    np.testing.assert_allclose(found.numpy(), naive_distances(embeddings.numpy()), atol=1e-12)
    assert found.shape == (batch, batch) and not found.diagonal().any()
    torch.testing.assert_close(found, found.T)


@pytest.mark.parametrize(
    ("students", "teachers"), [((3,), (7,)), ((3, 5), (4,)), ((2,), (6, 1, 9)), ((4, 2, 8), (5, 3))]
)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_errors_by_naive_loops(batch, students, teachers):
    student = [rows(batch, width, seed) for seed, width in enumerate(students)]
    teacher = [rows(batch, width, 10 + seed) for seed, width in enumerate(teachers)]
    found = relation_errors(student, teacher)
    assert found.shape == (batch, len(students), len(teachers)) and found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), naive_errors(student, teacher), atol=1e-12)
    # Of one sample there are no relations, and two are always one mean distance apart.
    assert bool(found.any()) == (batch > 2)


@pytest.mark.parametrize("widths", [((3, 3, 3), (7, 7)), ((3, 5, 3), (4, 9, 4))])
def test_errors_are_added_up_with_their_weights(widths):
    student, teacher = ([rows(5, width, 10 * width + s) for s, width in enumerate(side)] for side in widths)
    weights = rows(5, len(student) * len(teacher)).abs().unflatten(1, (len(student), len(teacher)))
    found = weighted_relation_error(student, teacher, weights.requires_grad_())
    expected = (weights.detach().numpy() * naive_errors(student, teacher)).sum(2)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    assert not found.requires_grad


def test_layers_of_one_shape_are_taken_together_and_come_back_in_order():
    seen: list[torch.Size] = []

    def double(stacked: Tensor) -> Tensor:
        seen.append(stacked.shape)
        return 2 * stacked

    layers = [rows(2, 3), rows(2, 4, 1), rows(2, 3, 2), rows(2, 3, 3, torch.float32)]
    for found, layer in zip(by_shape(double, layers), layers, strict=True):
        assert torch.equal(found, 2 * layer) and found.dtype == layer.dtype
    assert seen == [(2, 2, 3), (1, 2, 4), (1, 2, 3)]


def test_three_samples_by_hand():
    # Distances 1, 1, 2 with mean 4/3 against 3, 4, 5 with mean 4.
    line = torch.tensor([[0.0], [1.0], [2.0]])
    triangle = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    own, theirs = {(0, 1): 0.75, (1, 2): 0.75, (0, 2): 1.5}, {(0, 1): 0.75, (1, 2): 1.0, (0, 2): 1.25}
    squares = {pair: (own[pair] - theirs[pair]) ** 2 for pair in own}
    by_hand = [sum(value for pair, value in squares.items() if i in pair) / 2 for i in range(3)]
    assert relation_errors([line], [triangle]).flatten().tolist() == pytest.approx(by_hand, abs=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("change", ["scale", "rotation", "offset", "mirror", "all"])
def test_scale_rotation_and_offset_of_either_side_do_not_matter(side, change):
    rotation, _ = torch.linalg.qr(rows(6, 6, 5))
    changes = {
        "scale": lambda x: 1e-3 * x,
        "rotation": lambda x: x @ rotation,
        "offset": lambda x: x + rows(1, 6, 6) * 10,
        "mirror": lambda x: -x,
        "all": lambda x: 300 * (x @ rotation) + 40,
    }
    parts = {"student": rows(5, 6, 1), "teacher": rows(5, 6, 2)}
    before = relation_errors([parts["student"]], [parts["teacher"]])
    parts[side] = changes[change](parts[side])
    torch.testing.assert_close(relation_errors([parts["student"]], [parts["teacher"]]), before, rtol=1e-9, atol=1e-12)


def test_the_same_relations_are_no_error():
    embeddings = rows(5, 6)
    wider = torch.cat([embeddings * 7 + 3, torch.full((5, 4), 2.0, dtype=torch.float64)], 1)
    assert relation_errors([embeddings], [wider]).max() < 1e-20


def test_a_permuted_batch_permutes_the_errors():
    order = torch.tensor([3, 0, 4, 2, 1])
    student, teacher = [rows(5, 4, 1), rows(5, 2, 2)], [rows(5, 6, 3), rows(5, 3, 4)]
    permuted = relation_errors([x[order] for x in student], [x[order] for x in teacher])
    torch.testing.assert_close(permuted, relation_errors(student, teacher)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 64, 768])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_a_pair_that_coincides_has_no_distance_and_no_gradient(dtype, width, offset):
    # Up to the rounding of squares: a distance of sqrt(eps), whose gradient is nothing beside another pair's.
    rounding = 4 * torch.finfo(dtype).eps ** 0.5
    for seed in range(5):
        embeddings = rows(6, width, seed, dtype) + offset
        embeddings[4] = embeddings[1]
        embeddings.requires_grad_()
        distances = relative_distances(embeddings)
        assert distances[1, 4] < rounding and distances[4, 1] < rounding
        (alone,) = torch.autograd.grad(distances[1, 4], embeddings, retain_graph=True)
        (other,) = torch.autograd.grad(distances[1, 2], embeddings, retain_graph=True)
        assert alone.isfinite().all() and alone.abs().max() <= rounding * other.abs().max()
        (whole,) = torch.autograd.grad(distances.square().sum(), embeddings)
        assert whole.isfinite().all() and whole.any()
        assert (whole[1] - whole[4]).abs().max() <= 10 * rounding * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e4])
@pytest.mark.parametrize("equal", ["student", "teacher", "both"])
def test_equal_samples_give_finite_values_and_gradients(dtype, value, equal):
    same = torch.full((7, 5), value, dtype=dtype)
    student = (same if equal != "teacher" else rows(7, 5, 1, dtype)).clone().requires_grad_()
    teacher = same if equal != "student" else rows(7, 3, 2, dtype)
    errors = relation_errors([student], [teacher])
    (gradient,) = torch.autograd.grad(errors.sum(), student)
    assert errors.isfinite().all() and gradient.isfinite().all()
    if equal == "both":
        assert not errors.any() and not gradient.any()


@pytest.mark.parametrize("width", [8, 256])
def test_a_large_common_offset_costs_little_precision(width):
    student, teacher = rows(16, width, 1), rows(16, width, 2)
    narrow = relation_errors([(student + 1e3).float()], [(teacher + 1e3).float()])
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), relation_errors([student], [teacher]), rtol=0, atol=1e-3)
    distances = relative_distances((student + 1e3).float()).double()
    torch.testing.assert_close(distances, relative_distances(student), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    # The squares of 300 overflow float16.
    student, teacher = 300 * rows(5, 4, 1).to(dtype), rows(5, 6, 2).to(dtype)
    found = relation_errors([student], [teacher])
    assert found.dtype == torch.float32 and relative_distances(student).dtype == torch.float32
    assert torch.equal(found, relation_errors([student.float()], [teacher.float()]))
    np.testing.assert_allclose(found.numpy(), naive_errors([student.double()], [teacher.double()]), atol=1e-5)


def test_autocast_does_not_narrow():
    student, teacher = rows(5, 4, 1).float(), rows(5, 6, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = relation_errors([student], [teacher])
    assert torch.equal(found, relation_errors([student], [teacher]))


def test_the_teacher_gets_no_gradient():
    student, teacher = rows(5, 4, 1).requires_grad_(), rows(5, 6, 2).requires_grad_()
    relation_errors([student], [teacher]).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.any()


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_gradients_are_those_of_the_formula(batch):
    embeddings = rows(batch, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(relative_distances, (embeddings,))
    first, second, teacher = rows(batch, 3, 2).requires_grad_(), rows(batch, 2, 3).requires_grad_(), rows(batch, 4, 4)
    errors = lambda *student: relation_errors(student, [teacher, embeddings.detach()])  # noqa: E731
    assert torch.autograd.gradcheck(errors, (first, second))


# ---- SemCKDLoss ----------------------------------------------------------------------------------------------------

MAPS = ([(4, 6, 6), (6, 3, 3)], [(5, 6, 6), (8, 4, 4), (7, 2, 2)])
PATCHES = (
    [FeatureSpec(f"s{i}", "tokens", width, 10, (3, 3), 1) for i, width in enumerate((6, 6))],
    [FeatureSpec(f"t{i}", "tokens", 8, 17, (4, 4), 1) for i in range(3)],
)
TEXT = ([(7, 6), (7, 6)], [(7, 8), (7, 8), (7, 10)])
KINDS = {"maps": MAPS, "patches": PATCHES, "text": TEXT}
BATCH = 5
R = 1.7


def tensors(shapes: Sequence[Any], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(x.length, x.channels) if isinstance(x, FeatureSpec) else x for x in shapes]
    return [torch.randn(BATCH, *size, generator=generator) for size in sizes]


def mask_of(kind: str) -> Tensor | None:
    return (torch.arange(7) < torch.tensor([[7], [3], [5], [1], [6]])).long() if kind == "text" else None


def made(kind: str, relation_weight: float, **options: Any) -> SemCKDLoss:
    torch.manual_seed(0)
    return SemCKDLoss(*KINDS[kind], relation_weight=relation_weight, **options)


def embeddings_by_hand(kind: str, features: Sequence[Tensor]) -> list[Tensor]:
    if kind == "maps":
        return [x.mean((2, 3)) for x in features]
    if kind == "patches":
        return [x[:, 0] for x in features]
    lengths = mask_of(kind).sum(1).tolist()
    return [torch.stack([row[:length].mean(0) for row, length in zip(x, lengths, strict=True)]) for x in features]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("association", ["similarity", "learned", "uniform", "last", "one_to_one"])
def test_the_relation_part_by_hand(kind, association):
    student, teacher, mask = tensors(KINDS[kind][0], 1), tensors(KINDS[kind][1], 2), mask_of(kind)
    plain = made(kind, 0.0, association=association)(student, teacher, mask, mask)
    found = made(kind, R, association=association)(student, teacher, mask, mask)
    relations = torch.as_tensor(
        naive_errors(
            [x.double() for x in embeddings_by_hand(kind, student)],
            [x.double() for x in embeddings_by_hand(kind, teacher)],
        )
    )
    layers = 1 if association == "last" else len(student)
    expected = plain.per_sample + R * (plain.association * relations).sum((1, 2)) / layers
    torch.testing.assert_close(found.per_sample, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.total, found.per_sample.mean())
    torch.testing.assert_close(found.association, plain.association)
    torch.testing.assert_close(found.errors, plain.errors)
    assert (found.per_sample - plain.per_sample).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_pairwise_projector_takes_relations_too(kind):
    student, teacher, mask = tensors(KINDS[kind][0], 1), tensors(KINDS[kind][1], 2), mask_of(kind)
    plain = made(kind, 0.0, projector="pairwise")(student, teacher, mask, mask)
    found = made(kind, R, projector="pairwise")(student, teacher, mask, mask)
    errors = relation_errors(embeddings_by_hand(kind, student), embeddings_by_hand(kind, teacher))
    expected = plain.per_sample + R * (plain.association * errors).sum((1, 2)) / len(student)
    torch.testing.assert_close(found.per_sample, expected, rtol=1e-5, atol=1e-5)


def test_what_padding_holds_does_not_matter():
    student, teacher, mask = tensors(TEXT[0], 1), tensors(TEXT[1], 2), mask_of("text")
    other = [x + 100 * (mask == 0).unsqueeze(-1) for x in student], [x - 50 * (mask == 0)[..., None] for x in teacher]
    before = made("text", R)(student, teacher, mask, mask)
    torch.testing.assert_close(made("text", R)(*other, mask, mask).per_sample, before.per_sample)


@pytest.mark.parametrize("projector", ["shared", "pairwise"])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_kept_only_for_relations(kind, projector):
    teacher, mask = tensors(KINDS[kind][1], 2), mask_of(kind)
    without = made(kind, 0.0, projector=projector)
    related = made(kind, R, projector=projector)
    names = {f"embedding.{t}" for t in range(len(teacher))}
    assert not names & set(named(without.select(teacher, mask)))
    kept = named(related.select(teacher, mask))
    assert set(kept) == set(named(without.select(teacher, mask))) | names
    for t, embedding in enumerate(embeddings_by_hand(kind, teacher)):
        torch.testing.assert_close(kept[f"embedding.{t}"], embedding)
    # Losses that say the same share a teacher cache: these two must not.
    assert without.kept != related.kept


@pytest.mark.parametrize("association", ["similarity", "learned", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_selected_features_give_the_same_loss(kind, association):
    student, teacher, mask = tensors(KINDS[kind][0], 1), tensors(KINDS[kind][1], 2), mask_of(kind)
    options = {"association": association, "max_tokens": 4, "max_grid": 2}
    direct, selected = made(kind, R, **options), made(kind, R, **options)
    first = direct(student, teacher, mask, mask)
    second = selected(student, selected.select(teacher, mask), mask, mask)
    assert torch.equal(first.per_sample, second.per_sample) and torch.equal(first.association, second.association)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_weights_are_not_trained_by_relations(kind):
    gradients = []
    for weight in (0.0, 1000.0):
        loss, mask = made(kind, weight, association="learned"), mask_of(kind)
        student = [x.requires_grad_() for x in tensors(KINDS[kind][0], 1)]
        loss(student, tensors(KINDS[kind][1], 2), mask, mask).total.backward()
        gradients.append({name: entry.grad for name, entry in loss.named_parameters() if entry.grad is not None})
        gradients[-1]["student"] = student[0].grad
    without, related = gradients
    assert without.keys() == related.keys() and any(name.startswith("query") for name in without)
    for name, gradient in without.items():
        if name == "student":
            assert not torch.allclose(gradient, related[name])
        else:
            torch.testing.assert_close(related[name], gradient, msg=name)


def test_a_batch_of_one_has_no_relation_part():
    student, teacher = [x[:1] for x in tensors(MAPS[0], 1)], [x[:1] for x in tensors(MAPS[1], 2)]
    found = made("maps", R)(student, teacher)
    torch.testing.assert_close(found.per_sample, made("maps", 0.0)(student, teacher).per_sample)


def test_the_published_loss_has_none():
    assert SemCKDLoss.published(*MAPS, batch_size=BATCH).relation_weight == 0


# ---- Configuration and trainer -------------------------------------------------------------------------------------


SETTINGS = {"maps": (MAPS, 0.0), "images": (PATCHES, 20.0), "text": (TEXT, 0.0)}


def configured(tmp_path, kind, config=SemCKDConfig, **arguments):
    """Return the loss that a trainer would make."""
    specs = [
        [spec if isinstance(spec, FeatureSpec) else FeatureSpec.from_shape(spec, "") for spec in side]
        for side in SETTINGS[kind][0]
    ]
    return SemCKDLoss.for_layers(*specs, loss_options(config(str(tmp_path), use_cpu=True, **arguments)))


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_weight_that_is_used_where_none_is_given(tmp_path, kind):
    assert SemCKDConfig(str(tmp_path), use_cpu=True).relation_weight is None
    assert configured(tmp_path, kind).relation_weight == SETTINGS[kind][1]


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("weight", [0.0, 0, 0.5, 100])
def test_a_given_weight_is_used_everywhere(tmp_path, weight, kind):
    assert configured(tmp_path, kind, relation_weight=weight).relation_weight == weight


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_published_configuration_has_no_relations(tmp_path, kind):
    published = {"config": SemCKDConfig.published, "per_device_train_batch_size": 8}
    assert configured(tmp_path, kind, **published).relation_weight == 0.0
    assert configured(tmp_path, kind, **published, relation_weight=2.0).relation_weight == 2.0


@pytest.mark.parametrize("weight", [-1.0, -1e-9, float("nan"), float("inf"), "20", True])
def test_impossible_weights_are_refused(tmp_path, weight):
    with pytest.raises(ConfigurationError, match="`relation_weight` is out of range"):
        SemCKDConfig(str(tmp_path), use_cpu=True, relation_weight=weight)


@pytest.mark.parametrize(("asked", "used"), [(None, 20.0), (0.0, 0.0), (3.0, 3.0)])
def test_the_weight_between_image_models(tmp_path, asked, used):
    trainer = makers.distiller(tmp_path, {"relation_weight": asked, "max_steps": 1})
    trainer.train()
    assert trainer.feature_loss.relation_weight == used


def test_the_weight_between_a_map_and_patches(tmp_path):
    trainer = makers.distiller(tmp_path, {"max_steps": 1}, teacher_model=makers.resnet())
    trainer.train()
    assert trainer.feature_loss.relation_weight == 20.0


@pytest.mark.parametrize(("asked", "used"), [(None, 0.0), (3.0, 3.0)])
def test_the_weight_between_text_models(tmp_path, asked, used):
    parts = {"model": makers.bert(), "teacher_model": makers.bert(3, 24, seed=9), "train_dataset": makers.texts()}
    trainer = makers.distiller(tmp_path, {"relation_weight": asked, "max_steps": 1}, **parts)
    trainer.train()
    assert trainer.feature_loss.relation_weight == used
