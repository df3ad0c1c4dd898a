"""A training that found too little memory and starts again with a smaller batch (`auto_find_batch_size`)."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from .allocations import copied_buffers, put_back_buffers

logger = logging.getLogger(__name__)


class Attempts:
    """Lets each attempt of one call of `train` begin as a training of its batch size would.

    Before its first optimizer step an attempt changes buffers alone: teacher statistics, sample banks and what batch
    normalization counts. These are put back. What an attempt has learned after that stays, as in a plain `Trainer`:
    in the student and, to go with it, in the projections and all that was observed.

    Attributes:
        learned: Whether the present attempt has made an optimizer step.
    """

    def __init__(self, student: nn.Module):
        self.student = student
        self.learned = False
        self._start: dict[str, Tensor] | None = None

    def begin(self, batch_size: int | None, *, speaks: bool) -> None:
        """Begin the first attempt, whose student has the feature loss attached, or another one."""
        again, learned, self.learned = self._start is not None, self.learned, False
        if again and speaks:
            kept = "; student and projections keep what they have learned, and steps are counted anew" * learned
            logger.warning(
                "There was too little memory: training starts again with batches of %s%s.", batch_size, kept
            )
        if again and not learned:
            assert self._start is not None
            put_back_buffers(self.student, self._start)
        self._start = copied_buffers(self.student)

    def end(self) -> None:
        """Forget the start: what comes next is another call of `train`."""
        self._start, self.learned = None, False
