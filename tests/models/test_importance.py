"""What is kept by calibration: silent units go first whatever their weights, and blocks by what the loss says."""

import copy

import pytest
import torch
from makers import bert, gpt2, vit
from matrix.cells import case, outputs_of
from torch import nn

from hf_semckd import make_student
from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.models.importance import block_losses
from hf_semckd.models.sizes import find_depths
from hf_semckd.models.unit_scores import unit_scores
from hf_semckd.models.units import Units

TEXTS = {"input_ids": torch.arange(2, 26).view(4, 6), "labels": torch.tensor([0, 1, 2, 0])}


def test_units_that_are_silent_on_the_batch_go_whatever_their_weights():
    model = bert(2, 32, num_attention_heads=4, intermediate_size=64)
    with torch.no_grad():
        for block in model.bert.encoder.layer:
            # GELU of a large negative number is nothing: the first half says nothing, with large weights after it.
            block.intermediate.dense.bias[:32] = -100
            block.output.dense.weight[:, :32] *= 100
            for each in (block.attention.self.query, block.attention.self.key):
                each.weight[:16] *= 100
            block.attention.self.value.weight[:16] = 0
            block.attention.self.value.bias[:16] = 0
            block.attention.output.dense.weight[:, :16] *= 100
    kept = {}
    for batch in (None, TEXTS):
        student = make_student(model, hidden_size=16, batch=batch, report=False)
        layers = student.bert.encoder.layer
        kept[batch is None] = [bool((layer.intermediate.dense.bias > -50).all()) for layer in layers]
        heads = [bool((layer.attention.self.value.weight != 0).any()) for layer in layers]
        assert all(heads) == (batch is not None)
    assert kept == {True: [False, False], False: [True, True]}


def test_channels_are_scored_by_what_layers_read_of_them():
    """The scores are those of the definition, computed here from the inputs of one linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    read = torch.randn(5, 4)
    labels = {("1.weight", 1): Units("inner", 3, (2,)), ("0.weight", 0): Units("inner", 3, (2,))}

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = model

        def forward(self, x, attention_mask):
            return self.layers(x)

    both = {(f"layers.{name}", axis): units for (name, axis), units in labels.items()}
    mask = torch.ones(1, 5)
    mask[0, 4] = 0
    scores = unit_scores(Reads(), both, {"x": read[None], "attention_mask": mask})["inner"]
    inside = model[0](read[:4])
    expected = (inside.square().mean(0) * model[1].weight.square().sum(0)).view(3, 2).sum(1)
    torch.testing.assert_close(scores, (expected / expected.sum()).detach())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_table_says_how_units_were_chosen(capsys):
    make_student(vit(2, 32), hidden_size=16)
    assert "those with the largest weights" in capsys.readouterr().out
    make_student(vit(2, 32), hidden_size=16, batch={"pixel_values": torch.randn(2, 3, 16, 16)})
    assert "those with the largest activations times weights" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["bert", "gpt2", "vit"])
def test_the_loss_without_a_block_is_that_of_a_model_cut_by_hand(kind):
    batch = {"input_ids": TEXTS["input_ids"], "labels": TEXTS["input_ids"]} if kind == "gpt2" else TEXTS
    if kind == "vit":
        batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 2])}
    model = {"bert": bert, "gpt2": gpt2, "vit": vit}[kind](4).eval()
    with torch.no_grad():
        for entry in model.parameters():
            entry.add_(0.1 * torch.randn_like(entry))
    (depth,) = find_depths(model)
    expected = []
    for block in range(4):
        cut = copy.deepcopy(model)
        del cut.get_submodule(depth.lists[0])[block]
        with torch.no_grad():
            expected.append(cut(**batch, **({"use_cache": False} if kind == "gpt2" else {})).loss.item())
    torch.testing.assert_close(block_losses(model, depth, batch), expected, rtol=1e-5, atol=1e-6)
    student = make_student(model, num_layers=2, importance="loss", batch=batch, report=False)
    kept = sorted(sorted(range(4), key=lambda block: -expected[block])[:2])
    blocks = model.get_submodule(depth.lists[0])
    own = student.get_submodule(depth.lists[0])
    for place, block in enumerate(kept):
        for one, other in zip(own[place].parameters(), blocks[block].parameters(), strict=True):
            assert torch.equal(one, other)


def test_an_encoder_and_a_decoder_are_measured_each_by_itself():
    model, _ = case("bart")
    inputs = {"input_ids": torch.randint(5, 60, (3, 8)), "labels": torch.tensor([0, 1, 2])}
    inputs["input_ids"][:, -1] = 2
    depths = find_depths(model)
    losses = [block_losses(model, depth, inputs) for depth in depths]
    assert len(depths) == 2 and all(len(each) == 3 for each in losses) and losses[0] != losses[1]
    student = make_student(model, num_layers=[2, 1], importance="loss", batch=inputs, report=False)
    assert (student.config.encoder_layers, student.config.decoder_layers) == (2, 1)


def test_a_loss_that_cannot_be_measured_is_refused():
    words = {"input_ids": TEXTS["input_ids"]}
    with pytest.raises(InputError, match=r"(?s)returns no loss.*labels"):
        make_student(bert(3), num_layers=2, importance="loss", batch=words, report=False)
    with pytest.raises(ConfigurationError, match="there is none"):
        make_student(bert(3), num_layers=2, importance="loss", report=False)
    with pytest.raises(ConfigurationError, match="no such importance"):
        make_student(bert(3), num_layers=2, importance="size", report=False)


def test_a_block_that_cannot_be_removed_is_kept():
    """The first block of a stage halves the resolution."""
    model, inputs = case("resnet")
    depths = find_depths(model)
    labeled = {**inputs, "labels": torch.tensor([0, 1])}
    losses = block_losses(model, depths[0], labeled)
    assert losses[0] == float("inf") > losses[1]


def test_measuring_leaves_the_teacher_as_it_was():
    model = bert(3).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for importance in ("change", "loss"):
        make_student(model, num_layers=2, hidden_size=8, importance=importance, batch=TEXTS, report=False)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrapped_and_quantized_teachers_are_refused_with_what_to_do():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(bert(2), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(InputError, match=r"(?s)adapters.*merge_and_unload"):
        make_student(adapted, num_layers=1, report=False)
    merged = adapted.merge_and_unload()
    assert outputs_of(make_student(merged, num_layers=1, report=False), {"input_ids": TEXTS["input_ids"]}) is not None
    quantized = bert(2)
    quantized.is_quantized = True
    with pytest.raises(InputError, match=r"(?s)quantized.*dequantize"):
        make_student(quantized, num_layers=1, report=False)
