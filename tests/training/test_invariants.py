"""The same samples give the same training, however they are cut, ordered and padded; the oracle is written by hand.

In float64, with plain gradient descent, so that weights show gradients: a factor that is wrong anywhere shows here.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pytest
import torch
from makers import Samples, Stream, assert_same_weights, images, resnet, vit, weights
from tiny import PROBLEMS, Outcome, assert_same, by_hand, fit, make, outcome, pictures, tokenizer, train
from torch import Tensor
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

from hf_semckd import SemCKDConfig, SemCKDTrainer
from hf_semckd.errors import InputError

# Relations are those of a micro-batch: what must not depend on the cut is all the rest.
ALONE = {"relation_weight": 0.0}
CUTS = {"8x1": (8, 1), "4x2": (4, 2), "2x4": (2, 4)}
EQUAL = [name for name in PROBLEMS if name not in ("resnet", "unlabeled_words")]
# Another task loss does not change the other terms.
SINGLE_TERMS = [(name, "task") for name in EQUAL] + [
    (name, terms)
    for name in [*EQUAL, "unlabeled_words"]
    for terms in ("logit", "feature")
    if not name.startswith(("smoothed", "own_loss"))
]
ASSOCIATIONS = ["similarity", "learned", "last", "one_to_one"]


def cut(micro: int, parts: int, **others: Any) -> dict[str, Any]:
    """Return the arguments that make steps of `parts` micro-batches of `micro` samples."""
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": parts, **others}


def check_against_hand(problem: str, folder: Any, micro: int, parts: int, **args: Any) -> None:
    """Compare the library's training with the one by hand."""
    done = train(problem, folder, **cut(micro, parts), **args)
    assert_same(done, by_hand(problem, folder, micro=micro, parts=parts, **args), PROBLEMS[problem].tolerance)


# ---- Invariant 1: the cut into micro-batches does not matter -------------------------------------------------------


@pytest.mark.parametrize("shape", ["8x1", "4x2"])
@pytest.mark.parametrize("problem", EQUAL)
def test_training_equals_the_one_by_hand_however_steps_are_cut(problem, shape, tmp_path):
    """20 samples: the last step has 4, in one micro-batch instead of two."""
    micro, parts = CUTS[shape]
    done = train(problem, tmp_path, **cut(micro, parts), **ALONE)
    # Uniform weights know nothing of the batch: by hand, the step is always one batch of 8.
    assert_same(done, by_hand(problem, tmp_path, micro=8, parts=1, **ALONE), PROBLEMS[problem].tolerance)


@pytest.mark.parametrize("problem", EQUAL)
def test_relations_are_those_of_each_micro_batch(problem, tmp_path):
    check_against_hand(problem, tmp_path, *CUTS["4x2"])


@pytest.mark.parametrize(("problem", "terms"), SINGLE_TERMS)
def test_each_term_alone_equals_the_one_by_hand(problem, terms, tmp_path):
    check_against_hand(problem, tmp_path, *CUTS["4x2"], terms=terms)


@pytest.mark.parametrize("association", ["learned", "last", "one_to_one"])
@pytest.mark.parametrize("problem", ["vit", "resnet_vit", "sentences"])
def test_associations_that_know_one_sample_at_a_time_do_not_depend_on_the_cut(problem, association, tmp_path):
    done = train(problem, tmp_path, association=association, **cut(2, 4), **ALONE)
    assert_same(done, by_hand(problem, tmp_path, micro=8, parts=1, association=association, **ALONE))


@pytest.mark.parametrize("shape", [*CUTS, "1x8"])
@pytest.mark.parametrize("bank", [64, 5])
@pytest.mark.parametrize("problem", ["vit", "resnet_vit", "sentences", "tokens"])
def test_similarities_to_a_bank_do_not_depend_on_the_cut(problem, bank, shape, tmp_path):
    """20 samples in steps of 8: a bank of 5 takes up the end of a step alone."""
    args = {"association": "similarity", "association_bank": bank, **ALONE}
    done = train(problem, tmp_path, **cut(*CUTS.get(shape, (1, 8))), **args)
    assert_same(done, by_hand(problem, tmp_path, micro=8, parts=1, **args))
    assert done.terms[0]["association/entropy"] == pytest.approx(math.log(4 - 2 * (problem == "resnet_vit")))
    assert done.terms[-1]["association/entropy"] < done.terms[0]["association/entropy"] - 1e-4


