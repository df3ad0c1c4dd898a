"""Batches for a teacher and a student that read the same samples in different ways."""

from collections.abc import Callable, Mapping
from typing import Any

from .columns import TEACHER_PREFIX


class TeacherStudentCollator:
    """Collates a sample's `teacher_*` columns with the teacher's collator and the others with the student's.

    Needed where both tokenize differently: a tokenizer pads the columns that it knows, and no others.

    Example:
        >>> collator = TeacherStudentCollator(
        ...     DataCollatorWithPadding(student_tokenizer), DataCollatorWithPadding(teacher_tokenizer)
        ... )  # doctest: +SKIP
        >>> collator([{"input_ids": [1, 2], "teacher_input_ids": [7], "labels": 0}])  # doctest: +SKIP
    """

    def __init__(
        self,
        student_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        teacher_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    ):
        self.student_collator = student_collator
        self.teacher_collator = teacher_collator

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the student's batch, with the teacher's beside it under `teacher_*`."""
        own: list[dict[str, Any]] = [{} for _ in samples]
        theirs: list[dict[str, Any]] = [{} for _ in samples]
        for index, sample in enumerate(samples):
            for key, value in sample.items():
                target = theirs if key.startswith(TEACHER_PREFIX) else own
                target[index][key.removeprefix(TEACHER_PREFIX)] = value
        batch = dict(self.student_collator(own))
        # In evaluation the teacher's columns may have been left out: it does not take part.
        teacher = self.teacher_collator(theirs) if all(theirs) else {}
        return {**batch, **{f"{TEACHER_PREFIX}{key}": value for key, value in teacher.items()}}
