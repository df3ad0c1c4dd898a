"""Rows become samples: those that lack something are left out, and each model's processor reads the others."""

import io

import pytest
import torch
from datasets import Audio, ClassLabel, Dataset, Features, Image, List, Translation, Value
from PIL import Image as Picture
from recipe_parts import KINDS, WORDS, bert_config, sentences, tokenizer
from transformers import BertForSequenceClassification

from hf_semckd.errors import InputError
from hf_semckd.recipes.classes import Classes
from hf_semckd.recipes.data import chosen_rows, flat_translations, make_samples
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.sources import Splits
from hf_semckd.recipes.tasks.answers import QuestionAnswering
from hf_semckd.recipes.tasks.base import Columns
from hf_semckd.recipes.tasks.generation import TextGeneration
from hf_semckd.recipes.tasks.text import TextClassification


def one(data):
    return Splits(data, data, data, "test")


TEXT = Columns(("text",), "label")


# ---- Rows that lack something -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "rows", "kept"),
    [
        (TEXT, [("a", 0), (None, 1), ("b", None), ("", 1), (" \n", 1), ("c", 0)], [0, 5]),
        (Columns(("text",), None), [("a", 0), (None, 1), ("", 2), ("b", None)], [0, 3]),
        (Columns(("text", "other"), "label"), [("a", 0, "x"), ("b", 0, None), ("c", 1, ""), ("d", 1, "y")], [0, 3]),
    ],
)
def test_rows_without_an_input_or_a_label_are_left_out(columns, rows, kept):
    names = ("text", "label", "other")[: len(rows[0])]
    data = Dataset.from_list([dict(zip(names, row, strict=True)) for row in rows])
    found, dropped = chosen_rows(one(data), columns)
    assert found.train["text"][:] == [rows[place][0] for place in kept]
    # The table's split, which is the one to evaluate on, stays that one and counts once.
    assert dropped == 2 * (len(rows) - len(kept)) and found.test is found.validation
    assert set(found.train.column_names) == set(columns.all)


def test_hidden_labels_are_left_out_and_numbers_of_minus_one_are_not():
    hidden = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = [{"text": "x", "label": -1}, {"text": "y", "label": 1}]
    assert chosen_rows(one(Dataset.from_list(rows, hidden)), TEXT)[0].train["label"][:] == [1]
    assert chosen_rows(one(Dataset.from_list(rows)), TEXT)[0].train["label"][:] == [-1, 1]


def test_empty_lists_are_no_inputs_but_they_are_labels():
    rows = [{"text": "x", "label": []}, {"text": "y", "label": ["a"]}]
    assert len(chosen_rows(one(Dataset.from_list(rows)), TEXT)[0].train) == 2
    words = [{"tokens": [], "tags": []}, {"tokens": ["a"], "tags": [1]}]
    assert len(chosen_rows(one(Dataset.from_list(words)), Columns(("tokens",), "tags"))[0].train) == 1


def test_missing_images_are_left_out_and_the_others_are_not_opened_yet():
    picture = Picture.new("RGB", (2, 2), (9, 8, 7))
    features = Features({"image": Image(), "label": Value("int64")})
    data = Dataset.from_dict({"image": [picture, None, picture], "label": [0, 1, None]}, features)
    for split in (data, data.select([0, 1])):
        found, dropped = chosen_rows(one(split), Columns(("image",), "label"))
        assert dropped == 2 * (len(split) - 1)
        assert not found.train.features["image"].decode
        assert Picture.open(io.BytesIO(found.train[0]["image"]["bytes"])).getpixel((0, 0)) == (9, 8, 7)


def test_sounds_are_not_decoded_and_missing_ones_are_left_out():
    sound = {"bytes": b"RIFF", "path": None}
    data = Dataset.from_dict({"audio": [sound, None], "label": [0, 1]}).cast_column("audio", Audio(decode=False))
    data = data.cast_column("audio", Audio())
    found, dropped = chosen_rows(one(data), Columns(("audio",), "label"))
    assert dropped == 2 and found.train[:] == {"audio": [sound], "label": [0]}


