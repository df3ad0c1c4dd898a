"""The configuration refuses what cannot work, says so helpfully, and can be parsed from a command line."""

import json
import math
import pickle
import pydoc
from dataclasses import fields

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_semckd.config import SemCKDConfig, distillation_fields
from hf_semckd.errors import ConfigurationError
from hf_semckd.losses.semckd.defaults import (
    IMAGE_DEFAULTS,
    MAP_DEFAULTS,
    SEQUENCE_DEFAULTS,
    association_temperature,
    feature_defaults,
)
from hf_semckd.training.options import loss_options

OWN = (
    "temperature",
    "task_weight",
    "logit_weight",
    "logit_chunk_size",
    "feature_weight",
    "association",
    "relation_weight",
    "target_norm",
    "projector",
    "projection_init",
    "student_layers",
    "teacher_layers",
    "teacher_weights",
    "teacher_dtype",
    "teacher_placement",
    "teacher_compile",
    "association_temperature",
    "association_bank",
    "max_tokens",
    "max_grid",
    "projection_learning_rate",
    "teacher_cache_dir",
    "teacher_cache_dtype",
    "teacher_cache_samples",
    "teacher_cache_limit_gb",
)


def config(tmp_path, **arguments):
    return SemCKDConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **arguments)


def refusal(tmp_path, **arguments):
    with pytest.raises(ConfigurationError) as caught:
        config(tmp_path, **arguments)
    text = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert [part in text for part in ("received: ", "expected: ", "what to do: ")] == [True] * 3
    return text


def parse(tmp_path, *words):
    (parsed,) = HfArgumentParser(SemCKDConfig).parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])
    return parsed


# Values


NOT_NUMBERS = [math.nan, math.inf, -math.inf, "4", None, True, [1.0]]


@pytest.mark.parametrize("value", [-0.001, -1, *NOT_NUMBERS])
@pytest.mark.parametrize("name", ["task_weight", "logit_weight", "feature_weight"])
def test_a_weight_must_be_a_finite_number_from_zero(tmp_path, name, value):
    if name == "feature_weight" and value is None:
        assert config(tmp_path).distills_features
        return
    text = refusal(tmp_path, **{name: value})
    assert f"`{name}`" in text and f"received: {value!r}" in text and "finite number >= 0" in text


@pytest.mark.parametrize("value", [0, 0.0, -2.0, *(value for value in NOT_NUMBERS if value is not None)])
def test_the_temperature_must_be_positive(tmp_path, value):
    text = refusal(tmp_path, temperature=value)
    assert "`temperature`" in text and f"received: {value!r}" in text and "finite number > 0" in text


@pytest.mark.parametrize("value", [0.0, -1e-3, *(value for value in NOT_NUMBERS if value is not None)])
@pytest.mark.parametrize("name", ["association_temperature", "projection_learning_rate"])
def test_optional_numbers_must_be_positive_where_given(tmp_path, name, value):
    assert f"`{name}`" in refusal(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["association", "target_norm", "projector"])
@pytest.mark.parametrize("value", ["nonsense", "", None, 3])
def test_an_unknown_choice_lists_the_known_ones(tmp_path, name, value):
    if value is None and name != "target_norm":
        assert getattr(config(tmp_path, **{name: value}), name) is None
        return
    text = refusal(tmp_path, **{name: value})
    known = {
        "association": "'similarity', 'sinkhorn', 'learned', 'uniform', 'last', 'one_to_one'",
        "target_norm": "'channel', 'none'",
    }
    assert f"received: {value!r}" in text and known.get(name, "'shared', 'convolutional', 'pairwise'") in text


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("association", "one-to-one", "one_to_one"),
        ("target_norm", "chanel", "channel"),
        ("projector", "pairwize", "pairwise"),
        ("teacher_dtype", "bfloat", "bfloat16"),
    ],
)
def test_a_misspelt_choice_is_told_what_was_meant(tmp_path, name, value, meant):
    assert f"did you mean '{meant}'?" in refusal(tmp_path, **{name: value})


