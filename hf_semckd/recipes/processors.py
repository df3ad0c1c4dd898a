"""The tokenizer, image processor or feature extractor that reads the inputs of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoTokenizer

from ..errors import InputError
from ..models.loading import has_words
from .tasks.base import Task

KINDS = {
    "text": (AutoTokenizer, "a tokenizer"),
    "image": (AutoImageProcessor, "an image processor (preprocessor_config.json)"),
    "audio": (AutoFeatureExtractor, "a feature extractor (preprocessor_config.json)"),
}
LONGEST_TEXT, LONGEST_SOUND = 512, 10
SHORTEST_TEXT = 4


def load_processor(source: str, task: type[Task]) -> Any:
    """Return what reads the inputs of the model of a name or folder; `InputError` where it has none."""
    kind, name = KINDS[task.modality]
    folder = str(Path(source).parent) if Path(source).is_file() else source
    # Of those that ask for it, words do not begin with a blank otherwise.
    how = {"add_prefix_space": True} if task.labels_tokens else {}
    try:
        found = kind.from_pretrained(folder, trust_remote_code=False, **how)
        if task.modality == "text" and not has_words(found):
            raise ValueError("a tokenizer without words")
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        raise InputError(
            f"There is no {name.partition(' ')[2]} for {source}",
            received=" ".join(str(error).split())[:200],
            expected=f"{name} saved with the model",
            todo=f"save one there: {kind.__name__}.from_pretrained(...).save_pretrained({folder!r})",
        ) from error
    if task.modality == "text" and found.pad_token is None and found.eos_token is not None:
        found.pad_token = found.eos_token
    return found


def read_alike(one: Any, other: Any) -> bool:
    """Whether two processors make the same of an input."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if hasattr(one, "get_vocab"):
        return one.get_vocab() == other.get_vocab() and _tried(one) == _tried(other)
    return one.to_dict() == other.to_dict()


def _tried(tokenizer: Any) -> Any:
    """Return what a tokenizer makes of a text with capitals, accents, digits and a pair."""
    return tokenizer("Añ Example, No. 12", "ok?")["input_ids"]


def longest_input(task: type[Task], asked: int | None, processors: list[Any], models: list[nn.Module]) -> int:
    """Return the most tokens that all models take, or seconds of sound."""
    if task.modality == "audio":
        return asked or LONGEST_SOUND
    limits = [processor.model_max_length for processor in processors if hasattr(processor, "model_max_length")]
    limits += [limit for limit in map(_positions, models) if limit is not None]
    most = min(limits, default=LONGEST_TEXT)
    if asked is not None and asked < SHORTEST_TEXT and task.modality == "text":
        raise InputError(
            "Texts of this length hold special tokens alone",
            received=f"max_length={asked}",
            expected=f"at least {SHORTEST_TEXT} tokens",
            todo="raise max_length",
        )
    if asked is not None and asked > most and task.modality == "text":
        raise InputError(
            "The models do not take texts of this length",
            received=f"max_length={asked}",
            expected=f"at most {most} tokens",
            todo=f"set max_length to {most} or less",
        )
    return asked or min(most, LONGEST_TEXT)


def _positions(model: nn.Module) -> int | None:
    """Return the length that a model's position embeddings are for; None where there is no limit."""
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    # Like RoBERTa's, which count from the index after the padding's.
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    padded = [entry.padding_idx for entry in embeddings if entry.num_embeddings == limit]
    return limit - padded[0] - 1 if padded and padded[0] is not None else limit
