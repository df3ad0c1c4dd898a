"""The errors a user can meet. Each message says what was received, what was expected and what to do."""

import difflib
from collections.abc import Iterable


class SemCKDError(Exception):
    """Base class of every error that this library raises on purpose; see `message` for the arguments."""

    def __init__(self, what: str, *, received: object = None, expected: object = None, todo: str | None = None):
        super().__init__(what if todo is None else message(what, received=received, expected=expected, todo=todo))


class ConfigurationError(SemCKDError, ValueError):
    """A configuration value, or a combination of values, that cannot work."""


class InputError(SemCKDError, ValueError):
    """Models, datasets or batches that do not fit together; raised before the first optimizer step where possible."""


class SourceError(InputError):
    """A model or a data set that cannot be found or read where it was said to be."""


class LayerNotFoundError(InputError):
    """A layer index or module name that the model does not have."""


class RaggedBatchError(InputError):
    """A batch of another size than the published association networks were built for."""


class NonFiniteLossError(SemCKDError, FloatingPointError):
    """A loss term became NaN or infinite during training; the weights have not been touched by it."""


class TeacherOutputError(SemCKDError, FloatingPointError):
    """The teacher produced NaN or infinite values."""


class CheckpointError(SemCKDError, RuntimeError):
    """A checkpoint that does not hold what is needed to go on from it."""


class SaveError(SemCKDError, OSError):
    """A file that could not be written, on a full disk or in a read-only folder; what was there before is intact."""


class LostProcessError(SemCKDError, RuntimeError):
    """Another process of the training has failed or ended, so that this one cannot go on."""


class HubPushError(SemCKDError, RuntimeError):
    """The upload failed; the student is safe on disk and the message says how to push it later."""


class MissingDependencyError(SemCKDError, ImportError):
    """An optional package is needed and not installed."""


def message(what: str, *, received: object, expected: object, todo: str) -> str:
    """Compose an error text: `what` is a clause without a final full stop, `todo` an imperative sentence."""
    return f"{what}.\n  received: {received}\n  expected: {expected}\n  what to do: {todo}"


def nearest(name: str, choices: Iterable[str], count: int = 5) -> list[str]:
    """Return up to `count` choices spelled most like `name`, best first; used to suggest what was meant."""
    pool = list(choices)
    tail = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, pool, n=count, cutoff=0.5)
    close += [choice for choice in pool if choice.rsplit(".", 1)[-1] == tail and choice not in close]
    return close[:count]
