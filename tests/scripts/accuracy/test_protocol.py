"""scripts/accuracy/protocol.py: what the files may say, and what the kept ones do say."""

from __future__ import annotations

import pytest
import yaml
from accuracy import runs
from accuracy.associations import STUDIED, trainer_class
from accuracy.data import LOADERS
from accuracy.models import FAMILIES
from accuracy.protocol import Method, read_methods, read_protocols
from accuracy_cases import PROTOCOLS, write_protocol

from hf_semckd import DistillationTrainer, SemCKDConfig
from hf_semckd.errors import ConfigurationError
from hf_semckd.losses import FEATURE_LOSSES

FILES = sorted(path for path in PROTOCOLS.glob("*.yaml") if path.name != "methods.yaml")
METHODS = yaml.safe_load((PROTOCOLS / "methods.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_protocol_can_be_read(path):
    protocols = read_protocols(path)
    assert protocols and len({entry.name for entry in protocols}) == len(protocols)
    for entry in protocols:
        assert entry.name.split("@")[0] == path.stem and entry.description
        assert entry.data["name"] in LOADERS
        assert {"name", "family"} <= entry.teacher.keys() and {"name", "family"} <= entry.student.keys()
        assert {entry.teacher["family"], entry.student["family"]} <= FAMILIES.keys()
        assert {"num_train_epochs", "per_device_train_batch_size"} <= entry.training.keys()
        assert entry.tuning_seeds and entry.test_seeds and not set(entry.tuning_seeds) & set(entry.test_seeds)
        names = [method.name for method in entry.methods]
        assert names and len(set(names)) == len(names)
        assert all(issubclass(trainer_class(x), DistillationTrainer) for x in entry.methods)


def test_a_sweep_gives_a_protocol_for_each_value(tmp_path):
    swept = write_protocol(tmp_path, sweep={"key": "data.noise", "values": [0.0, 0.4]})
    first, second = read_protocols(swept)
    assert [first.name, second.name] == ["tiny@0.0", "tiny@0.4"]
    assert [first.data["noise"], second.data["noise"]] == [0.0, 0.4]
    assert first.data is not second.data and first.student == second.student
    (only,) = read_protocols(write_protocol(tmp_path))
    assert only.name == "tiny" and "noise" not in only.data


def test_what_is_not_said_has_defaults(tmp_path):
    path = write_protocol(tmp_path, tuning_seeds=None, test_seeds=None, description=None)
    (protocol,) = read_protocols(path)
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
def test_protocols_that_cannot_be_run_are_refused(tmp_path, changes, said):
    with pytest.raises(ConfigurationError, match=f"(?s)tiny.yaml cannot be run.*{said}|{said}"):
        read_protocols(write_protocol(tmp_path, **changes))


def test_an_unknown_method_comes_with_a_suggestion():
    with pytest.raises(ConfigurationError, match="semckd-uniform[?]"):
        read_methods(["semckd-unifrom"])


def test_a_protocol_may_change_the_grid_of_a_method(tmp_path):
    changed = {"semckd-uniform": {"grid": {"feature_weight": [0.3, 1.0, 0.1]}}}
    (protocol,) = read_protocols(write_protocol(tmp_path, methods=["kd", changed, {"pair-1-3": {"grid": {}}}]))
    kd, uniform, pair = protocol.methods
    assert [kd] == read_methods(["kd"]) and pair.arguments["teacher_layers"] == [3]
    (usual,) = read_methods(["semckd-uniform"])
    assert uniform.candidates() == [{"feature_weight": value} for value in (0.3, 1.0, 0.1)] != usual.candidates()
    assert (uniform.loss, uniform.arguments) == (usual.loss, usual.arguments)


@pytest.mark.parametrize("entry", [{"kd": {"loss": "sp"}}, {"kd": {}, "sp": {}}, {"kd": 3}, ["kd"]])
def test_a_change_of_another_form_is_refused(entry):
    with pytest.raises(ConfigurationError, match="one name with its arguments, grid, options"):
        read_methods([entry])


@pytest.mark.parametrize("name", [*METHODS, "pair-1-3"])
def test_every_method_can_be_configured(tmp_path, name):
    (method,) = read_methods([name])
    assert method.name == name
    assert method.loss is None or all(part in FEATURE_LOSSES for part in method.loss.split("+"))
    assert method.association is None or method.association in STUDIED
    assert not method.arguments.keys() & method.grid.keys()
    for candidate in method.candidates():
        SemCKDConfig(str(tmp_path), use_cpu=True, **method.arguments, **candidate)
    assert issubclass(trainer_class(method), DistillationTrainer)


def test_every_method_is_tuned_with_the_same_budget():
    untuned = {"student", "kd-untuned", "semckd", "semckd-random-start", "semckd-zero-start"}
    untuned |= {"semckd-linear", "semckd-similarity", "semckd-all-layers"}
    for method in read_methods(list(METHODS)):
        candidates = method.candidates()
        expected = 1 if method.name in untuned or method.name.startswith("pair-") else 3
        assert len(candidates) == expected, method.name
        assert all(candidates.count(entry) == 1 for entry in candidates), method.name


def test_a_pair_of_layers_is_forced():
    (method,) = read_methods(["pair-2-13"])
    assert (method.loss, method.association, method.candidates()) == ("semckd", None, [{}])
    assert method.arguments == {"association": "uniform", "student_layers": [2], "teacher_layers": [13]}


@pytest.mark.parametrize("name", ["pair-0-1", "pair-1-0", "pair-1", "pair-1-2-3", "pair-a-b"])
def test_pairs_that_cannot_be_are_refused(name):
    with pytest.raises(ConfigurationError, match=f"method '{name}'"):
        read_methods([name])


def test_candidates_are_all_combinations():
    method = Method("m", grid={"a": [3, 1], "b": [4, 5]})
    assert method.candidates() == [{"a": 3, "b": 4}, {"a": 3, "b": 5}, {"a": 1, "b": 4}, {"a": 1, "b": 5}]
    assert Method("m").candidates() == [{}]


@pytest.mark.parametrize("place", ["training", "teacher", "methods"])
def test_an_option_that_no_recipe_has_is_refused_with_the_near_one(place, tmp_path):
    changes = {
        "training": {"training": {"num_train_epoch": 1}},
        "teacher": {"teacher": {"name": "t", "family": "vit", "training": {"num_train_epoch": 1}}},
        "methods": {"methods": [{"kd": {"arguments": {"num_train_epoch": 1}}}]},
    }
    with pytest.raises(ConfigurationError, match="unknown option num_train_epoch; did you mean num_train_epochs"):
        read_protocols(write_protocol(tmp_path, **changes[place]))


def test_an_unknown_association_is_refused():
    with pytest.raises(ConfigurationError, match="Unknown association"):
        trainer_class(Method("m", "semckd", association="ckm"))


def test_a_protocol_tunes_unless_it_says_otherwise(tmp_path):
    assert read_protocols(write_protocol(tmp_path))[0].tune is True
    assert read_protocols(write_protocol(tmp_path, tune=False))[0].tune is False
    with pytest.raises(ConfigurationError, match="tune: true or tune: false"):
        read_protocols(write_protocol(tmp_path, tune="no"))


def test_without_tuning_nothing_of_the_grid_is_taken(tmp_path):
    (protocol,) = read_protocols(write_protocol(tmp_path, tune=False, methods=["kd", "fitnet"]))
    bench = runs.Bench.__new__(runs.Bench)
    bench.protocol = protocol
    assert [bench.tune(method) for method in protocol.methods] == [{}, {}]


@pytest.mark.parametrize(
    ("name", "section", "key", "methods"),
    [
        ("few_labels", "data", "train", {"student", "kd", "semckd", "rkd"}),
        ("noisy_labels", "data", "noise", {"student", "kd", "semckd", "rkd"}),
        ("batch_size", "training", "per_device_train_batch_size", {"kd", "semckd"}),
        ("feature_weight", "training", "feature_weight", {"semckd", "semckd-uniform"}),
    ],
)
def test_the_protocols_of_the_curves(name, section, key, methods):
    protocols = read_protocols(PROTOCOLS / f"{name}.yaml")
    values = [getattr(entry, section)[key] for entry in protocols]
    assert [entry.name for entry in protocols] == [f"{name}@{value}" for value in values]
    assert len(values) > 3 and values == sorted(set(values))
    for entry in protocols:
        assert not entry.tune and len(entry.test_seeds) == 5
        assert methods <= {method.name for method in entry.methods}


def test_the_map_has_every_pair_once():
    (protocol,) = read_protocols(PROTOCOLS / "negative_map.yaml")
    expected = [f"pair-{s}-{t}" for s in range(1, 4) for t in range(1, 7)]
    assert [method.name for method in protocol.methods] == ["kd", *expected]
    # With a tuned baseline, a pair would differ from it in more than the pair.
    assert not protocol.tune


def test_a_swept_feature_weight_is_not_overridden():
    for protocol in read_protocols(PROTOCOLS / "feature_weight.yaml"):
        assert all("feature_weight" not in method.arguments for method in protocol.methods)
