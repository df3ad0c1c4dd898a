"""Every feature loss gives finite losses and gradients of all finite features, whatever their shape and precision."""

import pytest
import torch
from drawn import DTYPES, FEWER
from feature_cases import NAMES, assert_sound, batches_for, loss_for, options
from hypothesis import given
from hypothesis import strategies as st

# Precision of the loss and of autocast. An engine casts whole modules. What is beyond float16's range under autocast
# is a GradScaler's to answer, and torch's autocast knows no float64.
HOW = {"plain": (torch.float32, None), "cast": (torch.bfloat16, None), "autocast": (torch.float32, torch.bfloat16)}


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
@FEWER
def test_finite_features_give_finite_losses_and_gradients(name, data):
    dtype, autocast = HOW[data.draw(st.sampled_from(sorted(HOW)))]
    batch = data.draw(batches_for(name, DTYPES if autocast is None else (torch.bfloat16, torch.float32)))
    loss = loss_for(name, batch, data.draw(options(batch.size))).to(dtype)
    loss.train(data.draw(st.booleans()))
    # The second time, statistics, banks and rings hold the first.
    for _ in range(2):
        assert_sound(loss, batch, autocast)
