"""Narrowed students: of a model with silent copies of its channels, heads and units, the copies are those that go."""

import copy
from inspect import signature

import pytest
import torch
import transformers
from makers import bert, gpt2, vit
from matrix.cells import FIRST_TASK, case, outputs_of
from torch import nn

from hf_semckd import make_student
from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.models.channels import find_channels
from hf_semckd.models.units import group_sizes
from hf_semckd.models.width import narrow

# Positions or decays belong to certain channels or heads, what a block consists of is not a multiple of one number, or
# the configuration has none for the channels.
REFUSED = {"afmoe", "beam", "bitnet", "bloom", "canine", "convbert", "ctrl", "esmc", "fnet", "focalnet"}
REFUSED |= {"glm4_moe_lite", "helium", "hiera", "ibert", "inkling2_text", "inkling_text", "jetmoe", "laguna", "lfm3"}
REFUSED |= {"m2m_100", "mamba2", "markuplm", "minicpm3", "minimax", "mobilebert", "mobilenet_v1", "mobilenet_v2"}
REFUSED |= {"moshi", "mpt", "olmo_hybrid", "pegasus_x", "rwkv", "sew", "sew-d", "squeezebert", "swiftformer", "wavlm"}
REFUSED |= {"xglm"}
# Too small in the matrix: groups that are none, and a last stage that does not exist. Larger ones are in `STAGED`.
TOO_SMALL = {"regnet", "segformer"}
# Their axes have more parts than `inflated` knows; that another order changes nothing is what proves these.
NOT_INFLATED = {"aria_text", "bit", "data2vec-audio", "deberta", "donut-swin", "ernie4_5_moe", "falcon_mamba"}
NOT_INFLATED |= {"gpt_bigcode", "gpt_neox_japanese", "gpt_oss", "hubert", "llama4_text", "mamba", "mobilevit", "pvt"}
NOT_INFLATED |= {"pvt_v2", "swin", "swinv2", "unispeech", "unispeech-sat", "wav2vec2"}
# Numbers of channels enter their outputs: of what an embedding is multiplied with, or of what logits are, with a bias.
SCALED = {"bert-generation", "bigbird_pegasus", "biogpt", "gemma", "gemma2", "gemma3_text", "recurrent_gemma"}
SCALED |= {"vaultgemma"}
# Vectors side by side in one weight: of queries, keys and values; of a gate and what it opens; of two pooled outputs.
SECTIONS = {"c_attn": 3, "qkv": 3, "in_proj": 3, "gate_up_proj": 2, "Wi.": 2}
QUICK = {"bert", "llama", "gpt2", "t5", "resnet", "swin"}


def cases(families):
    slow = (pytest.mark.matrix, pytest.mark.slow)
    return [pytest.param(name, id=name, marks=() if name in QUICK else slow) for name in sorted(families)]


COVERED = set(FIRST_TASK) - REFUSED - TOO_SMALL


