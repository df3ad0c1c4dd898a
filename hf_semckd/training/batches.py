"""What every training batch must be, from the models and the first batch that they took."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.batches import OBJECTS, BatchCheck, CheckedCollator
from ..data.columns import CACHED, LABEL_COLUMNS, TEACHER_PREFIX, has_own_tokens, teacher_entries
from ..data.samples import is_map_style, label_range
from ..errors import SemCKDError
from ..models.inputs import FAILURES, InputSelector, refused_batch
from ..models.outputs import base_model
from ..models.own_loss import DEFAULT_LOSS, OwnLoss
from ..models.packing import document_starts
from ..models.tasks import Task
from ..teacher.cache.cache import CachingCollator
from ..teacher.cached import CachedTeacher
from .checks import learned_positions
from .inspection import Inspection
from .pair import Pair
from .plan import Plan, Services
from .processes import is_lost

# A picture or a sound may stand in a text under a number that is no word.
OTHER_INPUTS = {"pixel_values", "input_features", "input_values"}


def check_of_batches(pair: Pair, plan: Plan, found: Inspection, services: Services, *, trains: bool) -> BatchCheck:
    """Return the check of batches to train or evaluate on, with the labels that the student's loss reads."""
    reads = (plan.task_weight > 0 or not trains) and services.custom_loss is None
    labels = (plan.label_names or ("labels",)) if reads else ()
    models = (pair.student, *(pair.teacher_models if trains else ()))
    check = batch_check(found.batch, models, labels, class_count(found.student_logits, plan.task), plan.own_loss)
    return replace(check, needs_labels=trains)


def batch_check(
    batch: Mapping[str, Any],
    models: Sequence[nn.Module],
    labels: Sequence[str],
    classes: int | None,
    own_loss: OwnLoss = DEFAULT_LOSS,
) -> BatchCheck:
    """Return what every batch must be, by the first one, which all models took.

    Args:
        batch: The first one, complete.
        models: The student, and the teachers that read the batches too.
        labels: Columns that may hold labels; empty where nothing is learned from them, or nobody knows how.
        classes: Number of classes of a head whose labels are class numbers.
        own_loss: How the student's own loss comes about.
    """
    columns = [name for name in batch if name not in (*LABEL_COLUMNS, *labels, CACHED)]
    named = {name for model in models for name in InputSelector(model).parameters}
    taken = [name for name in columns if name in named or name.startswith(TEACHER_PREFIX)] or columns
    limits, lengths = dict[str, int](), dict[str, int]()
    for number, model in enumerate(models):
        own = number > 0 and has_own_tokens(batch)
        name = f"{TEACHER_PREFIX}input_ids" if own else "input_ids"
        words = None if OTHER_INPUTS & set(columns) else _word_count(model)
        longest = learned_positions(model)
        if words is not None:
            limits[name] = min(words, limits.get(name, words))
        types = f"{TEACHER_PREFIX}token_type_ids" if own else "token_type_ids"
        kinds = _type_count(model)
        if kinds is not None:
            limits[types] = min(kinds, limits.get(types, kinds))
        if longest is not None and document_starts(teacher_entries(batch) if own else batch) is None:
            lengths[name] = min(longest, lengths.get(name, longest))
    labels = [name for name in labels if name in batch] or labels
    for name in labels:
        value = batch.get(name)
        of_loss = _object_classes(models[0]) if _lists_objects(value) else classes
        # Of several columns one may hold numbers that are measured.
        measured = len(labels) > 1 and isinstance(value, Tensor) and value.is_floating_point()
        # What the student's forward does not name is for the metrics.
        read = name in LABEL_COLUMNS or name in InputSelector(models[0]).parameters
        if of_loss is not None and read and not measured:
            limits[name] = of_loss
    base = base_model(models[0])
    # The loss of a module of one's own may convert labels, or mix them; CTC takes any whole numbers.
    whole = isinstance(base, PreTrainedModel) and not type(base).__name__.endswith("ForCTC")
    return BatchCheck(frozenset(taken), tuple(labels), limits, lengths, own_loss.ignored, own_loss.field, whole)