@pytest.mark.parametrize("layers", [[], [1, "a"], [1, 1], ["a", "a"], [1.5], [True], [None], ["1", 1], {"a": 1}, 2.5])
@pytest.mark.parametrize("name", ["student_layers", "teacher_layers"])
def test_layers_must_be_different_indices_or_different_names(tmp_path, name, layers):
    text = refusal(tmp_path, **{name: layers})
    assert f"`{name}`" in text and f"received: {layers!r}" in text


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        ([1, -1], [1, -1]),
        ((2, 3), [2, 3]),
        (["1", "-2"], [1, -2]),
        ("encoder.layer.3", ["encoder.layer.3"]),
        (4, [4]),
        (["a.0", "a.1"], ["a.0", "a.1"]),
    ],
)
def test_layers_are_kept_as_one_list_of_one_kind(tmp_path, given, kept):
    assert config(tmp_path, student_layers=given).student_layers == kept
    assert config(tmp_path, teacher_layers=given).teacher_layers == kept


@pytest.mark.parametrize("name", ["--1", "²", "-", "1-"])
def test_names_that_only_look_like_numbers_stay_names(tmp_path, name):
    assert config(tmp_path, student_layers=[name]).student_layers == [name]


@pytest.mark.parametrize("folder", ["", "   "])
def test_an_empty_cache_folder_is_refused(tmp_path, folder):
    assert "`teacher_cache_dir` is empty" in refusal(tmp_path, teacher_cache_dir=folder)


# How much is compared and kept


LIMITS = {
    "logit_chunk_size": (None, "positions", "whole logits"),
    "teacher_cache_samples": (None, "draws", "whole logits"),
    "association_bank": (64, "samples", "the other samples of the micro-batch"),
    "max_tokens": (16, "tokens", "no limit"),
    "max_grid": (None, "rows and columns", "no limit"),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [-1, 0.0, 0.25, 4.0, 2.5, "4", None, True, False, [4], math.nan, math.inf])
def test_limits_must_be_whole_numbers_from_zero(tmp_path, value, name):
    default, unit, zero = LIMITS[name]
    if value is default:
        assert getattr(config(tmp_path, **{name: value}), name) is None
        return
    text = refusal(tmp_path, **{name: value})
    assert f"`{name}` is not a number of {unit}" in text and f"received: {value!r}" in text
    assert f"a whole number >= 1, or 0 for {zero}" in text and f"set {name} to {default}, or to 0 for {zero}" in text


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, 1, 4, 1000])
def test_any_other_limit_will_do(tmp_path, value, name):
    assert getattr(config(tmp_path, **{name: value}), name) == value


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_on_unless_told_otherwise(tmp_path, name):
    assert getattr(config(tmp_path), name) == LIMITS[name][0]


@pytest.mark.parametrize("value", [0, 0.0, -3, *(value for value in NOT_NUMBERS if value is not None)])
def test_the_limit_of_the_cache_must_be_positive_where_given(tmp_path, value):
    text = refusal(tmp_path, teacher_cache_limit_gb=value)
    assert "`teacher_cache_limit_gb`" in text and f"received: {value!r}" in text


@pytest.mark.parametrize("value", [None, 0.001, 7, 2.5])
def test_any_other_limit_of_the_cache_will_do(tmp_path, value):
    assert config(tmp_path, teacher_cache_limit_gb=value).teacher_cache_limit_gb == value


@pytest.mark.parametrize("value", ["float32", "half", "", None, 16, torch.float16])
def test_an_unknown_precision_of_the_cache_lists_the_known_ones(tmp_path, value):
    text = refusal(tmp_path, teacher_cache_dtype=value)
    assert "`teacher_cache_dtype`" in text and f"received: {value!r}" in text
    assert "'auto', 'float16', 'bfloat16'" in text


def test_values_set_by_hand_are_refused_when_they_are_checked_again(tmp_path):
    bad = {"max_tokens": 0.25, "max_grid": -2, "teacher_cache_dtype": "float8", "teacher_cache_limit_gb": -1}
    for name, value in bad.items():
        built = config(tmp_path)
        setattr(built, name, value)
        with pytest.raises(ConfigurationError, match=f"`{name}`"):
            built.validate_distillation()


COMPARED_AND_KEPT = {
    "association_bank": (16, "-1", "0.25"),
    "max_tokens": (9, "-1", "0.25"),
    "max_grid": (7, "-1", "2.5"),
    "teacher_cache_dtype": ("bfloat16", None, "float32"),
    "teacher_cache_limit_gb": (1.5, "-2", "much"),
}


