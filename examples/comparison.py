"""What both examples share: arguments, labeled data, models to start from, and the rows of the table."""

from __future__ import annotations

import copy
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from sklearn.metrics import accuracy_score
from transformers import HfArgumentParser, PrinterCallback, ProgressCallback, Trainer, set_seed
from transformers.hf_argparser import HfArg
from transformers.utils import logging

from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer, evaluate
from hf_semckd.files import write_json
from hf_semckd.publishing.facts import environment

# What is compared: the trainer, and how its arguments differ.
METHODS = {
    "alone": (DistillationTrainer, {"logit_weight": 0.0, "feature_weight": 0.0}),
    "+ KD": (DistillationTrainer, {"feature_weight": 0.0}),
    "+ SemCKD": (SemCKDTrainer, {}),
}


@dataclass
class Arguments:
    """What both examples take besides the fields of `SemCKDConfig`."""

    dataset_config: str | None = HfArg(default=None, help="Configuration of a Hub dataset.")
    teacher_name_or_path: str | None = HfArg(default=None, help="Hub name or folder. None: the example's own.")
    student_name_or_path: str | None = HfArg(default=None, help="Hub name or folder. None: a small new model.")
    teacher_epochs: float | None = HfArg(default=None, help="None: 0 for a teacher that already knows the classes.")
    teacher_learning_rate: float | None = HfArg(default=None, help="Its peak. None: the example's own.")
    max_train_samples: int | None = HfArg(default=None, help="Train teacher and students on this many at most.")
    student_train_samples: int | None = HfArg(
        default=None, help="Train the students on this many of them. None: the example's own on its data, else all."
    )
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on this many at most.")
    eval_split: str = HfArg(default="test", help="Split that the table shows. Choose settings on 'validation'.")


def parse_arguments(kind: type, defaults: dict[str, Any]) -> tuple[Any, SemCKDConfig]:
    """Parse the command line into the example's own arguments and a `SemCKDConfig` with the example's defaults."""
    parser = HfArgumentParser((kind, SemCKDConfig))
    parser.set_defaults(report_to="none", logging_strategy="epoch", save_strategy="no")
    parser.set_defaults(lr_scheduler_type="cosine", per_device_train_batch_size=32, **defaults)
    # Bars are for terminals; a log gets one line for each model.
    parser.set_defaults(disable_tqdm=not sys.stderr.isatty(), dataloader_pin_memory=torch.cuda.is_available())
    options, args = parser.parse_args_into_dataclasses()
    args.disable_tqdm = args.disable_tqdm or args.process_index > 0
    if args.disable_tqdm:
        datasets.disable_progress_bars()
    logging.disable_progress_bar()  # of loading and writing models
    return options, args


def load_labeled(path: str, config: str | None, columns: dict[str, Any], seed: int, **files: Any) -> DatasetDict:
    """Load the labeled rows of what `load_dataset` takes, or of a folder of `save_to_disk`, with a test split.

    Without a labeled test split, the validation split becomes it, or else a fifth of the training rows. `columns` maps
    new names, "label" the last, to the names of the columns, or to a type: the first column of this type.
    """
    saved = (Path(path) / "dataset_dict.json").is_file()
    raw = load_from_disk(path) if saved else load_dataset(path, config, **files)
    data = DatasetDict({name: raw[name] for name in ("train", "validation", "test") if name in raw})
    first = {type(feature): name for name, feature in reversed(data["train"].features.items())}
    names = {first.get(column, column): new for new, column in columns.items()}
    data = data.select_columns(list(names)).rename_columns(names)
    features = data["train"].features
    # A ClassLabel of -1 is a hidden label, as in many test splits on the Hub.
    missing = (None, -1) if isinstance(features["label"], ClassLabel) else (None,)
    cells = [name for name, feature in features.items() if not isinstance(feature, Image)]
    data = data.filter(lambda *row: None not in row and row[-1] not in missing, input_columns=cells)
    data = DatasetDict({name: split for name, split in data.items() if len(split)})
    if not isinstance(features["label"], ClassLabel):
        labels = sorted({label for split in data.values() for label in split.unique("label")})
        features = Features({**features, "label": ClassLabel(names=[str(label) for label in labels])})
        data = data.map(lambda row: {"label": labels.index(row["label"])}, features=features)
    if "test" in data:
        return data
    if "validation" in data:
        return DatasetDict(train=data["train"], test=data["validation"])
    return data["train"].train_test_split(test_size=0.2, seed=seed)


