"""Precision of intermediate results."""

import pytest
import torch

from hf_semckd.features.precision import at_least_float32


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_at_least_float32_widens_half_precision_only(dtype, expected):
    assert at_least_float32(torch.ones(2, dtype=dtype)).dtype == expected