def class_count(logits: Tensor | None, task: Task) -> int | None:
    """Return the number of classes of a head whose labels are class numbers, and None for any other."""
    if logits is None or task not in ("single_label", "tokens", "frames"):
        return None
    classes = int(logits.shape[1] if task == "single_label" else logits.shape[-1])
    # One logit a pixel tells two classes apart.
    return None if logits.dim() == 4 and classes == 1 else classes


def check_label_range(check: BatchCheck, dataset: Any) -> None:
    """Refuse labels of a `datasets.Dataset`, the least or the greatest, that are no class of the student's."""
    limited = next((name for name in check.labels if name in check.limits), None)
    bounds = None if limited is None else label_range(dataset)
    if limited is not None and bounds is not None:
        check.check_values(limited, torch.tensor(bounds), "the data set")


@contextmanager
def checked_collator(trainer: Any, check: BatchCheck | None) -> Iterator[None]:
    """Let data loaders that a trainer makes meanwhile check their batches, if there is a check."""
    collator = trainer.data_collator
    trainer.data_collator = collator if check is None else CheckedCollator(collator, check)
    try:
        yield
    finally:
        trainer.data_collator = collator


@contextmanager
def checked_batches(
    trainer: Any, check: BatchCheck, teachers: Sequence[CachedTeacher], *, drop_last: bool | None = None
) -> Iterator[None]:
    """Let data loaders that a trainer makes meanwhile check their batches, and look them up in the caches.

    `drop_last` is that of the arguments where it is None.
    """
    args, collator, drops = trainer.args, trainer.data_collator, trainer.args.dataloader_drop_last
    trainer.data_collator = CheckedCollator(collator, check)
    # Where one process reads for all, nothing but tensors comes from there to the others: the teacher looks up.
    ahead = is_map_style(trainer.train_dataset) and not trainer.accelerator.dispatch_batches
    for cache in (teacher.cache for teacher in teachers if ahead):
        in_thread = args.dataloader_num_workers == 0
        trainer.data_collator = CachingCollator(trainer.data_collator, cache, in_thread=in_thread)
    args.dataloader_drop_last = drops if drop_last is None else drop_last
    try:
        yield
    finally:
        trainer.data_collator, args.dataloader_drop_last = collator, drops


class KnownShapes:
    """The shapes of batches that went through both models; that another one fails is the data's doing, and told so."""

    def __init__(self) -> None:
        self._known: set[tuple[Any, ...]] = set()

    @contextmanager
    def trying(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Raise `InputError` in place of what the models raise for a batch of shapes that are new to them."""
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        rows = {value.shape[0] for value in tensors.values() if value.dim()}
        shapes = (len(rows), *((name, value.dtype, value.shape[1:]) for name, value in tensors.items()))
        if shapes in self._known:
            yield
            return
        try:
            yield
        except SemCKDError:
            raise
        except FAILURES as error:
            if is_lost(error) or should_reduce_batch_size(error):
                raise
            raise refused_batch("student or teacher", batch, error) from error
        self._known.add(shapes)


def _word_count(model: nn.Module) -> int | None:
    """Return the number of entries of a model's table of words; None where it has none."""
    tells: Any = getattr(base_model(model), "get_input_embeddings", None)
    try:
        table = None if tells is None else tells()
    except (NotImplementedError, AttributeError):
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _type_count(model: nn.Module) -> int | None:
    """Return the number of entries of a model's table of token types; None where it has none, or reads none."""
    if "token_type_ids" not in InputSelector(model).parameters:
        return None
    named = (table for name, table in model.named_modules() if name.rpartition(".")[2] == "token_type_embeddings")
    return next((table.num_embeddings for table in named if isinstance(table, nn.Embedding)), None)


def _lists_objects(entries: Any) -> bool:
    """Whether labels are lists of objects, an entry a picture, as detectors of transformers take them."""
    listed = isinstance(entries, (list, tuple)) and bool(entries)
    return listed and all(isinstance(entry, Mapping) and {*OBJECTS} <= entry.keys() for entry in entries)


def _object_classes(model: nn.Module) -> int | None:
    return getattr(getattr(base_model(model), "config", None), "num_labels", None)
