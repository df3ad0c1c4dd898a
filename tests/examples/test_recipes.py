"""Every recipe of the examples runs as it stands, on less data; what it leaves loads without the library."""

import importlib.util
import json
from pathlib import Path

import pytest
from launching import python
from recipe_parts import command, quick_evaluate

from hf_semckd.recipes import run

ROOT = Path(__file__).resolve().parents[2]
RECIPES = {path.stem: path for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))}
PARTS = {
    "images": "digits",
    "language-model": "guides",
    "questions": "spans",
    "speech": "tones",
    "text-to-text": "repair",
    "tokens": "casing",
}
LOAD = """
import sys
import transformers
model = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2])
assert not [name for name in sys.modules if name.startswith("hf_semckd")]
print(type(model).__name__, type(model).__module__.partition(".")[0])
"""
LITTLE = ("--use_cpu", "True", "--max_train_samples", 64, "--max_eval_samples", 16, "--teacher_epochs", 0.2)
LITTLE += ("--max_steps", 2)


def prepare(part, folder):
    """Let the script beside the recipes write the data of one of them."""
    spec = importlib.util.spec_from_file_location("prepare_recipes", ROOT / "examples" / "recipes" / "prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.PARTS[part](folder / "data" / "recipes" / part)


def distill(name, folder, monkeypatch, capsys, *flags):
    """Run a recipe from a folder, and return what it says of itself."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(run, "evaluate", quick_evaluate)
    assert command("distill", RECIPES[name], "--json", *flags) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["problems"] == [] and "0 rows without" not in err
    made = folder / "outputs" / name
    assert {"evaluation.txt", "report.html", "README.md"} <= {path.name for path in made.iterdir()}
    return told


def assert_plain(told, folder):
    """Load the student in a process that does not know the library."""
    done = python("-c", LOAD, told["auto_class"], told["student"], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "transformers"


def quality(told, model="student"):
    return next(row["quality"] for row in told["evaluation"]["rows"] if row["model"] == model)


def test_all_are_covered_and_short():
    assert {*PARTS, "text"} == {*RECIPES}
    for path in RECIPES.values():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 15 and max(map(len, lines)) <= 119 and lines[0].startswith("# ")


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_recipe_runs_on_little_data(name, tmp_path, monkeypatch, capsys):
    prepare(PARTS[name], tmp_path)
    assert_plain(distill(name, tmp_path, monkeypatch, capsys, *LITTLE), tmp_path)


def test_a_recipe_of_images_runs_in_the_default_suite_too(tmp_path, monkeypatch, capsys):
    prepare(PARTS["images"], tmp_path)
    told = distill("images", tmp_path, monkeypatch, capsys, *LITTLE)
    assert told["auto_class"] == "AutoModelForImageClassification" and (tmp_path / told["student"]).is_dir()


@pytest.mark.slow
def test_a_recipe_teaches_more_than_chance(tmp_path, monkeypatch, capsys):
    """Ten digits, of which a guess gets a tenth right."""
    prepare("digits", tmp_path)
    flags = ("--use_cpu", "True", "--teacher_epochs", 8, "--num_train_epochs", 4, "--max_eval_samples", 200)
    told = distill("images", tmp_path, monkeypatch, capsys, *flags)
    assert quality(told) > 0.5 and quality(told, "teacher") > 0.5


@pytest.mark.network
def test_the_recipe_of_texts_runs(tmp_path, monkeypatch, capsys):
    parts = ROOT / "data" / "text"
    if not (parts / "minilm-l6").is_dir():
        pytest.skip("needs `python scripts/fetch_text_parts.py`")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "text").symlink_to(parts)
    told = distill("text", tmp_path, monkeypatch, capsys, *LITTLE)
    assert_plain(told, tmp_path)
