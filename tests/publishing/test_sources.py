"""What the cards of a student's sources tell, without a network."""

import logging
from types import SimpleNamespace

import pytest
from makers import vit

from hf_semckd.publishing import sources
from hf_semckd.publishing.sources import (
    Source,
    combined_license,
    dataset_source,
    hub_source,
    named_source,
    source_of,
    warn_of_license,
)

CARD = """---
license: cc-by-nc-4.0
base_model: google/vit-base-patch16-224
model-index:
- name: x
  results:
  - task: {type: image-classification}
    dataset: {type: beans, name: beans}
    metrics:
    - {type: accuracy, value: 0.97}
    - {type: confusion, value: none}
---
# A model
"""


def saved(folder, card=None):
    """Return a model as it is loaded from a folder with a card."""
    model = vit()
    model.config._name_or_path = str(folder)
    folder.mkdir()
    if card is not None:
        (folder / "README.md").write_text(card)
    return model


def test_the_card_in_a_folder_is_read(tmp_path):
    found = source_of(saved(tmp_path / "teacher", CARD))
    assert found == Source("ViTForImageClassification", "cc-by-nc-4.0", results={("beans", "accuracy"): 0.97})


@pytest.mark.parametrize(
    "card", [None, "no metadata", "---\nlicense: [a, b]\n---\n", "---\na: [\n---\n", "---\n- a\n---\n"]
)
def test_a_card_that_says_nothing_or_is_broken_is_no_error(tmp_path, card):
    model = saved(tmp_path / "teacher", card)
    assert source_of(model) == Source("ViTForImageClassification") and hub_source(model) is None


def test_a_license_that_is_no_plain_word_is_not_known(tmp_path):
    card = '---\nlicense: "<b>/home/mallory</b>"\nlicense_link: "javascript:alert(1)"\n---\n'
    assert source_of(saved(tmp_path / "teacher", card)) == Source("ViTForImageClassification")


def test_the_card_of_a_name_on_the_hub_comes_from_the_cache_unless_online(tmp_path, monkeypatch):
    def fetch(name, file, local_files_only):
        asked.append((name, file, local_files_only))
        if local_files_only:
            raise OSError("not cached")
        return tmp_path / "README.md"

    asked, model = [], vit()
    model.config._name_or_path = "alice/vit-1"
    (tmp_path / "README.md").write_text(CARD)
    monkeypatch.setattr(sources, "hf_hub_download", fetch)
    assert source_of(model) == Source("alice/vit-1")
    assert source_of(model, online=True).license == "cc-by-nc-4.0"
    assert asked == [("alice/vit-1", "README.md", True), ("alice/vit-1", "README.md", False)]
    assert hub_source(model) == "alice/vit-1"


def test_a_class_is_no_name_on_the_hub(monkeypatch):
    monkeypatch.setattr(sources, "hf_hub_download", pytest.fail)
    assert named_source("BertForSequenceClassification", online=True) == Source("BertForSequenceClassification")


def test_a_model_from_a_folder_has_the_base_model_of_its_card(tmp_path):
    assert hub_source(saved(tmp_path / "student", CARD)) == "google/vit-base-patch16-224"
    assert hub_source(saved(tmp_path / "other", "---\nbase_model: /home/mallory/x\n---\n")) is None
    assert hub_source(vit()) is None


@pytest.mark.parametrize(
    ("licenses", "expected", "is_free"),
    [
        (["mit"], "mit", True),
        (["apache-2.0", "mit"], "apache-2.0", True),
        (["apache-2.0", "cc-by-nc-4.0"], "cc-by-nc-4.0", False),
        (["gemma", "llama3"], None, False),
        (["mit", None], None, False),
        ([None, "gemma"], None, False),
        ([], None, False),
    ],
)
def test_a_license_is_carried_over_where_all_are_known_and_agree(licenses, expected, is_free):
    found = combined_license([Source(f"alice/m-{place}", name) for place, name in enumerate(licenses)])
    assert (found.license, found.is_free) == (expected, is_free)
    for place, name in enumerate(licenses):
        if name is None:
            assert f"alice/m-{place} is not known" in found.sentence
        elif is_free or name not in ("mit", "apache-2.0"):
            assert f"alice/m-{place} ({name})" in found.sentence


def test_only_what_may_restrict_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_license([Source("alice/a-1", "mit")])
        warn_of_license([])
        assert not caplog.records
        warn_of_license([Source("alice/a-1", "gemma")])
    assert "alice/a-1 (gemma) may restrict" in caplog.text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["hf://datasets/stanfordnlp/sst2@8d51e7e/data/train-0.parquet"] * 2, "stanfordnlp/sst2"),
        (["hf://datasets/a/b@1/x.csv", "hf://datasets/a/c@1/x.csv"], None),
        (["/home/mallory/train.csv"], None),
        ([], None),
    ],
)
def test_a_data_set_tells_where_on_the_hub_it_came_from(files, expected):
    info = SimpleNamespace(download_checksums=dict.fromkeys(files))
    assert dataset_source(SimpleNamespace(info=info)) == expected
    assert dataset_source([1]) is None
