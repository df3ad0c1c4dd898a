"""What the tests with the loopback hub have in common: processors, and clients in processes of their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from launching import python
from makers import IMAGE, VOCABULARY
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessor


def tokenizer() -> Any:
    """Return a tokenizer whose words are numbers."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0")


def image_processor() -> Any:
    """Return an image processor for the size of the tiny pictures."""
    return ViTImageProcessor(size={"height": IMAGE, "width": IMAGE})


def files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """Return the files right in a folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def error_of(call: Any) -> dict[str, str]:
    try:
        call()
    except Exception as error:
        return {"type": type(error).__name__, "text": str(error), "cause": type(error.__cause__).__name__}
    return {}


def run(arguments: list[str], env: dict[str, str], folder: Path) -> dict[str, Any]:
    """Run a fresh process and return what it prints last."""
    done = python(*arguments, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return {**json.loads(done.stdout.splitlines()[-1]), "output": done.stdout + done.stderr}


def same(first: Any, second: Any) -> bool:
    return bool(np.allclose(first, second, rtol=1e-5, atol=1e-6))
