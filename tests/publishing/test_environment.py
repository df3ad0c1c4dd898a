import getpass
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

from hf_semckd.files import write_json
from hf_semckd.publishing.facts import environment


def test_environment_tells_versions_and_no_identity(tmp_path):
    record = environment()
    assert record["torch"] == torch.__version__
    assert record["python"] == ".".join(map(str, os.sys.version_info[:3]))
    assert set(record) == {
        *("python", "torch", "transformers", "accelerate", "hf_semckd"),
        *("platform", "processor", "cpu_count", "torch_threads", "accelerator"),
    }
    text = write_json(tmp_path / "environment.json", record).read_text()
    words = set(text.replace('"', " ").replace(",", " ").split())
    # As whole words: a host that is called "x" would otherwise be found in "x86_64".
    assert not words & {platform.node(), getpass.getuser(), str(Path.home()), os.getcwd()}
    assert "/" not in text and platform.release() not in text


def test_environment_without_a_distribution(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert environment()["accelerate"] is None
