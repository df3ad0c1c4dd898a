"""Logits are compared class by class: orders are sorted out, padded rows left out, and other names refused."""

from typing import Any

import pytest
import torch
from makers import bert, distiller, gpt2, losses, texts, vit
from torch import nn
from transformers import PreTrainedTokenizerFast

from hf_semckd.errors import InputError
from hf_semckd.training.classes import match_logits, vocabulary_size

NAMES = {0: "cat", 1: "dog", 2: "bird"}


def tokenizer(size: int) -> Any:
    """Return a tokenizer that gives out so many ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{n}": n for n in range(size)}, unk_token="w0")), pad_token="w0"
    )


def logit_loss(tmp_path: Any, **parts: Any) -> float:
    trainer = distiller(tmp_path, {"max_steps": 1}, **parts)
    trainer.train()
    return losses(trainer, "logit_loss")[0]


def test_labels_in_another_order_are_matched_by_name(tmp_path):
    """A teacher whose head and names are permuted alike teaches exactly what the plain one teaches."""
    order = [2, 0, 1]
    plain, other = vit(3, 24, seed=9, id2label=NAMES), vit(3, 24, seed=9, id2label={0: "Bird", 1: "cat", 2: "DOG"})
    with torch.no_grad():
        other.classifier.weight.copy_(plain.classifier.weight[order])
        other.classifier.bias.copy_(plain.classifier.bias[order])
    values = [logit_loss(tmp_path, model=vit(id2label=NAMES), teacher_model=teacher) for teacher in (plain, other)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_other_labels_are_refused(tmp_path):
    other = vit(3, 24, id2label={0: "cat", 1: "dog", 2: "fish"})
    with pytest.raises(InputError, match=r"(?s)name their labels differently.*fish.*id2label"):
        distiller(tmp_path, model=vit(id2label=NAMES), teacher_model=other)
    # Features do not depend on the labels.
    distiller(tmp_path, {"logit_weight": 0.0}, model=vit(id2label=NAMES), teacher_model=other)


class Padded(nn.Module):
    """A model whose vocabulary has more rows than its tokenizer has ids, filled with large numbers."""

    def __init__(self, model: Any, rows: int):
        super().__init__()
        self.model, self.rows, self.config = model, rows, model.config

    def forward(self, input_ids: Any, attention_mask: Any = None, output_hidden_states: bool = False) -> Any:
        outputs = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=output_hidden_states)
        outputs.logits = nn.functional.pad(outputs.logits, (0, self.rows), value=50.0)
        return outputs


def test_rows_that_no_token_reaches_are_left_out(tmp_path):
    rows = texts(4, labels="input", types=False)
    values = [
        logit_loss(tmp_path, model=gpt2(), teacher_model=teacher, train_dataset=rows, processing_class=tokenizer(40))
        for teacher in (gpt2(3, 24, seed=9), Padded(gpt2(3, 24, seed=9), 24))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


@pytest.mark.parametrize("given", [None, 41])
def test_vocabularies_that_may_differ_are_refused(given, tmp_path):
    parts = {} if given is None else {"processing_class": tokenizer(given)}
    with pytest.raises(InputError, match="processing_class"):
        teacher = Padded(gpt2(3, 24, seed=9), 24)
        distiller(
            tmp_path, model=gpt2(), teacher_model=teacher, train_dataset=texts(4, labels="input", types=False), **parts
        )


def test_other_shapes_are_refused():
    with pytest.raises(InputError, match="different shapes"):
        match_logits((bert(), bert()), (2, 3), (2, 4), None)


def test_the_largest_id_counts_and_not_the_number_of_words():
    class Sparse:
        def get_vocab(self):
            return {"a": 0, "b": 7}

    assert vocabulary_size(Sparse()) == 8 and vocabulary_size(None) is None


def test_logits_of_other_tokens_are_refused(tmp_path):
    """Position n is another word to the teacher, also where both texts happen to have one length."""
    rows = texts(4, labels="input", types=False).rows
    same = [{**row, **{f"teacher_{name}": row[name] for name in ("input_ids", "attention_mask")}} for row in rows]
    other = [{**row, "teacher_input_ids": row["input_ids"].roll(1)} for row in same]
    parts = {"model": gpt2(), "teacher_model": gpt2(3, 24, seed=9)}
    distiller(tmp_path, **parts, train_dataset=same)
    with pytest.raises(InputError, match=r"(?s)reads other tokens.*logit_weight=0"):
        distiller(tmp_path, **parts, train_dataset=other)
    distiller(tmp_path, {"logit_weight": 0.0}, **parts, train_dataset=other)
