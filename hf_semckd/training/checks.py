"""Refuses models, data (`InputError`) and options (`ConfigurationError`) that cannot work, before the first step."""

import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from ..config import SemCKDConfig
from ..data.columns import LABEL_COLUMNS, TEACHER_PREFIX, has_own_tokens, teacher_entries
from ..data.samples import column_names
from ..errors import ConfigurationError, InputError
from ..files import saving
from ..losses import FeatureLoss
from ..losses.registry import FEATURE_LOSSES, LossSource, is_known, reuses_teacher_head
from ..models.images import ImageAdaptation, normalization_of
from ..models.inputs import InputSelector
from ..models.outputs import base_model, is_encoder_decoder
from ..models.packing import document_starts
from ..models.sizes import empty_like, shapes_of

logger = logging.getLogger(__name__)
POSITION_TABLES = ("position_embeddings", "positions_embed", "embed_positions", "wpe")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that is the student, wholly or in part: freezing it would freeze the student."""
    own = {id(parameter) for parameter in student.parameters()}
    shared = [name for name, parameter in teacher.named_parameters() if id(parameter) in own]
    if teacher is student or shared:
        what = "are the same object" if teacher is student else "share parameters"
        raise InputError(
            f"Teacher and student {what}",
            received=f"{type(teacher).__name__}" + (f" sharing {', '.join(shared[:3])}" if shared else ""),
            expected="two models that share nothing",
            todo="use copy.deepcopy(student) for self-distillation, or load the teacher separately",
        )


def check_teacher_given(teacher: object, config: SemCKDConfig) -> None:
    """Refuse to distill without a teacher."""
    if teacher is None:
        raise InputError(
            "There is no teacher to distill from",
            received=f"teacher_model=None, logit_weight={config.logit_weight}, feature_weight={config.feature_weight}",
            expected="a model, or a name or folder to load one from",
            todo="pass teacher_model=..., or set logit_weight=0 and feature_weight=0 for plain fine-tuning",
        )


def check_placement(config: SemCKDConfig, source: LossSource | None) -> None:
    """Refuse to divide or move a quantized teacher, or to read the classifier of one that is not whole."""
    if config.teacher_bits is not None and config.teacher_placement in ("shard", "offload"):
        raise ConfigurationError(
            "A quantized teacher can be neither divided among processes nor moved while it runs",
            received=f"teacher_dtype={config.teacher_dtype!r}, teacher_placement={config.teacher_placement!r}",
            expected="teacher_placement='device' or 'device_map', or a teacher that is not quantized",
            todo="leave teacher_placement out, or teacher_dtype",
        )
    if config.teacher_placement == "device_map" and config.world_size > 1:
        raise ConfigurationError(
            "One process alone can divide a teacher among all GPUs",
            received=f"teacher_placement='device_map' in {config.world_size} processes",
            expected="one process, or a teacher that is divided among the processes",
            todo="set teacher_placement='shard', or 'offload' to fill a teacher cache",
        )
    if config.teacher_placement != "device" and reuses_teacher_head(source):
        raise ConfigurationError(
            "The student would end with the teacher's classifier, whose weights are not together",
            received=f"teacher_placement={config.teacher_placement!r}",
            expected="teacher_placement='device'",
            todo="leave teacher_placement out, or use another feature loss",
        )


def check_output_folder(config: SemCKDConfig, *, probe: bool = False) -> None:
    """Make the output folder; `SaveError` where that cannot be, or where (`probe`) no file can be written there.

    Learned after hours of training, it would cost them.
    """
    if not config.should_save or config.output_dir is None:
        return
    with saving("The output folder", config.output_dir):
        os.makedirs(config.output_dir, exist_ok=True)
        if probe and config.save_strategy != SaveStrategy.NO:
            tempfile.TemporaryFile(dir=config.output_dir).close()


def check_feature_loss(source: LossSource | None) -> LossSource | None:
    """Return what was given as feature loss if it can be one; None for logits alone."""
    if source is None or source == "kd":
        return None
    if isinstance(source, str):
        usable = is_known(source)
    else:
        usable = issubclass(source if isinstance(source, type) else type(source), FeatureLoss)
    if usable:
        return source
    raise ConfigurationError(
        "`feature_loss` is not a feature loss",
        received=repr(source),
        expected="None or 'kd' (logits only), a FeatureLoss or a class of one, or one of "
        f"{', '.join(map(repr, FEATURE_LOSSES))}, or several joined by '+'",
        todo="pass one of these; hf_semckd.losses.FeatureLoss is the base class for your own",
    )


def check_trainable(student: nn.Module) -> None:
    """Refuse a student whose parameters are all frozen: the projections alone would learn."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise InputError(
            "The student has nothing to train: all its parameters are frozen",
            received=f"{type(student).__name__} with requires_grad=False everywhere",
            expected="at least one parameter with requires_grad=True",
            todo="call student.requires_grad_(True), or add an adapter (peft.get_peft_model) and train that",
        )


