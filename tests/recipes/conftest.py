"""Runs of recipes that take a second: the table measures no memory, and times for a moment only."""

import pytest
from recipe_parts import quick_evaluate, save_bert, sentences, write_rows

from hf_semckd.recipes import run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A BERT that was not trained, with named classes."""
    return save_bert(tmp_path_factory.mktemp("models") / "teacher", layers=3)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """24 rows in one file."""
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", sentences(24))


@pytest.fixture
def quick_table(monkeypatch):
    monkeypatch.setattr(run, "evaluate", quick_evaluate)
