"""Flags and files are read alike: every option can be given, and what is no option is refused with the near one."""

import json
import os
import re
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints
from unittest import mock

import pytest
from recipe_parts import read
from transformers import TrainingArguments

from hf_semckd import SemCKDConfig
from hf_semckd.cli.distill import defaults
from hf_semckd.config import distillation_fields
from hf_semckd.errors import ConfigurationError
from hf_semckd.recipes.reading import RecipeParser

NEEDED = ("--teacher", "t", "--dataset", "d", "--student", "s")


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe with what every one needs, and lines of its own."""

    def write(lines):
        path = tmp_path / "recipe.yaml"
        path.write_text(f"teacher: t\ndataset: d\n{lines}\n", encoding="utf-8")
        return path

    return write


# ---- Values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("learning_rate: 3e-4", "learning_rate", 3e-4),
        ("learning_rate: 3E-4", "learning_rate", 3e-4),
        ("eval_strategy: no", "eval_strategy", "no"),
        ("bf16: no", "bf16", False),
        ("greater_is_better: yes", "greater_is_better", True),
        ("max_steps: -1", "max_steps", -1),
        ("weight_decay: -1e-2", "weight_decay", -0.01),
        ("temperature: null", "temperature", None),
        ("temperature: ~", "temperature", None),
        ("temperature: Null", "temperature", None),
        ("temperature:", "temperature", None),
        ("num_train_epochs: NULL", "num_train_epochs", 3.0),
        ("student_layers: [1]", "student_layers", [1]),
        ("student_layers: 1", "student_layers", [1]),
        ("student_layers: [1, -1]", "student_layers", [1, -1]),
        ("teacher_weights: [1, 2.5]", "teacher_weights", [1.0, 2.5]),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("report_to: [tensorboard, mlflow]", "report_to", ["tensorboard", "mlflow"]),
        ("optim_target_modules: all-linear", "optim_target_modules", "all-linear"),
        ("optim_target_modules: [a, b]", "optim_target_modules", ["a", "b"]),
        ("lr_scheduler_kwargs: {min_lr: 3e-5, cycles: 2}", "lr_scheduler_kwargs", {"min_lr": 3e-5, "cycles": 2}),
        ("liger_kernel_config: {rope: true}", "liger_kernel_config", {"rope": True}),
    ],
)
def test_values_of_a_file_are_what_they_look_like(recipe, line, name, value):
    found = getattr(read(*NEEDED[4:], path=recipe(line)).args, name)
    assert found == value and isinstance(found, type(value))


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("class_names: [no, yes]", "class_names", ["no", "yes"]),
        ("class_names: [-, +]", "class_names", ["-", "+"]),
        ("class_names: [--neg, -pos]", "class_names", ["--neg", "-pos"]),
        ("class_names: [-1, 0, 1]", "class_names", ["-1", "0", "1"]),
        ("class_names: ['null', on]", "class_names", ["null", "on"]),
        ("class_names: [2020-01-01]", "class_names", ["2020-01-01"]),
        ("prefix: '- '", "prefix", "- "),
        ("prefix: --x", "prefix", "--x"),
        ("prefix: |-\n  two\n  lines: a", "prefix", "two\nlines: a"),
        ("prefix: 'summarize: '", "prefix", "summarize: "),
        ("dataset_config: 2023-99-99", "dataset_config", "2023-99-99"),
        ("dataset_config: 010", "dataset_config", "010"),
        ("dataset_config: ünïcode", "dataset_config", "ünïcode"),
    ],
)
def test_texts_stay_as_they_are_written(recipe, line, name, value):
    assert getattr(read(*NEEDED[4:], path=recipe(line)).recipe.data, name) == value


def test_a_student_is_described_in_lines_of_its_own_or_below_its_name(recipe):
    below = read(path=recipe("student: {num_layers: [2, 3], parameters: 3e-1, importance: change}"))
    beside = read(path=recipe("num_layers: [2, 3]\nparameters: 0.3\nimportance: change"))
    assert below.recipe.models == beside.recipe.models
    assert (below.recipe.models.num_layers, below.recipe.models.parameters) == ([2, 3], 0.3)
    assert below.given == beside.given == ("teacher", "dataset", "num_layers", "parameters", "importance")


# Values that only a few texts or numbers can be.
SPECIAL = {
    "eval_strategy": "steps", "save_strategy": "epoch", "logging_strategy": "epoch", "lr_scheduler_type": "cosine",
    "optim": "sgd", "hub_strategy": "end", "log_level": "info", "log_level_replica": "error",
    "debug": "underflow_overflow",
    "ddp_backend": "gloo", "report_to": "tensorboard", "save_steps": 500, "warmup_steps": 7, "logging_steps": 7,
    "teacher_weights": [1.0, 2.5], "trackio_static_space_id": "text",
}  # fmt: skip
# What cannot be made for a moment alone, or is given by these tests already.
ALONE = {"deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "tf32", "output_dir"}
ALONE |= {"resume_from_checkpoint"}  # which a recipe does by itself


def other_value(entry, hint):
    """Return a value of a field other than its default."""
    if entry.name in SPECIAL:
        return SPECIAL[entry.name]
    options = [hint, *get_args(hint)]
    literals = next((get_args(option) for option in options if get_origin(option) is Literal), ())
    choices = entry.metadata.get("choices", literals)
    if choices:
        return next(choice for choice in choices if choice != entry.default)
    kinds = {get_origin(option) or option for option in options}
    if bool in kinds and list not in kinds and dict not in kinds:
        return entry.default is not True
    if int in kinds or float in kinds:
        return (entry.default or 0) + 1
    return ["a", "b"] if list in kinds else {"key": True} if dict in kinds else "text"


@pytest.mark.parametrize("way", ["flags", pytest.param("file", marks=pytest.mark.slow)])
@mock.patch.dict(os.environ)  # where some arguments are written to
def test_every_argument_can_be_given(recipe, way):
    hints, plain = get_type_hints(SemCKDConfig), SemCKDConfig(**defaults(None))
    seen, refused, wrong = set(), set(), []
    for entry in (entry for entry in fields(SemCKDConfig) if entry.init and entry.name not in ALONE):
        name, value = entry.name, other_value(entry, hints[entry.name])
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags, path = (*NEEDED, f"--{name}", *words), None
        if way == "file":
            flags, path = NEEDED[4:], recipe(f"{name}: {json.dumps(value)}")
        try:
            by_hand = SemCKDConfig(**{**defaults(path), name: value})
        except Exception as error:  # such as bf16 without the hardware
            with pytest.raises(ConfigurationError, match=re.escape(str(error).split()[0])):
                read(*flags, path=path)
            refused.add(name)
            continue
        found = read(*flags, path=path)
        seen |= {name} if getattr(by_hand, name) != getattr(plain, name) else set()
        if getattr(found.args, name) != getattr(by_hand, name) or name not in found.given:
            wrong.append((name, getattr(by_hand, name), getattr(found.args, name)))
    assert not wrong
    # Of nearly all of them a change was seen.
    assert len(seen) > 0.8 * len(fields(SemCKDConfig)) and len(refused) < 15


# ---- Files and flags together -----------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_the_defaults(recipe):
    path = recipe("learning_rate: 1e-3\nlogging_steps: 7\nstudent: s\nbf16: false")
    found = read("--learning-rate", "2e-3", path=path)
    assert (found.args.learning_rate, found.args.logging_steps, found.args.save_steps) == (2e-3, 7, 0.1)
    assert found.args.output_dir == "outputs/recipe" and found.recipe.models.teacher == ["t"]


def test_given_are_the_options_of_the_file_and_the_flags_and_no_others(recipe):
    path = recipe("student: s\nseed: 3\ntemperature: null")
    flags = ("--learning-rate=1e-3", "--no_remove_unused_columns", "--prefix", "seed", "--bf16=false")
    found = read(*flags, path=path)
    assert found.given == (
        "teacher", "dataset", "student", "seed", "learning_rate", "remove_unused_columns", "prefix", "bf16",
    )  # fmt: skip
    assert found.args.remove_unused_columns is False


# ---- Refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rte: 1", "unknown option learning_rte; did you mean learning_rate"),
        ("student: {num_layer: 2}", "unknown option student.num_layer; did you mean student.num_layers"),
        ("student: {seed: 2}", "unknown option student.seed"),
        ("zzzzqqq: 1", r"unknown option zzzzqqq \(see"),
        ("1: 1", "unknown option 1"),
        ("on: {a: 1}", "unknown option on"),
        ("learning_rate: fast", "--learning_rate.*invalid float value: 'fast'"),
        ("seed: [1, 2]", "unknown option '2'"),
        ("task: chess", "invalid choice"),
        ("bf16: off", "Truthy value expected: got off"),
        ("association: sinkhron", "sinkhron"),
        ("liger_kernel_config: true", "(?s)liger_kernel_config is no mapping.*true"),
    ],
)
def test_what_is_no_option_or_no_value_is_refused(recipe, line, said):
    with pytest.raises(ConfigurationError, match=said):
        read("--student", "s", path=recipe(line))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning-rte", "1"], "'--learning-rte'; did you mean --learning_rate"),
        (["--learning_rte=1"], "did you mean --learning_rate"),
        (["--learn", "1"], "unknown option '--learn'"),
        (["--seed"], "expected one argument"),
        (["--seed", "1", "extra"], "unknown option 'extra'"),
    ],
)
def test_unknown_flags_are_refused_with_the_near_one(flags, said):
    with pytest.raises(ConfigurationError, match=said):
        read(*NEEDED, *flags)


# ---- Help ------------------------------------------------------------------------------------------------------


def test_the_help_has_the_own_options_before_those_of_trainer():
    text = RecipeParser("hf-semckd distill", "", "").format_help()
    places = [text.index(f"\n{title}") for title in ("models:", "data:", "results:", "distillation (", "training (")]
    assert places == sorted(places)
    for entry in fields(TrainingArguments):
        assert not entry.init or text.index(f"--{entry.name} ") > places[-1]
    for name in distillation_fields():
        assert places[-2] < text.index(f"--{name} ") < places[-1]


def test_making_a_parser_leaves_the_arguments_as_they_were():
    before = {entry.name: (entry.type, entry.kw_only) for entry in fields(SemCKDConfig)}
    RecipeParser("hf-semckd distill", "", "")
    assert before == {entry.name: (entry.type, entry.kw_only) for entry in fields(SemCKDConfig)}