def check_reload(student: nn.Module) -> None:
    """Refuse a student that its configuration does not describe: blocks would be made up when it is loaded again.

    What else would be lost or made up, such as a head that was replaced, is told: its owner may load it otherwise.
    """
    adapted = getattr(student, "_hf_peft_config_loaded", False)
    if not isinstance(student, PreTrainedModel) or getattr(student, "is_quantized", False) or adapted:
        return
    made = empty_like(student, student.config)
    if made is None:  # a constructor of the user's, or one that needs its weights: nothing is known then
        return
    described, shapes = shapes_of(made), shapes_of(student)
    wrong = [name for name, shape in described.items() if shapes.get(name) != shape]
    lost = [name for name in shapes if name not in described]
    blocks = [name for name in wrong if _lacks_block(name, shapes)]
    if blocks:
        raise InputError(
            "The student's configuration describes a deeper model: loaded again, some of its layers would be random",
            received=f"{type(student).__name__} without {', '.join(blocks[:3])}"
            + (f" and {len(blocks) - 3} more" if len(blocks) > 3 else ""),
            expected="a model that is built from its own configuration",
            todo="set the number of layers in student.config (such as num_hidden_layers) to what the student has",
        )
    if wrong or lost:
        logger.warning(
            "from_pretrained will not load this student as it is: its configuration describes other weights than it "
            "has (%s). Change student.config, or load it with your own code.",
            ", ".join([*wrong, *lost][:3]),
        )


def _lacks_block(name: str, shapes: Mapping[str, object]) -> bool:
    """Whether a weight belongs to a numbered module that a model lacks, though it has others of the list."""
    parts = name.split(".")
    for place in (place for place, part in enumerate(parts) if part.isdigit()):
        block, first = ".".join(parts[: place + 1]), ".".join([*parts[:place], "0"])
        if not any(other.startswith(f"{block}.") for other in shapes):
            return any(other.startswith(f"{first}.") for other in shapes)
    return False


def check_lengths(batch: Mapping[str, Any], student: nn.Module, teachers: Sequence[nn.Module]) -> None:
    """Refuse a text, the longest of the data set, that is longer than the positions that a model has."""
    for role, model in (("student", student), *(("teacher", teacher) for teacher in teachers)):
        prefix = TEACHER_PREFIX if role == "teacher" and has_own_tokens(batch) else ""
        ids, limit = batch.get(f"{prefix}input_ids"), learned_positions(model)
        if document_starts(teacher_entries(batch) if prefix else batch) is not None:
            continue
        if isinstance(ids, Tensor) and ids.dim() == 2 and limit is not None and ids.shape[1] > limit:
            raise InputError(
                f"There is a text that is longer than the {role} can read",
                received=f"{ids.shape[1]} tokens",
                expected=f"at most {limit} tokens, for which {type(model).__name__} has positions",
                todo=f"tokenize with truncation=True, max_length={limit}",
            )


