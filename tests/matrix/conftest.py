"""Writes the table of what was tried, where SUPPORT_TABLE names a file: `make test-matrix`."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matrix.tasks import TASKS

CHECKS = {
    "test_layers_are_those_that_a_person_would_name": "layers",
    "test_all_terms_train_and_the_student_loads": "trains, reloads",
    "test_the_feature_term_reaches_the_blocks": "features reach blocks",
    "test_padding_changes_nothing": "padding",
    "test_training_resumes": "resumes",
}
TASK_CHECKS = {
    "test_a_task_trains_and_its_student_loads": "trains, reloads",
    "test_features_alone_reach_the_blocks_of_a_task": "features reach blocks",
    "test_a_task_resumes": "resumes",
}
PAIRS = {
    "test_any_vision_family_teaches_any_other": "image classification",
    "test_any_text_family_teaches_any_other": "sequence classification",
    "test_any_audio_family_teaches_any_other": "audio classification",
}
HEADS = {
    "SEQUENCE_CLASSIFICATION": "Sequence classification",
    "CAUSAL_LM": "Causal language models",
    "MASKED_LM": "Masked language models",
    "SEQ_TO_SEQ_CAUSAL_LM": "Sequence to sequence",
    "IMAGE_CLASSIFICATION": "Image classification",
    "AUDIO_CLASSIFICATION": "Audio classification",
    "CTC": "Speech recognition (CTC)",
}
MARKS = {"passed": "✓", "failed": "✗", "xfailed": "✗"}
INTRODUCTION = """# Supported models

Written by `make test-matrix`: a tiny model of every family and head teaches another one, with all options at their
defaults.

- **layers**: the layers that are found are the outputs of the blocks listed in `tests/matrix/families.py`.
- **trains, reloads**: all terms that apply are finite, and the saved student loads with `from_pretrained`.
- **features reach blocks**: the feature term alone moves the weights of two blocks at least.
- **padding**: more padding changes neither the logit nor the feature term; `-` where it does not apply, or the
  family's own outputs depend on its padding.
- **resumes**: a training that is resumed from a checkpoint ends with the weights of one that was not interrupted.

Other models work too: `print(inspect_models(student, teacher, batch))` shows what would be compared.

Known limits:

- **Object detection**: queries have no order, so logits are refused; features and the model's own loss train.
- **Other tokenizers**: logits of tokens are refused; features are compared by their average over the text.
- **Packed sequences**: documents are the samples. Models that read across them are refused.
- **Teacher cache**: refuses packed rows, and models with several towers (CLIP).
"""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    path = os.environ.get("SUPPORT_TABLE")
    # A process of pytest-xdist knows its own tests alone.
    if path and not hasattr(terminalreporter.config, "workerinput"):
        outcomes = {
            report.nodeid.rpartition("::")[2]: outcome
            for outcome in MARKS
            for report in terminalreporter.stats.get(outcome, ())
            if report.when == "call"
        }
        Path(path).write_text(page(outcomes), encoding="utf-8")


def page(outcomes: Mapping[str, str]) -> str:
    """Return the page for the outcomes of tests by their names."""
    tasks: dict[str, dict[str, str]] = defaultdict(dict)
    cells: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    pairs: dict[str, list[bool]] = defaultdict(list)
    for name, outcome in outcomes.items():
        test, _, rest = name.partition("[")
        case = rest.removesuffix("]")
        if test in CHECKS:
            head, _, family = case.partition("-")
            cells[head][family][CHECKS[test]] = MARKS[outcome]
        elif test in TASK_CHECKS:
            tasks[case][TASK_CHECKS[test]] = MARKS[outcome]
        elif test in PAIRS:
            pairs[PAIRS[test]].append(outcome == "passed")
    families = {family for found in cells.values() for family in found}
    counted = [f"{len(tasks)} tasks, and {len(families)} families with {sum(map(len, cells.values()))} heads."]
    counted += ["", "Each family as the student of every other trains in:", ""]
    counted += [f"- {kind}: {sum(done)} of {len(done)} ordered pairs" for kind, done in sorted(pairs.items())]
    described = [([TASKS[case].title, TASKS[case].models], found) for case, found in tasks.items()]
    parts = [INTRODUCTION, *counted, "", "## Tasks", ""]
    parts += table(["task", "models"], sorted(described, key=lambda row: row[0]), TASK_CHECKS.values())
    for head, title in HEADS.items():
        rows = [([family], found) for family, found in sorted(cells[head].items())]
        parts += ["", f"## {title}", "", *table(["family"], rows, CHECKS.values())]
    return "\n".join(parts).rstrip() + "\n"


def table(names: list[str], rows: Iterable[tuple[list[str], dict[str, str]]], checks: Iterable[str]) -> list[str]:
    """Return the lines of a table; each row has entries for the names, and the mark of every check that ran."""
    columns = [*checks]
    lines = [[*names, *columns], *([*first, *(found.get(check, "-") for check in columns)] for first, found in rows)]
    written = ["| " + " | ".join(line) + " |" for line in lines]
    return [written[0], "|---" * (len(names) + len(columns)) + "|", *written[1:]]
