"""What does not fit together is refused in words, or answered; it is never a raw error and never NaN."""

from dataclasses import replace

import pytest
import torch
from drawn import FEWER
from feature_cases import NAMES, assert_sound, batches_for, loss_for, options
from hypothesis import given
from hypothesis import strategies as st

from hf_semckd.errors import SemCKDError

WIDE = (torch.float32,)
# Each spoils a feature (B, ...).
SPOILT = {
    "one sample less": lambda x: x[1:],
    "one sample more": lambda x: torch.cat([x, x[:1]]),
    "one channel less": lambda x: x[:, 1:] if x.dim() != 3 else x[..., 1:],
    "one channel more": lambda x: torch.cat([x, x[:, :1]], 1) if x.dim() != 3 else torch.cat([x, x[..., :1]], 2),
    "a rank less": lambda x: x[:, 0],
    "a rank more": lambda x: x.unsqueeze(1),
    "two ranks more": lambda x: x[None, None],
    "no rank": lambda x: x.sum(),
    "whole numbers": lambda x: x.long(),
    "truth values": lambda x: x > 0,
    "complex numbers": lambda x: x.to(torch.complex64),
    "one position less": lambda x: x[:, 1:] if x.dim() == 3 else x[..., 1:],
    "no tensor": lambda x: None,
    "a list": lambda x: x.tolist(),
}
SPOILT_MASK = {
    "one sample less": lambda mask: mask[1:],
    "one token less": lambda mask: mask[:, 1:],
    "one token more": lambda mask: torch.cat([mask, mask[:, :1]], 1),
    "a rank less": lambda mask: mask[:, 0],
    "a rank more": lambda mask: mask.unsqueeze(1),
    "a list": lambda mask: mask.tolist(),
}
SIDES = st.sampled_from(["student", "teacher"])


def spoil(data, batch):
    """Return the batch with one thing that does not fit."""
    side = data.draw(SIDES)
    features, mask = list(getattr(batch, side)), getattr(batch, f"{side}_mask")
    if mask is not None and data.draw(st.booleans()):
        return replace(batch, **{f"{side}_mask": SPOILT_MASK[data.draw(st.sampled_from(sorted(SPOILT_MASK)))](mask)})
    number, change = data.draw(st.integers(0, len(features) - 1)), data.draw(st.sampled_from(sorted(SPOILT)))
    everywhere = data.draw(st.booleans())
    spoilt = [SPOILT[change](x) if everywhere or n == number else x for n, x in enumerate(features)]
    return replace(batch, **{side: spoilt})


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@FEWER
def test_what_does_not_fit_is_refused_or_answered(name, data):
    batch = data.draw(batches_for(name, WIDE))
    loss = loss_for(name, batch, data.draw(options(batch.size)))
    try:
        out = loss(*spoil(data, batch).arguments)
    except SemCKDError:
        return
    assert out.per_sample.isfinite().all() and out.total.isfinite()


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@FEWER
def test_no_samples_are_refused(name, data):
    batch = data.draw(batches_for(name, WIDE))
    loss = loss_for(name, batch, data.draw(options(batch.size)))
    with pytest.raises(SemCKDError):
        loss(*batch.at(slice(0)).arguments)
    assert_sound(loss, batch)