def learned_positions(model: nn.Module) -> int | None:
    """Return the number of rows in a text model's table of positions; None where it has none."""
    limit = getattr(getattr(base_model(model), "config", None), "max_position_embeddings", None)
    for name, module in model.named_modules():
        if isinstance(limit, int) and isinstance(module, nn.Embedding) and name.rpartition(".")[2] in POSITION_TABLES:
            # RoBERTa's begin after the padding index; BART's and OPT's have two rows more than positions.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return min(limit, module.num_embeddings - first)
    return None


def check_dataset(dataset: Any, models: Sequence[nn.Module], remove_unused_columns: bool) -> None:
    """Refuse an empty dataset, and one whose columns neither model takes."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise InputError(
            "The training dataset is empty", received="0 samples", expected="at least 1", todo="check how it is made"
        )
    columns = column_names(dataset)
    if not columns or not remove_unused_columns:
        return
    taken = {name for model in models for name in InputSelector(model).parameters} - set(LABEL_COLUMNS)
    useful = [name for name in columns if name in taken or name.startswith(TEACHER_PREFIX)]
    # A plain module's one input may have any name: any single tensor is given to it.
    takes_any = any(not hasattr(model, "config") and len(InputSelector(model).parameters) == 1 for model in models)
    if not useful and not takes_any:
        raise InputError(
            "Neither student nor teacher takes any column of the training dataset",
            received=f"columns {', '.join(map(repr, columns))}",
            expected=f"some of {', '.join(sorted(taken))}",
            todo="tokenize or preprocess the dataset first (dataset.map(...)), or set remove_unused_columns=False "
            "when the collator or a transform makes the inputs",
        )


def check_labels(batch: Mapping[str, Any], label_names: Sequence[str], config: SemCKDConfig) -> None:
    """Refuse a batch without labels while the task loss is on."""
    if config.task_weight > 0 and not any(name in batch for name in (*label_names, "labels")):
        raise InputError(
            "There are no labels, and task_weight is positive",
            received=f"columns {', '.join(map(repr, batch))}, task_weight={config.task_weight}",
            expected=f"a column named {', '.join(map(repr, label_names or ('labels',)))}",
            todo="add labels, name their column in label_names, or set task_weight=0 to learn from the teacher alone",
        )


def check_tokenizers(teacher: object, tokenizer: Any, batch: Mapping[str, Any]) -> None:
    """Refuse a teacher given by name or folder that has another tokenizer than the student, and only its token ids."""
    shared = "input_ids" in batch and not any(name.startswith(TEACHER_PREFIX) for name in batch)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not shared or not isinstance(teacher, (str, os.PathLike)) or not hasattr(tokenizer, "get_vocab"):
        return
    theirs, known = _vocabulary_of(teacher), tokenizer.get_vocab()
    if theirs is None:
        return
    other = sum(theirs.get(token) != index for token, index in known.items())
    if other:
        raise InputError(
            "The teacher has another tokenizer than the student, whose token ids mean nothing to it",
            received=f"processing_class with {len(known)} tokens, of which {other} are other ids in {teacher}",
            expected="one tokenizer for both, or columns of the teacher's own",
            todo="tokenize the texts for the teacher too, as teacher_input_ids and teacher_attention_mask, with "
            "hf_semckd.data.TeacherStudentCollator",
        )


def _vocabulary_of(teacher: object) -> dict[str, int] | None:
    """Return the token ids of the tokenizer beside a model that is given by name or folder; None without one."""
    # Without files of its own, transformers would make up an empty one.
    named = isinstance(teacher, (str, os.PathLike))
    if not named or not any(_has_file(teacher, name) for name in TOKENIZER_FILES):  # type: ignore[arg-type]
        return None
    try:
        return AutoTokenizer.from_pretrained(teacher, trust_remote_code=False, local_files_only=True).get_vocab()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_own_inputs(teachers: Sequence[object], batch: Mapping[str, Any]) -> None:
    """Refuse several teachers that want different preprocessing where all of them read the columns `teacher_*`."""
    named = [entry for entry in teachers if isinstance(entry, (str, os.PathLike))]
    wanted: list[Any] = []
    if has_own_tokens(batch):
        wanted = [_vocabulary_of(entry) for entry in named]
    elif f"{TEACHER_PREFIX}pixel_values" in batch:
        wanted = [normalization_of(entry) for entry in named]
    known = [entry for entry in wanted if entry is not None]
    if any(entry != known[0] for entry in known):
        raise InputError(
            "The teachers have different tokenizers or image normalizations, and read the same columns",
            received=f"columns {', '.join(name for name in batch if name.startswith(TEACHER_PREFIX))} for "
            f"{', '.join(map(str, named))}",
            expected="teachers that share their preprocessing",
            todo="choose teachers with one tokenizer or normalization, or only one of them",
        )


def pixel_normalization(teacher: object, processor: Any, batch: Mapping[str, Any]) -> ImageAdaptation:
    """Return how images that a student's processor made are normalized for a teacher given by name or folder."""
    own = normalization_of(processor)
    theirs = normalization_of(teacher) if isinstance(teacher, (str, os.PathLike)) else None
    if own is None or theirs is None or own == theirs or "pixel_values" not in teacher_entries(batch):
        return ImageAdaptation()
    if any(name.startswith(TEACHER_PREFIX) for name in batch) or len(own[0]) != len(theirs[0]):
        return ImageAdaptation()
    logger.warning(
        "Teacher and student normalize images differently: the teacher's are converted from mean %s and deviation %s "
        "to %s and %s. If processing_class did not make the images, give the teacher its own teacher_pixel_values.",
        *own,
        *theirs,
    )
    scale = tuple(s / t for s, t in zip(own[1], theirs[1], strict=True))
    means = zip(own[0], theirs[0], theirs[1], strict=True)
    return ImageAdaptation(scale=scale, shift=tuple((s - t) / deviation for s, t, deviation in means))


