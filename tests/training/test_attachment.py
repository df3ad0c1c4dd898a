"""The feature loss inside the student's forward: exact while attached, and gone without a trace after."""

import copy
import inspect
import pickle

import pytest
import torch
from makers import assert_same_weights, bert, texts, traces, vit, weights
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput, SequenceClassifierOutput

from hf_semckd.errors import InputError
from hf_semckd.features.capture import FeatureCapture, remove_capturing_traces
from hf_semckd.losses import SemCKDLoss
from hf_semckd.models.outputs import logits_of, tokens_mask
from hf_semckd.training.attachment import (
    FEATURE_LOSS_NAME,
    DistillationTargets,
    StudentAttachment,
    without_feature_loss,
)


def attachment(student, layers=(1, 2)):
    loss = SemCKDLoss([(17, 16)] * len(layers), [(17, 24)] * 3)
    return StudentAttachment(student, loss, FeatureCapture(student, list(layers), "student"))


def pictures():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def targets():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(2, 17, 24, generator=generator) for _ in range(3)]


def test_detaching_leaves_no_trace():
    student = vit()
    before, state = traces(student), weights(student)
    attached = attachment(student)
    attached.attach()
    assert attached.attached and FEATURE_LOSS_NAME in dict(student.named_children())
    student(pixel_values=pictures(), **DistillationTargets(targets()).as_keyword())
    attached.detach()
    assert not attached.attached
    remove_capturing_traces(student)
    assert traces(student) == before
    assert_same_weights(weights(student), state)


@pytest.mark.parametrize("fails", [False, True])
def test_what_transformers_leaves_for_hidden_states_is_removed(fails):
    """From 5.2x these are hooks that cannot be pickled; in 5.0, after a failure, forwards that capture for ever."""
    student = vit()
    before = traces(student)
    if fails:
        student.vit.layernorm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            student(pixel_values=pictures(), output_hidden_states=True)
        student.vit.layernorm._forward_pre_hooks.clear()
    else:
        student(pixel_values=pictures(), output_hidden_states=True)
    assert traces(student) != before
    remove_capturing_traces(student)
    assert traces(student) == before
    pickle.dumps(student)
    assert len(student(pixel_values=pictures(), output_hidden_states=True).hidden_states) == 3


def test_hooks_and_forwards_of_the_user_stay():
    student = vit()
    student.vit.layernorm.register_forward_hook(lambda *_: None)
    student.vit.layernorm.forward = lambda states: states
    before = traces(student)
    remove_capturing_traces(student)
    assert traces(student) == before


def test_attaching_and_detaching_twice_is_the_same_as_once():
    student = vit()
    before = traces(student)
    attached = attachment(student)
    attached.attach()
    during = traces(student)
    attached.attach()
    assert traces(student) == during
    attached.detach()
    attached.detach()
    assert traces(student) == before


def test_without_targets_the_forward_is_the_students_own():
    student = vit()
    with torch.no_grad():
        expected = student(pixel_values=pictures()).logits
    attachment(student).attach()
    with torch.no_grad():
        outputs = student(pixel_values=pictures())
    assert type(outputs) is ImageClassifierOutput and outputs.hidden_states is None
    assert torch.equal(outputs.logits, expected)


def test_with_targets_the_loss_is_that_of_the_hidden_states():
    student = vit()
    plain = student(pixel_values=pictures(), output_hidden_states=True)
    attached = attachment(student)
    alone = copy.deepcopy(attached.loss)
    attached.attach()
    outputs, losses = student(pixel_values=pictures(), **DistillationTargets(targets()).as_keyword())
    expected = alone(list(plain.hidden_states[1:]), targets())
    assert torch.equal(outputs.logits, plain.logits) and outputs.hidden_states is None
    assert torch.equal(losses["per_sample"], expected.per_sample)
    assert torch.equal(losses["association"], expected.association)


def test_gradients_reach_student_and_loss_in_one_backward():
    student = vit()
    attachment(student).attach()
    _, losses = student(pixel_values=pictures(), **DistillationTargets(targets()).as_keyword())
    losses["per_sample"].mean().backward()
    touched = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert any(name.startswith(FEATURE_LOSS_NAME) for name in touched)
    assert "vit.embeddings.cls_token" in touched and any(".attention." in name for name in touched)


def test_the_padding_of_both_reaches_the_loss():
    student = bert()
    row = texts(2, length=6)
    ids, mask = (torch.stack([row[i][name] for i in range(2)]) for name in ("input_ids", "attention_mask"))
    loss = SemCKDLoss([(6, 16)], [(6, 24)])
    attached = StudentAttachment(student, loss, FeatureCapture(student, [2], "student"))
    attached.attach()
    teacher = [torch.randn(2, 6, 24)]
    kept = DistillationTargets(loss.select(teacher, mask), {"attention_mask": mask}).as_keyword()
    garbage = [torch.where(mask[..., None] == 1, teacher[0], torch.full_like(teacher[0], 1e6))]
    other = DistillationTargets(loss.select(garbage, mask), {"attention_mask": mask}).as_keyword()
    assert 0 in mask
    first = student(input_ids=ids, attention_mask=mask, **kept)[1]["per_sample"]
    loss.collecting = False  # or the same samples would be counted twice
    second = student(input_ids=ids, attention_mask=mask, **other)[1]["per_sample"]
    torch.testing.assert_close(first, second)


