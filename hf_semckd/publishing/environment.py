"""The versions that a result was made with."""

import contextlib
import os
import platform
from importlib import metadata

import torch


def environment() -> dict[str, object]:
    """Return what a reader needs to judge a timing or repeat a run, and nothing that tells who ran it or where.

    Versions are None where a package is not installed, "accelerator" is None without a CUDA device.
    """
    versions: dict[str, str | None] = dict.fromkeys(("transformers", "accelerate", "hf_semckd"))
    for name in versions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **versions,
        # Not platform.platform(): a kernel's release may carry a name that its owner gave it.
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }
