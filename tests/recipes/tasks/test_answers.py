"""Spans are checked as texts: what the found tokens say in the context is the answer."""

import pytest
from datasets import Features, Value
from recipe_parts import tokenizer

from hf_semckd.errors import InputError
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.tasks.answers import QuestionAnswering
from hf_semckd.recipes.tasks.base import Columns

ANSWERS = {"text": [Value("string")], "answer_start": [Value("int32")]}


def task(length=32):
    return QuestionAnswering(Columns(("question", "context"), "answers"), None, DataOptions(), length)


def rows(*entries):
    questions, contexts, answers = zip(*entries, strict=True)
    return {"question": questions, "context": contexts, "answers": answers}


def answer(context, text):
    return {"text": [text], "answer_start": [context.index(text)]}


def said(reader, found, place, context):
    """Return the text between the first and the last token of an answer, by the offsets of a fresh tokenization."""
    ids, first, last = found["input_ids"][place], found["start_positions"][place], found["end_positions"][place]
    return reader.decode(ids[first : last + 1]).replace(" ", ""), (first, last)


def test_the_columns_are_those_of_squad_or_those_that_are_named():
    features = Features({"question": Value("string"), "context": Value("string"), "answers": ANSWERS})
    assert QuestionAnswering.find_columns(features, DataOptions()).all == ("question", "context", "answers")
    other = Features({"q": Value("string"), "c": Value("string"), "a": ANSWERS})
    assert QuestionAnswering.find_columns(other, DataOptions()) is None
    named = DataOptions(input_columns=["q", "c"], label_column="a")
    assert QuestionAnswering.find_columns(other, named).all == ("q", "c", "a")


@pytest.mark.parametrize("wanted", ["the", "film was good", "xyz", "good", "was good - xyz!", "!"])
def test_the_tokens_of_an_answer_are_its_text(wanted):
    reader, context = tokenizer(), "the film was good - xyz!"
    found = task().encode(reader, rows(("  what film?", context, answer(context, wanted))))
    text, (first, last) = said(reader, found, 0, context)
    assert text == wanted.replace(" ", "") and 0 < first <= last


def test_an_answer_that_begins_within_a_word_takes_the_token_that_holds_it():
    reader, context = tokenizer(), "goodness film"
    found = task().encode(reader, rows(("was", context, {"text": ["ilm"], "answer_start": [10]})))
    assert said(reader, found, 0, context)[0] == "film"


@pytest.mark.parametrize(
    "none", [{"text": [], "answer_start": []}, {"text": [""], "answer_start": [0]}], ids=["empty list", "empty text"]
)
def test_no_answer_is_the_first_token(none):
    found = task().encode(tokenizer(), rows(("was", "the film", none)))
    assert (found["start_positions"], found["end_positions"]) == ([0], [0])


def test_one_answer_may_stand_without_a_list():
    reader, context = tokenizer(), "the film was odd"
    found = task().encode(reader, rows(("was", context, {"text": "odd", "answer_start": 13})))
    assert said(reader, found, 0, context)[0] == "odd"


def test_a_long_context_becomes_windows_and_each_says_whether_it_holds_the_answer():
    reader = tokenizer()
    words = [*["the film was bad"] * 6, "odd xyz good", *["film the bad was"] * 6]
    context = " ".join(words)
    found = task(length=20).encode(reader, rows(("was it", context, answer(context, "odd xyz good"))))
    count = len(found["input_ids"])
    assert count > 3 and all(len(ids) <= 20 for ids in found["input_ids"])
    wanted = reader("odd xyz good", add_special_tokens=False)["input_ids"]
    holding = 0
    for place in range(count):
        ids, first = found["input_ids"][place], found["start_positions"][place]
        inside = any(ids[start : start + len(wanted)] == wanted for start in range(len(ids)))
        assert (first > 0) == inside
        if inside:
            holding += 1
            assert ids[first : found["end_positions"][place] + 1] == wanted
    assert 0 < holding < count
    # Nothing of the context is lost: the windows, with what they share taken away, are its tokens.
    whole = reader(context, add_special_tokens=False)["input_ids"]
    seen = {tuple(whole[place : place + 3]) for place in range(len(whole) - 2)}
    parts = {tuple(ids[place : place + 3]) for ids in found["input_ids"] for place in range(len(ids) - 2)}
    assert seen <= parts


def test_every_window_belongs_to_its_own_row():
    reader = tokenizer()
    long = "the film was bad " * 8 + "good"
    short = "odd film"
    found = task(length=20).encode(
        reader, rows(("was", long, answer(long, "good")), ("film", short, answer(short, "odd")))
    )
    assert said(reader, found, len(found["input_ids"]) - 1, short)[0] == "odd"
    assert sum(start > 0 for start in found["start_positions"]) == 2


def test_a_long_question_leaves_half_of_the_sample_to_the_context():
    reader, context = tokenizer(), "the film was odd"
    found = task(length=14).encode(reader, rows(("good " * 20 + "bad", context, answer(context, "odd"))))
    held = [place for place, start in enumerate(found["start_positions"]) if start]
    assert held and all(said(reader, found, place, context)[0] == "odd" for place in held)
    assert all(ids.count(reader.convert_tokens_to_ids("good")) == 7 for ids in found["input_ids"])
    assert all(len(ids) <= 14 for ids in found["input_ids"])


def test_samples_too_short_for_both_are_refused():
    with pytest.raises(InputError, match="(?s)max_length=8.*raise max_length"):
        task(length=8).encode(tokenizer(), rows(("was", "the film", answer("the film", "film"))))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(InputError, match="fast tokenizer"):
        task().encode(object(), rows(("a", "b", answer("b", "b"))))


def test_batches_are_padded():
    reader = tokenizer()
    long, short = "the film was good " * 3, "odd"
    found = task().encode(reader, rows(("was", long, answer(long, "good")), ("a", short, answer(short, "odd"))))
    samples = [{name: values[row] for name, values in found.items()} for row in range(2)]
    batch = task().collator(reader, None)(samples)
    assert batch["input_ids"].shape == batch["attention_mask"].shape and batch["start_positions"].shape == (2,)
