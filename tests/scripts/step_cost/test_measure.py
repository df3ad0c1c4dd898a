"""scripts/step_cost/measure.py: what does not fit is left out, and said so."""

from __future__ import annotations

from step_cost import measure
from step_cost.pairs import find_pair


def test_the_published_form_is_left_out_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda device: 1000)
    pair = find_pair("bert-6x384", tiny=True)
    found = measure.measure_pair(pair, ("kd", "published"), "cpu", rounds=1)
    assert list(found["seconds"]) == ["kd"]
    assert found["skipped"]["published"] == "it needs about 0.0 GB, and 0.0 GB are free"
    assert found["skipped"]["ce"] == "not chosen with --variants"
