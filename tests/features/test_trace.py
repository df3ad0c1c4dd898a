"""Blocks, patches and special tokens are found from what modules do, and are those that a person would name."""

from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

from hf_semckd.errors import InputError
from hf_semckd.features.capture import FeatureCapture
from hf_semckd.features.trace import ForwardTrace, find_blocks, find_layers, pattern_of, towers

TEXT = {"vocab_size": 60, "num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2}
WIDE = {**TEXT, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}
HEADS = {"num_attention_heads": [1, 1, 2, 2]}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 2]}
SPEECH = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}

# A model, the modules that a person would name, and the grids and special tokens of its layers.
FAMILIES: dict[str, tuple[Any, list[str], list[tuple[tuple[int, int], int]] | None]] = {
    "llama": (
        lambda: tf.LlamaModel(tf.LlamaConfig(**WIDE)),
        ["layers.0", "layers.1", "norm"],
        None,
    ),
    "mamba": (
        lambda: tf.MambaModel(tf.MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=3, state_size=4)),
        ["layers.0", "layers.1", "layers.2"],
        None,
    ),
    "canine": (
        lambda: tf.CanineModel(tf.CanineConfig(**WIDE)),
        ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"],
        None,
    ),
    "squeezebert": (
        lambda: tf.SqueezeBertModel(tf.SqueezeBertConfig(**WIDE, embedding_size=16)),
        ["encoder.layers.0.output", "encoder.layers.1.output", "encoder"],
        None,
    ),
    "pvt": (
        lambda: tf.PvtModel(tf.PvtConfig(**{**STAGES, "hidden_sizes": [8, 12, 16, 16]}, **HEADS, image_size=64)),
        ["encoder.block.0.0", "encoder.block.1.0", "encoder.block.1.1", "encoder.block.2.0", "encoder.block.3.0"],
        [((16, 16), 0), ((8, 8), 0), ((8, 8), 0), ((4, 4), 0), ((2, 2), 1)],
    ),
    "swiftformer": (
        lambda: tf.SwiftFormerModel(tf.SwiftFormerConfig(embed_dims=STAGES["hidden_sizes"], depths=STAGES["depths"])),
        ["encoder.network.0", "encoder.network.2", "encoder.network.4", "encoder.network.6"],
        None,
    ),
    "textnet": (
        lambda: tf.TextNetModel(tf.TextNetConfig()),
        [f"encoder.stages.{n}" for n in range(4)],
        None,
    ),
    "swin": (
        lambda: tf.SwinModel(tf.SwinConfig(**SWIN, window_size=4)),
        ["encoder.layers.0.blocks.1", "encoder.layers.1.blocks.1", "encoder.layers.2"],
        [((16, 16), 0), ((8, 8), 0), ((4, 4), 0)],
    ),
    "yolos": (
        lambda: tf.YolosModel(
            tf.YolosConfig(**{**WIDE, "vocab_size": None}, image_size=[32, 32], patch_size=8, num_detection_tokens=5)
        ),
        ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"],
        [((4, 4), 1)] * 3,
    ),
}


def inputs_of(name: str, model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    if model.main_input_name == "pixel_values":
        size = 64 if name in ("pvt", "swiftformer", "textnet") else 32
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    return {"input_ids": torch.randint(3, 60, (2, 12), generator=generator)}


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_the_outputs_of_the_modules_that_a_person_would_name(name):
    make, modules, grids = FAMILIES[name]
    torch.manual_seed(0)
    model = make().eval()
    inputs, seen = inputs_of(name, model), {}
    handles = [
        model.get_submodule(module).register_forward_hook(lambda _, args, output, n=module: seen.update({n: output}))
        for module in modules
    ]
    capture = FeatureCapture(model, None, "student")
    with torch.no_grad():
        found = capture.find(model, inputs)
    for handle in handles:
        handle.remove()
    assert len(found.features) == len(modules)
    for feature, module in zip(found.features, modules, strict=True):
        output = seen[module]
        output = output if isinstance(output, torch.Tensor) else output[0]
        # Convolutions over tokens have their channels second.
        same = output.shape == feature.shape
        torch.testing.assert_close(feature, output if same else output.transpose(1, 2), rtol=0, atol=0)
    if grids is not None:
        specs = found.describe(of_image=True)
        assert [(spec.grid, spec.prefix) for spec in specs] == grids


def test_channels_of_reshaped_states_come_first():
    """Hiera gives maps whose channels are last."""
    sizes = {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 2, 2]}
    model = tf.HieraModel(tf.HieraConfig(image_size=[64, 64], **sizes)).eval()
    capture = FeatureCapture(model, None, "student")
    with torch.no_grad():
        found = capture.find(model, {"pixel_values": torch.randn(2, 3, 64, 64)})
    shapes = [tuple(feature.shape[1:]) for feature in found.features]
    assert shapes == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]


