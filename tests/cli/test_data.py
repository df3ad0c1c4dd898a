"""What commands read: splits and processors."""

import pytest
from datasets import Dataset, DatasetDict
from makers import vit

from hf_semckd.cli.data import load_processor, load_split, load_tokenizer


def test_splits_are_named(tmp_path):
    DatasetDict({"train": Dataset.from_dict({"x": [1]}), "test": Dataset.from_dict({"x": [1, 2]})}).save_to_disk(
        tmp_path
    )
    assert len(load_split(str(tmp_path), "test")) == 2
    with pytest.raises(Exception, match="train, test"):
        load_split(str(tmp_path), "dev")


def test_a_model_without_a_tokenizer_has_none(tmp_path):
    vit().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)) is None and load_processor(str(tmp_path)) is None