@pytest.mark.parametrize("name", COMPARED_AND_KEPT)
def test_how_much_is_compared_and_kept_can_be_told_on_the_command_line(tmp_path, name, capsys):
    value, refused, unreadable = COMPARED_AND_KEPT[name]
    parsed = getattr(parse(tmp_path, "--use_cpu", f"--{name}", str(value)), name)
    assert parsed == value and type(parsed) is type(value)
    if refused is not None:
        with pytest.raises(ConfigurationError, match=f"`{name}`"):
            parse(tmp_path, "--use_cpu", f"--{name}", refused)
    with pytest.raises(SystemExit):
        parse(tmp_path, "--use_cpu", f"--{name}", unreadable)
    assert f"--{name}" in capsys.readouterr().err


# Combinations


def test_the_pairwise_projector_does_not_start_at_zero(tmp_path):
    text = refusal(tmp_path, projector="pairwise", projection_init="zero")
    assert "projection_init='zero'" in text and "use projector='shared'" in text
    assert config(tmp_path, projector="shared", projection_init="zero").projection_init == "zero"


@pytest.mark.parametrize("value", ["zeros", "", 0, False])
def test_an_unknown_start_of_projections_lists_the_known_ones(tmp_path, value):
    text = refusal(tmp_path, projection_init=value)
    assert "`projection_init`" in text and "'zero', 'random'" in text


@pytest.mark.parametrize("projector", [None, "shared", "convolutional", "pairwise"])
@pytest.mark.parametrize("target_norm", ["channel", "none"])
@pytest.mark.parametrize("association", [None, "similarity", "sinkhorn", "learned", "uniform", "last", "one_to_one"])
def test_every_combination_of_choices_is_accepted(tmp_path, association, target_norm, projector):
    built = config(tmp_path, association=association, target_norm=target_norm, projector=projector)
    assert (built.association, built.target_norm, built.projector) == (association, target_norm, projector)
    assert built.depends_on_batch_size == (association == "learned" and target_norm == "none")
    defaults = {("learned", "none"): 1.0, ("learned", "channel"): 0.5}
    assert association_temperature(loss_options(built)) == defaults.get((association, target_norm), 0.2)


def test_liger_kernels_and_logit_distillation_exclude_each_other(tmp_path):
    text = refusal(tmp_path, use_liger_kernel=True)
    assert "use_liger_kernel=True, logit_weight=1.0" in text and "logit_weight=0" in text
    assert config(tmp_path, use_liger_kernel=True, logit_weight=0).use_liger_kernel


def test_label_smoothing_needs_a_task_loss(tmp_path):
    text = refusal(tmp_path, label_smoothing_factor=0.1, task_weight=0)
    assert "label_smoothing_factor=0.1, task_weight=0" in text
    assert config(tmp_path, label_smoothing_factor=0.1).label_smoothing_factor == 0.1
    assert config(tmp_path, task_weight=0).task_weight == 0
    assert config(tmp_path, label_smoothing_factor=0.1, logit_weight=0, feature_weight=0)


@pytest.mark.parametrize(
    ("logit", "feature", "expected"),
    [
        (1, 1, (True, True, True)),
        (0, 2, (False, True, True)),
        (2, 0, (True, False, True)),
        (0, 0, (False, False, False)),
    ],
)
def test_a_term_is_on_when_its_weight_is_positive(tmp_path, logit, feature, expected):
    built = config(tmp_path, logit_weight=logit, feature_weight=feature)
    assert (built.distills_logits, built.distills_features, built.distills) == expected


def test_what_training_arguments_refuse_is_still_refused(tmp_path):
    with pytest.raises(ValueError, match="Strategy"):
        config(tmp_path, eval_strategy="sometimes")


# Resolved values


@pytest.mark.parametrize(
    ("projector", "maps", "images", "expected"),
    [
        (None, True, True, MAP_DEFAULTS),
        ("convolutional", True, True, MAP_DEFAULTS),
        ("shared", True, True, IMAGE_DEFAULTS),
        ("pairwise", True, True, IMAGE_DEFAULTS),
        (None, False, True, IMAGE_DEFAULTS),
        ("convolutional", False, True, IMAGE_DEFAULTS),
        (None, False, False, SEQUENCE_DEFAULTS),
    ],
)
def test_what_suits_layers_depends_on_their_kind_and_on_a_projector_that_was_chosen(projector, maps, images, expected):
    assert feature_defaults(projector, maps=maps, images=images) is expected


