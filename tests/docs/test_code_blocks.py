"""The code in README.md and docs runs as it is written; only models and data of the Hub are replaced by tiny ones."""

import re
from collections import Counter

import pytest
from doc_pages import PAGES, ROOT, blocks, name, script
from stand_ins import with_stand_ins

from hf_semckd.cli import COMMANDS, main

ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("page", [page for page in PAGES if script(page)], ids=name)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in script(page):
        code = "\n" * (block.line - 1) + with_stand_ins(block.code, tmp_path)
        exec(compile(code, str(block.page), "exec"), namespace)


def test_few_blocks_are_not_run_and_all_for_a_known_reason():
    reasons = Counter(block.reason for block in ALL if block.reason is not None)
    assert set(reasons) <= {"needs the Hub", "needs a GPU"}
    assert sum(reasons.values()) <= 3


def test_every_block_names_its_language():
    languages = {block.language for block in ALL if not block.language.startswith("{")}
    assert languages <= {"python", "bash", "text", "bibtex"}


def test_the_script_of_the_readme_is_short():
    (code,) = (block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15


def test_commands_name_what_exists(capsys):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    shell = "\n".join(block.code for block in ALL if block.language == "bash").replace("\\\n", " ")
    assert set(re.findall(r"^make ([a-z-]+)", shell, re.M)) <= set(targets)
    assert all((ROOT / path).is_file() for path in re.findall(r"\b(?:scripts|examples)/\w+\.py\b", shell))
    lines = re.findall(r"^hf-semckd ([a-z-]+) (.*)", shell, re.M)
    assert {command for command, _ in lines} == set(COMMANDS)
    for command, words in lines:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        options = capsys.readouterr().out
        assert all(flag in options for flag in re.findall(r"--[\w-]+", words)), (command, words)
