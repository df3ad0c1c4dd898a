"""What is tried of a family: its layers, training, padding, and loading what was saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from makers import Samples, assert_same_weights, config, losses, weights
from torch import Tensor

from hf_semckd import SemCKDTrainer
from hf_semckd.features.capture import FeatureCapture
from hf_semckd.models.inputs import InputSelector
from matrix.families import FAMILIES
from matrix.tiny_models import CLASSES, FRAMES, LENGTH, make

TOKENS = ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM")
# Families whose own outputs change with padding: Fourier mixing, blocks of tokens, sampled attention, routing.
MIXES_PADDING = {"fnet", "big_bird", "bigbird_pegasus", "yoso", "mra", "nystromformer", "longformer", "led", "longt5"}
MIXES_PADDING |= {"switch_transformers", "convbert", "canine", "squeezebert", "data2vec-audio"}
ON_LARGER_IMAGES = {
    "mobilenet_v1",
    "mobilenet_v2",
    "swiftformer",
    "resnet",
    "regnet",
    "bit",
    "poolformer",
    "segformer",
}


def cells() -> list[tuple[str, str]]:
    """Return every head and family of the matrix."""
    return [(task, family) for task, known in FAMILIES.items() for family in known]


# The head with which a family is tried where one is enough.
FIRST_TASK = {family: task for task, family in reversed(cells())}


def case(family: str) -> tuple[Any, dict[str, Any]]:
    """Return a family's model with its first head, and inputs for it."""
    model = make(family, FIRST_TASK[family])
    return model, InputSelector(model)(batch_of(rows(FIRST_TASK[family], family, model)))


def outputs_of(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return a model's logits in evaluation mode."""
    with torch.no_grad():
        return model.eval()(**inputs).logits


def names_of(task: str, family: str) -> list[str]:
    """Return the modules that a person would name as the family's layers."""
    words = FAMILIES[task][family].split(" ")
    if "#" not in words[0]:
        return words
    return [words[0].replace("#", str(n)) for n in range(int(words[1]))]


def rows(task: str, family: str, model: Any, count: int = 4, padding: int = 0) -> Samples:
    """Return samples that the model takes, those of texts and speech with this much padding more."""
    generator = torch.Generator().manual_seed(1)
    made: list[dict[str, Any]] = []
    for n in range(count):
        label = n % CLASSES
        if task == "IMAGE_CLASSIFICATION":
            made.append(
                {"pixel_values": torch.randn(3, *image_size(family, model), generator=generator), "labels": label}
            )
        elif task in ("AUDIO_CLASSIFICATION", "CTC"):
            shape = (32, 16) if family == "audio-spectrogram-transformer" else (FRAMES,)
            sound = torch.randn(shape, generator=generator)
            target = torch.randint(1, 9, (4,), generator=generator) if task == "CTC" else label
            made.append({"input_values": sound, "labels": target})
        else:
            made.append(text(task, label, generator, padding))
            if family == "fsmt":  # the only one that does not make its decoder's inputs from the labels
                made[-1]["decoder_input_ids"] = made[-1]["labels"].roll(1)
    return Samples(made)


def text(task: str, label: int, generator: torch.Generator, padding: int) -> dict[str, Any]:
    """Return one tokenized text, with the labels of its task."""
    ids = torch.randint(5, 60, (LENGTH,), generator=generator)
    ids[-1] = 2
    mask = torch.cat([torch.ones(LENGTH), torch.zeros(padding)]).long()
    ids = torch.cat([ids, torch.zeros(padding).long()])
    labels: Any = ids.where(mask == 1, -100) if task in TOKENS else label
    if task == "SEQ_TO_SEQ_CAUSAL_LM":
        labels = labels[: LENGTH - 3].clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def image_size(family: str, model: Any) -> tuple[int, int]:
    size = 64 if family in ON_LARGER_IMAGES else getattr(model.config, "image_size", 64)
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def batch_of(samples: Samples, count: int = 2) -> dict[str, Tensor]:
    """Return the first samples as a batch."""
    return {name: torch.stack([torch.as_tensor(samples[n][name]) for n in range(count)]) for name in samples[0]}


def check_layers(task: str, family: str) -> None:
    """The captured layers are the outputs of the named modules; the last may have been normalized at the end."""
    model, seen = make(family, task), {}
    names = names_of(task, family)
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, n=name: seen.setdefault(n, []).append(output)
        )
        for name in dict.fromkeys(names)
    ]
    capture = FeatureCapture(model, None, "student")
    inputs = InputSelector(model)(batch_of(rows(task, family, model)))
    with torch.no_grad():
        found = capture.find(model, inputs)
    for handle in handles:
        handle.remove()
    assert len(found.features) == len(names)
    for n, (feature, name) in enumerate(zip(found.features, names, strict=True)):
        outputs = [output if isinstance(output, Tensor) else output[0] for output in seen[name]]
        # A shared module (ALBERT) ran once for every layer, and all of them twice where layers are recorded by hooks.
        same = any(alike(feature, output) for output in outputs)
        assert same or (n == len(names) - 1 and feature.numel() == outputs[-1].numel()), name


def alike(feature: Tensor, output: Tensor) -> bool:
    """Whether two tensors hold the same values, in any layout."""
    return feature.numel() == output.numel() and torch.equal(feature.flatten().sort()[0], output.flatten().sort()[0])


