"""scripts/benchmark_memory.py: a tiny pair is measured, and a line of the table by hand."""

from __future__ import annotations

import json

import benchmark_memory
import conditions
import pytest


@pytest.mark.parametrize("name", ["bert-6x384", benchmark_memory.GPT2])
def test_a_tiny_pair_trains_and_is_told_what_it_takes(name, tmp_path):
    told = benchmark_memory._train(benchmark_memory.make(name, 2, tiny=True), 2, str(tmp_path))
    teacher, student, _ = benchmark_memory.make(name, 2, tiny=True)
    sizes = [sum(entry.nbytes for entry in model.parameters()) for model in (teacher, student)]
    assert sizes[0] + 4 * sizes[1] < told < 10**8


def test_a_line_by_hand(tmp_path):
    measured = {"pages": (1.0e9, 1.1e9, 1.3e9), "as_it_is": (1.2e9, 1.5e9, 1.4e9)}
    runs = {name: [{"told_bytes": 1e9, "measured_bytes": size} for size in sizes] for name, sizes in measured.items()}
    path = tmp_path / "stored.json"
    path.write_text(json.dumps({"vit-12x192:8": {"runs": runs}}))
    line = benchmark_memory.table(path).splitlines()[-1]
    assert line == "| vit-12x192 | 8 | 1,000 MB | 1,100 MB | 1.10 | 1,400 MB | 1.40 | 3 |"


def test_rounds_are_added_to_what_is_stored(tmp_path):
    path = tmp_path / "stored.json"
    for number in range(2):
        conditions.add_round(path, "a", {"one": {"n": number}, "two": {"n": -number}}, 1)
    conditions.add_round(path, "b", {"one": {"n": 7}}, 2)
    stored = json.loads(path.read_text())
    assert stored["a"]["runs"] == {"one": [{"n": 0}, {"n": 1}], "two": [{"n": 0}, {"n": -1}]}
    assert stored["b"]["runs"] == {"one": [{"n": 7}]} and stored["b"]["threads"] == 2 and stored["b"]["conditions"]