@pytest.mark.parametrize("shape", list(CUTS))
@pytest.mark.parametrize("problem", ["vit", "resnet_vit", "sentences", "tokens"])
def test_similarities_without_a_bank_are_those_of_each_micro_batch(problem, shape, tmp_path):
    check_against_hand(problem, tmp_path, *CUTS[shape], association="similarity", association_bank=0)


@pytest.mark.parametrize("association", ["uniform", "similarity"])
def test_a_student_with_batch_norm_equals_the_one_by_hand_for_the_same_micro_batches(association, tmp_path):
    # The hand knows no decoders; `tests/losses/test_between_cnns.py` does.
    check_against_hand("resnet", tmp_path, 4, 2, association=association, projector="shared")


@pytest.mark.parametrize("problem", ["vit", "sentences"])
def test_raw_targets_equal_the_training_by_hand(problem, tmp_path):
    check_against_hand(problem, tmp_path, 4, 2, target_norm="none")


def test_a_logged_term_is_the_mean_over_the_steps_since_the_last_log(tmp_path):
    done = train("tokens", tmp_path, association="similarity", logging_steps=3, **cut(4, 2))
    steps = by_hand("tokens", tmp_path, micro=4, parts=2, association="similarity").terms
    (logged,) = done.terms
    for name in ("loss", "task_loss", "logit_loss", "feature_loss"):
        assert logged[name] == pytest.approx(sum(step[name] for step in steps) / 3, rel=1e-6), name
    # Weights are averaged over samples: 8, 8 and 4 of them.
    entropy = sum(step["association/entropy"] * size for step, size in zip(steps, (8, 8, 4), strict=True)) / 20
    assert logged["association/entropy"] == pytest.approx(entropy, rel=1e-9)


# ---- Invariant 2: any batch size, any padding ----------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 2, 3])
@pytest.mark.parametrize("association", ["similarity", "learned"])
@pytest.mark.parametrize("problem", ["vit", "sentences"])
def test_a_ragged_last_batch_equals_the_one_by_hand(problem, association, last, tmp_path):
    check_against_hand(problem, tmp_path, 4, 1, samples=8 + last, association=association)


@pytest.mark.parametrize("association", ["similarity", "learned"])
def test_batches_of_one_train(association, tmp_path):
    check_against_hand("sentences", tmp_path, 1, 1, samples=3, association=association)


@pytest.mark.parametrize("association", ASSOCIATIONS)
@pytest.mark.parametrize("problem", ["sentences", "tokens"])
def test_wider_padding_changes_nothing(problem, association, tmp_path):
    collator = {"sentences": DataCollatorWithPadding, "tokens": DataCollatorForTokenClassification}[problem]
    wide = dataclasses.replace(PROBLEMS[problem], collator=collator(tokenizer(), pad_to_multiple_of=16))
    assert wide.collator([wide.rows(1)[0]])["input_ids"].shape[1] == 16
    one = train(problem, tmp_path, association=association, **cut(4, 2))
    assert_same(one, train(wide, tmp_path, association=association, **cut(4, 2)))


def test_a_channel_that_is_silent_in_the_first_step_does_not_blow_up_the_term(tmp_path):
    """The last stage has one position a sample, so some channels after a ReLU are 0 for all of the first 8."""
    sparse = dataclasses.replace(PROBLEMS["resnet"], teacher=partial(resnet, (8, 12, 16), seed=9))
    done = train(sparse, tmp_path, **cut(8, 1), learning_rate=1e-6, projection_learning_rate=1e-6, **ALONE)
    assert max(step["feature_loss"] for step in done.terms) < 5


