"""scripts/compare_cached_logits.py: the table by hand, and perplexities that are known."""

from __future__ import annotations

import json

import compare_cached_logits
import pytest


def test_lines_by_hand(tmp_path):
    values = {"whole logits": (16384.4, [50.0, 60.0]), "32 draws": (68.2, [51.0, 63.0])}
    path = tmp_path / "runs.jsonl"
    with path.open("w") as file:
        for variant, (size, found) in values.items():
            for seed, value in enumerate(found):
                print(json.dumps({"variant": variant, "seed": seed, "bytes": size, "perplexity": value}), file=file)
    *_, plain, whole, draws = compare_cached_logits.table(path).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (plain, whole, draws)]
    assert cells[0] == ["no teacher", "0", "-", "-", "-"]
    assert cells[1] == ["whole logits", "2", "16,384", "55.00 ± 7.07", "-"]
    # Differences 1 and 3.
    assert cells[2] == ["32 draws", "2", "68", "57.00 ± 8.49", "+2.00 ± 1.41"]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model = compare_cached_logits.model(layers=1, width=8, seed=0)
    model.lm_head.weight.data.zero_()
    piece = list(range(compare_cached_logits.LENGTH))
    rows = [{"input_ids": piece, "labels": piece}] * 17
    assert compare_cached_logits.perplexity(model, rows) == pytest.approx(compare_cached_logits.VOCABULARY, rel=1e-4)