def test_what_reads_the_class_sees_the_student():
    """Trainer reads the signature, transformers the names."""
    student = vit()
    plain = type(student)
    attachment(student).attach()
    training = type(student)
    assert training is not plain and isinstance(student, plain)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(training, name) == getattr(plain, name)
    assert inspect.signature(training.forward) == inspect.signature(plain.forward)


def test_suspended_shows_the_plain_student_and_attaches_again_after_an_error():
    student = vit()
    before = traces(student)
    attached = attachment(student)
    attached.attach()
    during = traces(student)
    with pytest.raises(KeyError), attached.suspended():
        assert traces(student) == before
        raise KeyError
    assert traces(student) == during


def test_suspending_what_is_not_attached_does_nothing():
    student = vit()
    before = traces(student)
    with attachment(student).suspended():
        assert traces(student) == before
    assert traces(student) == before


def test_a_forward_that_a_wrapper_bound_goes_and_the_users_own_stays():
    for own in (None, lambda **inputs: "mine"):
        student = vit()
        if own is not None:
            student.forward = own
        before = traces(student)
        attached = attachment(student)
        attached.attach()
        student._original_forward = student.forward
        student.forward = lambda **inputs: "wrapped"
        attached.detach()
        assert traces(student) == before
        assert own is None or student.forward is own


def test_a_copy_made_while_attached_is_independent():
    student = vit()
    attachment(student).attach()
    twin = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    outputs, losses = twin(pixel_values=pictures(), **DistillationTargets(targets()).as_keyword())
    assert outputs.logits.abs().sum() > 0 and losses["per_sample"].shape == (2,)


def test_a_detached_student_can_be_pickled():
    student = vit()
    attached = attachment(student)
    attached.attach()
    attached.detach()
    copied = pickle.loads(pickle.dumps(student))
    assert type(copied) is type(student)
    assert_same_weights(weights(copied), weights(student))


def test_plain_modules_are_captured_by_name():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.body(x).mean((2, 3)))

    student = Plain()
    loss = SemCKDLoss([(5, 14, 14)], [(4, 7, 7)])
    attached = StudentAttachment(student, loss, FeatureCapture(student, ["body"], "student"))
    attached.attach()
    logits, losses = student(pictures(), **DistillationTargets([torch.randn(2, 4, 7, 7)]).as_keyword())
    assert logits.shape == (2, 3) and losses["per_sample"].shape == (2,)
    assert not student.body._forward_hooks


def test_without_calibration_drops_its_keys_under_any_wrapper():
    state = {
        "a.weight": 1,
        f"{FEATURE_LOSS_NAME}.projection.0.weight": 2,
        f"base_model.model.{FEATURE_LOSS_NAME}.query.weight": 3,
        f"not_{FEATURE_LOSS_NAME}.weight": 4,
    }
    assert without_feature_loss(state) == {"a.weight": 1, f"not_{FEATURE_LOSS_NAME}.weight": 4}


@pytest.mark.parametrize(
    "outputs",
    [
        torch.ones(2, 3),
        {"logits": torch.ones(2, 3), "loss": torch.zeros(())},
        SequenceClassifierOutput(loss=torch.zeros(()), logits=torch.ones(2, 3)),
        (torch.zeros(()), torch.ones(2, 3), torch.zeros(2, 5, 4)),
        type("Output", (), {"logits": torch.ones(2, 3)})(),
    ],
)
def test_logits_are_found_in_every_usual_output(outputs):
    assert torch.equal(logits_of(outputs, "student"), torch.ones(2, 3))


@pytest.mark.parametrize("outputs", [{"hidden": torch.ones(2, 3)}, "text", (torch.zeros(()),)])
def test_no_logits_is_an_error_with_the_role(outputs):
    with pytest.raises(InputError, match="(?s)The student returns no logits.*received.*logit_weight=0"):
        logits_of(outputs, "student")


def test_mask_of_tokens_is_padded_for_tokens_in_front():
    mask = torch.tensor([[1, 1, 0]])
    assert tokens_mask(mask, [torch.zeros(1, 3, 4)]) is mask
    prompted = nn.Module()
    prompted.get_base_model = nn.Identity
    assert tokens_mask(mask, [torch.zeros(1, 5, 4)], prompted).tolist() == [[1, 1, 1, 1, 0]]
    # Elsewhere more tokens are those of an image, and nothing tells where they are.
    assert tokens_mask(mask, [torch.zeros(1, 5, 4)], nn.Identity()) is None
    assert tokens_mask(None, []) is None
    assert tokens_mask(torch.ones(1, 1, 3, 3), [torch.zeros(1, 3, 4)]) is None
