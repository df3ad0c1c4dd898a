"""The structure of the package: what `lint-imports` cannot see, and the sizes that keep it readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_semckd"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 350, 50
# Before the rooms were built the package had 11,346 lines. What other families, packed rows, images of other sizes and
# the refusals that go with them take (some 1,900 lines), students made from teachers (1,450), the room that evaluates
# and exports them (1,450 with its commands), several teachers for one student (370), recipes (3,300), cards and pushes
# that say and prove what a deployer needs (920), the report of a training with pictures for trackers (1,750), and what
# engines, faults, large vocabularies and large teachers ask for (5,000) came later.
LARGEST_PACKAGE = 25_500
# Where `transformers.Trainer` is subclassed.
TRAINERS = {"training/trainer.py", "training/student_trainer.py"}


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def functions_of(path: Path) -> list[tuple[str, int]]:
    """Return name and length of every function, decorators and docstring included."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [
        (node.name, node.end_lineno - min([node.lineno, *(entry.lineno for entry in node.decorator_list)]) + 1)
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def imported_names(path: Path) -> set[str]:
    """Return the dotted names that a file imports, with the module for `from` imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {entry.name for entry in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{entry.name}" for entry in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_can_be_read_at_one_sitting(path):
    assert lines_of(path) <= LONGEST_FILE
    long = [(name, length) for name, length in functions_of(path) if length > LONGEST_FUNCTION]
    assert not long


def test_the_package_stays_small():
    assert sum(map(lines_of, FILES)) <= LARGEST_PACKAGE


def test_no_import_is_for_annotations_alone():
    """They hide circles from the tools that look for them."""
    hidden = [name_of(path) for path in FILES if "TYPE_CHECKING" in path.read_text(encoding="utf-8")]
    assert not hidden


def test_the_import_rule_has_no_exemption():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    assert not settings.get("exclude_type_checking_imports", False)
    assert settings["contracts"] and not any("ignore_imports" in contract for contract in settings["contracts"])


def test_the_trainer_is_known_to_its_own_files_alone():
    others = [path for path in FILES if name_of(path) not in TRAINERS]
    knows = [name_of(path) for path in others if "transformers.Trainer" in imported_names(path)]
    assert not knows


def test_importing_the_package_loads_no_framework():
    code = "import sys, hf_semckd; print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
