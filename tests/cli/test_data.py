"""What commands read: splits and processors."""

import pytest
from datasets import Dataset, DatasetDict
from makers import bert, vit
from recipe_parts import tokenizer
from transformers import AutoTokenizer

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


def test_a_folder_without_a_tokenizer_has_none_instead_of_one_without_words(tmp_path):
    """transformers makes a tokenizer of special tokens alone, for which every word is unknown."""
    bert().save_pretrained(tmp_path)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) < 10
    assert load_tokenizer(str(tmp_path)) is None and load_processor(str(tmp_path)) is None
    tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(load_processor(str(tmp_path))) == len(tokenizer())
