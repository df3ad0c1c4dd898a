"""Questions whose answers are spans of a text, as in SQuAD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Features
from transformers import DataCollatorWithPadding

from ...errors import InputError
from ..schema import DataOptions
from .base import Columns, Rows, Task, chosen, require_offsets

# Tokens that two windows of a long text share.
STRIDE_SHARE = 3


class QuestionAnswering(Task):
    """Question, context, and `{text: [...], answer_start: [...]}`, whose first answer counts; an empty one is none.

    A long context becomes several samples, of which those without the answer have the first token as theirs.
    """

    name = "question-answering"
    heads = ("QuestionAnswering",)
    classifies = False

    @classmethod
    def find_columns(cls, features: Features, options: DataOptions) -> Columns | None:
        """Return the columns of SQuAD, or those that are named."""
        inputs, label = chosen(features, options)
        names = (*(inputs or ("question", "context")), label or "answers")
        return Columns(names[:2], names[2]) if len(names) == 3 and all(name in features for name in names) else None

    def encode(self, processor: Any, rows: Rows) -> dict[str, Any]:
        """Return tokens of question and context, and where the answer begins and ends."""
        require_offsets(processor, "where a token stands in the text")
        # Half of a sample is for the context, however long a question is.
        room = self.length - self.length // 2 - processor.num_special_tokens_to_add(pair=True)
        if room < 2:
            raise InputError(
                "Question and context do not fit into a sample",
                received=f"max_length={self.length}",
                expected="some hundred tokens",
                todo="raise max_length",
            )
        found = processor(
            _cut(processor, self.texts(rows), self.length // 2),
            list(rows[self.columns.inputs[1]]),
            truncation="only_second",
            max_length=self.length,
            stride=min(self.length // STRIDE_SHARE, room - 1),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
        assert self.columns.label is not None
        answers = [rows[self.columns.label][source] for source in sources]
        spans = [
            _span(_first(answer), offsets[place], found.sequence_ids(place)) for place, answer in enumerate(answers)
        ]
        return {
            **found,
            "start_positions": [start for start, _ in spans],
            "end_positions": [end for _, end in spans],
        }

    def collator(self, processor: Any, model: Any) -> Callable[[list[Any]], Mapping[str, Any]]:
        """Return one that pads to the longest text of a batch."""
        return DataCollatorWithPadding(processor)


def _cut(processor: Any, questions: list[str], length: int) -> list[str]:
    """Return questions of so many tokens at most."""
    stripped = [question.strip() for question in questions]
    how = {"add_special_tokens": False, "return_offsets_mapping": True, "truncation": True, "max_length": length}
    ends = [offsets[-1][1] if offsets else 0 for offsets in processor(stripped, **how)["offset_mapping"]]
    return [question[:end] for question, end in zip(stripped, ends, strict=True)]


def _first(answer: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return first and last character of the first answer, or None without one."""
    if not answer["text"]:
        return None
    text, start = answer["text"], answer["answer_start"]
    text, start = (text[0], start[0]) if isinstance(text, list) else (text, start)
    return (start, start + len(text)) if text else None


def _span(answer: tuple[int, int] | None, offsets: list[Any], parts: list[int | None]) -> tuple[int, int]:
    """Return the tokens of an answer; the first token twice where this window does not hold all of it."""
    inside = [place for place, part in enumerate(parts) if part == 1]
    if answer is None or not inside or offsets[inside[0]][0] > answer[0] or offsets[inside[-1]][1] < answer[1]:
        return 0, 0
    start = max(place for place in inside if offsets[place][0] <= answer[0])
    end = min(place for place in inside if offsets[place][1] >= answer[1])
    return start, end