class Stages(nn.Module):
    """A CNN that returns no hidden states, like those of torchvision: `layer1` and `layer2` hold blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layer1 = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(2)))
        self.layer2 = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def plain_list() -> nn.Module:
    """Return a CNN that is one list of layers, as VGG."""
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU()]
    return nn.ModuleDict({"features": nn.Sequential(*layers)})["features"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [(Stages(), ["layer1.1", "layer2.0"]), (plain_list(), ["1", "4"])],
    ids=["stages", "list"],
)
def test_blocks_of_a_plain_module_are_found(model, expected):
    with torch.no_grad(), ForwardTrace.recording(model) as trace:
        model(torch.randn(2, 3, 8, 8))
    assert find_blocks(trace) == expected
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_dropped_block_passes_its_input_on_and_teaches_nothing():
    """LayerDrop leaves blocks out in training: the layer is then the detached one before it."""
    torch.manual_seed(0)
    model = tf.Wav2Vec2Model(
        tf.Wav2Vec2Config(**{**WIDE, "num_hidden_layers": 4}, **SPEECH, layerdrop=0.5, mask_time_prob=0.0)
    )
    inputs = {"input_values": torch.randn(2, 1600)}
    capture = FeatureCapture(model, None, "student")
    with torch.no_grad():
        capture.find(model.eval(), inputs)
    assert capture.layers == [f"encoder.layers.{n}" for n in range(4)]
    model.train()
    counts = set()
    for _ in range(8):
        with capture.recording(model) as recorded:
            outputs = model(**inputs, **capture.request())
        ran = [name in recorded for name in capture.names()]
        features = capture.collect(outputs, recorded)
        assert [feature.requires_grad for feature in features] == ran
        for n in range(1, 4):
            assert ran[n] or torch.equal(features[n], features[n - 1])
        counts.add(sum(ran))
    assert len(counts) > 1


def test_states_that_no_module_made_are_what_the_model_says():
    states = (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert find_layers(states, ForwardTrace()) is None
    model = nn.ModuleList([nn.Identity()])
    with ForwardTrace.recording(model) as trace:
        made = model[0](states[1])
    found = find_layers((states[0], made, states[2]), trace)
    assert found is not None and found.states == [1, 2] and found.modules == ["0", ""]


def test_numbers_in_names_make_a_pattern():
    assert pattern_of("encoder.layer.11.mlp") == "encoder.layer.#.mlp" and pattern_of("0") == "#"


class Experts(nn.Module):
    """Two blocks with two experts each; no token is sent to the second."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for experts in self.layers:
            x = experts[0](x) + experts[1](x[:, :0]).sum()
        return x


def test_an_expert_that_no_token_was_sent_to_is_no_call():
    model = Experts()
    with torch.no_grad(), ForwardTrace.recording(model) as trace:
        model(torch.randn(2, 3, 4))
    assert [call.name for call in trace.calls if call.name] == ["layers.0.0", "layers.1.0"]


