"""What the README says: its script runs, its numbers are those of the kept rows, its links lead somewhere."""

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertTokenizer

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def save_teacher(folder: Path) -> None:
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "a"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer.from_pretrained(folder).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=6, num_attention_heads=12, intermediate_size=24
    )
    BertForSequenceClassification(config).save_pretrained(folder)


def save_sentences(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 6), ("validation", 4)):
        rows = [f"a {'good' if index % 2 else 'bad'} film,{index % 2}" for index in range(count)]
        (folder / f"{split}.csv").write_text("\n".join(["sentence,label", *rows]))


def test_the_script_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    lines = [line for line in script.splitlines() if line.strip()]
    assert len(lines) <= 15
    save_teacher(tmp_path / "teacher")
    save_sentences(tmp_path / "sentences")
    # Only where teacher and data come from is replaced: there is no Hub here.
    for name, folder in (("textattack/bert-base-uncased-SST-2", "teacher"), ("stanfordnlp/sst2", "sentences")):
        assert script.count(f'"{name}"') == 1
        script = script.replace(f'"{name}"', repr(str(tmp_path / folder)))
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"load_dataset": load_dataset}
    exec(compile(script, "README.md", "exec"), namespace)
    student = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (4, 312)


def test_the_accuracy_tables_are_those_of_the_kept_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    readme = importlib.import_module("accuracy.readme")
    results = ROOT / "scripts" / "results" / "accuracy"
    rows = readme.read_shown(results)
    for page, texts in (
        (README, readme.blocks(rows)),
        ((results / "README.md").read_text(), readme.detail_blocks(rows)),
    ):
        assert all(len(text) > 100 for text in texts.values())
        assert readme.updated(page, texts) == page


@pytest.mark.parametrize("example", ["vit", "text"])
def test_the_tables_are_those_of_the_kept_rows(example: str) -> None:
    spec = importlib.util.spec_from_file_location("run_demo_seeds", ROOT / "scripts" / "run_demo_seeds.py")
    assert spec is not None and spec.loader is not None
    runs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runs)
    table = runs.table(example)
    assert len(table.splitlines()) == 6, "four models, the heading and its rule"
    assert table.strip() in README


def script(name: str) -> Any:
    """Import one of the scripts."""
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module(name)


def test_the_prices_are_those_of_the_stored_measurement() -> None:
    summary = script("step_cost.summary")
    paths = sorted((ROOT / "scripts" / "results" / "step").glob("*.json"))
    shown = [path for path in paths if not path.stem.endswith("-before")]
    assert len(shown) >= 2
    for path in shown:
        assert summary.table(json.loads(path.read_text())).strip() in README, path.name


def test_the_accuracies_are_those_of_the_kept_runs() -> None:
    table = script("compare_sampling").table()
    assert len(table.splitlines()) > 4
    assert table.strip() in README


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+?)\)", README)
    assert targets
    for target in targets:
        assert "://" in target or (ROOT / target).exists(), target


def test_every_module_has_its_floor_in_the_table() -> None:
    modules = {path.stem for path in (ROOT / "hf_semckd").glob("*.py")} - {"__init__", "version"}
    named = set(re.findall(r"`(\w+)`", README.split("## Architecture")[1].split("## Citation")[0]))
    assert modules <= named
