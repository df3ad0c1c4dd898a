"""Distil a Vision Transformer into a much smaller one, and compare with the student alone and with plain KD.

    accelerate launch examples/distill_vit.py          # real scans of digits that come with scikit-learn
    python examples/distill_vit.py --dataset_name fashion-mnist --max_train_samples 5000 --num_train_epochs 20
    python examples/distill_vit.py --image_folder pictures --teacher_name_or_path google/vit-base-patch16-224 \
        --teacher_epochs 3

Writes into output_dir: student (a plain model and its image processor), teacher, report.json, association.png.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from common import (
    Comparison,
    ComparisonArguments,
    choose_epochs,
    choose_split,
    load_or_make,
    run_example,
    some_rows,
)
from datasets import DatasetDict
from image_data import load_digits_images, load_fashion_mnist, load_image_dataset, prepare_images
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_semckd import SemCKDConfig

try:  # the one that needs no torchvision, and says nothing about it
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before transformers 5.4
    from transformers import ViTImageProcessor

DEFAULTS = {
    "output_dir": "outputs/vit",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "num_train_epochs": 80.0,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.05,
    "remove_unused_columns": False,
}
TEACHER_EPOCHS = 20.0
TEACHER_LEARNING_RATE = 1e-3
# Few labeled images, as is often the case where a student is wanted; the teacher has seen three times as many.
DIGITS_STUDENT_SAMPLES = 300
IMAGE_SIZES = {"digits": 8, "fashion-mnist": 28}
OTHER_IMAGE_SIZE = 64


@dataclass
class ImageArguments(ComparisonArguments):
    dataset_name: str = field(
        default="digits",
        metadata={
            "help": "digits (scikit-learn's), fashion-mnist, a Hub dataset, or a folder that load_dataset takes."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    image_folder: str | None = field(
        default=None, metadata={"help": "Folder with one folder of images a class; goes before dataset_name."}
    )
    fashion_mnist_dir: str = field(
        default="/usr/share/datasets/fashion-mnist",
        metadata={"help": "Where the idx.gz files of Fashion-MNIST are (Debian package dataset-fashion-mnist)."},
    )
    image_column: str | None = field(default=None, metadata={"help": "None: the first column of images."})
    label_column: str | None = field(default=None, metadata={"help": "None: the first column of classes."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side of the images that new models take. None: 8 digits, 28 fashion-mnist, 64 others."},
    )
    patch_size: int | None = field(default=None, metadata={"help": "Side of their patches. None: a quarter of it."})
    teacher_depth: int = field(default=6, metadata={"help": "Layers of a new teacher."})
    teacher_width: int = field(default=96, metadata={"help": "Width of a new teacher, a multiple of 24."})
    student_depth: int = field(default=3, metadata={"help": "Layers of a new student."})
    student_width: int = field(default=48, metadata={"help": "Width of a new student, a multiple of 24."})


def is_digits(options: ImageArguments) -> bool:
    return options.image_folder is None and options.dataset_name == "digits"


def load_data(options: ImageArguments, seed: int) -> DatasetDict:
    if is_digits(options):
        return load_digits_images()
    if options.image_folder is None and options.dataset_name == "fashion-mnist":
        return load_fashion_mnist(options.fashion_mnist_dir)
    return load_image_dataset(
        options.dataset_name,
        options.dataset_config,
        image_folder=options.image_folder,
        image_column=options.image_column,
        label_column=options.label_column,
        seed=seed,
    )


def make_vit(size: int, patch: int, depth: int, width: int, names: list[str]) -> ViTForImageClassification:
    config = ViTConfig(
        image_size=size,
        patch_size=patch,
        num_hidden_layers=depth,
        hidden_size=width,
        intermediate_size=4 * width,
        num_attention_heads=max(1, width // 24),
        # 0.02 is for a width of 768; with it a narrow model hardly starts to learn.
        initializer_range=0.02 * (768 / width) ** 0.5,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    return ViTForImageClassification(config)


def load_processor(source: str | None, size: int) -> Any:
    if source is not None:
        return AutoImageProcessor.from_pretrained(source)
    return ViTImageProcessor(size={"height": size, "width": size}, do_convert_rgb=True)


def prepare(options: ImageArguments, args: SemCKDConfig) -> Comparison:
    with args.main_process_first(desc="loading the images"):
        data = load_data(options, args.seed)
    most = options.student_train_samples or (DIGITS_STUDENT_SAMPLES if is_digits(options) else None)
    train = some_rows(data["train"], options.max_train_samples)
    student_train = some_rows(train, most)
    test = some_rows(choose_split(data, options.eval_split), options.max_eval_samples)
    names = train.features["label"].names
    size = options.image_size or IMAGE_SIZES.get(options.dataset_name, OTHER_IMAGE_SIZE)
    patch = options.patch_size or max(size // 4, 1)

    def model(source: str | None, depth: int, width: int) -> tuple[Any, bool]:
        new = lambda: make_vit(size, patch, depth, width, names)  # noqa: E731
        return load_or_make(AutoModelForImageClassification, source, new, names, args.seed)

    teacher, trained = model(options.teacher_name_or_path, options.teacher_depth, options.teacher_width)
    student, _ = model(options.student_name_or_path, options.student_depth, options.student_width)
    teacher_processor = load_processor(options.teacher_name_or_path, size)
    student_processor = load_processor(options.student_name_or_path, size)
    inputs = {"pixel_values": student_processor}
    if teacher_processor.to_dict() != student_processor.to_dict():
        inputs["teacher_pixel_values"] = teacher_processor
    channels = student.config.num_channels
    return Comparison(
        data_name=options.image_folder or options.dataset_name,
        unit="images",
        teacher=teacher,
        teacher_processor=teacher_processor,
        teacher_epochs=choose_epochs(options, trained, TEACHER_EPOCHS),
        teacher_learning_rate=options.teacher_learning_rate or TEACHER_LEARNING_RATE,
        teacher_train=prepare_images(train, {"pixel_values": teacher_processor}, channels),
        teacher_eval=prepare_images(test, {"pixel_values": teacher_processor}, channels),
        student=student,
        student_processor=student_processor,
        student_train=prepare_images(student_train, inputs, channels),
        student_eval=prepare_images(test, {"pixel_values": student_processor}, channels),
    )


if __name__ == "__main__":
    run_example(ImageArguments, DEFAULTS, prepare)
