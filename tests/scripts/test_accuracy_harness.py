"""scripts/accuracy: data, protocols, planted teachers, associations and runs, on scans of digits and tiny models."""

from __future__ import annotations

import importlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from hf_semckd import DistillationTrainer, SemCKDConfig
from hf_semckd.errors import ConfigurationError
from hf_semckd.losses import FEATURE_LOSSES, CombinedLoss, SemCKDLoss

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PROTOCOLS = SCRIPTS / "protocols"
MODULES = ("associations", "data", "models", "planted", "protocol", "rows", "runs")
TEACHER = {"name": "vit-3x24", "family": "vit", "width": 24, "depth": 3, "size": 8, "patch": 4}
STUDENT = {"name": "vit-2x24", "family": "vit", "width": 24, "depth": 2, "size": 8, "patch": 4}
TRAINING = {"num_train_epochs": 1, "learning_rate": 0.002, "per_device_train_batch_size": 20}


@pytest.fixture(scope="module")
def accuracy() -> Any:
    """The modules of scripts/accuracy, which find those of examples/ as the script lets them."""
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    paths = [str(ROOT / "examples"), str(SCRIPTS)]
    sys.path[:0] = paths
    try:
        found = ModuleType("accuracy_modules")
        for name in MODULES:
            setattr(found, name, importlib.import_module(f"accuracy.{name}"))
        return found
    finally:
        for path in paths:
            sys.path.remove(path)


@pytest.fixture(scope="module")
def digits(accuracy) -> Any:
    return accuracy.data.load_splits("digits", (("test", 60), ("validation", 50)))


def rows_of(accuracy: Any, labels: list[int], classes: int) -> Any:
    """Rows whose one input is their place."""
    columns = {"place": torch.arange(len(labels)), "labels": torch.tensor(labels)}
    return accuracy.data.Rows(columns, classes)


# ---- Data ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "classes"), [(20, 4), (40, 4), (4, 4), (30, 10)])
def test_a_draw_has_as_many_of_each_class(accuracy, count, classes):
    pool = rows_of(accuracy, [0] * 60 + [place % classes for place in range(200)], classes)
    drawn = accuracy.data.draw(pool, count, 0)
    assert len(drawn) == count and drawn.classes == classes
    assert torch.bincount(drawn.columns["labels"], minlength=classes).tolist() == [count // classes] * classes
    assert len(drawn.columns["place"].unique()) == count
    assert torch.equal(drawn.columns["labels"], pool.columns["labels"][drawn.columns["place"]])


def test_a_draw_that_cannot_be_even_is_as_even_as_can_be(accuracy):
    pool = rows_of(accuracy, [0] * 50 + [1] * 50 + [2] * 3, 3)
    counts = torch.bincount(accuracy.data.draw(pool, 22, 0).columns["labels"]).tolist()
    assert counts[2] == 3 and sorted(counts[:2]) in ([9, 10],)
    counts = torch.bincount(accuracy.data.draw(rows_of(accuracy, [0, 1, 2] * 10, 3), 10, 0).columns["labels"])
    assert sorted(counts.tolist()) == [3, 3, 4]


@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_a_draw_depends_on_the_seed_alone(accuracy, noise):
    pool = rows_of(accuracy, [place % 5 for place in range(100)], 5)
    first, again, other = (accuracy.data.draw(pool, 30, seed, noise) for seed in (3, 3, 4))
    for name in ("place", "labels"):
        assert torch.equal(first.columns[name], again.columns[name])
    assert set(first.columns["place"].tolist()) != set(other.columns["place"].tolist())


@pytest.mark.parametrize("count", [0, 40, 90])
@pytest.mark.parametrize("noise", [0.1, 0.25, 0.4, 0.99])
def test_the_share_of_wrong_labels_is_exact(accuracy, count, noise):
    pool = rows_of(accuracy, [place % 5 for place in range(100)], 5)
    before = {name: values.clone() for name, values in pool.columns.items()}
    drawn = accuracy.data.draw(pool, count, 7, noise)
    right = pool.columns["labels"][drawn.columns["place"]]
    wrong = drawn.columns["labels"] != right
    assert int(wrong.sum()) == round(noise * len(drawn))
    assert drawn.columns["labels"].min() >= 0 and drawn.columns["labels"].max() < 5
    # The same rows come without noise, and those that are not mislabeled are right.
    assert torch.equal(accuracy.data.draw(pool, count, 7).columns["place"], drawn.columns["place"])
    assert all(torch.equal(values, before[name]) for name, values in pool.columns.items())


def test_wrong_labels_are_any_of_the_others(accuracy):
    drawn = accuracy.data.draw(rows_of(accuracy, [2] * 3000, 4), 0, 0, 0.99)
    counts = torch.bincount(drawn.columns["labels"], minlength=4).tolist()
    assert counts[2] == 30 and all(900 < count < 1080 for place, count in enumerate(counts) if place != 2)


def test_a_draw_of_zero_takes_all(accuracy):
    pool = rows_of(accuracy, [0, 0, 1, 2, 2, 2], 3)
    drawn = accuracy.data.draw(pool, 0, 0)
    assert sorted(drawn.columns["place"].tolist()) == list(range(6))


def test_rows_are_taken_in_order(accuracy):
    pool = rows_of(accuracy, [0, 1, 2, 0], 3)
    for indices in ([3, 1], np.array([3, 1]), range(3, 0, -2)):
        taken = pool.take(indices)
        assert taken.columns["place"].tolist() == [3, 1] and taken.columns["labels"].tolist() == [0, 1]
        assert len(taken) == 2 and taken.classes == 3
        assert taken[1] == {"place": torch.tensor(1), "labels": torch.tensor(1)}
    taken.columns["labels"][0] = 2
    assert pool.columns["labels"].tolist() == [0, 1, 2, 0]
    assert len(pool.take([])) == 0


def pixels(rows: Any) -> list[bytes]:
    return [row.numpy().tobytes() for row in rows.columns["pixel_values"]]


@pytest.mark.parametrize("limits", [(), (("test", 60), ("validation", 50)), (("pool", 30), ("validation", 20))])
def test_no_row_is_in_two_splits(accuracy, limits):
    splits = accuracy.data.load_splits("digits", limits)
    named = {"pool": splits.pool, "validation": splits.validation, "test": splits.test}
    seen = [image for rows in named.values() for image in pixels(rows)]
    assert len(seen) == len(set(seen))
    for name, rows in named.items():
        assert len(rows) == dict(limits).get(name, len(rows)) > 0 and rows.classes == 10
        assert rows.columns["pixel_values"].shape[1:] == (1, 8, 8)
        assert rows.columns["labels"].dtype == torch.int64
    assert set(splits.pool.columns["labels"].tolist()) == set(range(10))


def test_a_smaller_test_split_changes_no_other(accuracy, digits):
    other = accuracy.data.load_splits("digits", (("test", 20), ("validation", 50)))
    assert pixels(other.pool) == pixels(digits.pool) and pixels(other.validation) == pixels(digits.validation)
    assert pixels(other.test) == pixels(digits.test)[:20]


def test_unknown_data_is_refused(accuracy):
    with pytest.raises(ConfigurationError, match="Unknown data"):
        accuracy.data.load_splits("mnist")


def test_padding_of_all_rows_is_cut_off(accuracy):
    def row(tokens: int, theirs: int) -> dict[str, Tensor]:
        mask, their_mask = (torch.arange(8) < tokens).long(), (torch.arange(6) < theirs).long()
        return {
            "input_ids": torch.arange(8) * mask, "attention_mask": mask, "labels": torch.tensor(tokens),
            "teacher_input_ids": torch.arange(6) * their_mask, "teacher_attention_mask": their_mask,
            "pixel_values": torch.zeros(1, 9, 9),
        }  # fmt: skip

    batch = accuracy.data.collate([row(3, 1), row(5, 2), row(1, 6)])
    shapes = {name: tuple(values.shape) for name, values in batch.items()}
    assert shapes == {
        "input_ids": (3, 5), "attention_mask": (3, 5), "labels": (3,), "teacher_input_ids": (3, 6),
        "teacher_attention_mask": (3, 6), "pixel_values": (3, 1, 9, 9),
    }  # fmt: skip
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 1] and batch["labels"].tolist() == [3, 5, 1]
    assert accuracy.data.collate([row(0, 0)])["input_ids"].shape == (1, 1)


