"""A teacher whose logits are not needed stops after its last wanted layer, and gives the very same features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from makers import bert, distiller, gpt2, images, losses, resnet, texts, traces, vit, weights
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, SwinConfig, SwinForImageClassification

from hf_semckd.features import FeatureCapture, remove_capturing_traces
from hf_semckd.teacher import Teacher
from hf_semckd.truncation import find_truncation, runs_by_itself


def batch_of(dataset: Any, size: int = 3) -> dict[str, Any]:
    rows = [dataset[index] for index in range(size)]
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0] if key != "labels"}


def words() -> dict[str, Any]:
    return batch_of(texts(types=False))


def pictures() -> dict[str, Any]:
    return batch_of(images())


def calls_of(model: nn.Module) -> tuple[list[str], list[Any]]:
    """Return a list that fills with the names of the modules that run, and the handles of its hooks."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
    ]
    return called, handles


def albert() -> Any:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=40,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AlbertForSequenceClassification(config)


def swin() -> Any:
    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
    return SwinForImageClassification(config)


FAMILIES = {
    "bert": (lambda: bert(layers=4), words),
    "albert, one layer for all": (albert, words),
    "gpt2": (lambda: gpt2(layers=4), words),
    "vit": (lambda: vit(layers=4), pictures),
    "resnet": (lambda: resnet((8, 12, 16, 20)), pictures),
}


@pytest.mark.parametrize("layers", [[1, 2], [2], [2, 0], [0]])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_later_layers_do_not_run_and_features_are_equal(family: str, layers: list[int]) -> None:
    make, data = FAMILIES[family]
    model, batch = make(), data()
    whole = Teacher(model, layers)
    expected = whole.run(batch, logits=False, features=True)
    called, handles = calls_of(model)
    whole.run(batch, logits=False, features=True)
    all_calls = len(called)
    teacher = Teacher(model, layers)
    teacher.prepare(batch, logits=False, features=True)
    called.clear()
    outputs = teacher.run(batch, logits=False, features=True)
    for handle in handles:
        handle.remove()
    assert not [name for name in called if name.split(".")[-1] in ("classifier", "lm_head")]
    assert 0 < len(called) < all_calls * (0.8 if max(layers) else 0.4)
    assert all(map(torch.equal, outputs.features, expected.features)) and len(outputs.features) == len(layers)
    assert outputs.logits is None
    assert (outputs.mask is None) == (expected.mask is None)


def test_exactly_the_layers_before_the_last_wanted_one_run() -> None:
    model, batch = bert(layers=4), words()
    teacher = Teacher(model, [1, 2])
    teacher.prepare(batch, logits=False, features=True)
    called, _ = calls_of(model)
    teacher.run(batch, logits=False, features=True)
    blocks = [name for name in called if name.split(".")[-2:-1] == ["layer"] or name.split(".")[-2:-1] == ["layers"]]
    assert [name.rpartition(".")[2] for name in blocks] == ["0", "1"]


def test_all_layers_still_save_the_head() -> None:
    model, batch = gpt2(layers=3), words()
    teacher = Teacher(model, [1, 2, 3])
    teacher.prepare(batch, logits=False, features=True)
    called, _ = calls_of(model)
    outputs = teacher.run(batch, logits=False, features=True)
    assert "lm_head" not in called
    assert torch.equal(outputs.features[2], model(**batch, output_hidden_states=True).hidden_states[3])


def test_another_batch_of_another_length_gives_its_own_features() -> None:
    model = bert(layers=4)
    teacher = Teacher(model, [1, 2])
    teacher.prepare(words(), logits=False, features=True)
    other = batch_of(texts(types=False, length=7, seed=5), size=2)
    outputs = teacher.run(other, logits=False, features=True)
    expected = Teacher(model, [1, 2]).run(other, logits=False, features=True)
    assert all(map(torch.equal, outputs.features, expected.features))


class Blocks(nn.Module):
    """Three layers, run in an order that is not that of their names."""

    def __init__(self, wander: bool = False):
        super().__init__()
        self.c, self.a, self.b = (nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)
        self.wander, self.runs = wander, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.wander and self.runs > 2:
            return self.head(self.b(self.a(x.relu())))
        return self.head(self.b(self.a(self.c(x))))


