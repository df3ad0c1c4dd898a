"""What must not change a loss, or must change it in a known way."""

import pytest
import torch
import torch.nn.functional as F
from drawn import FEWER, batches
from feature_cases import ALONE, NAMES, batches_for, loss_for, options
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_semckd.losses import SemCKDLoss

WIDE = (torch.float64,)


def losses(loss, batch):
    """Return the loss of each sample, by a loss that does not learn."""
    return loss.double().eval()(*batch.arguments).per_sample.detach()


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()) + 1e-12)


@pytest.mark.parametrize("name", ALONE)
@given(st.data())
@FEWER
def test_micro_batches_give_the_losses_of_the_batch(name, data):
    batch = data.draw(batches_for(name, WIDE))
    loss = loss_for(name, batch)
    alone = [losses(loss, batch.at(slice(i, i + 1))) for i in range(batch.size)]
    assert_equal(torch.cat(alone), losses(loss, batch))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "semckd+crd"])
@given(st.data())
@FEWER
def test_losses_follow_their_samples(name, data):
    batch = data.draw(batches_for(name, WIDE))
    chosen = data.draw(options(batch.size))
    assume(chosen.association != "learned")
    loss = loss_for(name, batch, chosen)
    order = data.draw(st.permutations(range(batch.size)))
    assert_equal(losses(loss, batch.at(order)), losses(loss, batch)[order])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("simkd", "semckd+crd")])
@given(st.data())
@FEWER
def test_padding_changes_nothing(name, data):
    batch = data.draw(batches_for(name, WIDE, ("text", "other tokenization"), always_masked=True))
    loss, added = loss_for(name, batch, data.draw(options(batch.size))), data.draw(st.integers(1, 3))
    filling = data.draw(st.sampled_from([0.0, 1.0, 1e30, float("nan"), float("inf")]))
    student, teacher = (
        [F.pad(feature, (0, 0, 0, added), value=filling) for feature in features]
        for features in (batch.student, batch.teacher)
    )
    masks = [F.pad(mask.long(), (0, added)) for mask in (batch.student_mask, batch.teacher_mask)]
    padded = loss.double().eval()(student, teacher, *masks).per_sample.detach()
    assert_equal(padded, losses(loss, batch))


@given(st.data())
@FEWER
def test_the_association_follows_the_teachers_layers(data):
    batch = data.draw(batches(dtypes=WIDE))
    order = data.draw(st.permutations(range(len(batch.teacher))))
    association = data.draw(st.sampled_from(["similarity", "sinkhorn", "uniform"]))

    def weights(layers):
        shapes = batch.student_specs, [batch.teacher_specs[t] for t in layers]
        loss = SemCKDLoss(*shapes, association=association, tokens_aligned=batch.tokens_aligned).double().eval()
        teacher = [batch.teacher[t] for t in layers]
        return loss(batch.student, teacher, batch.student_mask, batch.teacher_mask).association

    torch.testing.assert_close(weights(order), weights(range(len(order)))[:, :, order], rtol=1e-6, atol=1e-6)
