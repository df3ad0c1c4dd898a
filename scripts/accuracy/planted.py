"""Teachers whose layers a map made by hand is bound to get wrong: in another order, or useless."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

# Multiplies an image's random projection before the sine: neighboring images get unrelated values.
ROUGHNESS = 1e3


class PlantedTeacher(nn.Module):
    """A teacher with the same logits, whose hidden states come in another order and with useless ones among them.

    Args:
        teacher: The teacher.
        order: Positions of its hidden states without the first (the embedding), in the order in which they are
            shown; a negative number plants a useless layer, of the size of the last one: a pseudo-random function of
            the image, the same whenever it is seen, from which nothing can be learned.
    """

    def __init__(self, teacher: nn.Module, order: list[int]):
        super().__init__()
        self.teacher = teacher
        self.order = order
        self.config = teacher.config
        self.main_input_name = teacher.main_input_name

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False, return_dict: bool = True
    ) -> ImageClassifierOutput:
        """Return the teacher's logits and the planted hidden states."""
        outputs = self.teacher(pixel_values=pixel_values, output_hidden_states=output_hidden_states)
        if not output_hidden_states:
            return ImageClassifierOutput(logits=outputs.logits)
        states = outputs.hidden_states
        layers = [
            states[1 + place] if place >= 0 else _useless(pixel_values, states[-1], -place) for place in self.order
        ]
        return ImageClassifierOutput(logits=outputs.logits, hidden_states=(states[0], *layers))


def plant(teacher: Any, *, layers: int, seed: int, useless: int = 0, permute: bool = True) -> PlantedTeacher:
    """Return a teacher whose layers are shuffled, with useless ones among them.

    Args:
        teacher: A teacher for images.
        layers: Number of its layers, without the embedding.
        seed: Of the order; one whose last layer is not the teacher's last is taken.
        useless: How many useless layers to plant.
        permute: Whether to shuffle the teacher's own layers too.
    """
    generator = np.random.default_rng(seed)
    own = list(range(layers))
    if permute:
        while layers > 1 and own[-1] == layers - 1:
            own = generator.permutation(layers).tolist()
    for number in range(useless):
        # The last place is the worst that a useless layer can have: a hand-made map ends there.
        own.insert(len(own) if number == 0 else int(generator.integers(len(own))), -(number + 1))
    return PlantedTeacher(teacher, own).eval()


def _useless(pixels: Tensor, like: Tensor, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    rows = pixels.flatten(1)
    directions = torch.randn(rows.shape[1], 8, generator=generator) / rows.shape[1] ** 0.5
    mixing = torch.randn(8, like[0].numel(), generator=generator)
    return torch.sin(ROUGHNESS * torch.sin(ROUGHNESS * rows @ directions) @ mixing).view_as(like) * like.flatten(
        1
    ).std(1).view(-1, *[1] * (like.dim() - 1))