# ---- Invariant 3: the order within a batch does not matter ---------------------------------------------------------


def with_weights(problem: str, folder: Any, order: list[int], association: str) -> tuple[Outcome, list[Tensor]]:
    """Train on reordered samples and return the association weights (B, S, T) of every batch too."""
    rows = PROBLEMS[problem].rows(len(order))
    dataset = Samples([rows[index] for index in order])
    trainer = make(problem, folder, train_dataset=dataset, association=association, **cut(4, 1))
    weights: list[Tensor] = []
    trainer.feature_loss.register_forward_hook(lambda _module, _inputs, output: weights.append(output.association))
    fit(trainer)
    return outcome(trainer), weights


@pytest.mark.parametrize("association", ["similarity", "learned"])
@pytest.mark.parametrize("problem", ["vit", "sentences", "tokens"])
def test_a_shuffled_batch_permutes_the_weights_and_changes_no_loss(problem, association, tmp_path):
    first, weights = with_weights(problem, tmp_path, list(range(8)), association)
    second, shuffled = with_weights(problem, tmp_path, [2, 0, 3, 1, 5, 4, 7, 6], association)
    if association == "similarity":
        # The samples of the first step, in their order; the second step would be taken up by a third.
        rows = [made.state.pop("calibration.bank.rows")[:4] for made in (first, second)]
        torch.testing.assert_close(rows[1], rows[0][[2, 0, 3, 1]], rtol=0, atol=1e-9)
    assert_same(first, second)
    for before, after, order in zip(weights, shuffled, ([2, 0, 3, 1], [1, 0, 3, 2]), strict=True):
        torch.testing.assert_close(after, before[order], rtol=0, atol=1e-9)
    # The weights of samples differ, or a permutation would say nothing.
    assert float((weights[1][0] - weights[1][1]).abs().max()) > 1e-6


# ---- The published form --------------------------------------------------------------------------------------------


def published(folder: Any, samples: int, **changes: Any) -> SemCKDTrainer:
    """Return a trainer of the published form, for batches of 8."""
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    args = SemCKDConfig.published(str(folder), per_device_train_batch_size=8, num_train_epochs=1, **quiet, **changes)
    return SemCKDTrainer(model=vit(), teacher_model=vit(3, 24, seed=9), args=args, train_dataset=images(samples))


@pytest.mark.parametrize("samples", [17, 18, 19, 7])
def test_the_published_form_refuses_a_ragged_dataset_before_the_first_step(samples, tmp_path):
    with pytest.raises(InputError, match="dataloader_drop_last"):
        published(tmp_path, samples)


@pytest.mark.parametrize(("samples", "drop"), [(16, False), (21, True)])
def test_the_published_form_trains_on_whole_batches(samples, drop, tmp_path):
    trainer = published(tmp_path, samples, dataloader_drop_last=drop)
    before = {name: value.clone() for name, value in trainer.feature_loss.state_dict().items()}
    trainer.train()
    assert trainer.state.global_step == 2
    after = trainer.feature_loss.state_dict()
    still = [name for name, value in trainer.feature_loss.named_parameters() if torch.equal(before[name], after[name])]
    assert not still


# ---- Other ways to train -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["vit", "sentences", "next_word", "resnet"])
def test_bfloat16_autocast_is_close_to_full_precision(problem, tmp_path):
    # All tokens: pixels in another precision are other content, of which other tokens would be chosen.
    # And weights that do not turn with a small error, as the sharp ones between CNNs do.
    settings = {"association": "similarity", "association_temperature": 0.2}
    settings |= {"max_tokens": 0, "relation_weight": 1.0, **cut(4, 1)}
    exact = train(problem, tmp_path, **settings)
    rough = train(problem, tmp_path, dtype=torch.float32, bf16=True, **settings)
    assert not [name for name, value in rough.state.items() if value.dtype is torch.bfloat16]
    for one, other in zip(exact.terms, rough.terms, strict=True):
        assert other == pytest.approx(one, rel=0.05, abs=5e-3)
    gaps = [abs(one["loss"] - other["loss"]) for one, other in zip(exact.terms, rough.terms, strict=True)]
    # Else autocast was not on.
    assert max(gaps) > 1e-5


