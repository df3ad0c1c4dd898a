"""Images of another size, or of another normalization, than a teacher was made for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BaseImageProcessor

from .outputs import accepts

PIXELS = "pixel_values"
INTERPOLATE = "interpolate_pos_encoding"
# What a model says of an image that it cannot take.
SIZE_ERRORS = (ValueError, RuntimeError, AssertionError, IndexError)


@dataclass(frozen=True)
class ImageAdaptation:
    """What is done to images (B, C, H, W) before a teacher gets them; by default nothing.

    Attributes:
        interpolates: Whether the model interpolates its positions to the images' size.
        size: Height and width that they are resized to.
        scale, shift: Of each channel, from one normalization to another; empty for none.
    """

    interpolates: bool = False
    size: tuple[int, int] | None = None
    scale: tuple[float, ...] = ()
    shift: tuple[float, ...] = ()

    def __call__(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a model's inputs with its images as it takes them."""
        pixels = inputs.get(PIXELS)
        if not isinstance(pixels, Tensor) or pixels.dim() != 4:
            return dict(inputs)
        adapted = dict(inputs)
        if self.size is not None:
            wide = F.interpolate(pixels.float(), self.size, mode="bilinear", antialias=True, align_corners=False)
            adapted[PIXELS] = wide.to(pixels.dtype)
        if self.scale:
            scale, shift = (torch.tensor(values).to(pixels).view(-1, 1, 1) for values in (self.scale, self.shift))
            adapted[PIXELS] = adapted[PIXELS] * scale + shift
        return {**adapted, INTERPOLATE: True} if self.interpolates else adapted


@torch.no_grad()
def fitting_size(model: nn.Module, inputs: Mapping[str, Any]) -> ImageAdaptation:
    """Return what lets a model, in evaluation mode, take images of another size than its configuration names.

    Nothing where it takes them as they are; else its positions are interpolated, or the images resized.
    """
    config: Any = getattr(model, "config", None)
    pixels, named = inputs.get(PIXELS), getattr(config, "image_size", None)
    if named is None and "input_ids" not in inputs:
        named = getattr(getattr(config, "vision_config", None), "image_size", None)
    if not isinstance(pixels, Tensor) or pixels.dim() != 4 or named is None:
        return ImageAdaptation()
    size = (int(named), int(named)) if isinstance(named, (int, float)) else (int(named[0]), int(named[1]))
    if tuple(pixels.shape[2:]) == size:
        return ImageAdaptation()
    interpolated = [ImageAdaptation(interpolates=True)] if accepts(model.forward, INTERPOLATE) else []
    for adaptation in (ImageAdaptation(), *interpolated, ImageAdaptation(size=size)):
        try:
            model(**adaptation(inputs))
        except SIZE_ERRORS:
            continue
        return adaptation
    return ImageAdaptation()


def normalization_of(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation that images are normalized by, of a processor or of its settings.

    `processor` is an image processor or one with a part of that kind, or a name or folder to read its settings from.
    None where it does not tell, or does more than to bring pixels to [0, 1] first.
    """
    if isinstance(processor, (str, os.PathLike)):
        try:
            settings = BaseImageProcessor.get_image_processor_dict(os.fspath(processor))[0]
        except (OSError, ValueError):
            return None
    else:
        settings = vars(getattr(processor, "image_processor", processor)) if processor is not None else {}
    mean, deviation = settings.get("image_mean"), settings.get("image_std")
    # EfficientNet normalizes twice, and MobileViT wants blue first.
    special = settings.get("include_top") or settings.get("do_flip_channel_order")
    if mean is None or deviation is None or special or abs(settings.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
        return None
    if not settings.get("do_normalize", True):
        return (0.0,) * len(mean), (1.0,) * len(mean)
    return tuple(map(float, mean)), tuple(map(float, deviation))