def check_training(task: str, family: str, folder: Any) -> None:
    """All terms are trained, the feature term reaches two blocks at least, and what is saved loads as it was."""
    teacher, student = make(family, task, seed=1), make(family, task)
    data = rows(task, family, student)
    trainer = SemCKDTrainer(model=student, teacher_model=teacher, args=config(folder, max_steps=2), train_dataset=data)
    trainer.train()
    for term in ("task_loss", "logit_loss", "feature_loss"):
        values = losses(trainer, term)
        assert len(values) == 2 and all(value == value and abs(value) < 1e6 for value in values), term
    trainer.save_model(str(folder / "saved"))
    loaded: Any = type(student).from_pretrained(folder / "saved").eval()
    inputs = InputSelector(student)(batch_of(data))
    with torch.no_grad():
        kept, read = (model.eval()(**inputs).logits for model in (trainer.student, loaded))
    assert_same_weights(weights(trainer.student), weights(loaded))
    # Equal weights at other addresses may be added up in another order.
    torch.testing.assert_close(kept, read, rtol=1e-4, atol=1e-5)


def check_feature_gradient(task: str, family: str, folder: Any) -> None:
    """The feature term alone moves the weights of two blocks at least."""
    teacher, student = make(family, task, seed=1), make(family, task)
    before = weights(student)
    args = config(folder, max_steps=3, task_weight=0.0, logit_weight=0.0)
    data = rows(task, family, student)
    SemCKDTrainer(model=student, teacher_model=teacher, args=args, train_dataset=data).train()
    after = weights(student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {name for name in names_of(task, family) if any(key.startswith(block_of(name)) for key in moved)}
    assert len(blocks) >= 2 or len({*names_of(task, family)}) == 1


def block_of(name: str) -> str:
    """Return the prefix of a block's weights: a layer that is a norm within a block stands for the block."""
    return name.removesuffix(".layer_norm").removesuffix(".output") + "."


def check_padding(task: str, family: str, folder: Any) -> None:
    """Padding changes neither the logit nor the feature term; the second step has an association that is not even."""
    seen = []
    still = {"learning_rate": 0.0, "projection_learning_rate": 1e-30}
    for padding in (0, 4):
        teacher, student = make(family, task, seed=1), make(family, task)
        data = rows(task, family, student, padding=padding)
        args = config(folder, max_steps=2, max_tokens=0, **still)
        trainer = SemCKDTrainer(model=student, teacher_model=teacher, args=args, train_dataset=data)
        trainer.train()
        seen.append([value for term in ("logit_loss", "feature_loss") for value in losses(trainer, term)])
    for plain, padded in zip(*seen, strict=True):
        # In float32 the divergence of nearly equal logits, a sum of 64 differences, is rounded to some 1e-7.
        assert abs(plain - padded) <= 1e-3 * abs(plain) + 5e-7, seen


def check_pair(task: str, student: str, teacher: str, folder: Any) -> None:
    """A family learns from the features of another; images of another size are the teacher's own."""
    own, other = make(student, task), make(teacher, task, seed=1)
    data, theirs = rows(task, student, own), rows(task, teacher, other)
    if task == "IMAGE_CLASSIFICATION" and data[0]["pixel_values"].shape != theirs[0]["pixel_values"].shape:
        for row, one in zip(data.rows, theirs.rows, strict=True):
            row["teacher_pixel_values"] = one["pixel_values"]
    args = config(folder, max_steps=1)
    trainer = SemCKDTrainer(model=own, teacher_model=other, args=args, train_dataset=data)
    trainer.train()
    assert 0 < losses(trainer, "feature_loss")[0] < 1e6


def check_resume(task: str, family: str, folder: Any) -> None:
    """A training that is resumed after two of four steps ends as one that was not interrupted."""

    def trainer(seed: int, **args: Any) -> SemCKDTrainer:
        teacher, student = make(family, task, seed=1), make(family, task, seed=seed)
        data = rows(task, family, student, count=8)
        return SemCKDTrainer(model=student, teacher_model=teacher, args=config(folder, **args), train_dataset=data)

    assert_resumes(trainer, folder)


def assert_resumes(make_trainer: Callable[..., SemCKDTrainer], folder: Any) -> None:
    """Check that steps 3 and 4 after a checkpoint are those of a training in one go, within one epoch of 8 samples.

    `make_trainer` takes the student's seed and arguments. The resumed student begins with other weights, so that
    nothing but the checkpoint can make it equal.
    """
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole, half = make_trainer(0, **saving), folder / "checkpoint-2"
    whole.train()
    resumed = make_trainer(5, **saving)
    resumed.train(resume_from_checkpoint=str(half))
    assert resumed.state.global_step == 4 and losses(whole) == losses(resumed)
    kept = type(whole.student).from_pretrained(half).state_dict()
    assert any(not torch.equal(kept[name].to(value), value) for name, value in weights(whole.student).items())
    for one, other in ((whole.student, resumed.student), (whole.feature_loss, resumed.feature_loss)):
        ends = [weights(part) for part in (one, other)]
        assert ends[0].keys() == ends[1].keys()
        for name, value in ends[0].items():
            torch.testing.assert_close(value, ends[1][name], rtol=1e-6, atol=1e-6, msg=name)


def is_text(task: str) -> bool:
    return task not in ("IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC")
