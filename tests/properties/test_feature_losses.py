"""Every feature loss gives finite losses and gradients of all finite features, whatever their shape and precision."""

import pytest
import torch
from feature_cases import NAMES, assert_sound, batches_for, loss_for, options
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_finite_features_give_finite_losses_and_gradients(name, data):
    batch = data.draw(batches_for(name))
    loss = loss_for(name, batch, data.draw(options(batch.size)))
    loss.train(data.draw(st.booleans()))
    # The second time, statistics, banks and rings hold the first.
    for _ in range(2):
        assert_sound(loss, batch)


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_autocast_does_not_change_that(name, data):
    """Its range is bfloat16's here: what is beyond float16's is a GradScaler's to answer."""
    batch = data.draw(batches_for(name, (torch.bfloat16, torch.float32)))
    assert_sound(loss_for(name, batch, data.draw(options(batch.size))), batch, torch.bfloat16)


@pytest.mark.parametrize("name", NAMES)
@given(st.data())
def test_a_loss_in_bfloat16_stays_finite_too(name, data):
    """Engines cast whole modules."""
    batch = data.draw(batches_for(name))
    assert_sound(loss_for(name, batch, data.draw(options(batch.size))).bfloat16(), batch)
