"""Distill a Vision Transformer into a much smaller one, and compare with the student alone and with plain KD.

    accelerate launch examples/distill_vit.py          # real scans of digits that come with scikit-learn
    python examples/distill_vit.py --dataset_name fashion-mnist --max_train_samples 5000 --num_train_epochs 20
    python examples/distill_vit.py --image_folder pictures --teacher_name_or_path google/vit-base-patch16-224 \
        --teacher_epochs 3

Writes into output_dir: student and cut_student (plain models with their image processor; the second started from the
teacher), the other models, report.json, association.png.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from comparison import Arguments, Comparison, load_labeled, load_or_make, parse_arguments, small_config
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig
from transformers.hf_argparser import HfArg

from hf_semckd import make_student

try:  # the one that needs no torchvision, and says nothing about it
    from transformers import ViTImageProcessorPil as ViTImageProcessor
except ImportError:  # before transformers 5.4
    from transformers import ViTImageProcessor

DEFAULTS = {
    "output_dir": "outputs/vit", "num_train_epochs": 40.0, "learning_rate": 2e-3, "warmup_steps": 0.05,
    "weight_decay": 0.05, "per_device_eval_batch_size": 256, "remove_unused_columns": False,
}  # fmt: skip
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MOST_PREPARED_VALUES = 64_000_000  # 256 MB


@dataclass
class ImageArguments(Arguments):
    dataset_name: str = HfArg(default="digits", help="digits, fashion-mnist, a Hub dataset or a folder of a dataset.")
    image_folder: str | None = HfArg(default=None, help="Instead: a folder with one folder of images a class.")
    fashion_mnist_dir: str = HfArg(default="/usr/share/datasets/fashion-mnist", help="Where its idx.gz files are.")
    image_column: str | None = HfArg(default=None, help="None: the first column of images.")
    label_column: str | None = HfArg(default=None, help="None: the first column of classes.")
    image_size: int | None = HfArg(default=None, help="Of new models. None: 8 digits, 28 fashion-mnist, 64 others.")
    patch_size: int | None = HfArg(default=None, help="Of new models. None: a quarter of the image size.")
    teacher_depth: int = HfArg(default=6, help="Layers of a new teacher.")
    teacher_width: int = HfArg(default=96, help="Width of a new teacher, a multiple of 24.")
    student_depth: int = HfArg(default=3, help="Layers of a new student.")
    student_width: int = HfArg(default=48, help="Width of a new student, a multiple of 24.")


def load_images(options: ImageArguments, seed: int) -> DatasetDict:
    if options.image_folder is None and options.dataset_name == "digits":
        return load_digits_images()
    if options.image_folder is None and options.dataset_name == "fashion-mnist":
        return load_fashion_mnist(Path(options.fashion_mnist_dir))
    path = "imagefolder" if options.image_folder else options.dataset_name
    columns = {"image": options.image_column or Image, "label": options.label_column or ClassLabel}
    return load_labeled(path, options.dataset_config, columns, seed, data_dir=options.image_folder)


def load_digits_images() -> DatasetDict:
    digits = load_digits()  # 1797 scans of 8 x 8 pixels from 0 to 16
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    rows = as_dataset(images[order], digits.target[order], [str(name) for name in digits.target_names])
    splits = {"train": range(900), "validation": range(900, 1197), "test": range(1197, 1797)}
    return DatasetDict({name: rows.select(places) for name, places in splits.items()})


def load_fashion_mnist(folder: Path) -> DatasetDict:
    splits = {}
    for name, prefix in (("train", "train"), ("test", "t10k")):
        files = [folder / f"{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        if not all(file.is_file() for file in files):
            raise SystemExit(f"error: {folder} lacks Fashion-MNIST. On Debian: apt install dataset-fashion-mnist.")
        images, labels = (gzip.decompress(file.read_bytes()) for file in files)
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
        splits[name] = as_dataset(pixels, np.frombuffer(labels, np.uint8, offset=8), FASHION)
    return DatasetDict(splits)


def as_dataset(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    header = b"P5 %d %d 255\n" % images.shape[:0:-1]  # of a PGM file, whose pixels are not compressed
    rows = {"image": [{"bytes": header + image.tobytes()} for image in images], "label": labels}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": ClassLabel(names=names)}))


def load_processor(source: str | None, size: int) -> Any:
    if source is not None:
        return AutoImageProcessor.from_pretrained(source)
    return ViTImageProcessor(size={"height": size, "width": size}, do_convert_rgb=True)


def prepare_images(dataset: Dataset, processors: dict[str, Any], channels: int = 3) -> Dataset:
    """Make each input with its processor: once if the images are few and small, else whenever they are read."""

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("L" if channels == 1 else "RGB") for image in batch["image"]]
        inputs = {name: make(images, return_tensors="np")["pixel_values"] for name, make in processors.items()}
        return {"labels": batch["label"], **inputs}

    if len(dataset) * sum(np.size(values) for values in encode(dataset[:1]).values()) > MOST_PREPARED_VALUES:
        return dataset.with_transform(encode)
    return dataset.map(
        encode, batched=True, remove_columns=dataset.column_names, keep_in_memory=True, desc="Preparing images"
    ).with_format("torch")


def main() -> None:
    options, args = parse_arguments(ImageArguments, DEFAULTS)
    known = "" if options.image_folder else options.dataset_name
    comparison = Comparison(options.image_folder or known, "images", options, args)
    with args.main_process_first(desc="loading the images"):
        data = load_images(options, args.seed)
    # Few labeled images, as is often the case where a student is wanted; the teacher has seen three times as many.
    train, few, test = comparison.choose_rows(data, 300 if known == "digits" else None)

    size = options.image_size or {"digits": 8, "fashion-mnist": 28}.get(known, 64)
    patch = options.patch_size or max(size // 4, 1)
    names = train.features["label"].names
    new = partial(small_config, ViTConfig, names, 24, image_size=size, patch_size=patch)
    load = partial(load_or_make, AutoModelForImageClassification, args.seed)
    teacher, trained = load(options.teacher_name_or_path, new(options.teacher_depth, options.teacher_width))
    student, _ = load(options.student_name_or_path, new(options.student_depth, options.student_width))
    teacher_processor = load_processor(options.teacher_name_or_path, size)
    processor = load_processor(options.student_name_or_path, size)

    prepare = partial(prepare_images, channels=student.config.num_channels)
    inputs, teacher_inputs = {"pixel_values": processor}, {"pixel_values": teacher_processor}
    teacher_data = prepare(train, teacher_inputs), prepare(test, teacher_inputs), teacher_processor
    comparison.run_teacher(teacher, *teacher_data, epochs=0.0 if trained else 20.0, learning_rate=1e-3)

    same = teacher_processor.to_dict() == processor.to_dict()
    both = inputs if same else {**inputs, "teacher_pixel_values": teacher_processor}
    student_data = prepare(few, both), prepare(test, inputs), processor, teacher
    comparison.run_students("new", student, prepare(test, both), *student_data)
    cut = make_student(teacher, num_layers=options.student_depth, report=False)
    cut_data = prepare(few, teacher_inputs), *teacher_data[1:], teacher  # it reads what its teacher reads
    comparison.run_students("cut", cut, teacher_data[1], *cut_data)
    comparison.report()


if __name__ == "__main__":
    main()
