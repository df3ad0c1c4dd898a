"""Errors say what was received, what was expected and what to do, and are caught by the names one would guess."""

import pytest

from hf_semckd import errors


def test_message_has_its_four_parts_in_order():
    text = errors.message("The cup is full", received="3 l", expected="at most 1 l", todo="pour less")
    assert text.splitlines() == [
        "The cup is full.",
        "  received: 3 l",
        "  expected: at most 1 l",
        "  what to do: pour less",
    ]


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ConfigurationError, ValueError),
        (errors.InputError, ValueError),
        (errors.LayerNotFoundError, errors.InputError),
        (errors.RaggedBatchError, errors.InputError),
        (errors.NonFiniteLossError, FloatingPointError),
        (errors.TeacherOutputError, FloatingPointError),
        (errors.CheckpointError, RuntimeError),
        (errors.SaveError, OSError),
        (errors.LostProcessError, RuntimeError),
        (errors.HubPushError, RuntimeError),
        (errors.MissingDependencyError, ImportError),
    ],
)
def test_every_error_is_ours_and_the_builtin_one_would_catch(kind, builtin):
    assert issubclass(kind, errors.SemCKDError)
    assert issubclass(kind, builtin)


def test_no_error_class_is_left_out_of_the_hierarchy():
    classes = [entry for entry in vars(errors).values() if isinstance(entry, type) and issubclass(entry, Exception)]
    assert all(issubclass(entry, errors.SemCKDError) for entry in classes)


def test_nearest_puts_the_closest_spelling_first():
    names = ["encoder.layer.0", "encoder.layer.1", "pooler", "embeddings"]
    assert errors.nearest("encoder.layer.00", names)[0] == "encoder.layer.0"
    assert errors.nearest("poler", names) == ["pooler"]


def test_nearest_finds_the_same_last_part_under_another_path():
    names = ["vit.encoder.blocks.dense_attention_block", "classifier"]
    assert errors.nearest("x.dense_attention_block", names, count=1) == [names[0]]


def test_nearest_returns_at_most_count_without_repeats_and_nothing_for_strangers():
    names = [f"layer.{index}" for index in range(20)]
    found = errors.nearest("layer.1", iter(names), count=3)
    assert len(found) == len(set(found)) == 3
    assert errors.nearest("zzzzqqqq", names) == []
