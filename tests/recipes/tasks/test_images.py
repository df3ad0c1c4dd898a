"""Pictures of every mode become the pixels that the processor makes of them in RGB."""

import pytest
import torch
from datasets import ClassLabel, Features, Image, Value
from PIL import Image as Picture
from recipe_parts import ViTImageProcessor

from hf_semckd.recipes.classes import Classes
from hf_semckd.recipes.schema import DataOptions
from hf_semckd.recipes.tasks.base import Columns
from hf_semckd.recipes.tasks.images import ImageClassification

NAMED = ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("features", "options", "expected"),
    [
        ({"image": Image(), "label": NAMED}, {}, ("image", "label")),
        ({"img": Image(), "fine": NAMED, "coarse": NAMED}, {}, None),
        ({"img": Image(), "fine": NAMED, "coarse": NAMED}, {"label_column": "fine"}, ("img", "fine")),
        ({"id": Value("int64"), "x": Image(decode=False), "labels": Value("string")}, {}, ("x", "labels")),
        ({"a": Image(), "b": Image(), "label": NAMED}, {"input_columns": ["b"]}, ("b", "label")),
        ({"text": Value("string"), "label": NAMED}, {}, None),
    ],
)
def test_columns_are_found(features, options, expected):
    found = ImageClassification.find_columns(Features(features), DataOptions(**options))
    assert (found and found.all) == expected


def picture(mode):
    """Return a picture of one color, and that color in RGB."""
    if mode == "P":
        made = Picture.new("P", (4, 4), 1)
        made.putpalette([0, 0, 0, 10, 20, 30])
        return made, (10, 20, 30)
    colors = {"L": 40, "1": 1, "RGB": (1, 2, 3), "RGBA": (5, 6, 7, 255), "LA": (50, 255), "I;16": 60 * 257}
    rgb = {"L": (40,) * 3, "1": (255,) * 3, "RGB": (1, 2, 3), "RGBA": (5, 6, 7), "LA": (50,) * 3, "I;16": (60,) * 3}
    return Picture.new(mode, (4, 4), colors[mode]), rgb[mode]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"])
def test_pixels_are_those_of_the_picture_in_rgb(mode):
    made, color = picture(mode)
    processor = ViTImageProcessor(size={"height": 2, "width": 2}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    task = ImageClassification(Columns(("image",), "label"), Classes(("a", "b"), "single", (0, 1)), DataOptions(), 0)
    found = task.encode(processor, {"image": [made], "label": [1]})
    expected = torch.tensor(color).div(255).sub(0.5).div(0.5).view(3, 1, 1).expand(3, 2, 2)
    torch.testing.assert_close(found["pixel_values"][0], expected, atol=1e-5, rtol=0)
    batch = task.collator(processor, None)([{name: values[0] for name, values in found.items()}] * 2)
    assert batch["pixel_values"].shape == (2, 3, 2, 2) and batch["labels"].tolist() == [1, 1]
