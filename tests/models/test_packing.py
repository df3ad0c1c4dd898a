"""Packed rows: their documents are found, kept apart, and trained as the same documents are when they are padded."""

import dataclasses

import pytest
import torch
from makers import Samples, bert_mlm, gpt2
from tiny import PROBLEMS, assert_same, by_hand, make, train
from transformers import DataCollatorWithFlattening

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.models.outputs import token_targets
from hf_semckd.models.packing import Documents, check_documents, document_count, document_starts

ALONE = {"relation_weight": 0.0}


def packed(*lengths):
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    return {"input_ids": torch.arange(5, 5 + positions.numel()).unsqueeze(0), "position_ids": positions}


@pytest.mark.parametrize("first", [0, 2])
def test_documents_begin_where_positions_start_again(first):
    batch = packed(3, 1, 4)
    batch["position_ids"] += first
    assert document_starts(batch)[0].nonzero().flatten().tolist() == [0, 3, 4]
    documents = Documents.of(batch)
    assert documents.mask.sum(1).tolist() == [3, 1, 4]
    words = documents.unpack(batch["input_ids"])
    assert [row[kept].tolist() for row, kept in zip(words, documents.mask, strict=True)] == [
        [5, 6, 7],
        [8],
        [9, 10, 11, 12],
    ]


def test_documents_are_found_in_several_rows():
    batch = {"position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])}
    documents = Documents.of(batch)
    features = torch.randn(2, 4, 3)
    unpacked = documents.unpack(features)
    assert torch.equal(unpacked[0][:2], features[0, :2]) and torch.equal(unpacked[1][:2], features[0, 2:])
    assert torch.equal(unpacked[2], features[1])


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(2, 4)},
        {"position_ids": torch.tensor([[0, 1, 2], [0, 1, 2]])},
        {"position_ids": torch.tensor([[0, 1, 0, 1]]), "attention_mask": torch.ones(1, 4)},
        {"position_ids": torch.zeros(3, 1, 4)},
    ],
    ids=["no positions", "one document a row", "padded", "positions in three dimensions"],
)
def test_other_batches_are_not_packed(batch):
    assert Documents.of(batch) is None


def test_nothing_predicts_the_first_token_of_a_document():
    starts = document_starts(packed(3, 2))
    assert token_targets(None, None, True, starts).tolist() == [[True, True, False, True]]


def flattened(name):
    """Return a problem whose batches are packed into one row each."""
    problem = PROBLEMS[name]

    def collate(rows):
        plain = [{"input_ids": row["input_ids"]} for row in rows]
        batch = DataCollatorWithFlattening()(plain)
        return batch if name == "next_word" else {key: value for key, value in batch.items() if key != "labels"}

    return dataclasses.replace(problem, collator=collate)


@pytest.mark.parametrize("cut", [(8, 1), (4, 2), (2, 4)])
@pytest.mark.parametrize("association", ["similarity", "learned"])
def test_packed_documents_train_as_padded_ones_do(association, cut, tmp_path):
    args = {"association": association, **ALONE}
    shape = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
    done = train(flattened("next_word"), tmp_path, **shape, **args)
    assert_same(done, by_hand("next_word", tmp_path, micro=8, parts=1, **args), PROBLEMS["next_word"].tolerance)


@pytest.mark.parametrize("terms", ["logit", "feature"])
def test_packed_documents_need_no_labels(terms, tmp_path):
    args = {"terms": terms, "association": "similarity", **ALONE}
    shape = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    done = train(flattened("unlabeled_words"), tmp_path, **shape, **args)
    assert_same(done, by_hand("unlabeled_words", tmp_path, micro=8, parts=1, **args))


def test_a_model_that_reads_across_documents_is_refused(tmp_path):
    """An encoder takes position_ids and has no mask for them."""
    alone = {**packed(4, 5), "use_cache": False}
    check_documents(gpt2().eval(), alone, alone, "student")
    for model, inputs in ((bert_mlm(), packed(4, 5)), (gpt2(), packed(4, 5)), (gpt2().bfloat16(), packed(9))):
        # With a cache of keys transformers does not look at the positions; one document alone tells nothing.
        with pytest.raises(
            InputError, match=r"(?s)reads across the documents of packed rows.*DataCollatorWithPadding"
        ):
            check_documents(model.eval(), inputs, inputs, "student")


def test_a_model_that_is_not_told_the_positions_is_refused():
    batch = packed(4, 5)
    with pytest.raises(InputError, match="reads across"):
        check_documents(bert_mlm().eval(), batch, {"input_ids": batch["input_ids"]}, "teacher")


def test_what_fills_up_a_row_is_no_document():
    batch = packed(3, 2, 1, 1, 1)
    labels = batch["input_ids"].clone()
    labels[:, 5:] = -100
    assert int(document_count(batch)) == 5 and int(document_count({**batch, "labels": labels})) == 2
    assert Documents.of({**batch, "labels": labels}).mask.sum(1).tolist() == [3, 2]


def test_a_cache_of_packed_rows_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="packed rows"):
        make(flattened("next_word"), tmp_path, teacher_cache_dir=str(tmp_path / "cache"))


def test_single_documents_are_rows_as_usual(tmp_path):
    rows = Samples([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]} for _ in range(4)])
    batch = DataCollatorWithFlattening()(rows.rows[:1])
    assert Documents.of(batch) is None