def _has_file(source: str | os.PathLike[str], name: str) -> bool:
    """Whether a folder, or what is cached of a repository, holds a file."""
    if Path(source).is_dir():
        return (Path(source) / name).is_file()
    return isinstance(try_to_load_from_cache(os.fspath(source), name), str)


def warn_of_single_samples(loss: FeatureLoss | None, config: SemCKDConfig) -> None:
    """Warn where a sample is compared with the others of its micro-batch, and there are none."""
    chosen = {} if loss is None else loss.settings
    alone = not config.association_bank and chosen.get("association") in ("similarity", "sinkhorn")
    if config.per_device_train_batch_size == 1 and (alone or chosen.get("relation_weight")):
        logger.warning(
            "With one sample in a micro-batch %s. Raise per_device_train_batch_size and lower "
            "gradient_accumulation_steps%s.",
            "the association is uniform" if alone else "the relation error is 0: there are no other samples",
            ", or leave association_bank at its default" if alone else ", or set relation_weight=0",
        )


def check_encoder_decoder(models: Sequence[nn.Module], config: SemCKDConfig) -> None:
    """Refuse the teacher cache for encoder-decoders, whose outputs follow the labels and not the inputs alone."""
    found = [type(model).__name__ for model in models if is_encoder_decoder(model)]
    if found and config.teacher_cache_dir is not None:
        raise ConfigurationError(
            "The teacher cache does not support encoder-decoder models",
            received=f"teacher_cache_dir with {', '.join(found)}",
            expected="an encoder or a decoder, or no cache",
            todo="leave teacher_cache_dir out",
        )


def check_published_batches(config: SemCKDConfig, dataset: Any) -> None:
    """Refuse a ragged last batch where the published equations demand a fixed batch size."""
    size = config.per_device_train_batch_size
    ragged = hasattr(dataset, "__len__") and len(dataset) % size > 0
    if not ragged or config.dataloader_drop_last or config.world_size > 1:
        return
    raise InputError(
        "The published association takes similarity rows, whose length is the batch size; the last batch is smaller",
        received=f"{len(dataset)} samples in batches of {size}, dataloader_drop_last=False",
        expected="every batch of the same size",
        todo="set dataloader_drop_last=True, pad the dataset to a multiple of the batch size, or use the default "
        "form, which takes any batch size",
    )
