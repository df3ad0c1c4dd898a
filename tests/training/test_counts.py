"""Loss terms against loops in numpy, and the counts that they are averaged over."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hf_semckd.errors import InputError
from hf_semckd.losses.logits import cross_entropy, logit_loss_sum
from hf_semckd.models.outputs import batch_size, token_targets
from hf_semckd.models.own_loss import OwnLoss
from hf_semckd.models.tasks import task_of
from hf_semckd.training.counts import StepCounts, count_items, count_step, safe_labels, scaled

TEMPERATURE = 3.0


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def softmax(row, temperature):
    powers = np.exp(row / temperature - np.max(row / temperature))
    return powers / powers.sum()


def divergence(student, teacher, temperature=TEMPERATURE):
    """T^2 * sum p log(p / q), one class after the other."""
    q, p = softmax(student.numpy(), temperature), softmax(teacher.numpy(), temperature)
    return temperature**2 * sum(p[c] * (math.log(p[c]) - math.log(q[c])) for c in range(len(p)))


def bernoulli_divergence(student, teacher, temperature=TEMPERATURE):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, p = 1 / (1 + math.exp(-s / temperature)), 1 / (1 + math.exp(-t / temperature))
        total += p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    return temperature**2 * total / len(student)


def token_batch():
    labels = torch.tensor([[-100, 3, 1, -100, 2], [4, -100, -100, -100, -100], [-100] * 5])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    return {"input_ids": torch.zeros(3, 5, dtype=torch.long), "attention_mask": mask, "labels": labels}


# ---- Logit loss --------------------------------------------------------------------------------------------------


def test_single_label_is_the_sum_of_the_samples_divergences():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    expected = sum(divergence(student[i], teacher[i]) for i in range(4))
    batch = {"labels": torch.tensor([0, 1, 2, 3])}
    result = logit_loss_sum(student, teacher, batch, TEMPERATURE, "single_label", False)
    assert float(result) == pytest.approx(expected, rel=1e-9)


def test_segmentation_averages_a_sample_over_its_pixels():
    student, teacher = random(2, 4, 3, 2), random(2, 4, 3, 2, seed=1)
    expected = 0.0
    for i in range(2):
        pixels = [divergence(student[i, :, y, x], teacher[i, :, y, x]) for y in range(3) for x in range(2)]
        expected += sum(pixels) / 6
    result = logit_loss_sum(student, teacher, {}, TEMPERATURE, "single_label", False)
    assert float(result) == pytest.approx(expected, rel=1e-9)


def test_token_tasks_count_labeled_positions_only():
    student, teacher, batch = random(3, 5, 6), random(3, 5, 6, seed=1), token_batch()
    expected = sum(
        divergence(student[i, n], teacher[i, n]) for i in range(3) for n in range(5) if batch["labels"][i, n] != -100
    )
    result = logit_loss_sum(student, teacher, batch, TEMPERATURE, "tokens", False)
    assert float(result) == pytest.approx(expected, rel=1e-9)


def test_causal_models_compare_the_position_before_each_label():
    student, teacher, batch = random(3, 5, 6), random(3, 5, 6, seed=1), token_batch()
    expected = sum(
        divergence(student[i, n - 1], teacher[i, n - 1])
        for i in range(3)
        for n in range(1, 5)
        if batch["labels"][i, n] != -100
    )
    result = logit_loss_sum(student, teacher, batch, TEMPERATURE, "tokens", True)
    assert float(result) == pytest.approx(expected, rel=1e-9)


def test_tokens_without_labels_count_what_is_not_padding():
    student, teacher, batch = random(3, 5, 6), random(3, 5, 6, seed=1), token_batch()
    del batch["labels"]
    expected = sum(
        divergence(student[i, n], teacher[i, n]) for i in range(3) for n in range(5) if batch["attention_mask"][i, n]
    )
    result = logit_loss_sum(student, teacher, batch, TEMPERATURE, "tokens", False)
    assert float(result) == pytest.approx(expected, rel=1e-9)


def test_tokens_without_labels_and_mask_average_each_sample():
    student, teacher = random(2, 5, 6), random(2, 5, 6, seed=1)
    expected = sum(divergence(student[i, n], teacher[i, n]) / 5 for i in range(2) for n in range(5))
    result = logit_loss_sum(student, teacher, {}, TEMPERATURE, "tokens", False)
    assert float(result) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("piece", [2**24, 1])
@pytest.mark.parametrize("shifted", [False, True])
def test_positions_that_do_not_count_may_hold_anything(shifted, piece, value, monkeypatch):
    monkeypatch.setattr("hf_semckd.losses.logits.PIECE", piece)
    student, teacher, batch = random(3, 5, 6), random(3, 5, 6, seed=1), token_batch()
    expected = logit_loss_sum(student, teacher, batch, TEMPERATURE, "tokens", shifted)
    left_out = torch.ones(3, 5, dtype=torch.bool)
    counted = token_targets(batch["labels"], None, shifted)
    left_out[:, : counted.shape[1]] = ~counted
    spoiled = student.masked_fill(left_out.unsqueeze(-1), value).requires_grad_()
    result = logit_loss_sum(
        spoiled, teacher.masked_fill(left_out.unsqueeze(-1), value), batch, TEMPERATURE, "tokens", shifted
    )
    result.backward()
    assert float(result.detach()) == pytest.approx(float(expected), rel=1e-12)
    assert bool((spoiled.grad[left_out] == 0).all()) and bool(torch.isfinite(spoiled.grad).all())


@pytest.mark.parametrize("piece", [1, 40, 60])
def test_large_logits_are_compared_piece_by_piece(piece, monkeypatch):
    results = []
    for size in (2**24, piece):
        monkeypatch.setattr("hf_semckd.losses.logits.PIECE", size)
        student = random(3, 5, 6).requires_grad_()
        result = logit_loss_sum(student, random(3, 5, 6, seed=1), token_batch(), TEMPERATURE, "tokens", False)
        result.backward()
        results.append((float(result.detach()), student.grad))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-12)


def test_tokens_in_front_that_have_no_label_are_left_out():
    """Prompt tuning: two more logits in front than labels."""
    student, teacher, batch = random(3, 7, 6), random(3, 7, 6, seed=1), token_batch()
    whole = logit_loss_sum(student, teacher, batch, TEMPERATURE, "tokens", False)
    tail = logit_loss_sum(student[:, 2:], teacher[:, 2:], batch, TEMPERATURE, "tokens", False)
    assert float(whole) == float(tail)


def test_multi_label_is_the_mean_of_bernoulli_divergences():
    student, teacher = random(4, 5), random(4, 5, seed=1)
    expected = sum(bernoulli_divergence(student[i], teacher[i]) for i in range(4))
    result = logit_loss_sum(student, teacher, {"labels": torch.ones(4, 5)}, TEMPERATURE, "multi_label", False)
    assert float(result) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3)])
def test_regression_averages_the_numbers_of_a_sample(shape):
    student, teacher = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    expected = sum(((s - t) ** 2).mean() for s, t in zip(student, teacher, strict=True))
    torch.testing.assert_close(logit_loss_sum(student, teacher, {}, 2.0, "regression", False), expected)


def test_regression_is_the_squared_difference_without_temperature():
    student, teacher = random(4, 2), random(4, 2, seed=1)
    expected = sum(((student[i] - teacher[i]).numpy() ** 2).mean() for i in range(4))
    for temperature in (1.0, 5.0):
        result = logit_loss_sum(student, teacher, {}, temperature, "regression", False)
        assert float(result) == pytest.approx(expected, rel=1e-9)


def test_gradients_are_those_of_softened_distributions():
    """d/dz of T^2 KL = T (q - p), and none reaches the teacher."""
    student, teacher = random(1, 4).requires_grad_(), random(1, 4, seed=1).requires_grad_()
    logit_loss_sum(student, teacher, {}, TEMPERATURE, "single_label", False).backward()
    q = softmax(student.detach()[0].numpy(), TEMPERATURE)
    p = softmax(teacher.detach()[0].numpy(), TEMPERATURE)
    np.testing.assert_allclose(student.grad[0].numpy(), TEMPERATURE * (q - p), rtol=1e-9)
    assert teacher.grad is None


def test_other_numbers_of_classes_are_refused_by_name():
    with pytest.raises(InputError, match=r"(?s)student \(2, 3\), teacher \(2, 4\).*num_labels.*logit_weight=0"):
        logit_loss_sum(random(2, 3), random(2, 4), {}, 1.0, "single_label", False)


# ---- Counts ------------------------------------------------------------------------------------------------------


def test_samples_are_counted_for_classes_and_ignored_ones_are_not():
    batch = {"pixel_values": torch.zeros(4, 3), "labels": torch.tensor([0, -100, 2, 1])}
    assert [int(entry) for entry in count_items(batch, "single_label", False)] == [3, 4, 4]


def test_float_labels_count_as_samples():
    batch = {"x": torch.zeros(4, 3), "labels": torch.zeros(4, 5)}
    assert [int(entry) for entry in count_items(batch, "multi_label", False)] == [4, 4, 4]


@pytest.mark.parametrize(("ignored", "items"), [((255,), 7), ((-100,), 6), ((), 8), ((-100, 255), 5)])
def test_pixels_are_counted_where_the_students_own_loss_counts_them(ignored, items):
    labels = torch.tensor([[[0, 255], [1, -100]], [[2, 2], [-100, 0]]])
    batch = {"pixel_values": torch.zeros(2, 3, 2, 2), "labels": labels}
    assert [int(entry) for entry in count_items(batch, "single_label", False, OwnLoss(ignored))] == [items, 2, 2]


def test_answers_are_counted_where_they_start_and_where_they_end():
    texts = torch.zeros(2, 5, dtype=torch.long)
    batches = [
        {"input_ids": texts, "start_positions": torch.tensor([4, 5]), "end_positions": torch.tensor([7, 9])},
        {"input_ids": texts, "start_positions": torch.tensor([0, -1]), "end_positions": torch.tensor([9, 1])},
    ]
    found = count_step(batches, "spans", False, lambda sums: sums * 2, 2, True, OwnLoss(finds_ends=True))
    assert [int(entry.items) for entry in found] == [1, 3]
    assert all(entry.ends.tolist() == [6, 2] and float(entry.stops) == 2 for entry in found)
    assert all(entry.totals.tolist() == [8, 8, 8] for entry in found)
    plain = count_step(batches, "spans", False, lambda sums: sums)
    assert plain[0].ends is None and plain[0].totals.tolist() == [4, 4, 4]


@pytest.mark.parametrize(("shifted", "items"), [(False, 4), (True, 3)])
def test_tokens_are_counted_where_they_are_predicted(shifted, items):
    assert [int(entry) for entry in count_items(token_batch(), "tokens", shifted)] == [items, items, 3]


@pytest.mark.parametrize(("shifted", "tokens"), [(False, 9), (True, 6)])
def test_without_labels_the_task_counts_samples_and_the_logits_tokens(shifted, tokens):
    batch = token_batch()
    del batch["labels"]
    assert [int(entry) for entry in count_items(batch, "tokens", shifted)] == [3, tokens, 3]


def test_counts_agree_with_the_loss_that_they_divide():
    """With equal divergences at every position, sum / count is that divergence."""
    batch, row = token_batch(), random(6)
    student, teacher = row.expand(3, 5, 6), row.flip(0).expand(3, 5, 6)
    for shifted in (False, True):
        _, count, _ = count_items(batch, "tokens", shifted)
        total = logit_loss_sum(student, teacher, batch, TEMPERATURE, "tokens", shifted)
        assert float(total) / int(count) == pytest.approx(divergence(row, row.flip(0)), rel=1e-9)


def test_a_step_adds_micro_batches_and_processes_in_one_reduction():
    calls = []

    def two_processes(tensor):
        calls.append(tensor)
        return tensor * 2

    counts = count_step([token_batch(), token_batch(), token_batch()], "tokens", False, two_processes, processes=2)
    assert len(calls) == 1
    assert [int(entry.items) for entry in counts] == [4, 4, 4]
    assert all(entry.totals.tolist() == [24, 24, 18] and entry.processes == 2 for entry in counts)


def test_scales_turn_sums_and_means_into_shares_of_the_steps_mean():
    totals = torch.tensor([10.0, 5.0, 4.0], dtype=torch.float64)
    counts = StepCounts(torch.tensor(3.0), torch.tensor(2.0), totals, processes=2)
    assert float(counts.task_scale()) == pytest.approx(3 / 10 * 2)
    assert float(counts.logit_scale()) == pytest.approx(2 / 5)
    assert float(counts.sample_scale()) == pytest.approx(2 / 4 * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_scaled_loss_keeps_its_precision_and_rounds_once(dtype):
    loss, scale = torch.tensor(1.2345, dtype=dtype), torch.tensor(0.7654, dtype=torch.float64)
    assert scaled(loss, scale).dtype is dtype
    assert float(scaled(loss, scale)) == float(loss * 0.7654), "as with a number in place of the tensor"


def test_a_step_without_labels_divides_by_nothing():
    counts = StepCounts(torch.tensor(0.0), torch.tensor(0.0), torch.zeros(3))
    assert float(counts.task_scale()) == 0
    assert math.isfinite(counts.logit_scale()) and math.isfinite(counts.sample_scale())


@pytest.mark.parametrize("labels", [[[-100, -100], [-100, -100]], [[5, -100], [7, -100]]])
def test_labels_that_count_nothing_become_a_class_of_which_the_mean_is_finite(labels):
    """The second ones count nothing for a causal model, which never predicts the first token."""
    batch = {"input_ids": torch.zeros(2, 2, dtype=torch.long), "labels": torch.tensor(labels)}
    items, *_ = count_items(batch, "tokens", True)
    safe = safe_labels(batch["labels"], items)
    assert torch.equal(safe, torch.zeros(2, 2, dtype=torch.long))
    assert torch.isfinite(cross_entropy(random(2, 1, 4), safe[:, 1:]))


def test_labels_that_count_stay_as_they_are():
    batch = token_batch()
    items, *_ = count_items(batch, "tokens", False)
    assert torch.equal(safe_labels(batch["labels"], items), batch["labels"])
    values = torch.zeros(4)
    assert safe_labels(values, torch.tensor(0)) is values and safe_labels(None, torch.tensor(0)) is None


def test_batch_size_is_that_of_the_first_tensor_with_a_dimension():
    assert batch_size({"name": ["a"], "scalar": torch.tensor(1.0), "x": torch.zeros(5, 2)}) == 5


def test_a_batch_without_a_tensor_is_refused():
    with pytest.raises(InputError, match="(?s)no tensor.*'name'"):
        batch_size({"name": ["a", "b"]})


@pytest.mark.parametrize("shifted", [False, True])
def test_token_targets_prefer_labels_to_the_mask(shifted):
    batch = token_batch()
    expected = (batch["labels"] != -100)[:, int(shifted) :]
    assert torch.equal(token_targets(batch["labels"], batch["attention_mask"], shifted), expected)
    assert token_targets(torch.tensor([1, 2]), None, shifted) is None


# ---- The kind of head, and the usual task loss -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "labels", "problem", "task"),
    [
        ((2, 5), torch.tensor([1, 0]), None, "single_label"),
        ((2, 5), None, None, "single_label"),
        ((2, 5), torch.zeros(2, 5), None, "multi_label"),
        ((2, 5), None, "multi_label_classification", "multi_label"),
        ((2, 1), torch.zeros(2), None, "regression"),
        ((2,), torch.zeros(2), None, "regression"),
        ((2, 3), torch.zeros(2, 3), "regression", "regression"),
        ((2, 7, 5), torch.zeros(2, 7).long(), None, "tokens"),
        ((2, 5, 8, 8), torch.zeros(2, 8, 8).long(), None, "single_label"),
    ],
)
def test_task_is_told_from_logits_labels_and_configuration(shape, labels, problem, task):
    assert task_of(torch.zeros(shape), labels, problem) == task


def test_cross_entropy_for_each_kind_of_label():
    logits = random(3, 4)
    classes = torch.tensor([1, -100, 3])
    expected = -sum(math.log(softmax(logits[i].numpy(), 1.0)[classes[i]]) for i in (0, 2)) / 2
    assert float(cross_entropy(logits, classes)) == pytest.approx(expected, rel=1e-9)
    targets = torch.rand(3, 4, dtype=torch.float64)
    binary = F.binary_cross_entropy_with_logits(logits, targets)
    assert float(cross_entropy(logits, targets)) == pytest.approx(float(binary))
    values = random(3, seed=2)
    expected = float(np.mean((logits[:, 0].numpy() - values.numpy()) ** 2))
    assert float(cross_entropy(logits[:, :1], values)) == pytest.approx(expected)


def test_cross_entropy_flattens_tokens():
    logits, labels = random(2, 3, 4), torch.tensor([[0, -100, 1], [2, 3, -100]])
    rows = [(0, 0), (0, 2), (1, 0), (1, 1)]
    expected = -sum(math.log(softmax(logits[i, n].numpy(), 1.0)[labels[i, n]]) for i, n in rows) / 4
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-9)
