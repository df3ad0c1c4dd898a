"""Any value of any distillation field makes a configuration that JSON can hold, or is refused in words."""

import json
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_semckd import SemCKDConfig
from hf_semckd.choices import CHOICES
from hf_semckd.config import distillation_fields
from hf_semckd.errors import ConfigurationError

ODD = [
    *(np.float32(0.5), np.int64(3), np.bool_(True), np.array([1.0, 2.0]), torch.tensor(2.0), torch.float16),
    *(
        Fraction(1, 3),
        Decimal("0.5"),
        10**400,
        -(10**400),
        5e-324,
        1.7e308,
        -0.0,
        1j,
        b"text",
        "9" * 5000,
        object(),
        int,
    ),
    *(range(3), {0}, {"a": 1}, ("encoder.0", "encoder.1"), (0, -1), [1, "1"], [True], [[0]], [np.int64(1)], [None]),
]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
KNOWN = st.sampled_from([word for choices in CHOICES.values() for word in choices.__args__])
VALUES = PLAIN | KNOWN | st.sampled_from(ODD) | st.integers(0, 30).map(str) | st.lists(PLAIN, max_size=3)


@pytest.mark.parametrize("name", distillation_fields())
@given(VALUES)
def test_a_value_is_refused_or_can_be_written_as_json(name, value):
    try:
        args = SemCKDConfig(output_dir="unused", use_cpu=True, **{name: value})
    except ConfigurationError:
        return
    settings = args.distillation_settings()
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    args.validate_distillation()
    assert args.distillation_settings() == settings


@given(st.dictionaries(st.sampled_from(distillation_fields()), VALUES, min_size=2, max_size=4))
def test_so_is_a_combination(values):
    try:
        args = SemCKDConfig(output_dir="unused", use_cpu=True, **values)
    except ConfigurationError:
        return
    json.dumps(args.distillation_settings(), allow_nan=False)
