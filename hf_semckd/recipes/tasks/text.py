"""Classes of texts, and of their words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import ClassLabel, Features, Value
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from ...errors import InputError
from ..schema import DataOptions
from .base import Columns, Rows, Task, chosen, columns_of, first_named, is_list, is_text, label_of, require_offsets

PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
TEXTS = ("text", "sentence", "content", "review", "tweet", "utterance", "question")
WORDS, TAGS = ("tokens", "words"), ("ner_tags", "tags", "labels", "pos_tags", "upos", "chunk_tags")


class TextClassification(Task):
    """One class, several, or a number for a text or a pair of texts."""

    name = "text-classification"
    heads = ("SequenceClassification",)

    @classmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return one text or a known pair, and the column of classes."""
        inputs, label = chosen(features, options)
        label = label or label_of(features)
        texts = [name for name in columns_of(features, is_text) if name != label]
        if inputs is None:
            pair = next((pair for pair in PAIRS if set(pair) <= set(texts)), None)
            one = texts[0] if len(texts) == 1 else first_named(texts, TEXTS)
            inputs = list(pair) if pair is not None else [one] if one is not None else None
        return None if inputs is None or label is None else Columns(tuple(inputs[:2]), label)

    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return tokens, cut off at the longest length, and labels."""
        texts = [self.texts(rows, place) for place in range(len(self.columns.inputs))]
        return {**processor(*texts, truncation=True, max_length=self.length), "labels": self.labels(rows)}

    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return one that pads to the longest text of a batch."""
        return DataCollatorWithPadding(processor)


class TokenClassification(Task):
    """A class for every word; the first token of a word has its label, and the others have none."""

    name = "token-classification"
    heads = ("TokenClassification",)
    labels_tokens = True

    @classmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return lists of words and lists of their classes."""
        inputs, label = chosen(features, options)
        lists = columns_of(features, is_list)
        words = [name for name in inputs or lists if name in lists and is_text(features[name].feature)]
        word = first_named(words, WORDS) if inputs is None else next(iter(words), None)
        tags = [n for n in lists if n != word and isinstance(features[n].feature, (ClassLabel, Value))]
        label = label or first_named(tags, TAGS)
        return None if word is None or label is None else Columns((word,), label)

    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return tokens, and for each of them a label or -100."""
        require_offsets(processor, "which word a token belongs to")
        words = rows[self.columns.inputs[0]]
        found = processor(words, is_split_into_words=True, truncation=True, max_length=self.length)
        assert self.columns.label is not None and self.classes is not None
        labels = []
        for row, tags in enumerate(rows[self.columns.label]):
            if len(tags) != len(words[row]):
                raise InputError(
                    "A row has not one label for each word",
                    received=f"{len(words[row])} words and {len(tags)} labels",
                    expected="lists of one length",
                    todo=f"correct the columns {self.columns}",
                )
            places = found.word_ids(row)
            first = [place is not None and place not in places[:n] for n, place in enumerate(places)]
            labels.append(
                [self.classes.encode(tags[p]) if new else -100 for p, new in zip(places, first, strict=True)]
            )
        return {**found, "labels": labels}

    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return one that pads labels too."""
        return DataCollatorForTokenClassification(processor)
