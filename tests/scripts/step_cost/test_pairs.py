"""scripts/step_cost/pairs.py: the models are those that their names say."""

from __future__ import annotations

import pytest
import torch
from step_cost.pairs import find_pair


@pytest.mark.parametrize(
    ("name", "student", "layers", "teacher", "blocks"),
    [
        ("bert-6x384", 384, 6, 768, 12),
        ("bert-4x312", 312, 4, 768, 12),
        ("vit-12x192", 192, 12, 768, 12),
        ("resnet34-18", 512, 8, 512, 16),
        ("resnet32x4-8x4", 256, 3, 256, 15),
    ],
)
def test_the_full_pairs_are_the_models_that_their_names_say(name, student, layers, teacher, blocks):
    pair = find_pair(name)
    with torch.device("meta"):
        models = [pair.make_student(), pair.make_teacher()]
    found = []
    for model in models:
        config = model.config
        resnet = pair.family == "resnet"
        width = config.hidden_sizes[-1] if resnet else config.hidden_size
        found += [width, sum(config.depths) if resnet else config.num_hidden_layers]
    assert found == [student, layers, teacher, blocks]


def test_small_images_keep_their_resolution_until_the_second_stage():
    pair = find_pair("resnet32x4-8x4")
    states = pair.make_student().eval()(torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[1:]) for state in states] == [(32, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)]
