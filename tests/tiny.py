"""Small training problems in float64, one a kind of head, and the same training written out by hand.

`train` runs a problem with the library, `by_hand` with loops, autograd and gradient descent: the two share nothing but
the tiny models, the data and the random start of the projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from makers import IMAGE, LABELS, VOCABULARY, Samples, bert, bert_mlm, bert_tokens, config, gpt2, images, resnet, vit
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from hf_semckd import SemCKDTrainer
from hf_semckd.losses.semckd.defaults import association_temperature
from hf_semckd.training.options import loss_options

TEMPERATURE = 2.0
RATE, CALIBRATION_RATE = 0.05, 0.02
SMOOTHING = 0.1
WEIGHTS = ("task_weight", "logit_weight", "feature_weight")
# Without any distillation the trainer is `Trainer`, with its scaling; a weight that adds nothing keeps ours.
NOTHING = 1e-300
TERMS = {
    "task": (1.0, NOTHING, 0.0),
    "logit": (0.0, 1.0, 0.0),
    "feature": (0.0, 0.0, 1.0),
    "all": (0.7, 1.3, 0.9),
}


# ---- Data ----------------------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that is used for padding only."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", mask_token="w2"
    )


def pictures(count: int) -> Samples:
    """Return pictures in float64 with a class each."""
    return Samples([{**row, "pixel_values": row["pixel_values"].double()} for row in images(count).rows])


def sentences(count: int, labels: str) -> Samples:
    """Return sentences of different lengths, not padded.

    Args:
        count: Number of sentences.
        labels: `class`, `several` (0 or 1 for each label), `number`, `tokens` (a class a token, many of them -100, and
            all of them in sentences 4 to 7), `words` (the token itself, or -100), `none`.
    """
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(count):
        length = 3 + (5 * index + 2) % 8
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
        kept = (torch.rand(length, generator=generator) < 0.4) & (not 4 <= index < 8)
        made = {
            "class": int(torch.randint(LABELS, (), generator=generator)),
            "several": torch.randint(2, (LABELS,), generator=generator).double(),
            "number": torch.randn((), generator=generator).double(),
            "tokens": torch.randint(LABELS, (length,), generator=generator).where(kept, -100).tolist(),
            "words": ids.where(kept, -100).tolist(),
        }
        row = {"input_ids": ids.tolist(), "attention_mask": [1] * length}
        rows.append(row if labels == "none" else {**row, "labels": made[labels]})
    return Samples(rows)


def pad_with_float_labels(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad to the longest sentence; `DataCollatorWithPadding` would make labels float32."""
    inputs = [{key: value for key, value in row.items() if key != "labels"} for row in rows]
    return {**DataCollatorWithPadding(tokenizer())(inputs), "labels": torch.stack([row["labels"] for row in rows])}


# ---- Problems ------------------------------------------------------------------------------------------------------


def summed_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A user's `compute_loss_func`: a sum over items, divided by the items of the whole optimizer step."""
    logits = outputs["logits"]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum") / num_items_in_batch


@dataclass(frozen=True)
class Problem:
    """Two models, their data and what is particular about the training.

    Attributes:
        student, teacher: Make the models.
        rows: Makes a number of samples.
        collator: Makes a batch.
        head: `single`, `several`, `number`, `tokens` or `next` (token), for the computation by hand.
        grid: Whether pairs of layers are compared on a common grid instead of token by token.
        args: Changes of the arguments.
        parts: What else the trainer is given.
        tolerance: Below which results are equal; transformers computes some task losses in float32.
    """

    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    rows: Callable[[int], Samples]
    collator: Any = default_data_collator
    head: str = "single"
    grid: bool = False
    args: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-9


def _text(model: Any, targets: str, collator: Any, head: str, **extra: Any) -> Problem:
    settings = {key: extra.pop(key) for key in ("problem_type", "labels") if key in extra}
    return Problem(
        partial(model, **settings),
        partial(model, layers=4, width=24, seed=9, **settings),
        partial(sentences, labels=targets),
        collator,
        head,
        **extra,
    )


_PADDING, _TOKENS = DataCollatorWithPadding(tokenizer()), DataCollatorForTokenClassification(tokenizer())
_NEXT = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
_FLOAT32 = {"tolerance": 1e-6}
_SMOOTH = {"args": {"label_smoothing_factor": SMOOTHING}, **_FLOAT32}
_OWN_LOSS = {"parts": {"compute_loss_func": summed_cross_entropy}}