def test_named_layers_stop_at_the_one_that_runs_last() -> None:
    model, batch = Blocks(), {"x": torch.randn(2, 4)}
    teacher = Teacher(model, ["a", "c"])
    teacher.prepare(batch, logits=False, features=True)
    called, _ = calls_of(model)
    outputs = teacher.run(batch, logits=False, features=True)
    assert called == ["", "c", "a"]
    first = model.c(batch["x"])
    assert torch.equal(outputs.features[0], model.a(first)) and torch.equal(outputs.features[1], first)


def test_a_model_that_goes_another_way_later_runs_whole() -> None:
    model, batch = Blocks(wander=True), {"x": torch.randn(2, 4)}
    truncated = find_truncation(model, FeatureCapture(model, ["c"], "teacher"), batch)
    assert truncated is not None and truncated.last == ("c", 1)
    assert truncated(model, batch) is None


def test_hidden_states_that_no_module_returns_are_had_from_the_whole_model() -> None:
    """Swin's maps are rearranged copies of what its stages return."""
    model, batch = swin(), pictures()
    teacher = Teacher(model, [1])
    teacher.prepare(batch, logits=False, features=True)
    assert teacher._truncated is None
    called, _ = calls_of(model)
    assert teacher.run(batch, logits=False, features=True).features[0].dim() == 4
    assert "classifier" in called


class InPlace(nn.Module):
    """Changes what a module returned after it was recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        hidden += 1
        return self.second(hidden)


def test_features_that_are_changed_later_are_had_from_the_whole_model() -> None:
    model = InPlace()
    assert find_truncation(model, FeatureCapture(model, ["first"], "teacher"), {"x": torch.randn(2, 4)}) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda model: setattr(model, "hf_device_map", {"": 0}),
        lambda model: setattr(model.head, "_hf_hook", object()),
        lambda model: setattr(next(model.parameters()), "ds_id", 1),
    ],
)
def test_a_model_that_counts_on_its_end_runs_whole(spoil: Callable[[Any], None]) -> None:
    model = Blocks()
    assert runs_by_itself(model)
    spoil(model)
    assert not runs_by_itself(model)
    assert find_truncation(model, FeatureCapture(model, ["a"], "teacher"), {"x": torch.randn(2, 4)}) is None


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_a_configuration_that_captures_by_itself_runs_whole(name: str) -> None:
    """Before 5.2x, an exception would leave transformers' replaced forwards on the layers."""
    model = vit(layers=4, attn_implementation="eager")
    setattr(model.config, name, True)
    assert find_truncation(model, FeatureCapture(model, [1], "teacher"), pictures()) is None


def test_logits_need_the_whole_model() -> None:
    teacher = Teacher(vit(layers=4), [1])
    teacher.prepare(pictures(), logits=True, features=True)
    assert teacher._truncated is None
    teacher.prepare(pictures(), logits=False, features=True)
    assert teacher._truncated is not None
    assert teacher.run(pictures(), logits=True, features=True).logits is not None


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_model_is_left_as_it_was_and_still_gives_hidden_states(family: str) -> None:
    make, data = FAMILIES[family]
    model, batch = make(), data()
    before = traces(model.eval().requires_grad_(False))
    expected = model(**batch, output_hidden_states=True).hidden_states
    teacher = Teacher(model, [1])
    teacher.prepare(batch, logits=False, features=True)
    teacher.run(batch, logits=False, features=True)
    again = model(**batch, output_hidden_states=True).hidden_states
    assert len(again) == len(expected) and all(map(torch.equal, again, expected))
    assert model(**batch).hidden_states is None
    remove_capturing_traces(model)
    assert traces(model) == before


def test_a_training_gives_the_same_student_and_stops_the_teacher_early(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = []
    for cut in (True, False):
        if not cut:
            monkeypatch.setattr("hf_semckd.teacher.find_truncation", lambda *_: None)
        trainer = distiller(
            tmp_path, {"logit_weight": 0.0, "teacher_layers": [1, 2]}, teacher_model=vit(4, 24, seed=9)
        )
        called, _ = calls_of(trainer.teacher)
        trainer.train()
        assert ("classifier" in called) is not cut
        outcomes.append((weights(trainer.student), losses(trainer, "feature_loss")))
    assert outcomes[0][1] == outcomes[1][1]
    assert all(torch.equal(value, outcomes[1][0][name]) for name, value in outcomes[0][0].items())
