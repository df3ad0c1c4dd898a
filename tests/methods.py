"""Every feature loss on every kind of model that it can be used on."""

import itertools

from makers import bert, config, images, resnet, texts, vit

from hf_semckd import DistillationTrainer
from hf_semckd.losses import FEATURE_LOSSES
from hf_semckd.losses.registry import names_layers, reuses_teacher_head

FAMILIES = {
    "vit": (vit, lambda: vit(4, 24, seed=9), lambda: images(10)),
    "resnet": (resnet, lambda: resnet((8, 16), seed=9), lambda: images(10)),
    "resnet to vit": (vit, lambda: resnet((8, 16), seed=9), lambda: images(10)),
    "vit to resnet": (resnet, lambda: vit(4, 24, seed=9), lambda: images(10)),
    "bert": (bert, lambda: bert(layers=4, width=24, seed=9), lambda: texts(10)),
}
# What a method is not for, and what it says of it.
REFUSED = {
    ("simkd", "vit"): "no map",
    ("simkd", "resnet to vit"): "no map",
    ("simkd", "vit to resnet"): "no map",
    ("simkd", "bert"): "no map",
    ("pkd", "resnet"): "",
    ("pkd", "resnet to vit"): "",
    ("pkd", "vit to resnet"): "",
    ("minilm", "resnet"): "",
    ("minilm", "resnet to vit"): "",
    ("minilm", "vit to resnet"): "",
}
NAMES = [*FEATURE_LOSSES, "semckd+crd"]


def make(folder, name, family, teacher=None, **arguments):
    student, make_teacher, data = FAMILIES[family]
    return DistillationTrainer(
        student(),
        config(folder, **arguments),
        teacher_model=teacher or make_teacher(),
        train_dataset=data(),
        feature_loss=name,
    )


CASES = [(name, family) for name in NAMES for family in FAMILIES if (name, family) not in REFUSED]


def joinable(family):
    """Return the joined pairs of methods that a kind of model allows."""
    names = [name for name in FEATURE_LOSSES if (name, family) not in REFUSED and not reuses_teacher_head(name)]
    pairs = itertools.combinations(names, 2)
    return [f"{one}+{other}" for one, other in pairs if names_layers(one) == names_layers(other)]
