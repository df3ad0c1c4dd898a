"""What a model card tells of a training: the settings that had an effect, in words and order for people."""

from collections.abc import Mapping

from .redaction import HIDDEN, is_plain_text, shown_setting

TRAINING = {
    "learning_rate": "learning rate",
    "lr_scheduler_type": "learning-rate schedule",
    "warmup_steps": "warmup steps",
    "optim": "optimizer",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "total_train_batch_size": "batch size",
    "weight_decay": "weight decay",
    "max_grad_norm": "gradient clipping (norm)",
    "label_smoothing_factor": "label smoothing",
    "seed": "seed",
}
# Only these have settings of their own.
SEMCKD_ALONE = (
    "association",
    "association_temperature",
    "association_bank",
    "relation_weight",
    "target_norm",
    "projector",
    "projection_init",
    "max_tokens",
    "max_grid",
)
FEATURES_ALONE = ("feature_weight", "projection_learning_rate", "student_layers", "teacher_layers", *SEMCKD_ALONE)
# Words by which a setting is off, or as it was found.
OFF = frozenset({"auto", "none"})
# Tasks of models whose layers have no grid of pixels.
TEXT = frozenset(
    {
        "fill-mask",
        "question-answering",
        "text-classification",
        "text-generation",
        "text2text-generation",
        "token-classification",
    }
)
# They change what a run takes, not what is learned.
SPEED_ALONE = ("logit_chunk_size", "teacher_compile", "teacher_cache_dir", "teacher_cache_limit_gb")


def training_rows(training: Mapping[str, object]) -> dict[str, str]:
    """Return the arguments of a training as {words: value}: those that were on."""
    given = {name: value for name, value in training.items() if name == "seed" or value not in (None, 0)}
    if _number(given.get("max_steps")) > 0:
        given.pop("num_train_epochs", None)
    else:
        given.pop("max_steps", None)
    rows = {words: shown_setting(name, given[name]) for name, words in TRAINING.items() if name in given}
    if 0 < _number(given.get("warmup_steps")) < 1:
        rows["warmup steps"] = f"{_number(given['warmup_steps']):.3g} of all"
    batch, steps = given.get("per_device_train_batch_size"), _number(given.get("gradient_accumulation_steps"))
    if "batch size" in rows and isinstance(batch, int):
        processes = _number(given["total_train_batch_size"]) / (batch * max(steps, 1))
        parts = [str(batch)]
        parts += [f"{steps:g} accumulation steps"] * (steps > 1) + [f"{processes:g} devices"] * (processes > 1)
        rows["batch size"] += f" ({' x '.join(parts)})" if len(parts) > 1 else ""
    for name in ("bf16", "fp16"):
        if given.get(name):
            rows["precision"] = f"{name} (mixed)"
    return {words: value for words, value in rows.items() if value != HIDDEN}


def distillation_rows(settings: Mapping[str, object], method: str, task: str | None = None) -> dict[str, str]:
    """Return the settings of a distillation as {name: value}: those that were on, and apply to method and task."""
    off = {
        name
        for name, value in settings.items()
        if value is None or value is False or (isinstance(value, str) and value in OFF)
    }
    off |= {*SPEED_ALONE, *_unused(settings), *(["max_grid"] if task in TEXT else [])}
    if "semckd" not in method.lower():
        off.update(SEMCKD_ALONE)
    if method == "KD" or settings.get("feature_weight") == 0:
        off.update(FEATURES_ALONE)
    if settings.get("relation_weight") == 0:
        off.add("relation_weight")
    if settings.get("logit_weight") == 0:
        off.add("temperature")
    shown = {name: value for name, value in settings.items() if name not in off and is_plain_text(name)}
    return {name: shown_setting(name, value) for name, value in shown.items()}


def _unused(settings: Mapping[str, object]) -> set[str]:
    """Return the settings of SemCKD that others leave without a meaning."""
    association, projector, unused = settings.get("association"), settings.get("projector"), set[str]()
    if association not in (None, "similarity", "sinkhorn"):
        unused.add("association_bank")
    if association in ("uniform", "last", "one_to_one"):
        unused.add("association_temperature")
    if projector in ("convolutional", "pairwise"):
        unused.add("max_tokens")
    if projector == "pairwise":
        unused.add("max_grid")
    return unused


def version_rows(versions: Mapping[str, object]) -> dict[str, str]:
    """Return versions and hardware as {words: value}; what is not made of plain words is left out."""
    libraries = [name for name in ("hf_semckd", "transformers", "torch", "accelerate") if versions.get(name)]
    rows = {"versions": ", ".join(f"{name} {versions[name]}" for name in libraries)}
    rows["hardware"] = str(versions.get("accelerator") or versions.get("processor") or "")
    words = {name: " ".join(value.replace("@", "at").split()) for name, value in rows.items()}
    return {name: value for name, value in words.items() if is_plain_text(value)}


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0
