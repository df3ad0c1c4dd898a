"""Times of calls in turns, with a clock that the calls themselves move."""

import pytest
import torch
from makers import bert

from hf_semckd.models import latency


class Clock:
    def __init__(self):
        self.now, self.order = 0.0, []

    def call(self, name, seconds):
        def run():
            self.now += seconds
            self.order.append(name)

        return run


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(latency.time, "perf_counter", lambda: made.now)
    return made


def test_calls_take_turns_and_the_first_of_each_is_not_counted(clock):
    times = latency.interleaved_times({"a": clock.call("a", 0.002), "b": clock.call("b", 0.001)}, seconds=0)
    assert times == {"a": pytest.approx([2.0] * 15), "b": pytest.approx([1.0] * 15)}
    assert clock.order == (["a"] * 6 + ["b"] * 6) * 3


def test_calls_go_on_until_the_time_of_the_slowest_is_over_so_that_all_see_the_same_disturbances(clock):
    calls = {"slow": clock.call("slow", 1 / 16), "quick": clock.call("quick", 1 / 1024)}
    times = latency.interleaved_times(calls, seconds=2)
    assert len(times["slow"]) == len(times["quick"]) == 35


def test_a_model_is_run_on_what_it_takes(clock):
    model, batch = bert().eval(), {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.tensor([0])}
    outputs = latency.forward_call(model, batch)()
    assert outputs.loss is None and not outputs.logits.requires_grad
