"""Tiny models of any family, made from its configuration class: everything that has a size is made small."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

VOCABULARY, LENGTH, CLASSES, FRAMES = 64, 12, 3, 1600

WIDTHS = ("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "embedding_size", "word_embed_proj_dim")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
DEPTHS += ("num_decoder_layers", "num_encoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
HEADS += ("num_key_value_heads", "num_encoder_attention_heads")
INNER = ("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "n_inner")
LENGTHS = ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions")
SIZES: dict[str, int] = {
    **dict.fromkeys(WIDTHS, 16),
    **dict.fromkeys(DEPTHS, 3),
    **dict.fromkeys(HEADS, 2),
    **dict.fromkeys(INNER, 32),
    **dict.fromkeys(LENGTHS, 64),
    **{"head_dim": 8, "d_kv": 8, "vocab_size": VOCABULARY, "image_size": 32, "patch_size": 8, "state_size": 4},
    **{"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0},
}
SPECTROGRAM = {"num_mel_bins": 16, "max_length": 32, "frequency_stride": 8, "time_stride": 8}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 2, 1, 1]}
WINDOWS: dict[str, Any] = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 2]}
WINDOWS |= {"window_size": 4}
PYRAMID: dict[str, Any] = {
    "hidden_sizes": [8, 16, 16, 16],
    "depths": [1, 2, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}
SPEECH: dict[str, Any] = {"conv_dim": [16] * 3, "conv_stride": [5, 4, 2], "conv_kernel": [10, 8, 4], "conv_bias": True}
SPEECH |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
SPEECH |= {
    "do_stable_layer_norm": True,
    "classifier_proj_size": 16,
    "mask_time_prob": 0.0,
    "num_feat_extract_layers": 3,
}

# What a family needs besides, or in another form.
SPECIAL: dict[str, dict[str, Any]] = {
    "poolformer": STAGES,
    "resnet": {**STAGES, "embedding_size": 8, "layer_type": "basic"},
    "regnet": {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 2, 1, 1], "embedding_size": 8, "groups_width": 8},
    "swin": WINDOWS,
    "swinv2": WINDOWS,
    "donut-swin": WINDOWS,
    "pvt": {**PYRAMID, "image_size": 64},
    "pvt_v2": {**PYRAMID, "image_size": 64},
    "segformer": {**PYRAMID, "decoder_hidden_size": 16},
    "focalnet": {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "hidden_sizes": [8, 16]},
    "hiera": {"image_size": [64, 64], "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 2, 2]},
    "swiftformer": {"embed_dims": STAGES["hidden_sizes"], "depths": STAGES["depths"]},
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 32, 64, 64], "depths": [1, 2, 1, 1], "num_groups": 8},
    "mobilenet_v1": {"depth_multiplier": 0.1},
    "mobilenet_v2": {"depth_multiplier": 0.1},
    "mobilevit": {"image_size": 64, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 12, 12, 16, 16, 16]},
    "wav2vec2": SPEECH,
    "hubert": SPEECH,
    "wavlm": SPEECH,
    "unispeech": SPEECH,
    "unispeech-sat": SPEECH,
    "data2vec-audio": SPEECH,
    "sew": {**SPEECH, "squeeze_factor": 2},
    "sew-d": {**SPEECH, "squeeze_factor": 2},
    "audio-spectrogram-transformer": SPECTROGRAM,
    "mamba2": {"num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 8},
    "canine": {"downsampling_rate": 4},
    "longformer": {"attention_window": 4},
    "led": {"attention_window": 4},
    "xlnet": {"max_position_embeddings": None},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1, 1], "d_head": 8, "d_inner": 32},
}


def make(family: str, mapping: str, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny model of a family with the head of one of transformers' mappings, in evaluation mode."""
    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES")[family]
    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    return getattr(transformers, names if isinstance(names, str) else names[0])(config).eval()


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a tiny model without dropout."""
    plain = AutoConfig.for_model(family)
    own = {name: getattr(plain, name, None) for name in {*SIZES, *plain.__dict__}}
    sizes = {name: SIZES[name] for name, value in own.items() if name in SIZES and isinstance(value, (int, float))}
    quiet = {name: 0.0 for name, value in own.items() if isinstance(value, float) and is_noise(name)}
    special = {**SPECIAL.get(family, {}), **changes}
    settings = {**sizes, **quiet, "num_labels": CLASSES, **special}
    settings = {name: value for name, value in settings.items() if value is not None}
    config = type(plain)(**settings)
    for name in ("pad_token_id", "decoder_start_token_id"):
        if getattr(config, name, None) is None:
            setattr(config, name, 0)
    return config


def is_noise(name: str) -> bool:
    """Whether a field is the rate of a dropout, LayerDrop or stochastic depth."""
    return any(word in name for word in ("dropout", "drop_rate", "drop_path", "layerdrop", "pdrop", "mask_time_prob"))