# ---- Protocols and methods -----------------------------------------------------------------------------------------

FILES = sorted(path for path in PROTOCOLS.glob("*.yaml") if path.name != "methods.yaml")
METHODS = yaml.safe_load((PROTOCOLS / "methods.yaml").read_text(encoding="utf-8"))


def write(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """Write a protocol file; a key that is changed to None is left out."""
    content = {
        "description": "a check",
        "data": {"name": "digits", "train": 40, "validation": 50, "test": 60},
        "teacher": {**TEACHER, "training": {**TRAINING, "num_train_epochs": 2}},
        "student": STUDENT,
        "training": TRAINING,
        "tuning_seeds": [100],
        "test_seeds": [0],
        "methods": ["student", "kd", "semckd", "semckd-tuned"],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_protocol_can_be_read(accuracy, path):
    protocols = accuracy.protocol.read_protocols(path)
    assert protocols and len({entry.name for entry in protocols}) == len(protocols)
    for entry in protocols:
        assert entry.name.split("@")[0] == path.stem and entry.description
        assert entry.data["name"] in accuracy.data.LOADERS
        assert {"name", "family"} <= entry.teacher.keys() and {"name", "family"} <= entry.student.keys()
        assert {entry.teacher["family"], entry.student["family"]} <= accuracy.models.FAMILIES.keys()
        assert {"num_train_epochs", "per_device_train_batch_size"} <= entry.training.keys()
        assert entry.tuning_seeds and entry.test_seeds and not set(entry.tuning_seeds) & set(entry.test_seeds)
        names = [method.name for method in entry.methods]
        assert names and len(set(names)) == len(names)
        assert all(issubclass(accuracy.associations.trainer_class(x), DistillationTrainer) for x in entry.methods)


def test_a_sweep_gives_a_protocol_for_each_value(accuracy, tmp_path):
    swept = write(tmp_path, sweep={"key": "data.noise", "values": [0.0, 0.4]})
    first, second = accuracy.protocol.read_protocols(swept)
    assert [first.name, second.name] == ["tiny@0.0", "tiny@0.4"]
    assert [first.data["noise"], second.data["noise"]] == [0.0, 0.4]
    assert first.data is not second.data and first.student == second.student
    (only,) = accuracy.protocol.read_protocols(write(tmp_path))
    assert only.name == "tiny" and "noise" not in only.data


def test_what_is_not_said_has_defaults(accuracy, tmp_path):
    path = write(tmp_path, tuning_seeds=None, test_seeds=None, description=None)
    (protocol,) = accuracy.protocol.read_protocols(path)
    assert not set(protocol.tuning_seeds) & set(protocol.test_seeds)
    assert len(protocol.test_seeds) == 10 and protocol.description == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 3}, r"unknown \['epochs'\]"),
        ({"data": None}, r"missing \['data'\]"),
        ({"methods": None}, r"missing \['methods'\]"),
        ({"methods": ["student", "semkcd"]}, "'semkcd'.*semckd?"),
        ({"tuning_seeds": [1, 2], "test_seeds": [2, 3]}, r"seeds \[2\] in both"),
        ({"tune": "no"}, "tune: 'no'"),
        ({"tuning_seeds": [0], "test_seeds": None}, r"seeds \[0\] in both"),
    ],
)
def test_protocols_that_cannot_be_run_are_refused(accuracy, tmp_path, changes, said):
    with pytest.raises(ConfigurationError, match=f"(?s)tiny.yaml cannot be run.*{said}|{said}"):
        accuracy.protocol.read_protocols(write(tmp_path, **changes))


