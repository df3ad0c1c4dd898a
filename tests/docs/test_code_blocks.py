"""The code in README.md and docs runs as it is written; only models and data of the Hub are replaced by tiny ones."""

import re
from collections import Counter

import pytest
from doc_pages import PAGES, ROOT, blocks, name, script
from stand_ins import recipe_with_stand_ins, with_stand_ins

from hf_semckd.cli import COMMANDS, main
from hf_semckd.cli.distill import defaults
from hf_semckd.evaluation import variants
from hf_semckd.recipes.reading import RecipeParser, read_recipe

ALL = [block for page in PAGES for block in blocks(page)]
RECIPES = [block for block in ALL if block.language == "yaml"]


def recipe_name(block):
    return block.code.partition("\n")[0].strip("# ").removesuffix(".yaml")


@pytest.fixture
def quick_tables(monkeypatch):
    """The tables that pages print measure PyTorch alone, and no memory."""
    monkeypatch.setattr(variants, "is_installed", lambda name: False)
    monkeypatch.setattr(variants, "peak_memory", lambda *parts: 10**8)


def run_page(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in script(page):
        code = "\n" * (block.line - 1) + with_stand_ins(block.code, tmp_path)
        exec(compile(code, str(block.page), "exec"), namespace)


# Its tables and files are those of ONNX.
EXPORTING = ROOT / "docs" / "guides" / "deploy.md"


@pytest.mark.parametrize("page", [page for page in PAGES if script(page) and page != EXPORTING], ids=name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, quick_tables):
    run_page(page, tmp_path, monkeypatch)


@pytest.mark.slow
def test_the_python_of_the_page_on_exporting_runs(tmp_path, monkeypatch):
    run_page(EXPORTING, tmp_path, monkeypatch)


def test_few_blocks_are_not_run_and_all_for_a_known_reason():
    reasons = Counter(block.reason for block in ALL if block.reason is not None)
    assert set(reasons) <= {"needs the Hub", "needs a GPU"}
    assert sum(reasons.values()) <= 3


def test_every_block_names_its_language():
    languages = {block.language for block in ALL if not block.language.startswith("{")}
    assert languages <= {"python", "bash", "text", "bibtex", "yaml"}


@pytest.mark.parametrize("block", RECIPES, ids=recipe_name)
def test_a_recipe_names_only_options_that_exist(block, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(block.code)
    read_recipe(RecipeParser("hf-semckd distill", "", ""), str(path), [], defaults(str(path)))


@pytest.mark.slow
@pytest.mark.parametrize("block", RECIPES, ids=recipe_name)
def test_a_recipe_runs_as_it_is_written(block, tmp_path, monkeypatch, capsys):
    """With tiny models and data, which need shorter texts, and in one epoch."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_with_stand_ins(block.code, tmp_path))
    shorter = ["--max_length", "12"] if "max_length" in block.code else []
    flags = ["--num_train_epochs", "1", "--output_dir", "student", "--use_cpu", "true", *shorter]
    assert main(["distill", str(path), *flags]) == 0, capsys.readouterr().err
    assert (tmp_path / "student" / "report.html").is_file()


def test_the_script_of_the_readme_is_short():
    (code,) = (block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_commands_name_what_exists(capsys):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    shell = "\n".join(block.code for block in ALL if block.language == "bash").replace("\\\n", " ")
    assert set(re.findall(r"^make ([a-z-]+)", shell, re.M)) <= set(targets)
    named = re.findall(r"\b(?:scripts|examples)/[\w/-]+\.(?:py|yaml)\b", shell)
    assert all((ROOT / path).is_file() for path in named)
    lines = re.findall(r"^hf-semckd ([a-z-]+) (.*)", shell, re.M)
    assert {command for command, _ in lines} == set(COMMANDS)
    for command, words in lines:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options = capsys.readouterr().out
        assert all(flag in options for flag in re.findall(r"--[\w-]+", words)), (command, words)
