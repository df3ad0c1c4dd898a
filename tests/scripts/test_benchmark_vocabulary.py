"""scripts/benchmark_vocabulary.py: both forms compute the same, and a line of the table by hand."""

from __future__ import annotations

import json

import benchmark_vocabulary
import pytest
import torch


def test_both_forms_compute_the_same_losses():
    found = []
    for form in benchmark_vocabulary.FORMS:
        torch.manual_seed(0)
        found.append(benchmark_vocabulary.step(form, 12, 40, 8, 5)())
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 0


def test_a_line_by_hand(tmp_path):
    # Ratios 0.5, 0.25 and 0.2 of memory, and 1, 2 and 3 of time.
    dense = [{"peak_bytes": 1e9 * size, "seconds": 1.0} for size in (2, 4, 5)]
    fused = [{"peak_bytes": 1e9, "seconds": float(time)} for time in (1, 2, 3)]
    path = tmp_path / "stored.json"
    path.write_text(json.dumps({"8x40x4": {"runs": {"dense": dense, "fused": fused}}}))
    line = benchmark_vocabulary.table(path).splitlines()[-1]
    memory, time = "4,000 MB | 1,000 MB | 0.25 [0.20, 0.50]", "1.00 s | 2.00 s | 2.00 [1.00, 3.00]"
    assert line == f"| 8 | 40 | 4 | {memory} | {time} | 3 |"
