"""Every feature loss, and every two that may be joined, with a teacher cache and batches padded to their longest text.

What a loss gets of the teacher then comes from rows that were stored at another width, among other samples.
"""

import copy
import itertools
from contextlib import nullcontext, suppress

import pytest
import torch
from makers import bert
from methods import FEATURE_LOSSES, REFUSED, joinable
from tiny import PROBLEMS, arguments, assert_same, fit, outcome

from hf_semckd import DistillationTrainer
from hf_semckd.errors import ConfigurationError
from hf_semckd.features.capture import FeatureCapture
from hf_semckd.features.layers import FeatureSpec
from hf_semckd.losses.base import LossOptions
from hf_semckd.losses.registry import find_layers, make_feature_loss
from hf_semckd.teacher.cached import CachedTeacher
from hf_semckd.teacher.notes import TeacherRequest
from hf_semckd.teacher.running import TeacherRunner
from hf_semckd.teacher.teacher import Teacher

SINGLE = [name for name in FEATURE_LOSSES if (name, "bert") not in REFUSED]
JOINED = joinable("bert")
# What is trained in the default suite: a join of tokens and whole features, on which the cache once failed.
TRAINED = [*SINGLE, "semckd+crd"]

LENGTHS = (9, 3, 5, 2, 7, 4, 6)
FILLING, READING = [[0, 1, 2], [3, 4, 5, 6]], [[6, 3, 4], [1, 5, 2], [0, 3]]


def batch_of(members):
    """Return samples padded to the longest of them."""
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(3, 30, (length,), generator=generator) for length in LENGTHS]
    ids = torch.nn.utils.rnn.pad_sequence([texts[index] for index in members], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


@torch.no_grad()
def losses_of(loss, run_teacher, student, capture):
    """Return the losses of the samples of each batch that is read, and the teacher's logits."""
    loss, found = copy.deepcopy(loss), []
    for members in READING:
        batch = batch_of(members)
        targets = run_teacher(batch)
        with capture.recording(student) as recorded:
            features = capture.collect(student(**batch, **capture.request()), recorded)
        out = loss(features, targets.features, batch["attention_mask"])
        found.append((out.per_sample, targets.logits))
    return found


@pytest.mark.parametrize(
    ("name", "tokens"), [*((name, 4) for name in [*SINGLE, *JOINED]), *((name, 0) for name in SINGLE)]
)
def test_a_full_cache_gives_the_losses_of_the_teacher_itself(name, tokens, tmp_path):
    torch.manual_seed(0)
    student, model = bert().double().eval(), bert(layers=4, width=24, seed=9).double()
    capture = FeatureCapture(student, find_layers(name, student, "student"), "student")
    live = Teacher(model, find_layers(name, model, "teacher"))
    cached = CachedTeacher(live, tmp_path, request=TeacherRequest("", None, "auto", True, True))
    batch = batch_of(range(len(LENGTHS)))
    described = cached.describe(batch, logits=True, features=True)
    capture.find(student, batch)
    specs = [FeatureSpec("student", "tokens", 16, max(LENGTHS)) for _ in capture.layers]
    loss = make_feature_loss(name, specs, described.specs, LossOptions(max_tokens=tokens)).double()
    loss.update_statistics(described.features, batch["attention_mask"])
    loss.synchronize()
    loss.collecting = False
    cached.open(batch, described, kept=loss.kept, logits=True, features=True)
    from_model, from_cache = (TeacherRunner(x, loss, logits=True, autocast=nullcontext) for x in (live, cached))
    for members in FILLING:
        from_cache(batch_of(members))
    expected = losses_of(loss, from_model, student, capture)
    live.forward = None  # a full cache runs no teacher
    found = losses_of(loss, from_cache, student, capture)
    for (values, logits), (others, stored) in zip(found, expected, strict=True):
        assert values.abs().max() > 0
        torch.testing.assert_close(values, others, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(logits, stored, rtol=1e-9, atol=1e-12)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in JOINED if name not in TRAINED]


@pytest.mark.parametrize("name", [*TRAINED, *SLOW])
def test_a_training_from_a_full_cache_is_the_live_one(name, tmp_path):
    def make(**args):
        problem = PROBLEMS["sentences"]
        return DistillationTrainer(
            problem.student().double(),
            arguments(tmp_path / "out", per_device_train_batch_size=4, max_steps=3, max_tokens=4, **args),
            teacher_model=problem.teacher().double(),
            train_dataset=problem.rows(10),
            data_collator=problem.collator,
            feature_loss=name,
        )

    live = make()
    fit(live)
    cached = make(teacher_cache_dir=str(tmp_path / "cache"))
    assert cached.fill_teacher_cache() == 10
    ran = []
    cached.teacher.register_forward_pre_hook(lambda *_: ran.append(True))
    fit(cached)
    assert not ran and all("feature_loss" in terms for terms in outcome(cached).terms)
    assert_same(outcome(cached), outcome(live))


def test_every_two_methods_are_joined_here_or_refused():
    model, specs = bert(), [FeatureSpec(str(layer), "tokens", 16, 9) for layer in range(2)]
    joined = []
    for name in map("+".join, itertools.combinations(FEATURE_LOSSES, 2)):
        with suppress(ConfigurationError):
            find_layers(name, model, "student")
            make_feature_loss(name, specs, specs, LossOptions())
            joined.append(name)
    assert joined == JOINED