@pytest.mark.parametrize("association", [None, "similarity", "sinkhorn", "one_to_one"])
def test_the_association_temperature_of_cnns_is_sharper(tmp_path, association):
    built = config(tmp_path, association=association)
    assert association_temperature(loss_options(built), MAP_DEFAULTS) == 0.02
    assert association_temperature(loss_options(built), IMAGE_DEFAULTS) == 0.2
    assert association_temperature(loss_options(config(tmp_path, association="learned")), MAP_DEFAULTS) == 0.5


def test_a_given_association_temperature_wins(tmp_path):
    assert association_temperature(loss_options(config(tmp_path, association_temperature=0.7))) == 0.7
    assert (
        association_temperature(loss_options(SemCKDConfig.published(str(tmp_path), association_temperature=2.0)))
        == 2.0
    )


@pytest.mark.parametrize(("rate", "given", "expected"), [(5e-5, None, 1e-3), (0.05, None, 0.05), (0.05, 1e-4, 1e-4)])
def test_the_calibration_learning_rate_is_at_least_a_thousandth_unless_given(tmp_path, rate, given, expected):
    built = config(tmp_path, learning_rate=rate, projection_learning_rate=given)
    assert built.resolved_projection_learning_rate() == expected


def test_settings_are_json_without_paths_and_open_where_the_models_decide(tmp_path):
    built = config(tmp_path, teacher_cache_dir=str(tmp_path), student_layers=["1", "2"])
    settings = json.loads(json.dumps(built.distillation_settings()))
    assert set(settings) == set(OWN) - {"teacher_cache_dir"}
    assert settings["projection_learning_rate"] == 1e-3
    assert [settings[name] for name in ("association", "association_temperature", "feature_weight")] == [None] * 3
    assert settings["student_layers"] == [1, 2] and str(tmp_path) not in json.dumps(settings)


def test_a_configuration_survives_pickle_and_its_dictionary(tmp_path):
    built = config(tmp_path, association="learned", teacher_layers=[1, 2])
    assert pickle.loads(pickle.dumps(built)).distillation_settings() == built.distillation_settings()
    kept = {name: built.to_dict()[name] for name in OWN}
    assert config(tmp_path, **kept).distillation_settings() == built.distillation_settings()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("auto", None),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("8bit", 8),
        ("4bit", 4),
    ],
)
def test_the_teachers_precision_is_left_alone_or_named(tmp_path, name, dtype):
    built, bits = config(tmp_path, teacher_dtype=name), isinstance(dtype, int)
    assert built.resolved_teacher_dtype() is (None if bits else dtype) and built.teacher_bits == (
        dtype if bits else None
    )


# The published form


def test_published_is_the_papers_setting(tmp_path):
    built = SemCKDConfig.published(output_dir=str(tmp_path))
    assert (built.association, built.target_norm, built.projector) == ("learned", "none", "pairwise")
    assert (built.temperature, built.task_weight, built.logit_weight, built.feature_weight) == (4.0, 1.0, 1.0, 400.0)
    assert association_temperature(loss_options(built)) == 1.0 and built.depends_on_batch_size


def test_published_takes_other_fields_and_lets_them_win(tmp_path):
    built = SemCKDConfig.published(str(tmp_path), feature_weight=50, per_device_train_batch_size=64)
    assert (built.output_dir, built.feature_weight, built.per_device_train_batch_size) == (str(tmp_path), 50, 64)
    with pytest.raises(ConfigurationError):
        SemCKDConfig.published(str(tmp_path), feature_weight=-1)


# From plain training arguments


def test_plain_arguments_are_converted_with_defaults_and_not_changed(tmp_path):
    plain = TrainingArguments(str(tmp_path), learning_rate=0.3, seed=7, use_cpu=True, report_to="none")
    before = dict(vars(plain))
    converted = SemCKDConfig.from_training_arguments(plain)
    assert type(plain) is TrainingArguments and vars(plain) == before
    assert not any(hasattr(plain, name) for name in OWN)
    assert isinstance(converted, SemCKDConfig) and (converted.learning_rate, converted.seed) == (0.3, 7)
    reference = config(tmp_path)
    assert all(getattr(converted, name) == getattr(reference, name) for name in OWN)
    assert {entry.name for entry in fields(SemCKDConfig)} <= set(vars(converted)) | {"_n_gpu"}


