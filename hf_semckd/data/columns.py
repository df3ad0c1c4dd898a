"""Which columns are whose, and batches for a teacher and a student that read the same samples in different ways."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

# Columns with this prefix are the teacher's own inputs, under the name that follows it.
TEACHER_PREFIX = "teacher_"
LABEL_COLUMNS = ("labels", "label", "label_ids")
# Labels that do not count: of any position, and of a pixel (`semantic_loss_ignore_index` of segmentation models).
IGNORED, IGNORED_PIXEL = -100, 255
# The entry of a batch in which a collator leaves what the cache holds of its samples.
CACHED = "cached_teacher"


def has_own_tokens(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds another tokenization for the teacher, so that positions do not correspond."""
    return f"{TEACHER_PREFIX}input_ids" in batch


def teacher_entries(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a batch holds for the teacher alone, without the prefix; the batch itself where that is nothing."""
    return _teachers(batch) or batch


def _teachers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(TEACHER_PREFIX): value for key, value in row.items() if key.startswith(TEACHER_PREFIX)}


@dataclass(eq=False)
class TeacherStudentCollator:
    """Collates a sample's `teacher_*` columns with the teacher's collator and the others with the student's.

    Needed where both tokenize differently: a tokenizer pads the columns that it knows, and no others.

    Example:
        >>> collator = TeacherStudentCollator(
        ...     DataCollatorWithPadding(student_tokenizer), DataCollatorWithPadding(teacher_tokenizer)
        ... )  # doctest: +SKIP
        >>> collator([{"input_ids": [1, 2], "teacher_input_ids": [7], "labels": 0}])  # doctest: +SKIP
    """

    student_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    teacher_collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the student's batch, with the teacher's beside it under `teacher_*`."""
        own = [{key: value for key, value in row.items() if not key.startswith(TEACHER_PREFIX)} for row in samples]
        theirs = [_teachers(row) for row in samples]
        # In evaluation the teacher's columns may have been left out: it does not take part.
        teacher = self.teacher_collator(theirs) if all(theirs) else {}
        return {**self.student_collator(own), **{f"{TEACHER_PREFIX}{key}": value for key, value in teacher.items()}}