PROBLEMS = {
    "vit": Problem(vit, partial(vit, 4, 24, seed=9), pictures),
    "resnet_vit": Problem(vit, partial(resnet, (8, 16), seed=9), pictures, grid=True),
    "sentences": _text(bert, "class", _PADDING, "single"),
    "several_labels": _text(
        bert, "several", pad_with_float_labels, "several", problem_type="multi_label_classification"
    ),
    "regression": _text(bert, "number", pad_with_float_labels, "number", labels=1),
    "tokens": _text(bert_tokens, "tokens", _TOKENS, "tokens"),
    "masked_words": _text(bert_mlm, "words", _TOKENS, "tokens"),
    "next_word": _text(gpt2, "none", _NEXT, "next", **_FLOAT32),
    "unlabeled_words": _text(gpt2, "none", _PADDING, "next"),
    "smoothed_sentences": _text(bert, "class", _PADDING, "single", **_SMOOTH),
    "smoothed_tokens": _text(bert_tokens, "tokens", _TOKENS, "tokens", **_SMOOTH),
    "smoothed_next_word": _text(gpt2, "none", _NEXT, "next", **_SMOOTH),
    "own_loss_sentences": _text(bert, "class", _PADDING, "single", **_OWN_LOSS),
    "own_loss_tokens": _text(bert_tokens, "tokens", _TOKENS, "tokens", **_OWN_LOSS),
}
# A student with BatchNorm depends on how a step is cut into micro-batches; these have to be the same then.
PROBLEMS["resnet"] = Problem(resnet, partial(resnet, (8, 16), seed=9), pictures, grid=True)


# ---- Training with the library -------------------------------------------------------------------------------------


