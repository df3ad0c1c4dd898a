"""The versions that a result was made with."""

import os
import platform
from importlib import metadata

import torch


def environment() -> dict[str, object]:
    """Return what a reader needs to judge a timing or repeat a run, and nothing that tells who ran it or where.

    Versions are None where a package is not installed; "accelerator" is the first CUDA device's model, None without
    one. No host name, user or path.
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "accelerate": _version("accelerate"),
        "hf_semckd": _version("hf-semckd"),
        # Not platform.platform(): a kernel's release may carry a name that its owner gave it.
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
