"""losses/sampled_logits.py: drawn tokens against the whole distribution, and against sums written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from hf_semckd.losses import logits as logits_module
from hf_semckd.losses import sampled_logits as sampled_module
from hf_semckd.losses.logits import LogitMatch, kd_loss, logit_loss_sum
from hf_semckd.losses.sampled_logits import SampledLogits, TokenSampling, sampled_kd_loss

VOCABULARY = 11


def random(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(teacher, draws=5, temperature=1.0, vocabulary=None):
    """Return samples of logits (B, N, V), every text with a seed of its own."""
    sampling = TokenSampling(draws, vocabulary or teacher.shape[-1], temperature)
    ids, entropy = zip(*[sampling(text, seed) for seed, text in enumerate(teacher)], strict=True)
    return SampledLogits(torch.stack(ids), torch.stack(entropy))


# ---- Unbiased ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 8])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mean_over_many_draws_is_the_dense_loss_and_gradient(temperature, draws):
    """20,000 draws of one pair of distributions; five standard errors of each mean are allowed."""
    count, teacher = 20_000, random(VOCABULARY)
    student = random(VOCABULARY, seed=1).requires_grad_()
    dense = kd_loss(student, teacher, temperature)
    (expected,) = torch.autograd.grad(dense, student)

    copies = student.detach().expand(1, count, -1).clone().requires_grad_()
    losses = sampled_kd_loss(copies, drawn(teacher.expand(1, count, -1), draws, temperature), temperature)
    (gradients,) = torch.autograd.grad(losses.sum(), copies)

    def assert_unbiased(found, mean):
        error = found.std(0) / math.sqrt(count)
        assert bool(((found.mean(0) - mean).abs() <= 5 * error + 1e-12).all())
        assert bool((error < 0.05).all()), "an error so large would prove nothing"

    assert_unbiased(losses[0], dense.detach())
    assert_unbiased(gradients[0], expected)


def test_stratified_draws_vary_less_than_independent_ones():
    count, draws, teacher, student = 5_000, 8, random(VOCABULARY), random(VOCABULARY, seed=1)
    losses = sampled_kd_loss(student.expand(1, count, -1), drawn(teacher.expand(1, count, -1), draws), 1.0)
    p, logs = teacher.softmax(0), student.log_softmax(0)
    independent = float((p * (logs - (p * logs).sum()).square()).sum()) / draws
    assert 0 < float(losses.var()) < independent / 2


def test_the_entropy_is_exact_and_many_draws_come_close_to_the_dense_loss():
    teacher, student = random(2, 3, VOCABULARY), random(2, 3, VOCABULARY, seed=1)
    sampled = drawn(teacher, 4096, 2.0)
    expected = torch.distributions.Categorical(logits=teacher / 2).entropy()
    torch.testing.assert_close(sampled.entropy, expected)
    torch.testing.assert_close(
        sampled_kd_loss(student, sampled, 2.0), kd_loss(student, teacher, 2.0), atol=0.05, rtol=0
    )


# ---- Draws ---------------------------------------------------------------------------------------------------------


def test_draws_are_those_of_the_distribution_function_written_out():
    teacher, draws = random(4, VOCABULARY), 6
    found, _ = TokenSampling(draws, VOCABULARY, 1.0)(teacher, 3)
    points = torch.rand(4, draws, generator=torch.Generator().manual_seed(3))
    for position, row in enumerate(teacher.softmax(-1).tolist()):
        for k in range(draws):
            point, mass, token = (k + float(points[position, k])) / draws, row[0], 0
            while mass <= point:
                token += 1
                mass += row[token]
            assert found[position, k] == token


def test_a_seed_gives_the_same_draws_and_pieces_change_nothing(monkeypatch):
    teacher, sampling = random(9, VOCABULARY), TokenSampling(5, VOCABULARY, 1.0)
    ids, entropy = sampling(teacher, 2**64 - 1)
    assert not torch.equal(ids, sampling(teacher, 1)[0])
    monkeypatch.setattr(sampled_module, "PIECE", 2 * VOCABULARY)
    again = sampling(teacher, 2**64 - 1)
    assert torch.equal(ids, again[0]) and torch.equal(entropy, again[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_known_and_possible_tokens_are_drawn(dtype):
    teacher = torch.zeros(300, 8, dtype=dtype)
    teacher[:, [0, 3]], teacher[:, 6:] = -300.0, 300.0
    ids, entropy = TokenSampling(4, 6, 1.0)(teacher, 0)
    assert set(ids.flatten().tolist()) == {1, 2, 4, 5}
    assert entropy.tolist() == pytest.approx([math.log(4)] * 300, rel=1e-5)


def test_an_empty_text_has_no_draws():
    ids, entropy = TokenSampling(4, 8, 1.0)(torch.zeros(0, 8), 0)
    assert ids.shape == (0, 4) and entropy.shape == (0,)


# ---- In the sum over items -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_sum_is_that_of_the_labeled_positions(shifted, pieces, monkeypatch):
    if pieces:
        monkeypatch.setattr(logits_module, "PIECE", 3 * VOCABULARY)
    student, sampled = random(2, 5, VOCABULARY, seed=1), drawn(random(2, 5, VOCABULARY), temperature=2.0)
    labels = torch.tensor([[4, 2, -100, 1, 3], [-100, 6, 2, -100, -100]])
    expected = 0.0
    for b in range(2):
        for n in range(5 - shifted):
            if labels[b, n + shifted] != -100:
                logs = F.log_softmax(student[b, n] / 2, -1)
                drawn_logs = sum(float(logs[token]) for token in sampled.ids[b, n]) / 5
                expected += 4 * (-float(sampled.entropy[b, n]) - drawn_logs)
    # What is left out may hold anything.
    student[0, 1 if shifted else 2] = math.nan
    student.requires_grad_()
    found = logit_loss_sum(student, sampled, {"labels": labels}, 2.0, "tokens", shifted)
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert student.grad.isfinite().all() and not student.grad[0, 1 if shifted else 2].any()


def test_without_labels_and_mask_positions_are_averaged():
    student, sampled = random(2, 5, VOCABULARY, seed=1), drawn(random(2, 5, VOCABULARY))
    found = logit_loss_sum(student, sampled, {}, 1.0, "tokens", True)
    expected = sampled_kd_loss(student[:, :-1], sampled[:, :-1], 1.0).sum() / 4
    assert float(found) == pytest.approx(float(expected))


def test_padding_of_the_students_vocabulary_is_left_out():
    student, sampled = random(2, 5, VOCABULARY, seed=1), drawn(random(2, 5, VOCABULARY), vocabulary=7)
    own, theirs = LogitMatch(vocabulary=7)(student, sampled)
    assert own.shape == (2, 5, 7) and theirs is sampled