def some_rows(dataset: Dataset, most: int | None) -> Dataset:
    """Return this many rows at most, in a random order that does not depend on --seed; all of them for None."""
    if most is None or most >= len(dataset):
        return dataset
    return dataset.shuffle(seed=0).select(range(most))


def small_config(kind: type, names: list[str], head: int, depth: int, width: int, **settings: Any) -> Any:
    """Return the configuration of a small Transformer for the named classes, with heads of this width."""
    settings |= {"num_hidden_layers": depth, "hidden_size": width, "intermediate_size": 4 * width}
    settings |= {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    # 0.02 is for a width of 768; with it a narrow model hardly starts to learn.
    spread = 0.02 * (768 / width) ** 0.5
    return kind(num_attention_heads=max(1, width // head), initializer_range=spread, **settings)


def load_or_make(auto: Any, seed: int, source: str | None, new: Any) -> tuple[Any, bool]:
    """Load a classifier of the new one's classes, or make the new one; tell whether all weights were loaded."""
    set_seed(seed)  # so that new weights do not depend on what was made before
    if source is None:
        return auto.from_config(new), False
    verbosity = logging.get_verbosity()
    # A new head is expected here, of which transformers always warns: github.com/huggingface/transformers/issues/6780.
    logging.set_verbosity_error()
    settings = {"id2label": new.id2label, "label2id": new.label2id, "ignore_mismatched_sizes": True}
    model, info = auto.from_pretrained(source, output_loading_info=True, **settings)
    logging.set_verbosity(verbosity)
    return model, not info["missing_keys"] and not info["mismatched_keys"]


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of samples whose largest logit is the label's."""
    return {"accuracy": float(accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1)))}


class NamedProgress(ProgressCallback):
    """A progress bar with the model's name and the loss, instead of a line for each log."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.training_bar.set_description(self.name)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class Comparison:
    """Choose the rows of the data, then train, evaluate and save one model after the other, and report them."""

    def __init__(self, name: str, unit: str, options: Arguments, args: SemCKDConfig):
        self.name, self.unit, self.options, self.args = name, unit, options, args
        self.out, self.rows, self.models, self.tests = Path(args.output_dir), [], {}, {}

    def say(self, text: str) -> None:
        if self.args.process_index == 0:
            print(text, flush=True)

    def choose_rows(self, data: DatasetDict, student_samples: int | None) -> tuple[Dataset, Dataset, Dataset]:
        """Return what the teacher learns from, what the students learn from, and what the table shows."""
        options, unit = self.options, self.unit
        if options.eval_split not in data:
            raise SystemExit(f"error: Received eval_split={options.eval_split!r}; expected one of {sorted(data)}.")
        train = some_rows(data["train"], options.max_train_samples)
        few = some_rows(train, options.student_train_samples or student_samples)
        test = some_rows(data[options.eval_split], options.max_eval_samples)
        self.data = {"name": self.name, "teacher_train_samples": len(train), "student_train_samples": len(few)}
        self.data |= {"eval_split": options.eval_split, "eval_samples": len(test)}
        learning = f"the teacher learns from {len(train)} {unit}, the students from {len(few)}"
        self.say(f"{self.name}: {learning}; accuracy on {len(test)} {options.eval_split} {unit}")
        return train, few, test

    def run_teacher(self, model: Any, *data: Any, epochs: float, learning_rate: float) -> None:
        """Train the teacher as the options say, or else for these epochs."""
        epochs = epochs if self.options.teacher_epochs is None else self.options.teacher_epochs
        learning_rate = self.options.teacher_learning_rate or learning_rate
        self.settings = {"teacher_epochs": epochs, "teacher_learning_rate": learning_rate}
        self.run("teacher", Trainer, model, *data, num_train_epochs=epochs, learning_rate=learning_rate)

    def run_students(self, start: str, model: Any, test: Any, *data: Any, **fields: Any) -> None:
        """Train a student by every method, each time from the same weights; `test` has the teacher's columns too."""
        self.tests[start] = test, data[2]
        for method, (kind, changes) in METHODS.items():
            self.run(f"{start} student {method}", kind, copy.deepcopy(model), *data, **{**changes, **fields})

    def run(self, name: str, kind: type[Trainer], model: Any, *data: Any, **fields: Any) -> None:
        """Train a model with some fields of the arguments changed, unless for 0 epochs; evaluate it and save it.

        `data` are the rows to train on, the rows to evaluate on, the processor and, for a student, the teacher.
        """
        inputs = dict(zip(("train_dataset", "eval_dataset", "processing_class", "teacher_model"), data, strict=False))
        folder, trains = self.out / folder_of(name), fields.get("num_train_epochs") != 0
        if folder.name != "student":  # whose trainer draws the association into its output_dir, and may push it
            fields |= {"output_dir": str(folder if trains else self.out), "push_to_hub": False}
        trainer = kind(model=model, args=replace(self.args, **fields), compute_metrics=accuracy, **inputs)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if not self.args.disable_tqdm:
            trainer.add_callback(NamedProgress(name))
        seconds, done = None, "not trained here"
        if trains:
            started = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - started
            epochs = round(trainer.state.epoch, 2)
            done = f"trained {epochs:g} epoch{'' if epochs == 1 else 's'} in {seconds:.0f} s"
        metrics = trainer.evaluate()
        if trains:
            trainer.save_model(str(folder))
        self.say(f"{name}: {done}, accuracy {100 * metrics['eval_accuracy']:.1f} %")
        row = {"name": name, "parameters": trainer.model.num_parameters(), "metric": metrics["eval_accuracy"]}
        row |= {"seconds": seconds, "eval_loss": metrics["eval_loss"], "steps": trainer.state.global_step}
        self.rows.append(row)
        self.models[name] = trainer.model
        if folder.name == "student":
            self.trainer = trainer

    def measure(self) -> None:
        """Add to the rows what `evaluate` tells of the models, those of a start beside the teacher."""
        for start, (test, processor) in self.tests.items():
            models = {
                name: model for name, model in self.models.items() if name == "teacher" or name.startswith(start)
            }
            # On the CPU with PyTorch alone; `hf-semckd evaluate` also measures memory and ONNX files.
            found = evaluate(models, test, processing_class=processor, onnx=False, memory=False, seconds=0.5)
            for row in self.rows:
                if row["name"] in models:
                    measured = found.row(row["name"])
                    kept = measured.kept
                    row |= {"kept": [kept.value, kept.low, kept.high], "milliseconds": measured.latency[0].p50}

    def report(self) -> None:
        """Compare quality and cost, write report.json, and print the table and how to load the student."""
        if self.args.process_index > 0:
            return
        out, args, trainer = self.out, self.args, self.trainer
        self.measure()
        saved = json.loads((out / "student" / "distillation_config.json").read_text(encoding="utf-8"))
        settings = {**saved["distillation"], **saved["training"], **self.settings, "processes": args.world_size}
        layers = {"student_layers": trainer.student_layer_names, "teacher_layers": trainer.teacher_layer_names}
        content = {"data": self.data, "seed": args.seed, "metric": "accuracy", "rows": self.rows}
        content |= {"association": {**layers, "weights": trainer.association()}, "settings": settings}
        write_json(out / "report.json", {**content, "environment": environment()})
        self.print_table()

    def print_table(self) -> None:
        """Print what each model is worth and what it costs."""
        out, auto = self.out, "AutoModelFor" + type(self.trainer.student).__name__.rpartition("For")[2]
        written = [name for name in ("student", "cut_student", "teacher", "report.json") if (out / name).exists()]
        data = f"{self.data['eval_samples']} {self.data['eval_split']} {self.unit}"
        print(f"\n{self.name}, {data}, seed {self.args.seed}\n")
        head = ("model", "parameters", "accuracy", "kept of the teacher's", "ms for 1", "trained")
        widths = (22, 11, 8, 22, 8, 7)
        print("  ".join(f"{cell:{'<' if place == 0 else '>'}{widths[place]}}" for place, cell in enumerate(head)))
        print("  ".join("-" * width for width in widths))
        for row in self.rows:
            seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f} s"
            kept = "{:.0%} ({:.0%} to {:.0%})".format(*row["kept"])
            cells = (f"{row['name']:22}", f"{row['parameters']:11,}", f"{row['metric']:8.4f}", f"{kept:>22}")
            print("  ".join((*cells, f"{row['milliseconds']:8.2f}", f"{seconds:>7}")))
        print(f"\nWritten to {out}: {', '.join(written)}. A student is a plain model:\n")
        print(f'    from transformers import {auto}\n    model = {auto}.from_pretrained("{out / "cut_student"}")')


def folder_of(name: str) -> str:
    """Return the folder of a model: student for the new one and cut_student for the cut one, with SemCKD."""
    words = name.removeprefix("new ").removesuffix(" + SemCKD").replace("+ ", "").split()
    return "_".join(words).lower()
