"""Pieces of texts are the concatenation, cut by hand; sources and targets are the tokenizer's own."""

import pytest
from datasets import Features, Value
from recipe_parts import tokenizer
from tokenizers import processors
from transformers import T5Config, T5ForConditionalGeneration

from hf_semckd.errors import ConfigurationError
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.tasks.base import Columns
from hf_semckd.recipes.tasks.generation import TextGeneration, TextToText

STRING = Value("string")


def reader(end=None, appends=False):
    made = tokenizer(**({} if end is None else {"eos_token": end}))
    template = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    made.backend_tokenizer.post_processor = template if appends else processors.Sequence([])
    return made


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        ({"text": STRING}, {}, "text"),
        ({"anything": STRING, "n": Value("int64")}, {}, "anything"),
        ({"id": STRING, "content": STRING}, {}, "content"),
        ({"id": STRING, "story": STRING}, {}, None),
        ({"id": STRING, "story": STRING}, {"input_columns": ["story"]}, "story"),
    ],
)
def test_the_column_of_texts_is_found(features, options, expected):
    found = TextGeneration.find_columns(Features(features), DataOptions(**options))
    assert (found and found.all) == (expected and (expected,))


@pytest.mark.parametrize("appends", [False, True], ids=["plain tokenizer", "tokenizer that ends texts"])
@pytest.mark.parametrize("length", [1, 4, 7])
def test_pieces_are_the_texts_one_after_the_other_with_an_end_after_each(length, appends):
    made, texts = reader("[SEP]", appends), ["the film was good", "bad", "odd xyz film", "the the the"]
    found = TextGeneration(Columns(("text",), None), None, DataOptions(), length).encode(made, {"text": texts})
    joined = []
    for text in texts:
        joined += made.convert_tokens_to_ids(made.tokenize(text))
        joined.append(3)
    count = len(joined) // length
    assert found["input_ids"] == [joined[length * place : length * (place + 1)] for place in range(count)]
    assert found["labels"] == found["input_ids"] and found["attention_mask"] == [[1] * length] * count


def test_a_tokenizer_without_an_end_joins_texts_directly():
    made = reader()
    task = TextGeneration(Columns(("text",), None), None, DataOptions(prefix="odd "), 2)
    found = task.encode(made, {"text": ["good", "bad"]})
    assert [made.convert_ids_to_tokens(ids) for ids in found["input_ids"]] == [["odd", "good"], ["odd", "bad"]]


# ---- A text from another ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        ({"article": STRING, "highlights": STRING, "id": STRING}, {}, ("article", "highlights")),
        ({"document": STRING, "summary": STRING}, {}, ("document", "summary")),
        ({"source": STRING, "target": STRING}, {}, ("source", "target")),
        ({"translation.de": STRING, "translation.en": STRING}, {}, ("translation.de", "translation.en")),
        ({"translation.de": STRING, "translation.en": STRING},
         {"input_columns": ["translation.en"], "label_column": "translation.de"},
         ("translation.en", "translation.de")),
        ({"a": STRING, "b": STRING}, {}, None),
        ({"a": STRING, "b": STRING}, {"input_columns": ["a", "b"]}, ("a", "b")),
        ({"text": STRING, "label": Value("int64")}, {}, None),
    ],
)  # fmt: skip
def test_source_and_target_are_found(features, options, expected):
    found = TextToText.find_columns(Features(features), DataOptions(**options))
    assert (found and found.all) == expected


def test_a_named_column_has_to_be_there():
    with pytest.raises(ConfigurationError, match="tgt"):
        TextToText.find_columns(Features({"source": STRING}), DataOptions(label_column="tgt"))


def test_sources_have_the_prefix_and_both_are_cut_off():
    made = reader("[SEP]", appends=True)
    task = TextToText(Columns(("source",), "target"), None, DataOptions(prefix="odd "), 5)
    rows = {"source": ["the film", "good " * 9], "target": ["bad film", "was " * 9]}
    found = task.encode(made, rows)
    tokens = [made.convert_ids_to_tokens(ids) for ids in found["input_ids"]]
    assert tokens == [["odd", "the", "film", "[SEP]"], ["odd", "good", "good", "good", "[SEP]"]]
    targets = [made.convert_ids_to_tokens(ids) for ids in found["labels"]]
    assert targets == [["bad", "film", "[SEP]"], ["was", "was", "was", "was", "[SEP]"]]


def test_batches_pad_targets_with_what_does_not_count_and_start_the_decoder():
    made = reader("[SEP]", appends=True)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(made), **sizes, **tokens))
    task = TextToText(Columns(("source",), "target"), None, DataOptions(), 9)
    found = task.encode(made, {"source": ["the film", "good"], "target": ["bad", "was odd film"]})
    samples = [{name: values[row] for name, values in found.items()} for row in range(2)]
    batch = task.collator(made, model)(samples)
    assert batch["labels"].tolist()[0][-2:] == [-100, -100]
    assert batch["decoder_input_ids"][:, 0].tolist() == [0, 0]
    assert model(**batch).loss.isfinite()
