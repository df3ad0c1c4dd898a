"""scripts/step_cost/rounds.py: the order of steps."""

from __future__ import annotations

from step_cost.rounds import run_rounds


def test_variants_step_in_turn_with_the_same_batch():
    steps = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def step(self, batch):
            steps.append((self.name, batch))
            return 0.5

    found = run_rounds([Recorder("a"), Recorder("b")], ["x", "y"], 3, "test")
    assert steps == [("a", "x"), ("b", "x"), ("a", "y"), ("b", "y"), ("a", "x"), ("b", "x")]
    assert found == {"a": [0.5] * 3, "b": [0.5] * 3}
