"""The names that other people's scripts rely on, and an import that changes nothing."""

import importlib
import inspect
import json
import pkgutil
import re

import pytest
import torch
from launching import python
from transformers import Trainer, TrainingArguments

import hf_semckd
from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer, errors, losses

MODULES = [entry.name for entry in pkgutil.walk_packages(hf_semckd.__path__, "hf_semckd.")]


def test_names_of_the_package():
    assert {"DistillationTrainer", "SemCKDConfig", "SemCKDTrainer", "__version__"} <= set(hf_semckd.__all__)
    assert all(hasattr(hf_semckd, name) for name in hf_semckd.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", hf_semckd.__version__)


def test_names_of_the_losses():
    assert {"FeatureLoss", "FeatureLossOutput", "SemCKDLoss"} <= set(losses.__all__)
    assert all(hasattr(losses, name) for name in losses.__all__)


def test_the_trainers_are_trainers():
    assert issubclass(SemCKDTrainer, DistillationTrainer) and issubclass(DistillationTrainer, Trainer)
    assert issubclass(SemCKDConfig, TrainingArguments)
    for name in ("student", "teacher", "association", "train", "save_model", "push_to_hub"):
        assert hasattr(SemCKDTrainer, name)


@pytest.mark.parametrize("trainer", [SemCKDTrainer, DistillationTrainer])
def test_it_takes_what_trainer_takes_in_the_same_order(trainer):
    theirs, mine = (inspect.signature(kind.__init__).parameters for kind in (Trainer, trainer))
    assert list(mine)[: len(theirs)] == list(theirs)
    assert [mine[name].default for name in theirs] == [entry.default for entry in theirs.values()]
    assert mine["teacher_model"].kind is inspect.Parameter.KEYWORD_ONLY


def test_overridden_methods_take_what_trainers_take():
    for name, method in vars(Trainer).items():
        mine = getattr(SemCKDTrainer, name)
        if not inspect.isfunction(method) or mine is method or name == "__init__":
            continue
        catches_all = any(entry.kind is entry.VAR_KEYWORD for entry in inspect.signature(mine).parameters.values())
        missing = set(inspect.signature(method).parameters) - set(inspect.signature(mine).parameters)
        assert catches_all or not missing, (name, missing)


def test_the_feature_loss_stands_alone():
    shapes = {"student_shapes": [(4, 8, 8), (6, 4, 4)], "teacher_shapes": [(8, 8, 8), (8, 4, 4), (10, 2, 2)]}
    loss = losses.SemCKDLoss.published(**shapes, batch_size=8)
    features = [[torch.randn(8, *shape) for shape in shapes[name]] for name in shapes]
    out = loss(*features)
    assert out.total.dim() == 0 and out.association.shape == (8, 2, 3)
    out.total.backward()
    assert (len(loss.query), len(loss.key), len(loss.projection), len(loss.projection[0])) == (2, 3, 2, 3)
    assert sum(isinstance(entry, torch.nn.BatchNorm2d) for entry in loss.projection[0][0]) == 2


def test_every_error_can_be_caught_by_one_name():
    kinds = [
        entry for entry in vars(errors).values() if isinstance(entry, type) and entry.__module__ == errors.__name__
    ]
    assert len(kinds) > 5 and all(issubclass(kind, errors.SemCKDError) for kind in kinds)


IMPORT = """
import json, logging, os, random, sys, threading, warnings
import numpy, torch
from transformers import Trainer, TrainingArguments  # whose own side effects do not count
import datasets, huggingface_hub, safetensors.torch, transformers.integrations

def state():
    loggers = {name: [len(getattr(entry, "handlers", ())), getattr(entry, "level", 0)]
               for name, entry in logging.root.manager.loggerDict.items() if not name.startswith("hf_semckd")}
    return {
        "environment": dict(os.environ), "root": [len(logging.root.handlers), logging.root.level], "loggers": loggers,
        "filters": len(warnings.filters), "random": hash(random.getstate()),
        "numpy": int(numpy.random.get_state()[1].sum()), "torch": int(torch.random.get_rng_state().sum()),
        "dtype": str(torch.get_default_dtype()),
        "threads": [torch.get_num_threads(), threading.active_count()], "grad": torch.is_grad_enabled(),
        "optional": [name for name in ("matplotlib", "tensorboard", "sklearn", "peft") if name in sys.modules],
        "files": sorted(os.listdir(".")), "path": sys.path, "hook": str(sys.excepthook),
    }

before = state()
import hf_semckd, hf_semckd.losses
after = state()
own = [entry for name, entry in logging.root.manager.loggerDict.items() if name.split(".")[0] == "hf_semckd"]
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "handlers": sum(len(getattr(entry, "handlers", ())) for entry in own),
}))
"""


def test_importing_has_no_side_effects(tmp_path):
    done = python("-c", IMPORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"changed": [], "handlers": 0}
    assert not list(tmp_path.iterdir())


def public(module):
    """Yield the public functions, classes and methods that a module defines."""
    for name, entry in vars(module).items():
        if name.startswith("_") or getattr(entry, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(entry) or inspect.isclass(entry):
            yield f"{module.__name__}.{name}", entry
        for inner, method in vars(entry).items() if inspect.isclass(entry) else ():
            function = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
            if not inner.startswith("_") and inspect.isfunction(function):
                yield f"{module.__name__}.{name}.{inner}", function


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    undocumented = [
        path for path, entry in public(module) if not entry.__doc__ or entry.__doc__.startswith(f"{entry.__name__}(")
    ]
    assert undocumented == []
