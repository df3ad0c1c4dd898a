"""Layers are found in real architectures, named errors help, and no hook outlives its context."""

from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
import transformers as tf
from torch import nn

from hf_semckd.errors import InputError, LayerNotFoundError
from hf_semckd.features.capture import FeatureCapture
from hf_semckd.features.layers import FeatureSpec, describe, hidden_states, without_hidden_states
from hf_semckd.features.trace import ForwardTrace
from hf_semckd.models.outputs import accepts

DEPTH = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
WIDE = {**DEPTH, "intermediate_size": 32}
PATCHES = {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 12, 16], "depths": [1, 1, 1]}


def gpt2():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return tf.GPT2Model(tf.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=3, n_head=2, **ends))


def swin():
    shape = {"embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "window_size": 4}
    return tf.SwinModel(tf.SwinConfig(image_size=32, patch_size=2, **shape))


def mobilevit():
    necks = [8, 8, 12, 16, 16, 20, 24]
    config = tf.MobileViTConfig(hidden_sizes=[16, 20, 24], neck_hidden_sizes=necks, num_attention_heads=2)
    return tf.MobileViTModel(config)


def dinov2_with_registers():
    config = tf.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **PATCHES, **DEPTH)
    return tf.Dinov2WithRegistersModel(config)


BUILDERS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(vocab_size=50, max_position_embeddings=32, **WIDE)),
    "distilbert": lambda: tf.DistilBertModel(
        tf.DistilBertConfig(vocab_size=50, max_position_embeddings=32, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
    ),
    "gpt2": gpt2,
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**PATCHES, **WIDE)),
    "deit": lambda: tf.DeiTModel(tf.DeiTConfig(**PATCHES, **WIDE)),
    "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(mlp_ratio=2, **PATCHES, **DEPTH)),
    "dinov2_with_registers": dinov2_with_registers,
    "resnet": lambda: tf.ResNetModel(tf.ResNetConfig(embedding_size=8, layer_type="basic", **STAGES)),
    "convnext": lambda: tf.ConvNextModel(tf.ConvNextConfig(num_stages=3, **STAGES)),
    "swin": swin,
    "mobilevit": mobilevit,
}
TEXT = {"bert", "distilbert", "gpt2"}


def build(name):
    torch.manual_seed(0)
    return BUILDERS[name]().eval()


def inputs_for(name, size=(32, 32)):
    if name in TEXT:
        return {"input_ids": torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(1))}
    return {"pixel_values": torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))}


def capture(model, layers, inputs, role="student"):
    """Run the whole path: request, record, resolve, collect."""
    capture = FeatureCapture(model, layers, role)
    with torch.no_grad():
        found = capture.find(model, inputs)
    return capture, found.features


def described(model, inputs):
    """Return the names and specifications of all blocks."""
    capture = FeatureCapture(model, None, "student")
    with torch.no_grad():
        found = capture.find(model, inputs)
    return capture, found.features, found.describe(of_image="input_ids" not in inputs)


