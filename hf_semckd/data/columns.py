"""Which columns of a batch are whose."""

from collections.abc import Mapping
from typing import Any

# Columns with this prefix are the teacher's own inputs, under the name that follows it.
TEACHER_PREFIX = "teacher_"
LABEL_COLUMNS = ("labels", "label", "label_ids")
# The entry of a batch in which a collator leaves what the cache holds of its samples.
CACHED = "cached_teacher"


def has_own_tokens(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds another tokenization for the teacher, so that positions do not correspond."""
    return f"{TEACHER_PREFIX}input_ids" in batch


def teacher_entries(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a batch holds for the teacher alone, without the prefix; the batch itself where that is nothing."""
    own = {key.removeprefix(TEACHER_PREFIX): value for key, value in batch.items() if key.startswith(TEACHER_PREFIX)}
    return own or batch