def test_an_unknown_method_comes_with_a_suggestion(accuracy):
    with pytest.raises(ConfigurationError, match="semckd-uniform[?]"):
        accuracy.protocol.read_methods(["semckd-unifrom"])


def test_a_protocol_may_change_the_grid_of_a_method(accuracy, tmp_path):
    changed = {"semckd-uniform": {"grid": {"feature_weight": [0.3, 1.0, 0.1]}}}
    (protocol,) = accuracy.protocol.read_protocols(
        write(tmp_path, methods=["kd", changed, {"pair-1-3": {"grid": {}}}])
    )
    kd, uniform, pair = protocol.methods
    assert [kd] == accuracy.protocol.read_methods(["kd"]) and pair.arguments["teacher_layers"] == [3]
    (usual,) = accuracy.protocol.read_methods(["semckd-uniform"])
    assert uniform.candidates() == [{"feature_weight": value} for value in (0.3, 1.0, 0.1)] != usual.candidates()
    assert (uniform.loss, uniform.arguments) == (usual.loss, usual.arguments)


@pytest.mark.parametrize("entry", [{"kd": {"loss": "sp"}}, {"kd": {}, "sp": {}}, {"kd": 3}, ["kd"]])
def test_a_change_of_another_form_is_refused(accuracy, entry):
    with pytest.raises(ConfigurationError, match="one name with its arguments, grid, options"):
        accuracy.protocol.read_methods([entry])


@pytest.mark.parametrize("name", [*METHODS, "pair-1-3"])
def test_every_method_can_be_configured(accuracy, tmp_path, name):
    (method,) = accuracy.protocol.read_methods([name])
    assert method.name == name
    assert method.loss is None or all(part in FEATURE_LOSSES for part in method.loss.split("+"))
    assert method.association is None or method.association in accuracy.associations.STUDIED
    assert not method.arguments.keys() & method.grid.keys()
    for candidate in method.candidates():
        SemCKDConfig(str(tmp_path), use_cpu=True, **method.arguments, **candidate)
    assert issubclass(accuracy.associations.trainer_class(method), DistillationTrainer)


def test_every_method_is_tuned_with_the_same_budget(accuracy):
    untuned = {"student", "kd-untuned", "semckd", "semckd-random-start", "semckd-zero-start"}
    untuned |= {"semckd-linear", "semckd-similarity", "semckd-all-layers"}
    for method in accuracy.protocol.read_methods(list(METHODS)):
        candidates = method.candidates()
        expected = 1 if method.name in untuned or method.name.startswith("pair-") else 3
        assert len(candidates) == expected, method.name
        assert all(candidates.count(entry) == 1 for entry in candidates), method.name


def test_a_pair_of_layers_is_forced(accuracy):
    (method,) = accuracy.protocol.read_methods(["pair-2-13"])
    assert method.loss == "semckd" and method.candidates() == [{}]
    assert method.arguments == {"association": "uniform", "student_layers": [2], "teacher_layers": [13]}


@pytest.mark.parametrize("name", ["pair-0-1", "pair-1-0", "pair-1", "pair-1-2-3", "pair-a-b"])
def test_pairs_that_cannot_be_are_refused(accuracy, name):
    with pytest.raises(ConfigurationError, match=f"method '{name}'"):
        accuracy.protocol.read_methods([name])


def test_candidates_are_all_combinations(accuracy):
    method = accuracy.protocol.Method("m", grid={"a": [3, 1], "b": [4, 5]})
    assert method.candidates() == [{"a": 3, "b": 4}, {"a": 3, "b": 5}, {"a": 1, "b": 4}, {"a": 1, "b": 5}]
    assert accuracy.protocol.Method("m").candidates() == [{}]


def test_an_unknown_association_is_refused(accuracy):
    with pytest.raises(ConfigurationError, match="Unknown association"):
        accuracy.associations.trainer_class(accuracy.protocol.Method("m", "semckd", association="ckm"))


# ---- Accuracy and models -------------------------------------------------------------------------------------------


