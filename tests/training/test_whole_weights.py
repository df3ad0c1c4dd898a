"""Models whose weights an engine keeps apart. With real engines: tests/engines."""

import os
from types import SimpleNamespace

import pytest
import torch
from makers import vit
from transformers.integrations.deepspeed import deepspeed_config, unset_hf_deepspeed_config

from hf_semckd.errors import InputError
from hf_semckd.training.whole_weights import FSDP_LOADING, check_same_teacher, complete_weights, whole_loading


class DeepSpeedConfig:
    """What transformers keeps of DeepSpeed's configuration, by a weak reference."""

    def __init__(self) -> None:
        self.config = {"zero_optimization": {"stage": 3}}


def test_models_are_loaded_whole_and_the_engine_has_its_settings_back(monkeypatch):
    monkeypatch.setenv(FSDP_LOADING, "true")
    plugin = SimpleNamespace(dschf=DeepSpeedConfig())
    with pytest.raises(ZeroDivisionError), whole_loading(SimpleNamespace(deepspeed_plugin=plugin)):
        assert FSDP_LOADING not in os.environ and deepspeed_config() is None
        raise ZeroDivisionError
    assert os.environ[FSDP_LOADING] == "true"
    assert deepspeed_config() is plugin.dschf.config
    unset_hf_deepspeed_config()


def processes(gather=None, world=2, **plugins):
    return SimpleNamespace(
        num_processes=world, device=torch.device("cpu"), gather=gather, state=SimpleNamespace(**plugins)
    )


def test_teachers_that_differ_between_processes_are_refused():
    teacher = vit()
    check_same_teacher([teacher], processes(lambda own: torch.cat([own, own])))
    with pytest.raises(InputError, match="(?s)not the same in every process.*ViTForImageClassification"):
        check_same_teacher([teacher], processes(lambda own: torch.cat([own, own * 1.001])))


def test_fsdp_divides_what_every_process_holds():
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    complete_weights([vit()], processes(world=1, fsdp_plugin=plugin))
    assert plugin.cpu_ram_efficient_loading is False
