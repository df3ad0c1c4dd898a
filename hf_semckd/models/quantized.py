"""Models with matrices of 8 or 4 bits, which bitsandbytes computes with."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from ..errors import InputError, MissingDependencyError


@dataclass(frozen=True)
class Quantized:
    """How a model is quantized while it is loaded.

    Attributes:
        bits: 8 (LLM.int8(), Dettmers et al. 2022) or 4 (NF4, Dettmers et al. 2023).
        device_map: Where it goes, as `from_pretrained` takes it; None: where that puts it by itself.
    """

    bits: int
    device_map: str | Mapping[str, Any] | None = None

    def settings(self, model: nn.Module) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`; `MissingDependencyError` without bitsandbytes.

        Args:
            model: One of that kind, weights or not: what it has beside its base model, the head, stays as it is.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError(
                f"A model in {self.bits} bits needs a package that is not installed",
                received="an environment without bitsandbytes",
                expected="bitsandbytes",
                todo='pip install "hf-semckd[quantized]"',
            )
        base = getattr(model, "base_model_prefix", None)
        beside = [name for name, _ in model.named_children() if name != base] if hasattr(model, base or "") else None
        settings: dict[str, Any] = {f"load_in_{self.bits}bit": True, "llm_int8_skip_modules": beside}
        if self.bits == 4:
            settings["bnb_4bit_quant_type"] = "nf4"
        where = {} if self.device_map is None else {"device_map": self.device_map}
        return {"quantization_config": BitsAndBytesConfig(**settings), **where}

    def copy_of(self, model: nn.Module, role: str) -> nn.Module:
        """Return a quantized copy, by way of a temporary folder; the model itself where it is quantized already."""
        if getattr(model, "is_quantized", False):
            return model
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"The {role} cannot be quantized",
                received=f"a {type(model).__name__}",
                expected="a name, a folder or a PreTrainedModel",
                todo=f"quantize the {role} yourself and pass it, with its precision left alone ('auto')",
            )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            copied = type(model).from_pretrained(folder, **self.settings(model))
        self.check(copied, role)
        return copied

    def check(self, model: nn.Module, role: str) -> None:
        """Refuse (`InputError`) a loaded model of which nothing was quantized."""
        if any(entry.dtype in (torch.int8, torch.uint8) for entry in model.parameters()):
            return
        raise InputError(
            f"There is nothing in the {role} that {self.bits} bits are for",
            received=f"a {type(model).__name__}, without linear layers below its head",
            expected="a model with linear layers, such as a transformer; convolutions are not quantized",
            todo=f"give the {role} another precision, such as bfloat16",
        )