def test_plain_arguments_that_cannot_work_are_refused(tmp_path):
    plain = TrainingArguments(str(tmp_path), use_liger_kernel=True, use_cpu=True, report_to="none")
    with pytest.raises(ConfigurationError, match="use_liger_kernel"):
        SemCKDConfig.from_training_arguments(plain)


# The command line


def test_distillation_fields_are_those_of_the_design():
    assert distillation_fields() == OWN


@pytest.mark.parametrize("name", OWN)
def test_every_own_field_explains_itself(name):
    entry = SemCKDConfig.__dataclass_fields__[name]
    help_text = entry.metadata["help"]
    assert len(help_text) > 30 and help_text.rstrip().endswith(".")


def test_own_fields_appear_in_the_help_of_a_parser():
    text = HfArgumentParser(SemCKDConfig).format_help()
    assert all(f"--{name}" in text for name in OWN)


def test_the_command_line_without_own_fields_gives_the_defaults(tmp_path):
    parsed = parse(tmp_path, "--use_cpu")
    reference = config(tmp_path)
    assert all(getattr(parsed, name) == getattr(reference, name) for name in OWN)


def test_every_own_field_can_be_given_on_the_command_line(tmp_path):
    given = {
        "temperature": 2.5,
        "task_weight": 0.5,
        "logit_weight": 0.25,
        "logit_chunk_size": 128,
        "teacher_cache_samples": 16,
        "feature_weight": 7.0,
        "association": "one_to_one",
        "relation_weight": 2.5,
        "target_norm": "none",
        "projector": "pairwise",
        "projection_init": "random",
        "student_layers": [1, -1],
        "teacher_layers": ["encoder.layer.2", "encoder.layer.5"],
        "teacher_weights": [1.0, 2.5],
        "teacher_dtype": "bfloat16",
        "teacher_placement": "offload",
        "teacher_compile": True,
        "association_temperature": 0.3,
        "projection_learning_rate": 0.01,
        "association_bank": 32,
        "max_tokens": 5,
        "max_grid": 2,
        "teacher_cache_dir": "cache",
        "teacher_cache_dtype": "float16",
        "teacher_cache_limit_gb": 2.5,
    }
    words = []
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    parsed = parse(tmp_path, "--use_cpu", *words)
    assert {name: getattr(parsed, name) for name in OWN} == given


@pytest.mark.parametrize(
    "weights", [[1.0, 0.0], [1.0, -2.0], [1.0, math.nan], [1.0, math.inf], ["a", "b"], [True, 1], 0]
)
def test_weights_of_teachers_are_positive_numbers(tmp_path, weights):
    assert "`teacher_weights`" in refusal(tmp_path, teacher_weights=weights)


def test_weights_of_teachers_may_come_as_a_tuple(tmp_path):
    assert config(tmp_path, teacher_weights=(1, 2.5)).teacher_weights == [1, 2.5]


def test_a_bad_value_on_the_command_line_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="`temperature`"):
        parse(tmp_path, "--temperature", "0")
    with pytest.raises(SystemExit):
        parse(tmp_path, "--association", "nonsense")


def test_a_dictionary_or_json_file_can_be_parsed(tmp_path):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "student_layers": [1, 2], "feature_weight": 3}
    (tmp_path / "args.json").write_text(json.dumps(values))
    (parsed,) = HfArgumentParser(SemCKDConfig).parse_json_file(tmp_path / "args.json")
    assert parsed.student_layers == [1, 2] and parsed.feature_weight == 3


def test_its_help_in_python_is_that_of_the_fields():
    text = " ".join(pydoc.render_doc(SemCKDConfig, renderer=pydoc.plaintext).replace("|", " ").split())
    for name in distillation_fields():
        entry = SemCKDConfig.__dataclass_fields__[name]
        assert f"{name} (" in text and " ".join(entry.metadata["help"].split()) in text