def test_a_split_without_a_row_or_a_column_is_refused():
    data = Dataset.from_list([{"text": "x", "label": 0}])
    none = Dataset.from_list([{"text": None, "label": 0}])
    with pytest.raises(InputError, match="(?s)No row of a split can be used.*1 rows that lack one of text, label"):
        chosen_rows(Splits(data, none, none, "test"), TEXT)
    with pytest.raises(InputError, match="(?s)lacks a column.*label is not among text"):
        chosen_rows(Splits(data, data.remove_columns("label"), data, "test"), TEXT)


def test_translations_become_columns():
    features = Features({"translation": Translation(["de", "en"])})
    data = Dataset.from_dict({"translation": [{"de": "ja", "en": "yes"}]}, features)
    found = flat_translations(one(data)).train
    assert found.to_list() == [{"translation.de": "ja", "translation.en": "yes"}]


# ---- Samples ---------------------------------------------------------------------------------------------------


def classification(rows, **options):
    task = TextClassification(TEXT, Classes(KINDS, "single", KINDS), DataOptions(**options), 32)
    return task, one(Dataset.from_list(rows))


def test_one_tokenizer_makes_one_set_of_columns():
    reader = tokenizer()
    samples = make_samples(*classification(sentences(4)), None, reader, reader)
    assert set(samples.splits.train.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    by_hand = [reader(row["text"])["input_ids"] for row in sentences(4)]
    assert samples.splits.train["input_ids"][:] == by_hand
    assert samples.splits.train["labels"][:] == [KINDS.index(row["label"]) for row in sentences(4)]
    batch = samples.collator([samples.splits.train[place] for place in range(2)])
    assert batch["input_ids"].shape == (2, max(map(len, by_hand[:2])))


def test_two_tokenizers_make_a_teachers_columns_beside_them():
    own, theirs = tokenizer(), tokenizer(words=("tea", *WORDS[::-1]))
    rows = sentences(4)
    samples = make_samples(*classification(rows), None, own, theirs)
    train = samples.splits.train
    assert train["input_ids"][:] == [own(row["text"])["input_ids"] for row in rows]
    assert train["teacher_input_ids"][:] == [theirs(row["text"])["input_ids"] for row in rows]
    assert "teacher_labels" not in train.column_names and samples.processor is own
    batch = samples.collator([train[place] for place in range(4)])
    assert {"input_ids", "teacher_input_ids", "teacher_attention_mask", "labels"} <= {*batch}
    assert all(isinstance(value, torch.Tensor) and len(value) == 4 for value in batch.values())


@pytest.mark.parametrize("kind", [QuestionAnswering, TextGeneration])
def test_tasks_whose_samples_depend_on_the_tokenizer_need_one(kind):
    task = kind(Columns(("text",), None), None, DataOptions(), 8)
    with pytest.raises(InputError, match=f"one tokenizer for {kind.name}"):
        make_samples(task, one(Dataset.from_list(sentences(2))), None, tokenizer(), tokenizer(words=("tea", *WORDS)))


def test_texts_that_are_too_short_for_one_sample_are_refused():
    task = TextGeneration(Columns(("text",), None), None, DataOptions(), 30)
    reader = tokenizer()
    with pytest.raises(InputError, match="(?s)too short for one sample.*lower max_length"):
        make_samples(task, one(Dataset.from_list([{"text": "good film"}])), None, reader, reader)


def test_samples_go_through_the_model(tmp_path):
    reader = tokenizer()
    samples = make_samples(*classification(sentences(6)), None, reader, reader)
    batch = samples.collator([samples.splits.train[place] for place in range(6)])
    assert BertForSequenceClassification(bert_config())(**batch).loss.isfinite()


def test_images_are_read_when_they_are_asked_for():
    """Stored pixels would be many times as large as the files."""
    from hf_semckd.recipes.tasks.images import ImageClassification

    file = io.BytesIO()
    Picture.new("L", (5, 4), 3).save(file, "PNG")
    features = Features({"image": Image(), "label": List(Value("int64"))})
    data = Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}], "label": [[0]]}, features)
    seen = []

    def processor(pictures, return_tensors):
        seen.append([picture.mode for picture in pictures])
        return {"pixel_values": torch.zeros(len(pictures), 3, 2, 2)}

    task = ImageClassification(Columns(("image",), "label"), Classes(("0",), "multi", (0,)), DataOptions(), 0)
    samples = make_samples(task, one(data), None, processor, processor)
    assert not seen
    assert samples.splits.train[0]["labels"] == [1.0] and seen == [["RGB"]]
