"""What ends one of several processes ends the others soon, and each of them says so."""

import contextlib
from collections.abc import Iterator

from torch import distributed

from ..errors import LostProcessError, SemCKDError

# What gloo and NCCL say when the connection to another process is gone; gloo raises a plain RuntimeError.
LOST = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "NCCL",
    "remote process exited",
)


def is_lost(error: Exception) -> bool:
    """Whether an error is the network's, and says that another process cannot be reached."""
    return isinstance(error, distributed.DistError) or any(words in str(error) for words in LOST)


@contextlib.contextmanager
def noticing_lost_processes(processes: int) -> Iterator[None]:
    """Turn the network's error, where another process has failed or was killed, into `LostProcessError`."""
    try:
        yield
    except SemCKDError:
        raise
    except RuntimeError as error:
        if processes == 1 or not is_lost(error):
            raise
        raise LostProcessError(
            "Another process of the training has failed or was killed, and this one cannot go on without it",
            received=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected=f"{processes} processes",
            todo="see the error of the other process; then start all again with train(resume_from_checkpoint=True)",
        ) from error


@contextlib.contextmanager
def noting_step(step: int) -> Iterator[None]:
    """Add to an error of the data set's own code which step its samples were for; it stays the error that it is."""
    try:
        yield
    except SemCKDError:
        raise
    except Exception as error:
        if hasattr(error, "add_note"):  # since Python 3.11
            # The data loader reads one batch ahead.
            error.add_note(
                f"Raised while samples for training step {step} or the next were read; none was taken on them."
            )
        raise