class OrderedTrainer(SemCKDTrainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def arguments(folder: Any, terms: str = "all", **changes: Any) -> Any:
    """Return the arguments of a training over all samples, once, by plain gradient descent."""
    settings = {
        **dict(zip(WEIGHTS, TERMS[terms], strict=True)),
        "temperature": TEMPERATURE,
        "optim": "sgd",
        "learning_rate": RATE,
        "projection_learning_rate": CALIBRATION_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "max_steps": -1,
        "num_train_epochs": 1,
        "association": "uniform",
    }
    return config(folder, **{**settings, **changes})


def make(
    problem: str | Problem,
    folder: Any,
    *,
    samples: int = 20,
    terms: str = "all",
    dtype: torch.dtype = torch.float64,
    **args: Any,
) -> OrderedTrainer:
    """Return a trainer for a problem; keywords are changes of the arguments, or parts of the trainer."""
    problem = PROBLEMS[problem] if isinstance(problem, str) else problem
    given = ("model", "model_init", "teacher_model", "train_dataset", "optimizers")
    parts = {key: args.pop(key) for key in given if key in args}
    defaults = {} if "model_init" in parts else {"model": problem.student().to(dtype)}
    if "teacher_model" not in parts:
        defaults["teacher_model"] = problem.teacher().to(dtype)
    rows = [cast(row, dtype) for row in problem.rows(samples).rows]
    defaults["train_dataset"], defaults["eval_dataset"] = Samples(rows), Samples(rows[:8])
    return OrderedTrainer(
        data_collator=problem.collator,
        # Few enough tokens for most samples to be cut.
        args=arguments(folder, terms, **{"max_tokens": 3, **problem.args, **args}),
        **problem.parts,
        **{**defaults, **parts},
    )


def cast(row: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a row with its floating-point tensors in a precision."""
    floating = {key: value for key, value in row.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {**row, **{key: value.to(dtype) for key, value in floating.items()}}


@dataclass
class Outcome:
    """What a training leads to: the student's and the calibration's state, and one dictionary of terms a step."""

    state: dict[str, Tensor]
    terms: list[dict[str, float]]


def outcome(trainer: SemCKDTrainer) -> Outcome:
    """Return what a trained trainer holds."""
    state = {f"student.{name}": value for name, value in trainer.student.state_dict().items()}
    if trainer.feature_loss is not None:
        state |= {f"calibration.{name}": value for name, value in trainer.feature_loss.state_dict().items()}
    rows = [row for row in trainer.state.log_history if "loss" in row]
    names = ("loss", "task_loss", "logit_loss", "feature_loss", "association/entropy")
    terms = [{name: float(row[name]) for name in names if name in row} for row in rows]
    return Outcome({name: value.detach().cpu().clone() for name, value in state.items()}, terms)


def train(problem: str | Problem, folder: Any, **changes: Any) -> Outcome:
    """Train a problem with the library; see `make`."""
    trainer = make(problem, folder, **changes)
    fit(trainer)
    return outcome(trainer)


def fit(trainer: SemCKDTrainer, **how: Any) -> None:
    """Train without drawing the association, which takes longer than the training."""
    with mock.patch("hf_semckd.training.callbacks.save_association_plot"):
        trainer.train(**how)


def assert_same(first: Outcome, second: Outcome, tolerance: float = 1e-9) -> None:
    """Compare weights and terms; Trainer sums the total loss in float32."""
    assert first.state.keys() == second.state.keys()
    far = {name: float((value - second.state[name]).abs().max()) for name, value in first.state.items()}
    assert not {name: gap for name, gap in far.items() if not gap <= tolerance}
    assert len(first.terms) == len(second.terms) > 0
    for step, (one, other) in enumerate(zip(first.terms, second.terms, strict=True)):
        assert one.keys() == other.keys(), step
        for name, value in one.items():
            allowed = max(tolerance, 1e-6) if name == "loss" else tolerance
            assert abs(value - other[name]) <= allowed * max(1.0, abs(value)), (step, name, value, other[name])


# ---- The same training by hand -------------------------------------------------------------------------------------


def by_hand(
    problem: str | Problem, folder: Any, *, micro: int, parts: int, samples: int = 20, terms: str = "all", **args: Any
) -> Outcome:
    """Train a problem by hand, over `parts` micro-batches of `micro` samples a step, however they are distributed."""
    problem = PROBLEMS[problem] if isinstance(problem, str) else problem
    # The random start of the projections is all that is taken from the library.
    trainer = make(problem, folder, samples=samples, terms=terms, per_device_train_batch_size=micro, **args)
    start = {} if trainer.feature_loss is None else trainer.feature_loss.state_dict()
    hand = _ByHand(problem, {name: value.clone() for name, value in start.items()}, trainer.args)
    batches = [list(range(first, min(first + micro, samples))) for first in range(0, samples, micro)]
    rows = problem.rows(samples)
    for first in range(0, len(batches), parts):
        step = [problem.collator([rows[index] for index in batch]) for batch in batches[first : first + parts]]
        hand.step([dict(batch) for batch in step])
    return Outcome(hand.state(), hand.terms)


class _ByHand:
    """Gradient descent on CE + T^2 KL + features, each divided by what it is summed over in a whole step."""

    def __init__(self, problem: Problem, start: dict[str, Tensor], args: Any):
        self.problem, self.args = problem, args
        self.student, self.teacher = problem.student().double().train(), problem.teacher().double().eval()
        kept = ("statistics.", "bank.")
        self.calibration = {k: v.requires_grad_() for k, v in start.items() if not k.startswith(kept)}
        self.banked = start.get("bank.rows")
        self.seen: list[list[Tensor]] = []
        self.statistics: list[tuple[Tensor, Tensor]] = []
        self.terms: list[dict[str, float]] = []
        # What is known of the samples of each step: the summaries of every layer, student layers first.
        self.met: list[list[list[Tensor]]] = []
        self.owners = [int(name.split(".")[1]) for name in start if name.startswith("projection.")]

    def step(self, batches: list[dict[str, Tensor]]) -> None:
        """Take one optimizer step."""
        runs = [self._run(batch) for batch in batches]
        self.met.append([])
        self._standardize([features for _, _, _, features in runs], batches)
        sums = {name: torch.zeros((), dtype=torch.float64) for name in ("task", "logit", "feature", "entropy")}
        items = samples = 0
        for batch, (logits, states, targets, features) in zip(batches, runs, strict=True):
            task, kd, count = _head_losses(self.problem, logits, targets, batch)
            sums["task"], sums["logit"], items = sums["task"] + task, sums["logit"] + kd, items + count
            samples += len(logits)
            if self.args.feature_weight != 0:
                per_sample, weights = self._features(states, features, batch)
                sums["feature"] = sums["feature"] + per_sample.sum()
                sums["entropy"] = sums["entropy"] - torch.xlogy(weights, weights).sum(2).mean(1).sum().detach()
        self._descend(sums, items, samples)

    def state(self) -> dict[str, Tensor]:
        """Return weights and statistics under the names of `outcome`."""
        state = {f"student.{name}": value for name, value in self.student.state_dict().items()}
        state |= {f"calibration.{name}": value.detach() for name, value in self.calibration.items()}
        if self.banked is not None:
            # A ring of all samples but those of the last step, which the next one would take up.
            samples = [sample for step in self.met[:-1] for sample in step]
            rows = torch.zeros_like(self.banked)
            for place, sample in enumerate(samples):
                rows[place % len(rows)] = torch.cat([layer / layer.norm() for layer in sample])
            state |= {"calibration.bank.rows": rows, "calibration.bank.seen": torch.tensor(len(samples))}
        for layer, values in enumerate(self._merged()):
            names = [f"calibration.statistics.{layer}.{name}" for name in ("mean", "variance", "count")]
            state |= dict(zip(names, values, strict=True))
        return state

    def _run(self, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor]]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        student = self.student(**inputs, output_hidden_states=True)
        with torch.no_grad():
            teacher = self.teacher(**inputs, output_hidden_states=True)
        return student.logits, list(student.hidden_states[1:]), teacher.logits, list(teacher.hidden_states[1:])

    def _descend(self, sums: dict[str, Tensor], items: int, samples: int) -> None:
        args, heads = self.args, {"single", "several", "number"}
        means = {
            "task_loss": sums["task"] / max(items, 1),
            "logit_loss": sums["logit"] / (samples if self.problem.head in heads else max(items, 1)),
            "feature_loss": sums["feature"] / samples,
        }
        feature_weight = 3.0 if args.feature_weight is None else args.feature_weight
        weights = dict(zip(means, (args.task_weight, args.logit_weight, feature_weight), strict=True))
        loss = sum(weights[name] * value for name, value in means.items() if weights[name])
        mine, theirs = list(self.student.parameters()), list(self.calibration.values())
        gradients = torch.autograd.grad(loss, mine + theirs, allow_unused=True)
        with torch.no_grad():
            for index, (value, gradient) in enumerate(zip(mine + theirs, gradients, strict=True)):
                if gradient is not None:
                    value -= (args.learning_rate if index < len(mine) else args.projection_learning_rate) * gradient
        logged = {name: float(value.detach()) for name, value in means.items() if weights[name]}
        if args.feature_weight != 0:
            logged["association/entropy"] = float(sums["entropy"]) / samples
        self.terms.append({"loss": float(loss.detach()), **logged})

    # Statistics: those of all steps before this one; the first step has to do with its own.

    def _standardize(self, features: list[list[Tensor]], batches: list[dict[str, Tensor]]) -> None:
        pairs = zip(features, batches, strict=True)
        compared = [[self._compared(layer, batch) for layer in layers] for layers, batch in pairs]
        self.seen.append([torch.cat([torch.cat(part) for part in layer]) for layer in zip(*compared, strict=True)])
        self.statistics = self._merged()

    def _compared(self, layer: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the positions (n, C) of each sample that are compared, and so make the statistics."""
        if self.problem.grid:
            limit = self._grid_limit
            maps = _map(layer)
            size = [min(side, limit) for side in maps.shape[2:]] if limit else maps.shape[2:]
            return list(F.adaptive_avg_pool2d(maps, size).flatten(2).transpose(1, 2))
        return [rows[chosen] for rows, chosen in zip(layer, self._chosen(layer, batch), strict=True)]

    def _chosen(self, layer: Tensor, batch: dict[str, Tensor]) -> list[list[int]]:
        """Return the tokens of each sample that are compared: at even steps, from where its content says."""
        content = batch["pixel_values"].view(torch.int64) if "pixel_values" in batch else batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones(layer.shape[:2]))
        chosen = []
        for values, kept in zip(content, mask, strict=True):
            if "pixel_values" not in batch:
                values = values[kept.bool()]
            total = sum(value ^ (value >> 32) for value in values.flatten().tolist()) * 2654435761 % 2**32
            tokens = kept.nonzero().flatten().tolist()
            count = min(len(tokens), self.args.max_tokens or len(tokens))
            phase = total // 256 / 2**24
            chosen.append([tokens[math.floor((k + phase) * len(tokens) / count)] for k in range(count)])
        return chosen

    def _merged(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        merged = []
        standardized = self.calibration and self.args.target_norm == "channel"
        for layer in range(len(self.seen[0]) if standardized else 0):
            rows = torch.cat([step[layer] for step in self.seen[: max(len(self.seen) - 1, 1)]])
            merged.append((rows.mean(0), rows.var(0, unbiased=False), torch.tensor(float(len(rows))).double()))
        return merged

    # Features: every sample, every pair of layers.

    def _features(
        self, states: list[Tensor], targets: list[Tensor], batch: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        mask = batch.get("attention_mask")
        self.layers = len(states)
        standard = targets
        if self.args.target_norm == "channel":
            standard = [self._standard(target, *self.statistics[t]) for t, target in enumerate(targets)]
        weights = self._weights(states, targets, standard, mask)
        relations = self._relations(states, targets, mask)
        losses = []
        for i in range(len(states[0])):
            own = None if self.problem.grid else self._chosen(states[0], batch)[i]
            pairs = [
                weights[i, s, t] * self._pair(s, state[i], target[i], own)
                + self._relation_weight(mask is None) * weights[i, s, t].detach() * relations[s][t][i]
                for s, state in enumerate(states)
                for t, target in enumerate(standard)
            ]
            losses.append(sum(pairs) / (1 if self.args.association == "last" else len(states)))
        per_sample = torch.stack(losses)
        if self.args.association == "learned":
            divergence = (weights * (weights * weights.shape[2]).log()).sum(2)
            per_sample = per_sample + association_temperature(loss_options(self.args)) * divergence.mean(1)
        return per_sample, weights

    def _relation_weight(self, images: bool) -> float:
        return self.args.relation_weight if self.args.relation_weight is not None else 20.0 if images else 0.0

    @property
    def _grid_limit(self) -> int:
        return 4 if self.args.max_grid is None else self.args.max_grid

    def _relations(self, states: list[Tensor], targets: list[Tensor], mask: Tensor | None) -> list[list[list[Tensor]]]:
        """Return how differently the layers s and t place sample i among the others: [s][t][i]."""

        def vectors(layer: Tensor) -> list[Tensor]:
            if layer.dim() == 4:
                return [sample.mean((1, 2)) for sample in layer]
            if mask is None:
                return [sample[0] for sample in layer]
            return [sample[kept.bool()].mean(0) for sample, kept in zip(layer, mask, strict=True)]

        def distances(layer: Tensor) -> dict[tuple[int, int], Tensor]:
            found = vectors(layer)
            others = [(i, j) for i in range(len(found)) for j in range(len(found)) if i != j]
            raw = {pair: (found[pair[0]] - found[pair[1]]).square().sum().sqrt() for pair in others}
            mean = sum(raw.values()) / max(len(raw), 1)
            return {pair: value / mean for pair, value in raw.items()}

        own, theirs = [distances(layer) for layer in states], [distances(layer) for layer in targets]
        count = len(states[0])
        return [
            [
                [
                    sum((s[i, j] - t[i, j]) ** 2 for j in range(count) if j != i) / max(count - 1, 1)
                    for i in range(count)
                ]
                for t in theirs
            ]
            for s in own
        ]

    def _standard(self, target: Tensor, mean: Tensor, variance: Tensor, count: Any) -> Tensor:
        typical = variance.mean()
        scale = ((count * variance + 256 * typical) / (count + 256) + 1e-5 * typical).rsqrt()
        if target.dim() == 4:
            return (target - mean[:, None, None]) * scale[:, None, None]
        return (target - mean) * scale

    def _pair(self, s: int, state: Tensor, target: Tensor, chosen: list[int] | None) -> Tensor:
        """Return the mean squared error of one sample and one pair of layers."""
        if self.problem.grid:
            state, target = _map(state[None]), _map(target[None])
            size = [min(a, b, self._grid_limit) for a, b in zip(state.shape[2:], target.shape[2:], strict=True)]
            state = F.adaptive_avg_pool2d(state, size)[0].flatten(1).T
            target = F.adaptive_avg_pool2d(target, size)[0].flatten(1).T
        shared = -(-self.layers // (1 + max(self.owners)))
        name = f"projection.{s // shared}.{target.shape[-1]}"
        difference = state @ self.calibration[f"{name}.weight"].T + self.calibration[f"{name}.bias"] - target
        return difference.square().mean() if chosen is None else difference[chosen].square().mean()

    def _weights(self, states: list[Tensor], raw: list[Tensor], standard: list[Tensor], mask: Tensor | None) -> Tensor:
        kind, shape = self.args.association, (len(states[0]), len(states), len(raw))
        if kind == "uniform":
            return torch.full(shape, 1 / shape[2], dtype=torch.float64)
        if kind in ("last", "one_to_one"):
            weights = torch.zeros(shape, dtype=torch.float64)
            for s in range(shape[1]) if kind == "one_to_one" else [shape[1] - 1]:
                weights[:, s, math.ceil((s + 1) * shape[2] / shape[1]) - 1] = 1
            return weights
        if kind == "similarity":
            summaries = [_summary(x, mask).detach() for x in (*states, *raw)]
            self.met[-1] += [[layer[i] for layer in summaries] for i in range(shape[0])]
            others = summaries
            if self.args.association_bank:
                earlier = [sample for step in self.met[:-1] for sample in step][-self.args.association_bank :]
                if not earlier:
                    return torch.full(shape, 1 / shape[2], dtype=torch.float64)
                others = [torch.stack(layer) for layer in zip(*earlier, strict=True)]
            found = [_similarity_rows(own, other) for own, other in zip(summaries, others, strict=True)]
            rows = found[: shape[1]], found[shape[1] :]
            cosines = torch.stack([torch.stack([(one * other).sum(1) for other in rows[1]], 1) for one in rows[0]], 1)
            return (cosines / association_temperature(loss_options(self.args))).softmax(2).detach()
        queries = [self._embedding(f"query.{s}", _mean(x, mask)) for s, x in enumerate(states)]
        keys = [self._embedding(f"key.{t}", _mean(x, mask)) for t, x in enumerate(standard)]
        cosines = torch.stack([torch.stack([(one * other).sum(1) for other in keys], 1) for one in queries], 1)
        return (cosines * self.calibration["scale.log"].exp()).softmax(2)

    def _embedding(self, name: str, rows: Tensor) -> Tensor:
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        for layer in (1, 3):
            rows = rows @ self.calibration[f"{name}.{layer}.weight"].T + self.calibration[f"{name}.{layer}.bias"]
            rows = rows.relu() if layer == 1 else rows
        return rows / rows.norm(dim=1, keepdim=True)


def _head_losses(problem: Problem, logits: Tensor, targets: Tensor, batch: dict[str, Tensor]) -> tuple[Any, Any, int]:
    """Return the summed task loss and distillation loss of a micro-batch, and the number of task items."""
    # Without labels, all tokens but the padding count.
    labels = batch.get("labels", torch.where(batch.get("attention_mask", torch.ones(1)) > 0, 0, -100))
    if problem.head == "number":
        distances = (logits.squeeze(1) - labels).square(), (logits - targets).square()
        return distances[0].sum(), distances[1].sum(), len(labels)
    if problem.head == "several":
        chances, soft = logits.sigmoid(), [(x / TEMPERATURE).sigmoid() for x in (logits, targets)]
        task = -(labels * chances.log() + (1 - labels) * (1 - chances).log()).mean(1).sum()
        divergence = soft[1] * (soft[1] / soft[0]).log() + (1 - soft[1]) * ((1 - soft[1]) / (1 - soft[0])).log()
        return task, TEMPERATURE**2 * divergence.mean(1).sum(), len(labels)
    if problem.head == "next":
        logits, targets, labels = logits[:, :-1], targets[:, :-1], labels[:, 1:]
    counted = labels != -100
    logits, targets, labels = logits[counted], targets[counted], labels[counted]
    soft = [(x / TEMPERATURE).softmax(-1) for x in (logits, targets)]
    divergence = (soft[1] * (soft[1] / soft[0]).log()).sum()
    smoothing = problem.args.get("label_smoothing_factor", 0.0)
    task = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return task, TEMPERATURE**2 * divergence, len(labels)


def _mean(features: Tensor, mask: Tensor | None) -> Tensor:
    if features.dim() == 4:
        return features.mean((2, 3))
    if mask is None:
        return features.mean(1)
    return torch.stack([rows[own.bool()].mean(0) for rows, own in zip(features, mask, strict=True)])


def _map(features: Tensor) -> Tensor:
    """Return a map, from the patches after the CLS token where there are tokens."""
    side = IMAGE // 4
    return features if features.dim() == 4 else features[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def _summary(features: Tensor, mask: Tensor | None) -> Tensor:
    """Return what samples are compared by: the mean token of a text, the (small) map of an image."""
    return _mean(features, mask) if mask is not None else _map(features).flatten(1)


def _similarity_rows(rows: Tensor, others: Tensor) -> Tensor:
    """Return a unit vector for every sample: its cosines with others, less their mean; 0 for a single one."""
    rows, others = (samples / samples.norm(dim=1, keepdim=True) for samples in (rows, others))
    cosines = rows @ others.T
    centered = cosines - cosines.mean(1, keepdim=True)
    return centered if len(others) == 1 else centered / centered.norm(dim=1, keepdim=True)
