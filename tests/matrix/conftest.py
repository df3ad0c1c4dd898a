"""Writes the table of what was tried, where SUPPORT_TABLE names a file: `make test-matrix`."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKS = {
    "test_layers_are_those_that_a_person_would_name": "layers",
    "test_all_terms_train_and_the_student_loads": "trains, reloads",
    "test_the_feature_term_reaches_the_blocks": "features reach blocks",
    "test_padding_changes_nothing": "padding",
}
PAIRS = "test_any_vision_family_teaches_any_other"
HEADS = {
    "SEQUENCE_CLASSIFICATION": "Sequence classification",
    "CAUSAL_LM": "Causal language models",
    "MASKED_LM": "Masked language models",
    "SEQ_TO_SEQ_CAUSAL_LM": "Sequence to sequence",
    "IMAGE_CLASSIFICATION": "Image classification",
    "AUDIO_CLASSIFICATION": "Audio classification",
    "CTC": "Speech recognition (CTC)",
}
MARKS = {"passed": "✓", "failed": "✗"}
INTRODUCTION = """# Supported models

Written by `make test-matrix`: a tiny model of every family and head teaches another one, with all options at their
defaults.

- **layers**: the layers that are found are the outputs of the blocks listed in `tests/matrix/families.py`.
- **trains, reloads**: task, logit and feature terms are finite, and the saved student loads with `from_pretrained`.
- **features reach blocks**: the feature term alone moves the weights of two blocks at least.
- **padding**: more padding changes neither the logit nor the feature term; `-` where it does not apply, or the
  family's own outputs depend on its padding.

Other models work too: `print(inspect_models(student, teacher, batch))` shows what would be compared.

Known limits:

- **Object detection**: queries have no order, so logits are refused; features and the model's own loss train.
- **Other tokenizers**: logits of tokens are refused; features are compared by their average over the text.
- **BLIP**: the hidden states that it returns are those of the image; its text decoder learns from labels and logits
  alone, unless its layers are named.
- **Packed sequences**: documents in one row are one sample to the association.
"""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    path = os.environ.get("SUPPORT_TABLE")
    if path:
        outcomes = {
            report.nodeid.rpartition("::")[2]: outcome
            for outcome in MARKS
            for report in terminalreporter.stats.get(outcome, ())
            if report.when == "call"
        }
        Path(path).write_text(table(outcomes), encoding="utf-8")


def table(outcomes: Mapping[str, str]) -> str:
    """Return the page for the outcomes of tests by their names."""
    cells: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    pairs = []
    for name, outcome in outcomes.items():
        test, _, rest = name.partition("[")
        if test in CHECKS:
            head, family = re.fullmatch(r"([A-Z_]+)-(.+)\]", rest).groups()
            cells[head][family][CHECKS[test]] = MARKS[outcome]
        elif test == PAIRS:
            pairs.append(outcome == "passed")
    families = {family for found in cells.values() for family in found}
    counted = f"{len(families)} families with {sum(map(len, cells.values()))} heads; of {len(pairs)} ordered pairs of "
    counted += f"vision families {sum(pairs)} train."
    parts = [INTRODUCTION, counted + "\n"]
    for head, title in HEADS.items():
        parts += [
            f"## {title}\n",
            "| family | " + " | ".join(CHECKS.values()) + " |",
            "|---" * (len(CHECKS) + 1) + "|",
        ]
        for family, found in sorted(cells[head].items()):
            parts.append(f"| {family} | " + " | ".join(found.get(check, "-") for check in CHECKS.values()) + " |")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"
