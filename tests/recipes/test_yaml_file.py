"""Files of recipes as people write them: comments, marks of other systems, and what is no recipe at all."""

import pytest
from recipe_parts import read

from hf_semckd.errors import ConfigurationError
from hf_semckd.recipes.yaml_file import PLAIN, flag_words


def test_the_comments_at_the_top_are_kept(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# What it does.\n# Needs: this\nteacher: t\n# inside\ndataset: d\nstudent: s\n")
    assert read(path=path).recipe.head == "What it does.\nNeeds: this"


@pytest.mark.parametrize("mark", ["\ufeff", ""], ids=["with a byte order mark", "without"])
def test_files_of_other_systems_are_read(tmp_path, mark):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(f"{mark}# Windows\r\nteacher: t\r\ndataset: d\r\nstudent: s\r\n".encode())
    found = read(path=path).recipe
    assert (found.head, found.models.student) == ("Windows", "s")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "received: nothing"),
        (b"# only comments\n", "received: nothing"),
        (b"- teacher: t\n", "received: a list"),
        (b"just text\n", "received: a str"),
        (b"teacher: [t\n", "YAML"),
        (b"teacher:\n\tx: 1\n", "found character '\\\\t'"),
        (b"teacher: t\n---\ndataset: d\n", "document"),
        (b"? [a, b]\n: c\n", "unhashable"),
        (b"seed: 1\nseed: 2\n", "seed is there twice"),
        (b"student: {num_layers: 1, num_layers: 2}\n", "num_layers is there twice"),
        (b"student: {num_layers: 1}\nnum_layers: 2\n", "num_layers beside student"),
        (b"teacher: !!python/object/apply:os.getcwd []\n", "python/object"),
        (b"teacher: \xff\xfe\n", "decode"),
        (b"lr_scheduler_kwargs: &a {x: *a}\n", "anchor|Circular|recursive"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_the_reason(tmp_path, content, said):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"(?s)recipe.yaml.*{said}"):
        read(path=path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="(?s)none.yaml cannot be read.*No such file"):
        read(path=tmp_path / "none.yaml")
    with pytest.raises(ConfigurationError, match="(?s)cannot be read.*directory"):
        read(path=tmp_path)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("3e-4", ["--x=3e-4"]),
        ("-a", ["--x=-a"]),
        (["-a"], ["--x=-a"]),
        (["a", "-b", "-1"], ["--x", "a", f"{PLAIN}-b", "-1"]),
        ({"a": 1}, ["--x", '{"a": 1}']),
    ],
)
def test_an_option_becomes_words_of_a_command_line(value, words):
    assert flag_words("x", value) == words
