"""A saved student's folder: which of its files are published, and a model card made from them alone."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..errors import InputError
from .card import CARD_FILES, EVALUATION_FILE, card_title, create_model_card
from .facts import StudentFacts, last_evaluation
from .heads import head_of
from .redaction import is_hub_id
from .sources import named_source, warn_of_license

logger = logging.getLogger(__name__)
CARD, SETTINGS_FILE, ADAPTER_FILE = "README.md", "distillation_config.json", "adapter_config.json"
STATE_FILE = "trainer_state.json"
# What `save_pretrained` of models and processors writes, and what is written beside it. An allow-list: optimizer
# states, logs, pickles and checkpoints have many names.
PUBLISHED = (
    *("config.json", "generation_config.json", ADAPTER_FILE, SETTINGS_FILE, "LICENSE*"),
    *("model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors"),
    *("tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "vocab-*"),
    *("merges.txt", "*.spm", "spiece.model", "sentencepiece*.model", "bpe.codes", "normalizer.json"),
    *("*preprocessor_config.json", "processor_config.json", "chat_template.*", "additional_chat_templates/*.jinja"),
    *("model*.onnx", "model*.onnx.data", "onnx/model*.onnx", "onnx/model*.onnx.data"),
)
# A class with the head of each task of PEFT.
TASKS: dict[Any, tuple[str, ...]] = {
    "SEQ_CLS": ("BertForSequenceClassification",),
    "TOKEN_CLS": ("BertForTokenClassification",),
    "QUESTION_ANS": ("BertForQuestionAnswering",),
    "CAUSAL_LM": ("GPT2LMHeadModel",),
    "SEQ_2_SEQ_LM": ("T5ForConditionalGeneration",),
}
# Kept with the parameters, and none of them.
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
# The title of the empty card that PEFT writes.
PEFT_TITLE = "# Model Card for Model ID"


def published_files(folder: Path) -> dict[str, Path]:
    """Return the files of a student that are published, by their paths in the repository, without the card.

    Raises `InputError` where the folder holds no student.
    """
    found = {path.relative_to(folder).as_posix(): path for pattern in PUBLISHED for path in folder.glob(pattern)}
    found = {name: path for name, path in sorted(found.items()) if path.is_file()}
    saved = [path.name for path in weight_files(folder)]
    kinds = [name for name in ("config.json", ADAPTER_FILE, SETTINGS_FILE) if name in found]
    if not saved or not kinds:
        raise InputError(
            "There is no student in this folder",
            received=f"{str(folder)!r}, without {'weights (.safetensors)' if not saved else 'config.json'}",
            expected="a folder that trainer.save_model or save_pretrained wrote",
            todo="pass the folder of the student: output_dir, or a checkpoint in it",
        )
    return found


def published_content(path: Path) -> Path | bytes:
    """Return what is uploaded of a file: itself, or its content without the local path that PEFT writes."""
    if path.name != ADAPTER_FILE:
        return path
    settings = json.loads(path.read_text(encoding="utf-8"))
    base = settings.get("base_model_name_or_path")
    if base and not is_hub_id(base):
        settings["base_model_name_or_path"] = None
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def weight_files(folder: Path) -> list[Path]:
    """Return the files with a student's weights."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")])


def card_of_folder(folder: Path, name: str, processor: str | None) -> str:
    """Return the card in a folder, or one made from what is there and from the cards of its sources on the Hub.

    `processor` is the auto class of its processor.
    """
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else PEFT_TITLE
    if PEFT_TITLE not in card:
        return card
    facts = folder_facts(folder, name, processor, online=True)
    warn_of_license(facts.sources)
    return create_model_card(facts)


def card_name(folder: Path) -> str | None:
    """Return the repository's id in a folder's card, or None."""
    path = folder / CARD
    return card_title(path.read_text(encoding="utf-8")) if path.is_file() else None


def folder_facts(folder: Path, name: str, processor: str | None, *, online: bool = False) -> StudentFacts:
    """Return the facts that the files of a saved student tell, and, `online`, the cards of its sources."""
    config, settings, adapter = (_json(folder / part) for part in ("config.json", SETTINGS_FILE, ADAPTER_FILE))
    # What PEFT adapts is named by its folder or its Hub id; its head is not in the files.
    base = adapter.get("base_model_name_or_path") or settings.get("base_model")
    head = head_of([*(config.get("architectures") or ()), *TASKS.get(adapter.get("task_type"), ())])
    taught = settings.get("teacher") or []
    teachers = [taught] if isinstance(taught, str) else taught
    return StudentFacts(
        repo_name=name,
        student_class=head.auto_class,
        parameters=sum(map(_count, weight_files(folder))),
        pipeline_tag=head.pipeline_tag,
        processor=processor,
        loader="peft" if adapter else "transformers" if config else "torch",
        adapter_type=adapter.get("peft_type"),
        base_model=base if isinstance(base, str) else None,
        teacher=teachers,
        sources=[named_source(name, online=online) for name in (base, *teachers) if isinstance(name, str)],
        method=settings.get("method") or "",
        settings=settings.get("distillation") or {},
        training=settings.get("training") or {},
        versions=settings.get("versions") or {},
        dataset=settings.get("dataset"),
        metrics=last_evaluation(_json(folder / STATE_FILE).get("log_history") or []),
        evaluation=_json(folder / EVALUATION_FILE) or None,
        files=[entry for entry in CARD_FILES if (folder / entry).is_file()],
    )


def _json(path: Path) -> dict[str, Any]:
    """Return a file of JSON, or {} where it is missing or broken: what tells of a student costs only itself."""
    try:
        read = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        logger.warning("%s cannot be read, and the card says nothing of it: %s", path.name, error)
        return {}
    return read if isinstance(read, dict) else {}


def _count(path: Path) -> int:
    """Return the number of parameters in a file of weights, from its header."""
    with safe_open(path, framework="pt") as weights:
        names = [name for name in weights.keys() if not name.endswith(BUFFERS)]
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