def hook_count(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# Finding all blocks


TOKENS, PATCH_TOKENS = ("tokens", 16, 7, None, 0), ("tokens", 16, 17, (4, 4), 1)
SPATIAL = [("map", 8, 64, (8, 8), 0), ("map", 12, 16, (4, 4), 0), ("map", 16, 4, (2, 2), 0)]
EXPECTED = {
    "bert": ([1, 2, 3], [TOKENS] * 3),
    "distilbert": ([1, 2, 3], [TOKENS] * 3),
    "gpt2": ([1, 2, 3], [TOKENS] * 3),
    "vit": ([1, 2, 3], [PATCH_TOKENS] * 3),
    "deit": ([1, 2, 3], [("tokens", 16, 18, (4, 4), 2)] * 3),
    "dinov2": ([1, 2, 3], [PATCH_TOKENS] * 3),
    "dinov2_with_registers": ([1, 2, 3], [("tokens", 16, 20, (4, 4), 4)] * 3),
    "resnet": ([1, 2, 3], SPATIAL),
    "convnext": ([1, 2, 3], SPATIAL),
    "swin": (
        # Before the resolution is halved, and not after it.
        ["encoder.layers.0.blocks.0", "encoder.layers.1.blocks.0", "encoder.layers.2"],
        [("tokens", 8, 256, (16, 16), 0), ("tokens", 16, 64, (8, 8), 0), ("tokens", 32, 16, (4, 4), 0)],
    ),
    "mobilevit": (
        [0, 1, 2, 3, 4],
        [
            ("map", 8, 256, (16, 16), 0),
            ("map", 12, 64, (8, 8), 0),
            ("map", 16, 16, (4, 4), 0),
            ("map", 16, 4, (2, 2), 0),
            ("map", 20, 1, (1, 1), 0),
        ],
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_all_blocks_are_found_and_described(name):
    model, inputs = build(name), inputs_for(name)
    found, layers, specs = described(model, inputs)
    indices, expected = EXPECTED[name]
    assert found.layers == indices and found.names() == list(map(str, indices))
    assert [(spec.kind, spec.channels, spec.length, spec.grid, spec.prefix) for spec in specs] == expected
    for spec, layer in zip(specs, layers, strict=True):
        shape = (spec.channels, *spec.grid) if spec.kind == "map" else (spec.length, spec.channels)
        assert tuple(layer.shape) == (2, *shape)


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers"])
def test_the_grid_follows_the_image_and_not_the_configuration(name):
    model, inputs = build(name), inputs_for(name, size=(48, 24))
    keywords = {"interpolate_pos_encoding": True} if name == "vit" else {}
    _, _, (spec, *_) = described(model, {**inputs, **keywords})
    assert spec.grid == (6, 3) and spec.prefix == (1 if name == "vit" else 4)


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_the_captured_layers_are_the_blocks_own_outputs(name):
    model, inputs = build(name), inputs_for(name)
    _, layers = capture(model, None, inputs)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    assert all(torch.equal(layer, state) for layer, state in zip(layers, outputs.hidden_states[1:], strict=True))


def test_the_decoder_of_an_encoder_decoder_is_captured():
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = tf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2, **ends
    )
    torch.manual_seed(0)
    model = tf.T5Model(config).eval()
    inputs = {"input_ids": torch.randint(2, 50, (2, 7)), "decoder_input_ids": torch.randint(2, 50, (2, 4))}
    found, layers = capture(model, None, inputs)
    assert found.layers == [1, 2, 3] and all(layer.shape == (2, 4, 16) for layer in layers)


# Indices


@pytest.mark.parametrize(
    ("asked", "resolved"), [([0, 2], [0, 2]), ([-1], [3]), ([-4, 1, -2], [0, 1, 2]), ([3, 1], [3, 1])]
)
def test_indices_are_resolved_in_order_and_negative_ones_from_the_end(asked, resolved):
    model, inputs = build("bert"), inputs_for("bert")
    found, layers = capture(model, asked, inputs)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert found.layers == resolved
    assert all(torch.equal(layer, states[index]) for layer, index in zip(layers, resolved, strict=True))


@pytest.mark.parametrize(("index", "near"), [(4, 3), (99, 3), (-5, 0), (-40, 0)])
def test_an_index_that_is_not_there_names_the_range_and_the_nearest(index, near):
    with pytest.raises(LayerNotFoundError) as caught:
        capture(build("bert"), [1, index], inputs_for("bert"), role="teacher")
    text = str(caught.value)
    assert f"The teacher has no hidden state {index}" in text and f"teacher_layers with {index}" in text
    assert "from 0 (embedding or stem) to 3" in text and f"nearest is {near};" in text


def test_an_index_out_of_range_is_also_refused_when_collecting_without_resolving():
    model = build("bert")
    found = FeatureCapture(model, [7], "student")
    with torch.no_grad():
        outputs = model(**inputs_for("bert"), **found.request())
    with pytest.raises(LayerNotFoundError, match="no hidden state 7"):
        found.collect(outputs, {})


# Module names


class Twins(nn.Module):
    """Returns logits only; one block returns a tuple, one a mapping, one nothing, one does not run."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.first = Wrap(lambda x: (x.relu(), "rest"))
        self.second = Wrap(lambda x: {"note": "none", "state": x * 2})
        self.silent = Wrap(lambda x: None)
        self.unused = nn.Linear(6, 6)
        self.fails = False

    def forward(self, x):
        x = self.first(self.stem(x))[0]
        if self.fails:
            raise RuntimeError("broken forward")
        self.silent(x)
        return self.second(x)["state"]


class Wrap(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def twins():
    torch.manual_seed(0)
    return Twins(), {"x": torch.randn(3, 5, 4)}


def test_module_names_give_the_outputs_of_those_modules_in_the_order_asked():
    model, inputs = build("vit"), inputs_for("vit")
    names = [name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer"]
    found, layers = capture(model, names[::-1], inputs)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    assert found.names() == names[::-1] and found.request() == {}
    assert all(torch.equal(layer, state) for layer, state in zip(layers, states[:0:-1], strict=True))


def test_the_first_tensor_of_a_tuple_or_mapping_is_recorded():
    model, inputs = twins()
    _, (stem, first, second) = capture(model, ["stem", "first", "second"], inputs)
    assert torch.equal(first, stem.relu()) and torch.equal(second, first * 2)


@pytest.mark.parametrize("name", ["silent", "unused"])
def test_a_module_without_a_tensor_is_an_input_error_that_names_it(name):
    model, inputs = twins()
    with pytest.raises(InputError, match=rf"(?s)Module `{name}` of the teacher gave no tensor.*teacher_layers"):
        capture(model, ["stem", name], inputs, role="teacher")


@pytest.mark.parametrize(
    ("slip", "near"), [("{block}0", "{block}"), ("{block}.attentoin", "{block}"), ("poolr", "pooler")]
)
def test_an_unknown_module_name_shows_near_ones(slip, near):
    model = build("vit")
    # Versions of transformers name the blocks differently: encoder.layer.0, layers.0.
    block = next(name for name, _ in model.named_modules() if name.endswith(".0"))
    name, near = slip.format(block=block), near.format(block=block)
    with pytest.raises(LayerNotFoundError) as caught:
        FeatureCapture(model, [name], "student")
    assert f"no module `{name}`" in str(caught.value) and near in str(caught.value).split("expected:")[1]


def test_a_name_like_no_other_shows_the_first_modules():
    with pytest.raises(LayerNotFoundError, match=r"such as 'embeddings'"):
        FeatureCapture(build("vit"), ["zzzzzzzzzzz"], "student")


def test_the_root_module_has_no_name_that_could_be_asked_for():
    with pytest.raises(LayerNotFoundError):
        FeatureCapture(twins()[0], [""], "student")


# Hooks


def test_hooks_exist_only_while_recording():
    model, inputs = twins()
    found = FeatureCapture(model, ["stem", "first"], "student")
    before = hook_count(model)
    with found.recording(model) as recorded:
        assert hook_count(model) == before + 2
        model(**inputs)
    assert hook_count(model) == before and set(recorded) == {"stem", "first"}


def test_hooks_are_gone_after_a_failing_forward():
    model, inputs = twins()
    found, model.fails = FeatureCapture(model, ["stem", "second"], "student"), True
    with pytest.raises(RuntimeError, match="broken forward"), found.recording(model):
        model(**inputs)
    assert hook_count(model) == 0


def test_hooks_are_gone_when_a_name_no_longer_exists():
    model, _ = twins()
    found = FeatureCapture(model, ["stem", "first"], "student")
    del model.first
    with pytest.raises(LayerNotFoundError), found.recording(model):
        pass
    assert hook_count(model) == 0


def test_bad_names_leave_no_hook():
    model, _ = twins()
    with pytest.raises(LayerNotFoundError):
        FeatureCapture(model, ["stem", "frist"], "student")
    assert hook_count(model) == 0


def test_hooks_of_others_are_left_alone():
    model, inputs = twins()
    model.stem.register_forward_hook(lambda *_: None)
    capture(model, ["stem"], inputs)
    assert hook_count(model) == 1


@pytest.mark.parametrize("layers", [None, [1]])
def test_hidden_states_need_no_hook(layers):
    model = build("bert")
    before = hook_count(model)
    with FeatureCapture(model, layers, "student").recording(model):
        assert hook_count(model) == before


# Outputs


@pytest.mark.parametrize("layers", [None, [0], [-1]])
def test_a_model_without_hidden_states_is_an_input_error_that_names_the_layers_option(layers):
    model, inputs = twins()
    with pytest.raises(InputError) as caught:
        capture(model, layers, inputs)
    text = str(caught.value)
    assert "The student returns no hidden states" in text and "type Tensor" in text
    assert "student_layers" in text and "feature_weight=0" in text


def test_hidden_states_are_only_requested_from_a_forward_that_takes_them():
    assert FeatureCapture(twins()[0], None, "student").request() == {}
    bert = build("bert")
    assert FeatureCapture(bert, None, "student").request() == {"output_hidden_states": True, "return_dict": True}


def test_hidden_states_of_plain_objects_and_mappings_are_found():
    states = (torch.zeros(1), torch.ones(1))
    assert hidden_states({"hidden_states": states}) == states
    assert hidden_states(SimpleNamespace(hidden_states=states)) == states
    assert hidden_states({"logits": states[0]}) is None
    assert hidden_states(states[0]) is None


def test_maps_are_preferred_over_tokens():
    maps, tokens = (torch.zeros(1, 2, 3, 3),), (torch.zeros(1, 9, 2),)
    assert hidden_states({"hidden_states": tokens, "reshaped_hidden_states": maps}) == maps


def test_without_hidden_states_keeps_the_rest_and_the_type():
    model, inputs = build("swin"), inputs_for("swin")
    with torch.no_grad():
        full = model(**inputs, output_hidden_states=True)
        plain = model(**inputs)
    stripped = without_hidden_states(full)
    assert type(stripped) is type(full) and list(stripped) == list(plain)
    assert "hidden_states" in full and torch.equal(stripped.pooler_output, plain.pooler_output)


def test_collecting_before_resolving_is_refused():
    model = build("bert")
    found = FeatureCapture(model, None, "student")
    with torch.no_grad():
        outputs = model(**inputs_for("bert"), **found.request())
    with pytest.raises(InputError, match="resolve"):
        found.collect(outputs, {})


# Specs


def test_shapes_are_maps_or_tokens():
    assert FeatureSpec.from_shape((3, 4, 5), "a") == FeatureSpec("a", "map", 3, 20, (4, 5))
    assert FeatureSpec.from_shape([7, 3], "b") == FeatureSpec("b", "tokens", 3, 7)


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4, 5)])
def test_other_shapes_are_refused_with_the_name_of_the_layer(shape):
    with pytest.raises(InputError, match=r"(?s)`odd` is neither a map nor a sequence.*student_layers"):
        FeatureSpec.from_shape(shape, "odd")


def test_a_vector_is_one_token():
    spec = describe(torch.zeros(2, 6), "pooled", ForwardTrace(), of_image=True)
    assert spec == FeatureSpec("pooled", "tokens", 6, 1)


def test_accepts_looks_at_names_and_at_any_keyword():
    assert accepts(lambda a, b=1: a, "b") and accepts(lambda **rest: rest, "b")
    assert not accepts(lambda a, *rest: a, "b")


class Checkpointed(nn.Module):
    """Two linear layers, recomputed in the backward pass."""

    def __init__(self, reentrant: bool):
        super().__init__()
        self.reentrant = reentrant
        self.both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run both."""
        return torch.utils.checkpoint.checkpoint(self.both, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize(("reentrant", "name"), [(True, "both"), (False, "both"), (False, "both.0")])
def test_a_checkpointed_layer_is_captured_once_with_its_gradient(reentrant, name):
    model, x = Checkpointed(reentrant), torch.randn(2, 3, 4)
    capture = FeatureCapture(model, [name], "student")
    with capture.recording(model) as recorded:
        outputs = model(x)
    (feature,) = capture.collect(outputs, recorded)
    seen = recorded[name]
    feature.square().sum().backward()
    got = [weight.grad for weight in model.both[0].parameters()]
    model.zero_grad()
    (model.both if name == "both" else model.both[0])(x).square().sum().backward()
    for found, weight in zip(got, model.both[0].parameters(), strict=True):
        torch.testing.assert_close(found, weight.grad)
    assert recorded[name] is seen, "recomputing records nothing"


def test_what_a_checkpoint_hides_is_refused_where_it_is_to_learn_and_only_there():
    model, x = Checkpointed(True), torch.randn(2, 3, 4)
    capture = FeatureCapture(model, ["both.0"], "student")
    with torch.no_grad(), capture.recording(model) as recorded:
        model(x)
    assert set(recorded) == {"both.0"}
    with pytest.raises(InputError, match=r"both\.0.*gradient|gradient.*both\.0"), capture.recording(model):
        model(x)
    assert not model.both[0]._forward_hooks
