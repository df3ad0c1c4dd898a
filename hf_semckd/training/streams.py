"""Streams: data sets without a length, which are read from their beginning."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from ..config import SemCKDConfig
from ..data.batches import collate
from ..data.samples import first_samples, is_map_style
from ..errors import CheckpointError, ConfigurationError
from .caching import TrainingData

TRAINER_STATE = "trainer_state.json"


def is_stream(dataset: Any) -> bool:
    """Whether it is not known how many samples there are."""
    return dataset is not None and not hasattr(dataset, "__len__")


def batches_to_read(dataset: Any, config: SemCKDConfig) -> int | None:
    """Return how many evaluation batches hold what training reads of a stream; None for all of another data set."""
    if not is_stream(dataset):
        return None
    samples = config.max_steps * config.gradient_accumulation_steps * config.train_batch_size
    # Each worker of a loader begins with batches of its own.
    return math.ceil(samples / config.eval_batch_size) + config.dataloader_num_workers


def check_equal_sizes(data: TrainingData | None, config: SemCKDConfig) -> None:
    """Refuse samples of several sizes in a stream that one process reads for all: Accelerate joins their batches."""
    dispatches: Any = config.accelerator_config.dispatch_batches
    if data is None or config.world_size == 1 or is_map_style(data.dataset) or dispatches is False:
        return
    batches = [collate(data.collator, [sample]) for sample in first_samples(data.dataset)]
    sizes = [
        {name: tuple(entry.shape) for name, entry in batch.items() if torch.is_tensor(entry)} for batch in batches
    ]
    if any(entry != sizes[0] for entry in sizes):
        raise ConfigurationError(
            "The samples of this stream have several sizes, and one process would read them for all",
            received=" and ".join(map(str, sizes)),
            expected="batches of one size, which can be joined and dealt out",
            todo="set accelerator_config={'dispatch_batches': False}: each process then reads its own samples; or pad "
            "all samples to one length",
        )


def check_position(checkpoint: str | bool | None, dataset: Any, config: SemCKDConfig) -> None:
    """Refuse to go on with a stream that had begun again: `Trainer` would skip its steps from the first pass alone."""
    if not isinstance(checkpoint, str) or not is_stream(dataset) or config.ignore_data_skip:
        return
    path = Path(checkpoint) / TRAINER_STATE
    state = TrainerState.load_from_json(str(path)) if path.is_file() else TrainerState()
    # Of a stream, an epoch has `max_steps` steps, but ends where the stream does.
    if (state.epoch or 0) * state.max_steps > state.global_step + 0.5:
        raise CheckpointError(
            "The stream had ended and begun again before this checkpoint, so its place in it is not known",
            received=f"{checkpoint}, step {state.global_step}, and training data without a length",
            expected="a stream that is longer than the training, or data with a length",
            todo="set ignore_data_skip=True to begin the stream anew, or train on data with a length",
        )
