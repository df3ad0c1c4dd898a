"""Images of another size or normalization than the teacher's: what it sees is what a person would give it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers import IMAGE, assert_same_weights, distiller, images, losses, resnet, vit, weights
from torch import nn

from hf_semckd import inspect_models
from hf_semckd.models.images import ImageAdaptation, fitting_size, normalization_of
from hf_semckd.teacher.teacher import Teacher

try:  # the one that needs no torchvision
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before transformers 5.4
    from transformers import ViTImageProcessor

LARGE = 24


class FixedPositions(nn.Module):
    """A model with a position for every patch of an image of one size."""

    def __init__(self, size=LARGE):
        super().__init__()
        self.config = SimpleNamespace(image_size=size)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, (size // 4) ** 2, 8))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values):
        tokens = self.patches(pixel_values).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = tokens + block(tokens)
        return self.head(tokens.mean(1))


def batch(size=IMAGE):
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


def test_a_model_that_takes_the_images_is_left_alone():
    assert fitting_size(vit().eval(), batch()) == ImageAdaptation()
    assert fitting_size(resnet().eval(), batch(40)) == ImageAdaptation()


def test_positions_are_interpolated_where_the_model_can():
    teacher = Teacher(vit(3, 24, seed=9, image_size=LARGE))
    specs = teacher.describe(batch(), logits=True, features=True).specs
    assert [spec.grid for spec in specs] == [(IMAGE // 4, IMAGE // 4)] * 3
    with torch.no_grad():
        expected = teacher.model(**batch(), interpolate_pos_encoding=True).logits
    assert torch.equal(teacher.run(batch(), logits=True, features=False).logits, expected)


def test_images_are_resized_where_it_cannot():
    teacher = Teacher(FixedPositions())
    teacher.describe(batch(), logits=True, features=True)
    assert teacher.images == ImageAdaptation(size=(LARGE, LARGE))
    pixels = torch.nn.functional.interpolate(
        batch()["pixel_values"], (LARGE, LARGE), mode="bilinear", antialias=True, align_corners=False
    )
    with torch.no_grad():
        expected = teacher.model(pixels)
    assert torch.equal(teacher.run(batch(), logits=True, features=False).logits, expected)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("make", [lambda: vit(3, 24, seed=9, image_size=LARGE), FixedPositions], ids=["vit", "fixed"])
def test_a_student_of_small_images_learns_from_a_teacher_of_large_ones(make, cached, tmp_path):
    torch.manual_seed(3)
    teacher = make()
    before = weights(teacher)
    args = {"teacher_cache_dir": str(tmp_path / "cache")} if cached else {}
    trainer = distiller(tmp_path, args, model=vit(), teacher_model=teacher)
    trainer.train()
    assert losses(trainer, "feature_loss")[0] > 0
    assert_same_weights(weights(teacher), before)


def test_inspect_models_shows_the_adapted_teacher():
    report = inspect_models(vit(), vit(3, 24, image_size=LARGE), batch())
    assert [spec.grid for spec in report.teacher.specs] == [(4, 4)] * 3


def processor(mean, deviation, **others):
    return ViTImageProcessor(image_mean=[mean] * 3, image_std=[deviation] * 3, **others)


def test_a_processor_tells_its_normalization(tmp_path):
    assert normalization_of(processor(0.4, 0.2)) == ((0.4,) * 3, (0.2,) * 3)
    assert normalization_of(processor(0.4, 0.2, do_normalize=False)) == ((0.0,) * 3, (1.0,) * 3)
    assert normalization_of(processor(0.4, 0.2, rescale_factor=1 / 127.5)) is None
    assert normalization_of(None) is None and normalization_of(str(tmp_path)) is None
    processor(0.1, 0.3).save_pretrained(tmp_path)
    assert normalization_of(tmp_path) == ((0.1,) * 3, (0.3,) * 3)


def test_a_teacher_gets_images_normalized_as_its_own_processor_would(tmp_path, caplog):
    """What both processors make of one picture is the oracle."""
    picture = np.random.default_rng(0).integers(0, 256, (IMAGE, IMAGE, 3), dtype=np.uint8)
    sizes = {"size": {"height": IMAGE, "width": IMAGE}}
    own, theirs = processor(0.5, 0.5, **sizes), processor(0.2, 0.3, **sizes)
    made, expected = (entry(picture, return_tensors="pt")["pixel_values"] for entry in (own, theirs))
    folder = tmp_path / "teacher"
    vit(3, 24, seed=9).save_pretrained(folder)
    theirs.save_pretrained(folder)
    trainer = distiller(tmp_path, teacher_model=str(folder), processing_class=own)
    seen = trainer.pair.teacher.inputs({"pixel_values": made})["pixel_values"]
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)
    assert any("normalize images differently" in record.message for record in caplog.records)
    caplog.clear()
    alike = distiller(tmp_path, teacher_model=str(folder), processing_class=theirs)
    assert torch.equal(alike.pair.teacher.inputs({"pixel_values": made})["pixel_values"], made)
    columns = [{**row, "teacher_pixel_values": row["pixel_values"]} for row in images().rows]
    distiller(tmp_path, teacher_model=str(folder), processing_class=own, train_dataset=columns)
    assert not any("normalize images differently" in record.message for record in caplog.records)


def test_a_student_made_anew_finds_the_teacher_as_it_was(tmp_path):
    """The layers are found again, from images that were not resized before."""
    trainer = distiller(
        tmp_path, model=None, model_init=lambda: vit(), teacher_model=vit(3, 24, seed=9, image_size=LARGE)
    )
    trainer.train()
    assert trainer.pair.teacher.images == ImageAdaptation(interpolates=True)
