"""Language models: the next token of a text, or one text made from another."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Features
from transformers import DataCollatorForSeq2Seq, default_data_collator

from ..schema import DataOptions
from .base import Columns, Rows, Task, chosen, columns_of, first_named, is_text

TEXTS = ("text", "content", "sentence", "document")
SOURCES = ("document", "article", "dialogue", "source", "input", "text", "question")
TARGETS = ("summary", "highlights", "target", "output", "answer", "headline")


class TextGeneration(Task):
    """The next token of running text: texts are joined, with the end token after each, and cut into equal pieces."""

    name = "text-generation"
    heads = ("CausalLM", "LMHeadModel")
    classifies = False

    @classmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return one column of text."""
        inputs, _ = chosen(features, options)
        texts = columns_of(features, is_text)
        one = inputs[0] if inputs else texts[0] if len(texts) == 1 else first_named(texts, TEXTS)
        return None if one is None else Columns((one,), None)

    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return pieces of equal length; what is left over at the end of some rows is dropped."""
        tokens = processor(self.texts(rows), return_attention_mask=False, verbose=False)["input_ids"]
        # A tokenizer may end a text by itself.
        end = processor.eos_token_id
        ended = [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in tokens]
        joined = list(itertools.chain.from_iterable(ended))
        starts = range(0, len(joined) - self.length + 1, self.length)
        pieces = [joined[start : start + self.length] for start in starts]
        return {"input_ids": pieces, "attention_mask": [[1] * len(ids) for ids in pieces], "labels": pieces}

    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return one that stacks: all pieces have one length."""
        return default_data_collator


class TextToText(Task):
    """A text made from another: a summary, a translation, an answer."""

    name = "text2text-generation"
    heads = ("Seq2SeqLM", "ConditionalGeneration")
    classifies = False

    @classmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return the source and its target; of a column of translations its first two languages."""
        inputs, label = chosen(features, options)
        texts = columns_of(features, is_text)
        pair = [name for name in texts if name.startswith("translation.")]
        source = inputs[0] if inputs else pair[0] if len(pair) > 1 else first_named(texts, SOURCES)
        target = label or (inputs[1] if inputs and len(inputs) > 1 else None)
        target = target or (pair[1] if len(pair) > 1 else first_named(texts, TARGETS))
        return None if None in (source, target) or source == target else Columns((str(source),), target)

    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return the tokens of both, cut off at the longest length."""
        assert self.columns.label is not None
        how = {"truncation": True, "max_length": self.length}
        targets = processor(text_target=list(rows[self.columns.label]), **how)["input_ids"]
        return {**processor(self.texts(rows), **how), "labels": targets}

    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return one that pads both, and makes what the decoder starts from."""
        return DataCollatorForSeq2Seq(processor, model=model)
