"""A stored measurement that the tests of scripts/step_cost share."""

from __future__ import annotations

from typing import Any


def record(**changes: Any) -> dict[str, Any]:
    """A stored pair whose ratios are easily seen: 1.04 and 1.10, of 3 rounds."""
    return {
        "pair": "bert-6x384",
        "family": "bert",
        "seconds": {
            "ce": [0.4, 0.5, 0.8],
            "kd": [1.0, 1.0, 2.0],
            "semckd": [1.03, 1.04, 2.2],
            "published": [3.0, 5.0, 8.0],
            "cached": [0.44, 0.6, 0.84],
        },
        "memory": {
            "kd": {"peak_bytes": 1000},
            "semckd": {"peak_bytes": 1060},
            "published": {"skipped": "it is too large"},
        },
        "parameters": {"semckd": {"student": 1000, "feature_loss": 125}},
        "skipped": {},
        "shares_of_kd": {"teacher forward": 0.5},
        **changes,
    }
