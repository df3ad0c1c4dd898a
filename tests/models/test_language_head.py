"""From hidden states to logits: the head that is found makes the model's own logits, and leaves no hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from makers import VOCABULARY, gpt2, traces
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hf_semckd.models.language_head import UnprovenHeadError, find_language_head, recording_head_input

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.4,
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"final_logit_softcapping": 2.0}),
    "cohere2": (Cohere2ForCausalLM, Cohere2Config, {"logit_scale": 0.25}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    "falcon-h1": (FalconH1ForCausalLM, FalconH1Config, {"lm_head_multiplier": 0.5, **MAMBA}),
}


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "gpt2":
        return gpt2().eval()
    model, config, changes = FAMILIES[name]
    return model(config(**{**SMALL, **changes})).eval()


def ids() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("name", ["gpt2", *FAMILIES])
@torch.no_grad()
def test_the_head_makes_the_models_logits_of_what_it_reads(name: str) -> None:
    model = made(name)
    before = traces(model)
    head = find_language_head(model, ids(), loss=True)
    logits = model(**ids(), use_cache=False).logits
    with recording_head_input(head) as seen:
        last = model(**ids(), use_cache=False).logits
    torch.testing.assert_close(head(seen.hidden), logits)
    torch.testing.assert_close(last, logits[:, -1:], msg="only the last position is computed")
    assert traces(model) == before


@pytest.mark.parametrize("change", [{"softcap": 3.0}, {"shift": 1.0}])
def test_what_the_configuration_does_not_tell_is_found_out(change: dict[str, float]) -> None:
    """By numbers far beyond the usual: a cap of 200 changes logits of a new model by less than rounding does."""
    model = made("qwen3")

    class Changed(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            logits = outputs.logits
            outputs.logits = logits + change["shift"] if "shift" in change else 200 * torch.tanh(logits / 200)
            return outputs

    model.__class__ = Changed
    with pytest.raises(UnprovenHeadError, match="is not known"):
        find_language_head(model, ids(), loss=False)


def test_another_loss_is_found_out() -> None:
    model = made("qwen3")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    with pytest.raises(UnprovenHeadError, match="its own loss"):
        find_language_head(model, ids(), loss=True)
    find_language_head(model, ids(), loss=False)


def test_a_failing_forward_leaves_no_hook_and_says_why() -> None:
    model = made("qwen3")
    before = traces(model)
    with pytest.raises(UnprovenHeadError, match="forward fails"):
        find_language_head(model, {**ids(), "position_ids": "none"}, loss=False)
    assert traces(model) == before


def test_a_head_that_is_called_twice_is_refused() -> None:
    model = made("qwen3")
    head = find_language_head(model, ids(), loss=False)
    with torch.no_grad(), recording_head_input(head) as seen:
        for _ in range(2):
            model(**ids())
    with pytest.raises(UnprovenHeadError, match="called 2 times"):
        _ = seen.hidden


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_found_too(half: torch.dtype) -> None:
    for name in ("gemma3", "granite", "gpt2"):
        find_language_head(made(name).to(half), ids(), loss=True)
