"""Samples of texts and of words, compared with the tokenizer's own and with labels that are counted by hand."""

import pytest
from datasets import ClassLabel, Features, List, Value
from recipe_parts import KINDS, tokenizer

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.recipes.classes import Classes
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.tasks.base import Columns
from hf_semckd.recipes.tasks.text import TextClassification, TokenClassification

STRING, NUMBER, NAMED = Value("string"), Value("int64"), ClassLabel(names=["a", "b"])
CLASSES = Classes(KINDS, "single", KINDS)


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        ({"text": STRING, "label": NAMED}, {}, (("text",), "label")),
        ({"idx": NUMBER, "sentence": STRING, "label": NUMBER}, {}, (("sentence",), "label")),
        ({"anything": STRING, "kind": NAMED}, {}, (("anything",), "kind")),
        ({"premise": STRING, "hypothesis": STRING, "label": NAMED}, {}, (("premise", "hypothesis"), "label")),
        ({"id": STRING, "Text": STRING, "Label": STRING}, {}, (("Text",), "Label")),
        ({"id": STRING, "title": STRING, "label": NUMBER}, {}, None),
        ({"text": STRING, "stars": NUMBER}, {}, None),
        ({"text": STRING, "stars": NUMBER}, {"label_column": "stars"}, (("text",), "stars")),
        ({"id": STRING, "title": STRING, "label": NUMBER}, {"input_columns": ["title"]}, (("title",), "label")),
        (
            {"a": STRING, "b": STRING, "c": NUMBER},
            {"input_columns": ["b", "a"], "label_column": "c"},
            (("b", "a"), "c"),
        ),
        ({"text": STRING, "labels": List(STRING)}, {}, (("text",), "labels")),
        ({"text": Value("large_string"), "label": NUMBER}, {}, (("text",), "label")),
    ],
)
def test_columns_are_found_by_type_and_name(features, options, expected):
    found = TextClassification.find_columns(Features(features), DataOptions(**options))
    assert (found and (found.inputs, found.label)) == expected


def test_a_column_that_is_not_there_is_refused():
    with pytest.raises(ConfigurationError, match="(?s)does not have this column.*txet.*some of text, label"):
        TextClassification.find_columns(
            Features({"text": STRING, "label": NUMBER}), DataOptions(input_columns=["txet"])
        )


def text_task(*inputs, length=32, **options):
    return TextClassification(Columns(inputs, "label"), CLASSES, DataOptions(**options), length)


def test_pairs_are_read_together():
    rows = {"a": ["good film", "bad"], "b": ["was odd", "the film"], "label": ["good", "odd"]}
    found = text_task("a", "b").encode(tokenizer(), rows)
    assert found["input_ids"][0] == tokenizer()("good film", "was odd")["input_ids"]
    assert found["token_type_ids"][0] == [0, 0, 0, 0, 1, 1, 1] and found["labels"] == [0, 2]


def test_long_texts_are_cut_off_after_their_last_special_token():
    found = text_task("text", length=6).encode(tokenizer(), {"text": ["good " * 40], "label": ["good"]})
    reader = tokenizer()
    assert reader.convert_ids_to_tokens(found["input_ids"][0]) == ["[CLS]", *["good"] * 4, "[SEP]"]


def test_the_prefix_is_in_front_of_the_first_text_alone():
    rows = {"a": ["film"], "b": ["odd"], "label": ["good"]}
    found = text_task("a", "b", prefix="good ").encode(tokenizer(), rows)
    assert tokenizer().convert_ids_to_tokens(found["input_ids"][0]) == [
        "[CLS]", "good", "film", "[SEP]", "odd", "[SEP]",
    ]  # fmt: skip


# ---- Words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        ({"tokens": List(STRING), "ner_tags": List(NAMED)}, {}, (("tokens",), "ner_tags")),
        ({"tokens": List(STRING), "pos_tags": List(NAMED), "ner_tags": List(NAMED)}, {}, (("tokens",), "ner_tags")),
        ({"words": List(STRING), "labels": List(STRING)}, {}, (("words",), "labels")),
        ({"w": List(STRING), "tags": List(NUMBER)}, {}, None),
        ({"w": List(STRING), "t": List(NUMBER)}, {"input_columns": ["w"], "label_column": "t"}, (("w",), "t")),
        ({"tokens": STRING, "tags": STRING}, {}, None),
    ],
)
def test_lists_of_words_and_their_classes_are_found(features, options, expected):
    found = TokenClassification.find_columns(Features(features), DataOptions(**options))
    assert (found and (found.inputs, found.label)) == expected


def word_task(length=32):
    return TokenClassification(Columns(("tokens",), "tags"), CLASSES, DataOptions(), length)


def test_the_first_token_of_a_word_has_its_label_and_no_other_token_has_one():
    reader = tokenizer()
    words, tags = [["good", "xyz", "film", "ab"], ["bad"]], [["good", "bad", "odd", "good"], ["bad"]]
    found = word_task().encode(reader, {"tokens": words, "tags": tags})
    for row, ids in enumerate(found["input_ids"]):
        expected = [-100]
        for word, tag in zip(words[row], tags[row], strict=True):
            pieces = reader(word, add_special_tokens=False)["input_ids"]
            expected += [KINDS.index(tag), *[-100] * (len(pieces) - 1)]
        assert found["labels"][row] == [*expected, -100] and len(ids) == len(expected) + 1
    # xyz is three tokens, and ab two.
    assert found["labels"][0] == [-100, 0, 1, -100, -100, 2, 0, -100, -100]


def test_words_that_are_cut_off_have_no_label():
    found = word_task(length=5).encode(tokenizer(), {"tokens": [["good"] * 9], "tags": [["bad"] * 9]})
    assert found["labels"] == [[-100, 1, 1, 1, -100]]


def test_rows_whose_words_and_labels_differ_in_number_are_refused():
    with pytest.raises(InputError, match="(?s)one label for each word.*2 words and 1 labels"):
        word_task().encode(tokenizer(), {"tokens": [["a", "b"]], "tags": [["bad"]]})


def test_a_tokenizer_that_does_not_tell_words_is_refused():
    with pytest.raises(InputError, match="fast tokenizer"):
        word_task().encode(object(), {"tokens": [["a"]], "tags": [["bad"]]})


def test_batches_of_words_are_padded_with_labels_that_do_not_count():
    reader = tokenizer()
    found = word_task().encode(reader, {"tokens": [["good"] * 3, ["bad"]], "tags": [["bad"] * 3, ["odd"]]})
    samples = [{name: values[row] for name, values in found.items()} for row in range(2)]
    assert word_task().collator(reader, None)(samples)["labels"].tolist() == [
        [-100, 1, 1, 1, -100],
        [-100, 2, -100, -100, -100],
    ]