@pytest.mark.parametrize(
    ("problem", "reentrant"),
    [("vit", False), ("sentences", False), ("next_word", False), ("vit", None), ("next_word", True)],
)
def test_gradient_checkpointing_changes_nothing(problem, reentrant, tmp_path):
    how = None if reentrant is None else {"use_reentrant": reentrant}
    args = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": how, "association": "similarity"}
    done = train(problem, tmp_path, **args, **cut(4, 2))
    hand = by_hand(problem, tmp_path, micro=4, parts=2, association="similarity")
    assert_same(done, hand, PROBLEMS[problem].tolerance)


BLOCKS = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
WITHIN = ["bert.encoder.layer.0.attention", "bert.encoder.layer.1.output"]


@pytest.mark.parametrize(
    ("layers", "reentrant"),
    [(BLOCKS, True), (["bert.embeddings", "bert.encoder"], True), (WITHIN, False)],
)
def test_gradient_checkpointing_changes_nothing_for_named_layers(layers, reentrant, tmp_path):
    args = {"student_layers": layers, "samples": 8, **cut(4, 1)}
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    assert_same(train("sentences", tmp_path, **args, **how), train("sentences", tmp_path, **args), 1e-9)


def test_layers_that_gradient_checkpointing_cuts_off_are_refused_before_anything_is_learned(tmp_path):
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make("sentences", tmp_path, student_layers=WITHIN, **how, **cut(4, 1))
    before = weights(trainer.student)
    with pytest.raises(InputError, match="use_reentrant"):
        fit(trainer)
    assert_same_weights(before, weights(trainer.student))


COMPILED = [("vit", "eager"), ("sentences", "eager"), ("sentences", "aot_eager"), ("vit", "inductor")]


@pytest.mark.slow
@pytest.mark.parametrize(("problem", "backend"), COMPILED)
def test_a_compiled_student_trains_the_same(problem, backend, tmp_path):
    torch.compiler.reset()
    args = {"torch_compile": True, "torch_compile_backend": backend, "association": "similarity"}
    done = train(problem, tmp_path, **args, **cut(4, 2))
    assert_same(done, by_hand(problem, tmp_path, micro=4, parts=2, association="similarity"))


def test_a_student_made_by_model_init_trains_the_same(tmp_path):
    done = train("vit", tmp_path, model_init=lambda: PROBLEMS["vit"].student().double(), **cut(4, 2))
    assert_same(done, by_hand("vit", tmp_path, micro=4, parts=2))


def test_a_stream_of_samples_trains_the_same(tmp_path):
    done = train("vit", tmp_path, train_dataset=Stream(pictures(24)), max_steps=3, **cut(4, 2))
    assert_same(done, by_hand("vit", tmp_path, micro=4, parts=2, samples=24))


def test_an_optimizer_of_the_user_trains_the_projections_and_comes_back_as_it_was(tmp_path):
    student = PROBLEMS["vit"].student().double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make("vit", tmp_path, model=student, optimizers=(optimizer, scheduler), **cut(4, 2))
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([len(group["params"]) for group in optimizer.param_groups])
    )
    fit(trainer)
    own = len(list(student.parameters()))
    assert seen == [[own, len(list(trainer.feature_loss.parameters()))]] * 3
    assert_same(outcome(trainer), by_hand("vit", tmp_path, micro=4, parts=2, projection_learning_rate=0.05))
    assert [len(group["params"]) for group in optimizer.param_groups] == [own]
    assert (scheduler.base_lrs, len(scheduler.get_last_lr()), len(scheduler.lr_lambdas)) == ([0.05], 1, 1)
    assert set(optimizer.state) <= set(student.parameters())