class Parity(nn.Module):
    """Says 1 for odd places, 0 for even ones, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def forward(self, place: Tensor) -> Any:
        assert not self.training and not torch.is_grad_enabled()
        self.sizes.append(len(place))
        return SimpleNamespace(logits=torch.nn.functional.one_hot(place % 2, 3).float())


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 500])
def test_accuracy_against_a_hand_count(accuracy, batch_size):
    # Places 0 to 6 are answered 0 1 0 1 0 1 0: right are the first, third, fourth and seventh.
    rows, model = rows_of(accuracy, [0, 0, 0, 1, 2, 2, 0], 3), Parity()
    rows.columns["teacher_place"] = torch.full((7,), -1)
    assert accuracy.models.accuracy(model, rows, batch_size) == pytest.approx(4 / 7)
    assert sum(model.sizes) == 7 and max(model.sizes) <= batch_size


def test_equal_seeds_make_equal_models(accuracy, digits):
    first, again, other = (accuracy.models.make_model(STUDENT, digits.pool, seed) for seed in (1, 1, 2))
    states = [list(model.state_dict().values()) for model in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))
    assert first.config.num_channels == 1 and first.config.num_labels == 10


def test_a_teacher_sees_its_own_columns(accuracy):
    rows = rows_of(accuracy, [0, 1], 2)
    assert accuracy.models.teacher_rows(rows) is rows
    rows.columns["teacher_place"] = torch.tensor([5, 6])
    own = accuracy.models.teacher_rows(rows)
    assert own.columns["place"].tolist() == [5, 6] and rows.columns["place"].tolist() == [0, 1]


# ---- Planted teachers ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(accuracy, digits) -> Any:
    return accuracy.models.make_model({**TEACHER, "depth": 4}, digits.pool, 0).eval()


@torch.no_grad()
def states(model: Any, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    out = model(pixel_values=images, output_hidden_states=True)
    return out.logits, out.hidden_states


def test_hidden_states_come_in_the_planted_order(accuracy, digits, plain):
    images = digits.test.columns["pixel_values"][:20]
    logits, own = states(plain, images)
    planted_logits, found = states(accuracy.planted.PlantedTeacher(plain, [2, -1, 0, 3, 1]), images)
    assert torch.equal(planted_logits, logits) and len(found) == 6
    for place, source in {0: 0, 1: 3, 3: 1, 4: 4, 5: 2}.items():
        assert torch.equal(found[place], own[source])
    assert found[2].shape == own[-1].shape
    assert all(not torch.allclose(found[2], state, atol=0.1) for state in own)
    without = accuracy.planted.PlantedTeacher(plain, [2, -1, 0])(pixel_values=images)
    assert torch.equal(without.logits, logits) and without.hidden_states is None


def test_a_useless_layer_is_the_same_for_the_same_image(accuracy, digits, plain):
    images = digits.test.columns["pixel_values"][:40]
    teacher = accuracy.planted.PlantedTeacher(plain, [0, -1, -2])
    whole = states(teacher, images)[1]
    assert torch.equal(states(teacher, images)[1][2], whole[2])
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:13]
    part = states(teacher, images[order])[1]
    for place in (2, 3):
        torch.testing.assert_close(part[place], whole[place][order], rtol=0, atol=0.02)
    assert not torch.allclose(whole[2], whole[3], atol=0.1)


def test_nothing_can_be_learned_from_a_useless_layer(accuracy, digits, plain):
    """The mean of a class is as far from the others' as that of a random set of the same size."""
    rows = digits.pool
    layer = states(accuracy.planted.PlantedTeacher(plain, [-1]), rows.columns["pixel_values"])[1][1].flatten(1)
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
def test_the_last_layer_is_never_the_teachers_own(accuracy, plain, seed, useless):
    order = accuracy.planted.plant(plain, layers=4, seed=seed, useless=useless).order
    assert sorted(order) == [-place for place in range(useless, 0, -1)] + [0, 1, 2, 3]
    assert order[-1] != 3 and (order[-1] < 0) == (useless > 0)
    assert accuracy.planted.plant(plain, layers=4, seed=seed, useless=useless).order == order


def test_a_teacher_may_keep_its_order(accuracy, plain):
    teacher = accuracy.planted.plant(plain, layers=4, seed=0, useless=2, permute=False)
    assert [place for place in teacher.order if place >= 0] == [0, 1, 2, 3] and teacher.order[-1] == -1
    assert not teacher.training and teacher.config is plain.config


# ---- Associations --------------------------------------------------------------------------------------------------


