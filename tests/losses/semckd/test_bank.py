"""The bank of recent samples against a list, and several processes against one."""

import threading

import numpy as np
import pytest
import torch
from naive import normal

from hf_semckd import SemCKDConfig
from hf_semckd.losses import SemCKDLoss
from hf_semckd.losses.semckd.association import SimilarityAssociation
from hf_semckd.losses.semckd.bank import SimilarityBank

WIDTHS = [3, 5, 4]


def summaries(count, seed):
    return [normal(count, width, seed=10 * seed + layer) for layer, width in enumerate(WIDTHS)]


def joined(layers):
    return torch.cat([layer / layer.norm(dim=1, keepdim=True) for layer in layers], 1)


def bank_of(size):
    return SimilarityBank(size, WIDTHS).double()


class Processes:
    """Threads that add their tensors, as processes do."""

    def __init__(self, count):
        self.count, self.barrier, self.given = count, threading.Barrier(count), [None] * count

    def run(self, work):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)

    def reduce_sum(self, rank, tensor):
        self.given[rank] = tensor
        self.barrier.wait()
        total = torch.stack(self.given).sum(0)
        self.barrier.wait()
        return total


def test_the_bank_holds_the_latest_samples_in_a_ring():
    bank, known = bank_of(6), []
    for step, counts in enumerate([(2,), (1, 3), (4, 2, 3), (5,)]):
        for part, count in enumerate(counts):
            layers = summaries(count, seed=10 * step + part)
            bank(layers)
            known += joined(layers)
        before = bank.rows.clone()
        bank.synchronize(None, 0, 1)
        assert not torch.equal(bank.rows, before) and int(bank.seen) == len(known)
        expected = torch.zeros(6, sum(WIDTHS), dtype=torch.float64)
        for place, row in enumerate(known):
            expected[place % 6] = row
        torch.testing.assert_close(bank.rows, expected, rtol=0, atol=1e-15)


def test_similarities_are_cosines_with_the_samples_of_earlier_steps():
    bank = bank_of(6)
    first, second = summaries(4, seed=1), summaries(3, seed=2)
    assert not torch.stack(bank(first)).any() and not bank.filled.any()
    bank.synchronize(None, 0, 1)
    actual = bank.eval()(second)
    for layer in range(3):
        expected = torch.zeros(3, 6, dtype=torch.float64)
        for i, j in np.ndindex(3, 4):
            a, b = second[layer][i], first[layer][j]
            expected[i, j] = a @ b / (a.norm() * b.norm())
        torch.testing.assert_close(actual[layer], expected, rtol=1e-12, atol=1e-14)
    # Evaluation collects nothing.
    bank.synchronize(None, 0, 1)
    assert int(bank.seen) == 4


@pytest.mark.parametrize("counts", [[(2, 2), (2, 2)], [(3, 3), (3, 1)], [(4, 4), (4, 0)], [(1, 2), (5, 3)]])
@pytest.mark.parametrize("size", [3, 8, 32])
def test_two_processes_fill_the_bank_as_one_does(counts, size):
    """Each entry of `counts` is a micro-batch, with its samples on either process."""
    one, parts = bank_of(size), []
    for part, both in enumerate(counts):
        layers = summaries(sum(both), seed=part)
        one(layers)
        parts.append([[layer[: both[0]] for layer in layers], [layer[both[0] :] for layer in layers]])
    one.synchronize(None, 0, 1)
    banks, processes = [bank_of(size), bank_of(size)], Processes(2)

    def work(rank):
        for part in parts:
            banks[rank](part[rank])
        banks[rank].synchronize(lambda tensor: processes.reduce_sum(rank, tensor), rank, 2)

    processes.run(work)
    for bank in banks:
        assert torch.equal(bank.seen, one.seen)
        torch.testing.assert_close(bank.rows, one.rows, rtol=0, atol=1e-15)


def test_a_bank_of_the_batch_itself_gives_the_weights_of_the_batch():
    student, teacher = summaries(7, seed=3)[:2], summaries(7, seed=4)[2:] * 3
    bank = SimilarityBank(32, [layer.shape[1] for layer in (*student, *teacher)]).double()
    association = SimilarityAssociation(0.2, bank)
    association.of_summaries(student, teacher)
    association.synchronize(None, 0, 1)
    expected = SimilarityAssociation(0.2).of_summaries(student, teacher)
    torch.testing.assert_close(association.of_summaries(student, teacher), expected, rtol=1e-12, atol=1e-14)


def test_useless_teacher_layers_are_found_out_by_single_samples():
    """Noise and the signal, a sample at a time: without a bank both would get half."""
    signal, noise = normal(200, 6), normal(200, 6, seed=1)
    layers = [signal @ normal(6, 6, seed=2), noise, signal]
    loss = SemCKDLoss([(1, 6)], [(1, 6)] * 2, association_bank=64).double()
    weights = []
    for i in range(200):
        student, *teacher = (layer[i : i + 1, None] for layer in layers)
        weights.append(loss([student], teacher).association[0, 0])
    assert weights[0].tolist() == [0.5, 0.5]
    assert torch.stack(weights[100:]).mean(0)[1] > 0.9


def test_the_state_of_a_loss_holds_its_bank():
    loss, other = (SemCKDLoss([(4, 6)], [(4, 8)], association_bank=16).double() for _ in range(2))
    for seed in range(3):
        loss([normal(5, 4, 6, seed=seed)], [normal(5, 4, 8, seed=9 + seed)])
    loss.synchronize()
    other.load_state_dict(loss.state_dict())
    batch = [normal(2, 4, 6, seed=40)], [normal(2, 4, 8, seed=41)]
    assert torch.equal(loss(*batch).per_sample, other(*batch).per_sample)


def test_a_configuration_has_a_bank_unless_it_is_turned_off(tmp_path):
    assert SemCKDConfig(str(tmp_path)).association_bank == 64
    with pytest.raises(ValueError, match="0 for the other samples of the micro-batch"):
        SemCKDConfig(str(tmp_path), association_bank=-1)
