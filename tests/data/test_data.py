"""Two tokenizers, one dataset: each model gets its own, padded by its own tokenizer."""

import random

import numpy as np
import pytest
import torch
from paired import STUDENT, collator, dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from hf_semckd import SemCKDConfig, SemCKDTrainer
from hf_semckd.data.views import RepeatableViews, preserved_random_state
from hf_semckd.errors import InputError


def trainer(tmp_path, data_collator) -> SemCKDTrainer:
    torch.manual_seed(0)
    student = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=20, dim=8, n_layers=2, n_heads=2))
    teacher = BertForSequenceClassification(
        BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    )
    args = SemCKDConfig(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", use_cpu=True, disable_tqdm=True
    )
    data = dataset()
    return SemCKDTrainer(student, args, data_collator, data, data, STUDENT, teacher_model=teacher)


def test_each_part_is_padded_with_its_own_token():
    batch = collator()([dataset()[index] for index in range(3)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [2, 0, 0, 0, 0], [3, 1, 2, 1, 3]]
    assert batch["teacher_input_ids"].tolist() == [
        [11, 12, 11, 12, 7, 7, 7],
        [12, 7, 7, 7, 7, 7, 7],
        [11, 12, 11, 12, 11, 11, 12],
    ]
    assert batch["teacher_attention_mask"].sum(1).tolist() == [4, 1, 7]
    assert batch["labels"].tolist() == [0, 1, 0]


def test_samples_without_teacher_columns_are_the_students_alone():
    samples = [{"input_ids": [1], "attention_mask": [1]}]
    assert set(collator()(samples)) == {"input_ids", "attention_mask"}


def test_two_tokenizations_train_and_evaluate(tmp_path):
    run = trainer(tmp_path, collator())
    assert run.train().global_step == 3
    assert run.association().shape == (2, 3)
    assert run.evaluate()["eval_loss"] > 0


def test_a_collator_that_cannot_pad_the_teachers_columns_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(InputError, match="TeacherStudentCollator"):
        trainer(tmp_path, DataCollatorWithPadding(STUDENT))


# ---- Repeatable views ----------------------------------------------------------------------------------------------


def drawn(value: float) -> tuple[float, float, float, float]:
    """A transform that draws from all three generators."""
    return value, random.random(), float(np.random.rand()), float(torch.rand(()))


def states() -> tuple[object, list[int], list[int]]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def versions(views: RepeatableViews, index: int, times: int = 40) -> set[tuple[float, ...]]:
    return {views[index] for _ in range(times)}


def test_a_sample_has_as_many_versions_as_views_and_they_repeat():
    views = RepeatableViews([10.0, 20.0], drawn, views=3)
    assert len(views) == 2
    assert {len(versions(views, index)) for index in range(2)} == {3}
    assert {row[0] for row in versions(views, 1)} == {20.0}
    torch.manual_seed(99)
    assert versions(views, 0) == versions(RepeatableViews([10.0, 20.0], drawn, views=3), 0)


def test_versions_differ_between_samples_and_seeds_in_all_generators():
    views = RepeatableViews([0.0] * 10, drawn, views=4)
    seen = [row for index in range(10) for row in versions(views, index)]
    assert len(seen) == 40
    for generator in (1, 2, 3):
        assert len({row[generator] for row in seen}) == 40
    assert not versions(views, 0) & versions(RepeatableViews([0.0] * 10, drawn, views=4, seed=1), 0)


def test_all_versions_are_about_equally_frequent():
    views = RepeatableViews([0.0], drawn, views=4)
    torch.manual_seed(0)
    counts: dict[object, int] = {}
    for _ in range(200):
        counts[views[0]] = counts.get(views[0], 0) + 1
    assert all(25 < count < 75 for count in counts.values())


def test_reading_takes_one_draw_of_torch_and_leaves_the_other_generators_alone():
    views = RepeatableViews([0.0], drawn, views=5)
    torch.manual_seed(3)
    before = states()
    views[0]
    after = states()
    assert after[:2] == before[:2]
    torch.manual_seed(3)
    torch.randint(5, ())
    assert after[2] == torch.get_rng_state().tolist()


def test_a_transform_that_fails_leaves_the_generators_alone():
    def broken(_: float) -> None:
        drawn(0.0)
        raise OSError("no file")

    before = states()
    with pytest.raises(OSError, match="no file"):
        RepeatableViews([0.0], broken, views=2)[0]
    assert states()[:2] == before[:2]


def test_random_states_are_seeded_for_a_moment_and_restored():
    torch.manual_seed(1)
    before = states()
    with preserved_random_state(7):
        first = drawn(0.0)
    assert states() == before
    with preserved_random_state(7):
        assert drawn(0.0) == first
    with preserved_random_state(8):
        assert drawn(0.0) != first