def numpy_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Linear CKA by the norms of cross-covariances, not by centered kernels."""
    first, second = first - first.mean(0), second - second.mean(0)
    cross = np.linalg.norm(first.T @ second) ** 2
    return float(cross / (np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second)))


def test_the_cka_weights_by_numpy(accuracy):
    generator = torch.Generator().manual_seed(0)
    student = [torch.randn(9, 5, width, generator=generator) + 2 for width in (6, 4)]
    # One teacher layer that says what the student's first does.
    teacher = [torch.randn(9, 5, 7, generator=generator), student[0] @ torch.randn(6, 7, generator=generator)]
    teacher += [torch.randn(9, 5, 3, generator=generator)]
    loss = accuracy.associations.CenteredKernelAlignment([(5, 6), (5, 4)], [(5, 7), (5, 7), (5, 3)])
    found = loss(student, teacher).association
    means = [[x.mean(1).double().numpy() for x in layers] for layers in (student, teacher)]
    alignment = np.array([[numpy_cka(own, theirs) for theirs in means[1]] for own in means[0]])
    expected = np.exp(alignment / 0.2) / np.exp(alignment / 0.2).sum(1, keepdims=True)
    assert found.shape == (9, 2, 3)
    for sample in found:
        np.testing.assert_allclose(sample.numpy(), expected, atol=1e-5)
    assert found[0, 0].argmax() == 1


def test_random_weights_are_uniform_on_the_simplex(accuracy):
    loss = accuracy.associations.RandomWeights([(5, 6), (5, 4)], [(5, 7)] * 3)
    student, teacher = [torch.randn(400, 5, 6), torch.randn(400, 5, 4)], [torch.randn(400, 5, 7)] * 3
    torch.manual_seed(0)
    first, second = loss(student, teacher).association, loss(student, teacher).association
    assert first.shape == (400, 2, 3) and first.min() >= 0 and not torch.equal(first, second)
    torch.testing.assert_close(first.sum(-1), torch.ones(400, 2))
    # Of a flat Dirichlet of three: means 1/3, variances 1/18.
    torch.testing.assert_close(first.mean((0, 1)), torch.full((3,), 1 / 3), rtol=0, atol=0.03)
    torch.testing.assert_close(first.var((0, 1)), torch.full((3,), 1 / 18), rtol=0, atol=0.01)


def trained(accuracy: Any, digits: Any, folder: Path, method: Any, steps: int = 8, **arguments: Any) -> Any:
    rows = digits.pool
    config = SemCKDConfig(
        str(folder), **{**accuracy.models.QUIET, **accuracy.models.COMMON}, use_cpu=True, max_steps=steps,
        per_device_train_batch_size=16, learning_rate=0.002, logging_steps=1, **arguments,
    )  # fmt: skip
    student, teacher = accuracy.models.make_model(STUDENT, rows, 1), accuracy.models.make_model(TEACHER, rows, 0)
    trainer = accuracy.associations.trainer_class(method)(
        student, config, teacher_model=teacher, train_dataset=rows, data_collator=accuracy.data.collate,
        feature_loss=method.loss,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["semckd-cka", "semckd-random", "semckd-gradient", "semckd-lookahead"])
def test_studied_associations_train_and_choose(accuracy, digits, tmp_path, name):
    (method,) = accuracy.protocol.read_methods([name])
    trainer = trained(accuracy, digits, tmp_path, method)
    trainer_type, loss_type = accuracy.associations.STUDIED[method.association]
    assert isinstance(trainer, trainer_type) and type(trainer.feature_loss) is loss_type
    assert trainer.feature_loss.relation_weight == 20.0 and trainer.state.global_step == 8
    losses = [entry["feature_loss"] for entry in trainer.state.log_history if "feature_loss" in entry]
    assert losses and all(math.isfinite(loss) for loss in losses)
    weights = np.asarray(trainer.association())
    assert weights.shape == (2, 3)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-4)
    assert np.abs(weights - 1 / 3).max() > 1e-3 and weights.min() > 0


def test_gradient_agreement_by_hand(accuracy):
    """Task gradients that are those of one teacher's error give that teacher the most weight."""
    torch.manual_seed(0)
    loss = accuracy.associations.GradientAgreement([(5, 6)], [(5, 7)] * 3).train()
    student, teacher = torch.randn(4, 5, 6, requires_grad=True), [torch.randn(4, 5, 7) for _ in range(3)]
    torch.testing.assert_close(loss([student], teacher).association, torch.full((4, 1, 3), 1 / 3))
    loss.collecting = False
    gradients = []
    for statistics, entry in zip(loss.statistics, teacher, strict=True):
        target = statistics(entry)
        error = (loss.projection[0]["7"](student) - target).square().mean((1, 2)).sum()
        gradients.append(torch.autograd.grad(error, student)[0])
    for task in gradients:
        loss.task_gradients = [task]
        cosine = torch.stack([torch.cosine_similarity(g.flatten(1), task.flatten(1)) for g in gradients], 1)
        expected = torch.softmax(cosine / 0.2, -1).unsqueeze(1)
        torch.testing.assert_close(loss([student], teacher).association, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(loss([student], teacher).association, torch.full((4, 1, 3), 1 / 3))


def test_the_look_ahead_moves_towards_what_agrees(accuracy):
    loss = accuracy.associations.LookAhead([(5, 6), (5, 6)], [(5, 7)] * 3)
    for _ in range(10):
        loss.look(torch.tensor([[0.3, 0.0, -0.3], [-0.1, 0.0, 0.1]]))
    weights = torch.softmax(loss.score, -1)
    assert weights[0].tolist() == sorted(weights[0].tolist(), reverse=True)
    assert weights[1].tolist() == sorted(weights[1].tolist()) and weights[0, 0] > 0.4
    still = accuracy.associations.LookAhead([(5, 6)], [(5, 7)] * 3)
    still.look(torch.full((1, 3), 0.5))
    assert torch.equal(still.score, torch.zeros(1, 3))


def test_options_reach_the_last_of_joined_losses(accuracy, digits, tmp_path):
    (method,) = accuracy.protocol.read_methods(["semckd+crd"])
    loss = trained(accuracy, digits, tmp_path, method, steps=2).feature_loss
    assert isinstance(loss, CombinedLoss) and isinstance(loss.losses[0], SemCKDLoss)
    assert len(loss.losses[1].student_ring) == method.options["negatives"] == 1000


# ---- Runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(accuracy, tmp_path_factory) -> Iterator[Path]:
    """A folder that holds the teachers and the cache of the tests below."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy.models, "TEACHERS", folder / "teachers")
        patch.setattr(accuracy.runs, "CACHE", folder / "cache")
        yield folder


def bench(accuracy: Any, place: Path, results: Path, **changes: Any) -> Any:
    (protocol,) = accuracy.protocol.read_protocols(write(results, **changes))
    return accuracy.runs.Bench(protocol, results)


def counted(accuracy: Any, patch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Write down which students are trained."""
    seen, original = [], accuracy.runs.Bench._student

    def student(self: Any, method: Any, settings: Any, seed: int) -> Any:
        seen.append((method.name, seed))
        return original(self, method, settings, seed)

    patch.setattr(accuracy.runs.Bench, "_student", student)
    return seen


@pytest.fixture(scope="module")
def ran(accuracy, place) -> Any:
    """The rows of a whole tiny protocol, and which students were trained for them."""
    results = place / "ran"
    results.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        seen = counted(accuracy, patch)
        bench(accuracy, place, results).run()
    path = results / "tiny.jsonl"
    return SimpleNamespace(lines=path.read_text().splitlines(), rows=accuracy.rows.read_rows(path), seen=seen)


def copied(ran: Any, folder: Path, leave_out: Any = None) -> Path:
    """Copy the rows of the whole run, but for one."""
    lines = [line for line in ran.lines if leave_out is None or not leave_out(json.loads(line))]
    assert len(lines) == len(ran.lines) - (leave_out is not None)
    path = folder / "tiny.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_run_leaves_a_row_for_everything(accuracy, ran):
    tests = {(row["method"], row["seed"]) for row in ran.rows if row["split"] == "test"}
    assert tests == {("teacher", 0), ("student", 0), ("kd", 0), ("semckd", 0), ("semckd-tuned", 0)}
    tuning = [(row["method"], row["seed"]) for row in ran.rows if row["split"] == "tuning"]
    assert sorted(tuning) == [("kd", 100)] * 3 + [("semckd-tuned", 100)] * 3
    assert len(ran.lines) == len(ran.rows) == 11
    for row in ran.rows:
        accuracy.rows.validate_row(row)
        assert row.keys() == accuracy.rows.KEYS.keys()
        assert (row["protocol"], row["teacher"], row["student"]) == ("tiny", "vit-3x24", "vit-2x24")
        assert row["settings"]["data"]["train"] == 40 and row["settings"]["training"] == TRAINING
        assert 0 <= row["value"] * (50 if row["split"] == "tuning" else 60) <= 60


def test_rows_tell_what_was_run(ran):
    by_method = {row["method"]: row for row in ran.rows if row["split"] == "test"}
    association = np.asarray(by_method["semckd"]["extras"]["association"])
    assert association.shape == (2, 3)
    np.testing.assert_allclose(association.sum(1), 1, atol=1e-3)
    assert by_method["semckd"]["extras"]["loss_parameters"] > 0
    assert "association" not in by_method["kd"]["extras"] and "association" not in by_method["student"]["extras"]
    assert by_method["student"]["parameters"] == by_method["semckd"]["parameters"] < by_method["teacher"]["parameters"]
    assert by_method["student"]["settings"]["arguments"]["feature_weight"] == 0.0


def test_test_rows_carry_what_was_chosen(ran):
    for name in ("kd", "semckd-tuned"):
        own = [row for row in ran.rows if row["method"] == name]
        (test,) = [row for row in own if row["split"] == "test"]
        tuning = [row for row in own if row["split"] == "tuning"]
        # Of equals the first.
        best = max(tuning, key=lambda row: row["value"])
        assert test["settings"]["tuned"] == best["settings"]["tuned"]


def test_runs_of_several_processes_leave_the_rows_of_one(accuracy, ran, tmp_path):
    # A copy, which keeps teachers and cache to itself.
    for part in ("examples", "scripts/accuracy", "scripts/step_cost"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for part in ("scripts/benchmark_accuracy.py", "scripts/protocols/methods.yaml"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / part, tmp_path / part)
    command = [sys.executable, "scripts/benchmark_accuracy.py", str(write(tmp_path)), "--jobs", "2"]
    done = subprocess.run([*command, "--results", "rows"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = accuracy.rows.read_rows(tmp_path / "rows" / "tiny.jsonl")
    assert len((tmp_path / "rows" / "tiny.jsonl").read_text().splitlines()) == len(rows) == len(ran.rows)
    key = accuracy.rows.key_of
    assert {key(row): row["value"] for row in rows} == {key(row): row["value"] for row in ran.rows}


def test_a_second_run_adds_nothing(accuracy, place, ran, tmp_path, monkeypatch):
    path = copied(ran, tmp_path)
    monkeypatch.setattr(accuracy.runs.Bench, "_student", lambda *args: pytest.fail("it was run already"))
    bench(accuracy, place, tmp_path).run()
    assert path.read_text().splitlines() == ran.lines


@pytest.mark.parametrize(("method", "split"), [("semckd", "test"), ("kd", "test"), ("student", "test")])
def test_a_deleted_row_is_run_again_with_the_same_value(accuracy, place, ran, tmp_path, monkeypatch, method, split):
    path = copied(ran, tmp_path, lambda row: (row["method"], row["split"]) == (method, split))
    seen = counted(accuracy, monkeypatch)
    again = bench(accuracy, place, tmp_path)
    # The twin of a row that is gone is there still: it is not what is looked at here.
    monkeypatch.setattr(again.record, "twin", lambda *args: None)
    again.run()
    assert seen == [(method, 0)]
    rows = accuracy.rows.read_rows(path)
    before = {accuracy.rows.key_of(row): row for row in ran.rows}
    assert {accuracy.rows.key_of(row) for row in rows} == before.keys()
    (new,) = [row for row in rows if (row["method"], row["split"]) == (method, split)]
    old = before[accuracy.rows.key_of(new)]
    assert new["value"] == old["value"] and new["extras"].get("terms") == old["extras"].get("terms")
    assert new["settings"] == old["settings"]


def test_only_named_methods_are_run(accuracy, place, tmp_path, monkeypatch):
    seen = counted(accuracy, monkeypatch)
    bench(accuracy, place, tmp_path).run(["student"])
    assert seen == [("student", 0)]
    rows = accuracy.rows.read_rows(tmp_path / "tiny.jsonl")
    assert [row["method"] for row in rows] == ["teacher", "student"]


def test_other_seeds_may_be_asked_for(accuracy, place, tmp_path, monkeypatch):
    seen = counted(accuracy, monkeypatch)
    bench(accuracy, place, tmp_path).run(["student"], [7, 8])
    assert seen == [("student", 7), ("student", 8)]


def test_a_seed_that_tuned_is_no_test_seed(accuracy, place, tmp_path, monkeypatch):
    seen = counted(accuracy, monkeypatch)
    with pytest.raises(ConfigurationError, match=r"(?s)seeds \[100\], which tune.*leave them out"):
        bench(accuracy, place, tmp_path).run(["student"], [99, 100])
    assert not seen


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({3.0: (0.1, 0.2), 1.0: (0.5, 0.0), 10.0: (0.2, 0.2)}, 1.0),
        ({3.0: (0.1, 0.2), 1.0: (0.5, 0.0), 10.0: (0.2, 0.4)}, 10.0),
        ({3.0: (0.3, 0.2), 1.0: (0.5, 0.0), 10.0: (0.2, 0.3)}, 3.0),
    ],
)
def test_the_best_on_validation_is_tested(accuracy, place, tmp_path, monkeypatch, scores, chosen):
    calls = []

    def train(self: Any, method: Any, tuned: Any, seed: int, split: str) -> float:
        calls.append((method.name, dict(tuned), seed, split))
        # On test it would be the other way round.
        return scores[tuned["feature_weight"]][seed - 100] if split == "tuning" else 0.0

    monkeypatch.setattr(accuracy.runs.Bench, "train", train)
    made = bench(
        accuracy, place, tmp_path, methods=["fitnet", "semckd-tuned"], tuning_seeds=[100, 101], test_seeds=[0, 1]
    )
    (method,) = [entry for entry in made.protocol.methods if entry.name == "semckd-tuned"]
    made.run(["semckd-tuned"])
    tuning = [("semckd-tuned", {"feature_weight": w}, s, "tuning") for w in (3.0, 1.0, 10.0) for s in (100, 101)]
    assert calls == tuning + [("semckd-tuned", {"feature_weight": chosen}, seed, "test") for seed in (0, 1)]
    assert made.tune(method) == {"feature_weight": chosen}


def test_a_protocol_without_tuning_takes_the_defaults(accuracy, place, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(accuracy.runs.Bench, "train", lambda self, *args: calls.append(args[1:]) or 0.0)
    bench(accuracy, place, tmp_path, tune=False).run(["semckd-tuned", "kd"])
    assert calls == [({}, 0, "test")] * 2


def test_a_method_without_a_grid_is_not_tuned(accuracy, place, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(accuracy.runs.Bench, "train", lambda self, *args: calls.append(args[1:]) or 0.0)
    bench(accuracy, place, tmp_path).run(["semckd"])
    assert calls == [({}, 0, "test")]


def test_tuning_looks_at_the_validation_split_alone(accuracy, place, tmp_path, monkeypatch):
    made, looked = bench(accuracy, place, tmp_path), []
    monkeypatch.setattr(accuracy.runs, "accuracy", lambda model, rows: looked.append(rows) or 0.5)
    (method,) = accuracy.protocol.read_methods(["semckd"])
    made.train(method, {}, 100, "tuning")
    made.train(method, {}, 0, "test")
    assert looked[0] is made.splits.validation and looked[1] is made.splits.test


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"name": "digits", "train": 60, "validation": 50, "test": 60}},
        {"student": {**STUDENT, "name": "another"}},
        {"teacher": {**TEACHER, "training": {**TRAINING, "num_train_epochs": 2}, "planted": {"layers": 3, "seed": 1}}},
        {"training": {**TRAINING, "learning_rate": 0.001}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_rows_of_another_form_of_the_protocol_are_refused(accuracy, place, ran, tmp_path, changes):
    path = copied(ran, tmp_path)
    with pytest.raises(SystemExit, match=f"tiny.jsonl holds rows of another form .*{next(iter(changes))} differ"):
        bench(accuracy, place, tmp_path, **changes)
    assert path.read_text().splitlines() == ran.lines


def test_more_seeds_and_methods_are_no_other_form(accuracy, place, ran, tmp_path, monkeypatch):
    path = copied(ran, tmp_path)
    monkeypatch.setattr(accuracy.runs.Bench, "train", lambda *args: 0.0)
    bench(
        accuracy, place, tmp_path, test_seeds=[0, 1, 2], methods=["student", "kd", "fitnet"], description="new"
    ).run()
    assert path.read_text().splitlines() == ran.lines


@pytest.mark.parametrize("value", [3.0, 3])
def test_a_run_that_was_made_under_another_name_is_not_made_again(accuracy, place, ran, tmp_path, monkeypatch, value):
    path = copied(ran, tmp_path, lambda row: (row["method"], row["split"]) == ("semckd-tuned", "test"))
    monkeypatch.setattr(accuracy.runs.Bench, "_student", lambda *args: pytest.fail("it was run already"))
    made = bench(accuracy, place, tmp_path)
    (method,) = accuracy.protocol.read_methods(["semckd-tuned"])
    found = made.train(method, {"feature_weight": value}, 0, "test")
    (row,) = [x for x in accuracy.rows.read_rows(path) if (x["method"], x["split"]) == ("semckd-tuned", "test")]
    (default,) = [x for x in ran.rows if x["method"] == "semckd"]
    assert row["extras"] == {**default["extras"], "same_run_as": "semckd"}
    assert found == row["value"] == default["value"] and row["seconds"] == default["seconds"]
    assert row["settings"]["tuned"] == {"feature_weight": 3.0}


def test_other_settings_are_no_twins(accuracy, place, ran, tmp_path):
    copied(ran, tmp_path)
    made = bench(accuracy, place, tmp_path)
    (method,) = accuracy.protocol.read_methods(["semckd"])
    recipe = {"loss": "semckd", "association": None, "options": {}}
    assert made.record.twin(recipe, 0, "test")["method"] in ("semckd", "semckd-tuned")
    assert made.record.twin({**recipe, "feature_weight": 3}, 0, "test") is not None
    assert made.record.twin({**recipe, "feature_weight": 2.5}, 0, "test") is None
    assert made.record.twin({**recipe, "association": "cka"}, 0, "test") is None
    assert made.record.twin({**recipe, "options": {"layers": 1}}, 0, "test") is None
    assert made.record.twin(recipe, 1, "test") is None
    assert made.record.twin(recipe, 0, "tuning") is None
    assert method.arguments == {}


@pytest.mark.parametrize(
    ("name", "recipe", "same", "other"),
    [
        ("resnet_fashion", {}, 100, 3),
        ("resnet_regnet_fashion", {}, 100, 3),
        ("resnet_fashion", {"projector": "shared"}, 3, 100),
        ("resnet_vit_fashion", {}, 3, 100),
        ("vit_resnet_fashion", {}, 3, 100),
    ],
)
def test_a_default_weight_is_that_of_the_models_and_projector(accuracy, name, recipe, same, other, tmp_path):
    """Else the run of a weight that is the default of other models would be taken for that of the default."""
    (protocol,) = accuracy.protocol.read_protocols(SCRIPTS / "protocols" / f"{name}.yaml")
    record = accuracy.runs._Record(protocol, tmp_path / "rows.jsonl")
    recipe = {"loss": "semckd", "association": None, "options": {}, **recipe}
    assert record.digest(recipe) == record.digest({**recipe, "feature_weight": same})
    assert record.digest(recipe) != record.digest({**recipe, "feature_weight": other})


def test_a_teacher_is_trained_once(accuracy, place, ran, tmp_path, monkeypatch):
    kept = sorted(path.name for path in (place / "teachers").iterdir())
    assert len(kept) == 1 and kept[0].startswith("vit-3x24-")
    monkeypatch.setattr(accuracy.models, "Trainer", lambda *args, **options: pytest.fail("it was trained already"))
    made = bench(accuracy, place, tmp_path)
    assert not made.teacher.training and made.teacher is made.plain_teacher
    described = json.loads((place / "teachers" / kept[0] / "described.json").read_text())
    assert (
        described["model"] == TEACHER
        and "test" not in described["data"]
        and described["rows"] == len(made.splits.pool)
    )


def test_a_planted_teacher_keeps_its_accuracy(accuracy, place, ran, tmp_path):
    planted = {"layers": 3, "seed": 1, "useless": 1}
    teacher = {**TEACHER, "training": {**TRAINING, "num_train_epochs": 2}, "planted": planted}
    made = bench(accuracy, place, tmp_path, teacher=teacher)
    assert isinstance(made.teacher, accuracy.planted.PlantedTeacher)
    made.run(["semckd"])
    (own,) = [row for row in accuracy.rows.read_rows(made.path) if row["method"] == "teacher"]
    (before,) = [row for row in ran.rows if row["method"] == "teacher"]
    assert own["value"] == before["value"]
    (row,) = [row for row in accuracy.rows.read_rows(made.path) if row["method"] == "semckd"]
    assert np.asarray(row["extras"]["association"]).shape == (2, 4)


# ---- The script ----------------------------------------------------------------------------------------------------


def test_the_smoke_protocol_from_start_to_table(accuracy, tmp_path):
    command = [sys.executable, str(SCRIPTS / "benchmark_accuracy.py"), str(PROTOCOLS / "smoke.yaml")]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (protocol,) = accuracy.protocol.read_protocols(PROTOCOLS / "smoke.yaml")
    rows = accuracy.rows.read_rows(tmp_path / "smoke.jsonl")
    tested = {(row["method"], row["seed"]) for row in rows if row["split"] == "test"}
    names = [method.name for method in protocol.methods]
    assert tested == {("teacher", 0)} | {(name, seed) for name in names for seed in protocol.test_seeds}
    assert "| method | smoke | ARI |" in done.stdout
    for name in ("teacher", *names):
        assert f"| {name} | " in done.stdout
