"""Times of calls in turns, with a clock that the calls themselves move."""

import pytest

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


def test_quick_calls_go_on_until_their_time_is_over_and_slow_ones_do_not(clock):
    times = latency.interleaved_times(
        {"slow": clock.call("slow", 1 / 8), "quick": clock.call("quick", 1 / 128)}, seconds=1
    )
    assert len(times["slow"]) == 15 and len(times["quick"]) == 130
