"""The parts of a distillation: composed in one place, and none of them holds the trainer."""

import functools
import types
from typing import Any

import pytest
import torch
from makers import IMAGE, LABELS, bert, config, distiller, gpt2, images, resnet, texts, vit
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer

from hf_semckd import SemCKDTrainer

PAIRS = {
    "text": (bert, lambda: bert(3, 24, seed=9), lambda: texts(10)),
    "words": (gpt2, lambda: gpt2(3, 24, seed=9), lambda: texts(10, labels="input", types=False)),
    "images": (vit, lambda: vit(3, 24, seed=9), lambda: images(10)),
    "maps": (resnet, lambda: resnet((8, 16), seed=9), lambda: images(10)),
}


def held_by(entry: Any) -> list[Any]:
    """Return what an object refers to: attributes, items, and what functions close over."""
    held = list(vars(entry).values()) if hasattr(entry, "__dict__") and not isinstance(entry, type) else []
    if isinstance(entry, dict):
        held += list(entry.values())
    elif isinstance(entry, (list, tuple, set, frozenset)):
        held += list(entry)
    elif isinstance(entry, types.MethodType):
        held += [entry.__self__, entry.__func__]
    elif isinstance(entry, functools.partial):
        held += [entry.func, *entry.args, *entry.keywords.values()]
    elif isinstance(entry, types.FunctionType):
        held += [cell.cell_contents for cell in entry.__closure__ or () if cell.cell_contents is not None]
    return held


def trainers_within(part: Any) -> list[str]:
    """Return the ways that lead from a part to a trainer."""
    found, waiting, seen = [], [(part, type(part).__name__)], set()
    while waiting:
        entry, path = waiting.pop()
        if id(entry) in seen or isinstance(entry, (torch.Tensor, types.ModuleType, type, Dataset, DataLoader, str)):
            continue
        seen.add(id(entry))
        if isinstance(entry, Trainer):
            found.append(path)
            continue
        waiting += [(held, f"{path} > {type(held).__name__}") for held in held_by(entry)]
    return found


def test_the_search_finds_a_trainer_that_is_held(tmp_path):
    trainer = distiller(tmp_path)
    for part in (trainer.train, functools.partial(print, trainer), lambda: trainer, {"deep": [trainer]}):
        assert trainers_within(part)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("pair", PAIRS)
def test_no_part_refers_to_a_trainer(tmp_path, pair, cached):
    student, teacher, data = PAIRS[pair]
    args = {"teacher_cache_dir": str(tmp_path / "cache")} if cached else {}
    trainer = distiller(tmp_path, args=args, model=student(), teacher_model=teacher(), train_dataset=data())
    trainer.train()
    assert trainers_within(trainer.distillation) == []
    assert trainers_within(trainer.pair) == []


@pytest.mark.parametrize("pair", PAIRS)
def test_the_loss_of_a_batch_is_the_same_whenever_it_is_computed(tmp_path, pair):
    """Once with the counts of its step, which travel with it, and once more with the very same batch."""
    student, teacher, data = PAIRS[pair]
    seen: list[tuple[float, float]] = []

    class Twice(type(distiller(tmp_path / "other"))):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            before = set(inputs)
            first = super().compute_loss(model, inputs, *args, **kwargs)
            again = super().compute_loss(model, inputs, *args, **kwargs)
            assert set(inputs) == before, "the caller's batch is not changed"
            seen.append((float(first.detach()), float(again.detach())))
            return again

    base = distiller(
        tmp_path,
        args={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
        model=student(),
        teacher_model=teacher(),
        train_dataset=data(),
    )
    base.__class__ = Twice
    base.train()
    assert len(seen) == 6 and all(first == again for first, again in seen), seen


def test_a_batch_without_counts_is_a_step_of_its_own(tmp_path):
    trainer = distiller(tmp_path, args={"max_steps": 1, "per_device_train_batch_size": 4})
    losses: list[float] = []
    original = type(trainer).compute_loss

    class Watching(type(trainer)):
        def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            bare = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
            assert len(bare) < len(inputs), "the counts of its step travel with a batch"
            losses.append(float(original(self, model, bare, *args, **kwargs).detach()))
            losses.append(float(original(self, model, inputs, *args, **kwargs).detach()))
            return original(self, model, inputs, *args, **kwargs)

    trainer.__class__ = Watching
    trainer.train()
    assert losses[0] == losses[1]


class WithoutLoss(nn.Module):
    """A classifier that takes no labels."""

    def __init__(self, width: int):
        super().__init__()
        self.body, self.head = nn.Linear(3 * IMAGE * IMAGE, width), nn.Linear(width, LABELS)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pixel_values.flatten(1)))


def test_a_module_that_computes_no_loss_is_evaluated_without_training_data(tmp_path):
    torch.manual_seed(0)
    student, rows = WithoutLoss(4), images(6)
    settings = config(tmp_path, label_names=["labels"], student_layers=["body"], teacher_layers=["body"])
    trainer = SemCKDTrainer(student, settings, eval_dataset=rows, teacher_model=WithoutLoss(8))
    pixels, labels = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("pixel_values", "labels"))
    expected = nn.functional.cross_entropy(student.eval()(pixels), labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