def half_width(model):
    """Return the number of channels nearest to the half that is possible."""
    channels = find_channels(model, group_sizes(model))
    return max(channels.step, channels.width // 2 // channels.step * channels.step)


def count(model):
    return sum(entry.numel() for entry in model.parameters())


def inflated(small, like):
    """Return a model of the other's size that says what the small one does: nothing reads the copies of units."""
    made = copy.deepcopy(like)
    state = made.state_dict()
    for name, value in small.state_dict().items():
        module = made.get_submodule(name.rpartition(".")[0])
        for axis in range(value.dim()):
            if value.shape[axis] == state[name].shape[axis]:
                continue
            reads = axis == (0 if type(module).__name__ == "Conv1D" else 1) and name.endswith("weight")
            reads = ("experts" in name and axis == 2) or (reads and not isinstance(module, nn.Embedding))
            if "input_ids" in signature(like.forward).parameters:
                reads &= getattr(module, "weight", 0) is not made.get_input_embeddings().weight
            both = name == "classifier.weight" and "dinov2" in like.config.model_type
            parts = 1 + both if reads else next((n for word, n in SECTIONS.items() if word in name), 1)
            pairs = [(part, 0 * part if reads else part) for part in value.chunk(parts, axis)]
            value = torch.cat([entry for pair in pairs for entry in pair], axis)
        state[name] = value
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("family", cases(COVERED - NOT_INFLATED))
def test_copies_that_nothing_reads_are_those_that_go(family):
    model, inputs = case(family)
    small = make_student(model, hidden_size=half_width(model), batch=inputs, report=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for entry in small.parameters():
            # All of one size, so that no unit is larger than another.
            signs = 2.0 * torch.randint(2, entry.shape) - 1
            entry.copy_(signs / (entry[0].numel() ** 0.5 if entry.dim() > 1 else 1))
    large = inflated(small, model)
    if family not in SCALED:
        own, other = outputs_of(small, inputs), outputs_of(large, inputs)
        # The logits of tied embeddings are counted twice.
        other = other * (own * other).sum() / other.square().sum()
        torch.testing.assert_close(other, own, rtol=0, atol=1e-3 * float(own.abs().max()))
    again = make_student(large, hidden_size=half_width(model), report=False, batch=inputs)
    for name, value in small.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("family", cases(COVERED))
def test_a_narrowed_student_is_an_ordinary_model_of_its_size(family, tmp_path):
    model, inputs = case(family)
    before = outputs_of(model, inputs)
    student = make_student(model, hidden_size=half_width(model), batch=inputs, report=False)
    assert count(student) < 0.9 * count(model) and torch.equal(outputs_of(model, inputs), before)
    assert_reloads(student, inputs, tmp_path)


def assert_reloads(student, inputs, folder):
    student.save_pretrained(folder)
    loaded, info = type(student).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, value in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(student, inputs))


STAGED = {
    "resnet bottleneck": ("ResNet", 48, {"hidden_sizes": [32, 64, 96], "embedding_size": 12}),
    "regnet x": (
        "RegNet",
        24,
        {"hidden_sizes": [16, 32, 48], "embedding_size": 8, "groups_width": 8, "layer_type": "x"},
    ),
    "regnet y": ("RegNet", 24, {"hidden_sizes": [16, 32, 48], "embedding_size": 8, "groups_width": 8}),
    "convnext": ("ConvNext", 12, {"hidden_sizes": [8, 16, 24], "num_stages": 3}),
    "convnextv2": ("ConvNextV2", 12, {"hidden_sizes": [8, 16, 24], "num_stages": 3}),
    "segformer": ("Segformer", 16, {"hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4]}),
    "bit": ("Bit", 48, {"hidden_sizes": [32, 64, 96], "embedding_size": 32, "num_groups": 4}),
    "swin": ("Swin", 64, {"embed_dim": 24, "num_heads": [3, 6, 12], "window_size": 4, "patch_size": 2}),
    "swinv2": ("Swinv2", 32, {"embed_dim": 16, "num_heads": [2, 4, 8], "window_size": 4, "patch_size": 2}),
}


def staged(name):
    kind, width, sizes = STAGED[name]
    depths = [1, 2, 1, 1][: len(sizes.get("hidden_sizes", [0] * 3))]
    config = getattr(transformers, f"{kind}Config")(depths=depths, num_labels=3, image_size=64, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    return model, width, {"pixel_values": torch.randn(2, 3, 64, 64)}


SMALL = {"regnet y", "segformer", "swinv2"}
MARKS = (pytest.mark.matrix, pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(k, id=k, marks=() if k in SMALL else MARKS) for k in STAGED])
def test_every_stage_is_narrowed_in_proportion(name, tmp_path):
    model, width, inputs = staged(name)
    student = make_student(model, hidden_size=width, batch=inputs, report=False)
    assert count(student) < 0.5 * count(model)
    config, whole = student.config, model.config
    if hasattr(config, "embed_dim"):
        assert config.hidden_size == width == config.embed_dim * 4
    else:
        assert [2 * size for size in config.hidden_sizes] == whole.hidden_sizes and config.hidden_sizes[-1] == width
    assert_reloads(student, inputs, tmp_path)


PUBLISHED = {
    "ResNet": 1024,
    "RegNet": 544,
    "ConvNext": 384,
    "Segformer": 128,
    "Swin": 512,
    "Bit": 1024,
    "Wav2Vec2": 384,
    "Bert": 384,
}


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("kind", PUBLISHED)
def test_models_of_published_sizes_are_narrowed(kind):
    torch.manual_seed(0)
    head = {"Wav2Vec2": "Sequence", "Bert": "Sequence"}.get(kind, "Image")
    model = getattr(transformers, f"{kind}For{head}Classification")(getattr(transformers, f"{kind}Config")())
    student = make_student(model, hidden_size=PUBLISHED[kind], report=False)
    assert count(student) < 0.5 * count(model)


def test_running_statistics_go_with_their_channels():
    model, _ = case("resnet")
    for entry in model.buffers():
        if entry.is_floating_point():
            entry.copy_(torch.arange(1.0, 1 + len(entry)))
    student = make_student(model, hidden_size=half_width(model), report=False)
    own = dict(student.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            kept = own[name].running_mean.long() - 1
            assert len(kept) == module.num_features // 2
            for entry in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(getattr(own[name], entry), getattr(module, entry)[kept])


def test_heads_of_which_half_is_silent_attend_as_before():
    """SegFormer's first stage has one head, which becomes narrower: scores are divided by the root of less."""
    model, width, _ = staged("segformer")
    attention = model.segformer.stages[0].blocks[0].attention
    with torch.no_grad():
        for each in (attention.q_proj, attention.k_proj, attention.v_proj):
            each.bias.normal_()
            each.weight[4:] = 0
            each.bias[4:] = 0
        attention.o_proj.weight[:, 4:] = 0
    own = make_student(model, hidden_size=width, report=False).segformer.stages[0].blocks[0].attention
    query, key = (getattr(attention, name).bias for name in ("q_proj", "k_proj"))
    before = query @ key / len(query) ** 0.5
    after = own.q_proj.bias @ own.k_proj.bias / len(own.q_proj.bias) ** 0.5
    assert len(own.q_proj.bias) == 4 and torch.equal(own.k_proj.bias, key[:4])
    torch.testing.assert_close(after, before)


def test_heads_channels_and_units_that_say_nothing_are_those_that_go():
    model = bert(2, 32, num_attention_heads=4, intermediate_size=64, initializer_range=0.5)
    with torch.no_grad():
        for name, entry in model.named_parameters():
            entry.add_(0.5 * torch.rand_like(entry))
            for axis, length in enumerate(entry.shape):
                # The last half of whatever is 32 (channels and heads) or 64 (inner units, and words).
                if length in (32, 64) and "word_embeddings" not in name:
                    entry.narrow(axis, length // 2, length // 2).zero_()
        model.bert.embeddings.word_embeddings.weight[:, 16:] = 0
    student = make_student(model, hidden_size=16, report=False)
    assert student.config.num_attention_heads == 2 and student.config.intermediate_size == 32
    own = student.state_dict()
    for name, entry in model.state_dict().items():
        assert torch.equal(own[name], entry[tuple(slice(0, n) for n in own[name].shape)]), name


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Phi3", "Mixtral"])
def test_keys_and_values_go_with_the_queries_that_share_them(kind):
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    student = make_student(model, hidden_size=32, report=False)
    per_head = [each.config.num_attention_heads // each.config.num_key_value_heads for each in (model, student)]
    assert per_head == [4, 4]
    attention = student.model.layers[0].self_attn
    assert attention.head_dim == model.model.layers[0].self_attn.head_dim


@pytest.mark.parametrize("model", [bert, gpt2])
def test_an_impossible_width_says_what_is_possible(model):
    with pytest.raises(ConfigurationError, match=r"(?s)do not divide.*a multiple of 8"):
        narrow(model(2, 16), 12)


@pytest.mark.parametrize("family", cases(REFUSED | TOO_SMALL))
def test_families_whose_heads_or_channels_cannot_be_chosen_are_refused_by_name(family):
    """Each of BLOOM's heads has a slope of its own, for example."""
    model, inputs = case(family)
    with pytest.raises(InputError, match=f"(?s){type(model).__name__} cannot be narrowed.*what to do"):
        make_student(model, hidden_size=half_width(model), batch=inputs, report=False)


def test_depth_and_width_go_together():
    teacher = vit(4, 32)
    student = make_student(teacher, num_layers=2, hidden_size=16, report=False)
    assert (student.config.num_hidden_layers, student.config.hidden_size) == (2, 16)
    assert isinstance(student.classifier, nn.Linear) and student.classifier.in_features == 16
    small = make_student(teacher, hidden_size=16, parameters=0.2, report=False)
    assert count(small) <= 0.2 * count(teacher)
