"""Which classes the logits of both models have in common: by the names of labels, or by the ids of a tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..data.columns import TEACHER_PREFIX
from ..errors import InputError
from ..losses.logits import LogitMatch, logit_shape_message
from ..models.tasks import label_names, label_order


def vocabulary_size(tokenizer: Any) -> int | None:
    """Return the number of token ids that a tokenizer gives out, or of a processor's; None without one."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    known = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max(known.values()) + 1 if known else None


def match_logits(
    models: Sequence[nn.Module], student: Sequence[int], teacher: Sequence[int], vocabulary: int | None
) -> LogitMatch:
    """Return how logits of two shapes are brought to the same classes; `InputError` where they cannot be.

    The logits of one tokenizer's ids may have been padded to different numbers of rows. Labels of the same names in
    another order are put into the student's.

    Args:
        models: Student and teacher.
        student, teacher: Shapes; that of a teacher which is not loaded lacks batch and tokens.
        vocabulary: Number of token ids of the student's tokenizer, where there is one.
    """
    own, other = tuple(student)[-len(teacher) :], tuple(teacher)
    dim = 1 if len(student) == 4 else -1
    if own != other:
        padded = len(student) == 3 and own[:-1] == other[:-1]
        if padded and vocabulary is not None and vocabulary <= min(own[-1], other[-1]):
            return LogitMatch(vocabulary=vocabulary)
        raise InputError(logit_shape_message(tuple(student), other))
    names = [label_names(model) for model in models]
    if names[0] is None or names[1] is None or names[0] == names[1]:
        return LogitMatch()
    order = label_order(names[1], names[0])
    if order is None:
        raise InputError(
            "Teacher and student name their labels differently, so that their logits cannot be matched",
            received=f"student {names[0]}, teacher {names[1]}",
            expected="the same names, in any order",
            todo="load the student with the teacher's id2label and label2id, or set logit_weight=0",
        )
    return LogitMatch(order=order, dim=dim)


def match_teachers(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    shape: Sequence[int],
    shapes: Sequence[Sequence[int]],
    vocabulary: int | None,
) -> list[LogitMatch]:
    """Return `match_logits` of a student, with logits of a shape, and each of its teachers."""
    pairs = zip(teachers, shapes, strict=True)
    found = [match_logits((student, teacher), shape, theirs, vocabulary) for teacher, theirs in pairs]
    # Where one is cut to the vocabulary, all are: their mean is over the same classes.
    cut = next((match for match in found if match.vocabulary is not None), None)
    return found if cut is None else [cut] * len(found)


def check_same_tokens(student: Sequence[int], batch: Mapping[str, Any]) -> None:
    """Refuse to compare logits (B, N, V) of tokens, of the student's shape, where the teacher reads other ones."""
    own, theirs = batch.get("input_ids"), batch.get(f"{TEACHER_PREFIX}input_ids")
    if len(student) != 3 or theirs is None:
        return
    if isinstance(own, Tensor) and own.shape == theirs.shape and bool((own == theirs).all()):
        return
    raise InputError(
        "The teacher reads other tokens than the student, so their logits of tokens cannot be compared",
        received="teacher_input_ids that differ from input_ids, and a head that predicts tokens",
        expected="one tokenizer for both",
        todo="set logit_weight=0 to distill features alone, which are compared by their average over the text",
    )
