"""What a recipe says has to fit together before anything is loaded."""

import pytest
from recipe_parts import read

from hf_semckd.errors import ConfigurationError


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "A student is either given, or cut"),
        (("--num_layers", 1, "--student", "s"), "A student is either given, or cut"),
        (("--num_layers", 1, "--teacher", "a", "b"), "cut out of one teacher"),
        (("--student", "s", "--teacher", "a", "b", "--teacher_epochs", 1), "Several teachers are fine-tuned"),
        (("--num_layers", 1, "--max_train_samples", 0), "max_train_samples=0"),
        (("--num_layers", 1, "--max_length", -3), "max_length=-3"),
        (("--num_layers", 1, "--teacher_epochs", -1), "teacher_epochs=-1"),
    ],
)
def test_contradictions_are_refused(flags, said):
    with pytest.raises(ConfigurationError, match=said):
        read("--teacher", "t", "--dataset", "d", *flags)


@pytest.mark.parametrize(("given", "missing"), [(("--teacher", "t"), "dataset"), (("--dataset", "d"), "teacher")])
def test_what_is_missing_is_named(given, missing):
    with pytest.raises(ConfigurationError, match=f"(?s)There is no {missing}.*add {missing}: "):
        read(*given, "--num_layers", 1)


def test_a_recipe_that_fits_together_is_taken():
    models = read("--teacher", "t", "--dataset", "d", "--parameters", 0.5, "--teacher_epochs", 0.5).recipe.models
    assert (models.teacher, models.parameters, models.teacher_epochs, models.method) == (["t"], 0.5, 0.5, "semckd")
