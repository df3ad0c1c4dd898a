"""Runs the shared cases of a group of losses over the scenarios of each loss."""

import pytest

pytest.register_assert_rewrite("layer_cases", "embedding_cases")


def pytest_generate_tests(metafunc):
    """Give a case of a shared class each of its scenarios, or each with masks where it asks for `padded`."""
    scenarios = getattr(metafunc.cls, "scenarios", None)
    marked = {name for mark in metafunc.definition.iter_markers("parametrize") for name in mark.args[:1]}
    if scenarios is None:
        return
    if "scenario" in metafunc.fixturenames and "scenario" not in marked:
        metafunc.parametrize("scenario", list(scenarios))
    if "padded" in metafunc.fixturenames:
        metafunc.parametrize("padded", [name for name, entry in scenarios.items() if entry[2] is not None])