def test_series_have_their_channels_last_and_the_last_block_counts():
    """PatchTST gives (samples, series, patches, channels), and notes what goes into its blocks."""
    sizes = {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "ffn_dim": 32, "num_targets": 3}
    config = tf.PatchTSTConfig(
        num_input_channels=3, context_length=32, patch_length=8, patch_stride=8, use_cls_token=True, **sizes
    )
    model = tf.PatchTSTForClassification(config).eval()
    capture = FeatureCapture(model, None, "student")
    with torch.no_grad():
        found = capture.find(model, {"past_values": torch.randn(2, 32, 3)})
    assert found.names == [f"model.encoder.layers.{n}" for n in range(3)]
    assert [tuple(feature.shape) for feature in found.features] == [(2, 15, 16)] * 3


class ChannelsLast(nn.Module):
    """Stages with channels last and a transition between them, like torchvision's Swin."""

    class Block(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(self.norm(x))

    class Merging(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.reduction = nn.Linear(4 * width, 2 * width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            parts = [x[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
            return self.reduction(torch.cat(parts, -1))

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(16, 3)
        stages = [nn.Sequential(*(self.Block(width) for _ in range(2))) for width in (8, 16)]
        self.features = nn.Sequential(stages[0], self.Merging(8), stages[1])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(self.patches(pixel_values).permute(0, 2, 3, 1)).mean((1, 2)))


def test_stages_with_their_channels_last_become_maps_and_transitions_are_no_blocks():
    model, seen = ChannelsLast().eval(), {}
    for name in ("features.0", "features.2"):
        model.get_submodule(name).register_forward_hook(lambda _, args, output, n=name: seen.update({n: output}))
    capture = FeatureCapture(model, None, "student")
    with torch.no_grad():
        found = capture.find(model, {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert found.names == ["features.0", "features.2"]
    for name, feature in zip(found.names, found.features, strict=True):
        assert torch.equal(feature, seen[name].permute(0, 3, 1, 2))


@pytest.mark.parametrize("margin", ["black", "white", "none"])
def test_patches_do_not_depend_on_what_the_images_show(margin):
    """Scans with a common margin have patches that never change, as the model's own tokens do."""
    pixels = torch.rand(2, 3, 32, 32)
    if margin != "none":
        pixels[:, :, :8] = pixels[:, :, :, -8:] = float(margin == "white")
        pixels[:, :, 8:16, 8:16] = 0.5
    model = tf.ViTModel(tf.ViTConfig(**{**WIDE, "image_size": 32, "patch_size": 4})).eval()
    for images in (pixels, pixels[:1], torch.zeros_like(pixels)):
        with torch.no_grad():
            found = FeatureCapture(model, None, "student").find(model, {"pixel_values": images})
        assert [(spec.grid, spec.prefix) for spec in found.describe(of_image=True)] == [((8, 8), 1)] * 3
        assert all(len(feature) == len(images) for feature in found.features)


class Sounds(nn.Module):
    """A plain convolutional network on sounds: (samples, channels, time)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, 6, 3, padding=1), nn.BatchNorm1d(6), nn.ReLU()) for width in (1, 6)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(2))


def test_the_positions_of_a_sound_are_its_tokens():
    model, seen = Sounds().eval(), []
    model.blocks[1].register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        found = FeatureCapture(model, None, "student").find(model, {"x": torch.randn(2, 1, 20)})
    assert [(spec.length, spec.channels) for spec in found.describe(of_image=True)] == [(20, 6)] * 2
    assert torch.equal(found.features[1], seen[-1].transpose(1, 2))


def test_layers_that_do_not_begin_with_the_samples_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = model, nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x.transpose(0, 1)).mean(0))

    outer = Sequence().eval()
    with torch.no_grad(), pytest.raises(InputError, match=r"(?s)does not begin with the samples.*batch_first"):
        FeatureCapture(outer, None, "student").find(outer, {"x": torch.randn(2, 5, 4)})


def test_towers_are_found_below_a_common_part():
    names = [f"clip.{tower}_model.encoder.layers.{n}" for tower in ("vision", "text") for n in range(2)]
    assert towers(names) == ["vision_model", "vision_model", "text_model", "text_model"]
    assert towers(["layer1.0", "layer1.1", "layer2.0"]) == []
    assert towers(["encoder.layers.0", "encoder.layers.1"]) == [] and towers([]) == []
