"""One student and teacher for every task: tiny models without dropout, samples, and what is tried of them.

The teacher is wider and deeper than the student. All is made from configurations and seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import transformers as tf
from makers import Samples, assert_same_weights, config, losses, weights
from tiny import tokenizer
from torch import Tensor, nn

from hf_semckd import SemCKDTrainer
from hf_semckd.models.inputs import InputSelector
from matrix.cells import assert_resumes
from matrix.tiny_models import CLASSES, DEPTHS, FRAMES, WIDTHS, tiny_config

SIZES = {"student": {"layers": 2, "width": 16, "seed": 0}, "teacher": {"layers": 3, "width": 24, "seed": 1}}
COUNT, LENGTH, IGNORED = 8, 10, -100
IMAGE, PATCHES, IMAGE_TOKEN = 32, 16, 63
ALL = ("task_loss", "logit_loss", "feature_loss")
ALONE = {"task_weight": 0.0, "logit_weight": 0.0}


@dataclass(frozen=True)
class Task:
    """What is trained, on which samples.

    Attributes:
        title: The task and what is particular about it, for the written page.
        models: Its models, for the written page: the student, and the teacher where it is of another kind.
        make: Makes the student, given `layers`, `width` and `seed`; and the teacher, unless `teacher` does.
        rows: Makes the samples.
        blocks: The student's two blocks: what the names of their weights begin with in one or another version of
            transformers.
        collator: Makes a batch of samples for a student; None for the trainer's own.
        terms: The terms that apply.
        args: Changes of the arguments.
        teacher: Makes the teacher, given the same.
    """

    title: str
    models: str
    make: Callable[..., nn.Module]
    rows: Callable[[], list[dict[str, Any]]]
    blocks: list[tuple[str, ...]]
    collator: Callable[[nn.Module], Any] | None = None
    terms: tuple[str, ...] = ALL
    args: Mapping[str, Any] = field(default_factory=dict)
    teacher: Callable[..., nn.Module] | None = None

    def student_model(self, seed: int = 0) -> Any:
        """Return a new student."""
        return self.make(**{**SIZES["student"], "seed": seed})

    def teacher_model(self) -> Any:
        """Return a new teacher."""
        return (self.teacher or self.make)(**SIZES["teacher"])

    def trainer(self, folder: Any, student: Any = None, **args: Any) -> SemCKDTrainer:
        """Return a trainer of new models, which draws four samples a step unless told otherwise."""
        student = self.student_model() if student is None else student
        return SemCKDTrainer(
            model=student,
            teacher_model=self.teacher_model(),
            args=config(folder, **{**self.args, **args}),
            train_dataset=Samples(self.rows()),
            data_collator=None if self.collator is None else self.collator(student),
        )


# ---- Models --------------------------------------------------------------------------------------------------------


def sized(family: str, layers: int, width: int, **changes: Any) -> Any:
    """Return a family's tiny configuration with this many layers of this width."""
    plain = tf.AutoConfig.for_model(family)
    sizes = {**dict.fromkeys(DEPTHS, layers), **dict.fromkeys(WIDTHS, width)}
    own = {name: size for name, size in sizes.items() if isinstance(getattr(plain, name, None), int)}
    return tiny_config(family, **{**own, **changes})


def seeded(cls: Any, settings: Any, seed: int) -> Any:
    """Return a model with random weights."""
    torch.manual_seed(seed)
    return cls(settings).eval()


def model(name: str, family: str, **changes: Any) -> Callable[..., Any]:
    """Return a function that makes a model of this class, given `layers`, `width` and `seed`."""

    def make(layers: int, width: int, seed: int) -> Any:
        return seeded(getattr(tf, name), sized(family, layers, width, **changes), seed)

    return make


def segformer(layers: int, width: int, seed: int) -> Any:
    """Return a model whose stages grow, by the width each."""
    stages: dict[str, Any] = {"hidden_sizes": [width * (n + 1) for n in range(layers)], "depths": [1] * layers}
    stages |= {"num_encoder_blocks": layers, "num_hidden_layers": layers, "decoder_hidden_size": width}
    stages |= {name: [2] * layers for name in ("num_attention_heads", "sr_ratios", "mlp_ratios", "strides")}
    made = tiny_config("segformer", **stages, patch_sizes=[3] * layers)
    return seeded(tf.SegformerForSemanticSegmentation, made, seed)


def llava(layers: int, width: int, seed: int) -> Any:
    """Return a model that reads an image of 16 patches among its words."""
    vision = sized("clip_vision_model", layers, width)
    made = tf.LlavaConfig(
        vision_config=vision, text_config=sized("llama", layers, width), image_token_index=IMAGE_TOKEN
    )
    return seeded(tf.LlavaForConditionalGeneration, made, seed)


def git(layers: int, width: int, seed: int) -> Any:
    """Return a model that writes captions."""
    vision = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"image_size": IMAGE, "patch_size": 8}
    return seeded(tf.GitForCausalLM, sized("git", layers, width, vision_config=vision), seed)


def vision_encoder_decoder(layers: int, width: int, seed: int) -> Any:
    """Return a ViT whose patches a BERT describes."""
    parts = sized("vit", layers, width), sized("bert", layers, width)
    made = tf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    made.decoder_start_token_id, made.pad_token_id = 1, 0
    return seeded(tf.VisionEncoderDecoderModel, made, seed)


class PlainCNN(nn.Module):
    """A plain PyTorch CNN, whose forward names its input as one likes."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        widths = [3, *(width * (n + 1) for n in range(layers))]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def cnn(layers: int, width: int, seed: int) -> nn.Module:
    """Return a plain CNN with random weights."""
    torch.manual_seed(seed)
    return PlainCNN(layers, width)


# ---- Samples -------------------------------------------------------------------------------------------------------


def made(row: Callable[[int, torch.Generator], dict[str, Any]]) -> Callable[[], list[dict[str, Any]]]:
    """Return a function that makes samples, each from its number and one generator for all."""

    def rows() -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(1)
        return [row(n, generator) for n in range(COUNT)]

    return rows


def words(generator: torch.Generator, length: int = LENGTH) -> Tensor:
    """Return random tokens that the tokenizer knows."""
    return torch.randint(5, 40, (length,), generator=generator)


def sentence(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a text of 5 to 10 tokens, padded to 10."""
    mask = (torch.arange(LENGTH) < LENGTH - n % 6).long()
    return {"input_ids": words(generator) * mask, "attention_mask": mask}


def image(generator: torch.Generator, size: int = IMAGE) -> dict[str, Any]:
    """Return a random picture."""
    return {"pixel_values": torch.randn(3, size, size, generator=generator)}


def labeled(label: Callable[[int, torch.Generator, Tensor], Any]) -> Callable[[], list[dict[str, Any]]]:
    """Return padded texts; `label` makes the label from number, generator and mask."""

    def row(n: int, generator: torch.Generator) -> dict[str, Any]:
        text = sentence(n, generator)
        return {**text, "labels": label(n, generator, text["attention_mask"])}

    return made(row)


def tagged(n: int, generator: torch.Generator, mask: Tensor) -> Tensor:
    """Return a class for every token but the first and the padding."""
    classes = torch.randint(CLASSES, (LENGTH,), generator=generator)
    return classes.where((mask == 1) & (torch.arange(LENGTH) > 0), IGNORED)


def several(n: int, generator: torch.Generator, mask: Tensor) -> Tensor:
    """Return 0 or 1 for each class."""
    return torch.randint(2, (CLASSES,), generator=generator).float()


def choices(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return two texts, of which one is right."""
    texts = [sentence(n, generator), sentence(n + 3, generator)]
    return {**{name: torch.stack([text[name] for text in texts]) for name in texts[0]}, "labels": n % 2}


def answered(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a text and where an answer begins and ends."""
    return {**sentence(n, generator), "start_positions": n % 3, "end_positions": 2 + n % 3}


def masked(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a text with every third token masked, which is what is learned."""
    text = sentence(n, generator)
    hidden = (torch.arange(LENGTH) % 3 == n % 3) & (text["attention_mask"] == 1)
    labels = text["input_ids"].where(hidden, IGNORED)
    return {**text, "input_ids": text["input_ids"].masked_fill(hidden, 2), "labels": labels}


def ragged(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a list of 5 to 10 tokens, as tokenizers give them."""
    return {"input_ids": words(generator, LENGTH - n % 6).tolist()}


def translated(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a list of 5 to 10 tokens, and another of 3 to 7 tokens."""
    row = ragged(n, generator)
    return {**row, "attention_mask": [1] * len(row["input_ids"]), "labels": words(generator, 3 + n % 5).tolist()}


def target(n: int, generator: torch.Generator, length: int = 6) -> Tensor:
    """Return tokens to be written, padded with -100."""
    return words(generator, length).where(torch.arange(length) < length - n % 3, IGNORED)


def segmented(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a picture with a class for every pixel but those of a corner."""
    labels = torch.randint(CLASSES, (IMAGE, IMAGE), generator=generator)
    labels[: 4 + n, : 4 + n] = 255
    return {**image(generator), "labels": labels}


def sounds(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a sound and its class."""
    return {"input_values": torch.randn(FRAMES, generator=generator), "labels": n % CLASSES}


def spoken(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a sound of its own length, padded, and what was said."""
    mask = (torch.arange(FRAMES) < FRAMES - 100 * n).long()
    sound = torch.randn(FRAMES, generator=generator) * mask
    return {"input_values": sound, "attention_mask": mask, "labels": target(n, generator, 5)}


def spectrogram(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return a spectrogram and what was said."""
    return {"input_features": torch.randn(16, 40, generator=generator), "labels": target(n, generator)}


def shown(n: int, generator: torch.Generator, before: int = 1) -> dict[str, Any]:
    """Return an image, the tokens in its place after some words, and a text about it."""
    text = sentence(n, generator)
    ids = torch.cat([words(generator, before), torch.full((PATCHES,), IMAGE_TOKEN), text["input_ids"]])
    mask = torch.cat([torch.ones(before + PATCHES).long(), text["attention_mask"]])
    labels = ids.where((mask == 1) & (ids != IMAGE_TOKEN), IGNORED)
    return {**image(generator), "input_ids": ids, "attention_mask": mask, "labels": labels}


def captioned(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return an image and its caption."""
    text = sentence(n, generator)
    return {**image(generator), **text, "labels": text["input_ids"].where(text["attention_mask"] == 1, IGNORED)}


def boxed(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return an image with one or two objects."""
    boxes = 0.25 + 0.25 * torch.rand(1 + n % 2, 4, generator=generator)
    return {**image(generator), "labels": {"class_labels": torch.arange(1 + n % 2), "boxes": boxes}}


def series(n: int, generator: torch.Generator) -> dict[str, Any]:
    """Return three series of 32 steps, and their class."""
    return {"past_values": torch.randn(32, 3, generator=generator), "target_values": n % CLASSES}


def stack_with_boxes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch whose labels are a list, one entry an image."""
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": [row["labels"] for row in rows],
    }


# ---- Tasks ---------------------------------------------------------------------------------------------------------


def numbered(*prefixes: str) -> list[tuple[str, ...]]:
    """Return what the names of the weights of two blocks begin with, where they are in one of these lists."""
    return [tuple(f"{prefix}.{n}." for prefix in prefixes) for n in range(2)]


BERT, SPEECH = numbered("bert.encoder.layer"), numbered("wav2vec2.encoder.layers")
SERIES = {"context_length": 32, "patch_length": 8, "patch_stride": 8, "use_cls_token": True, "num_targets": CLASSES}
SERIES |= {"num_input_channels": 3}
WHISPER = {"num_mel_bins": 16, "max_source_positions": 20}
FEATURES = ("feature_loss",)

TASKS: dict[str, Task] = {
    "sequence-classification": Task(
        "Sequence classification",
        "BERT",
        model("BertForSequenceClassification", "bert"),
        labeled(lambda n, generator, mask: n % CLASSES),
        BERT,
    ),
    "token-classification": Task(
        "Token classification", "BERT", model("BertForTokenClassification", "bert"), labeled(tagged), BERT
    ),
    "multi-label": Task(
        "Multi-label classification",
        "BERT",
        model("BertForSequenceClassification", "bert", problem_type="multi_label_classification"),
        labeled(several),
        BERT,
    ),
    "regression": Task(
        "Regression",
        "BERT",
        model("BertForSequenceClassification", "bert", num_labels=1),
        labeled(lambda n, generator, mask: n / 4),
        BERT,
    ),
    "multiple-choice": Task("Multiple choice", "BERT", model("BertForMultipleChoice", "bert"), made(choices), BERT),
    "question-answering": Task(
        "Extractive question answering",
        "BERT",
        model("BertForQuestionAnswering", "bert", num_labels=2),
        made(answered),
        BERT,
    ),
    "masked-lm": Task("Masked language modeling", "BERT", model("BertForMaskedLM", "bert"), made(masked), BERT),
    "causal-lm": Task(
        "Causal language modeling",
        "Llama",
        model("LlamaForCausalLM", "llama"),
        made(ragged),
        numbered("model.layers"),
        lambda student: tf.DataCollatorForLanguageModeling(tokenizer(), mlm=False),
    ),
    "causal-lm-packed": Task(
        "Causal language modeling, packed rows",
        "Llama",
        model("LlamaForCausalLM", "llama"),
        made(ragged),
        numbered("model.layers"),
        lambda student: tf.DataCollatorWithFlattening(),
    ),
    "seq2seq": Task(
        "Sequence to sequence, with decoder inputs",
        "T5",
        model("T5ForConditionalGeneration", "t5"),
        made(translated),
        numbered("decoder.block"),
        lambda student: tf.DataCollatorForSeq2Seq(tokenizer(), model=student),
    ),
    "seq2seq-labels": Task(
        "Sequence to sequence, labels alone",
        "BART",
        model("BartForConditionalGeneration", "bart"),
        made(translated),
        numbered("model.decoder.layers"),
        lambda student: tf.DataCollatorForSeq2Seq(tokenizer()),
    ),
    "image-classification": Task(
        "Image classification",
        "ViT",
        model("ViTForImageClassification", "vit"),
        made(lambda n, generator: {**image(generator), "labels": n % CLASSES}),
        numbered("vit.layers", "vit.encoder.layer"),
    ),
    "segmentation": Task(
        "Semantic segmentation",
        "SegFormer",
        segformer,
        made(segmented),
        numbered("segformer.stages", "segformer.encoder.block"),
    ),
    "audio-classification": Task(
        "Audio classification",
        "wav2vec 2.0",
        model("Wav2Vec2ForSequenceClassification", "wav2vec2"),
        made(sounds),
        SPEECH,
    ),
    "ctc": Task(
        "Speech recognition (CTC), padded",
        "wav2vec 2.0",
        model("Wav2Vec2ForCTC", "wav2vec2", ctc_zero_infinity=True),
        made(spoken),
        SPEECH,
    ),
    "speech-seq2seq": Task(
        "Speech to text",
        "Whisper",
        model("WhisperForConditionalGeneration", "whisper", **WHISPER),
        made(spectrogram),
        numbered("model.decoder.layers"),
    ),
    "image-text-to-text": Task(
        "Image and text to text", "LLaVA", llava, made(shown), numbered("model.language_model.layers")
    ),
    "image-text-to-text-image-first": Task(
        "Image and text to text, the image first",
        "LLaVA",
        llava,
        made(partial(shown, before=0)),
        numbered("model.language_model.layers"),
    ),
    "vision-encoder-decoder": Task(
        "Image to text",
        "ViT with a BERT decoder",
        vision_encoder_decoder,
        made(lambda n, generator: {**image(generator), "labels": target(n, generator)}),
        numbered("decoder.bert.encoder.layer"),
    ),
    "captioning": Task("Image captioning", "GIT", git, made(captioned), numbered("git.encoder.layer")),
    "sentence-encoder": Task(
        "Sentence encoder, features alone",
        "BERT without a head",
        model("BertModel", "bert"),
        made(sentence),
        numbered("encoder.layer"),
        terms=FEATURES,
        args=ALONE,
    ),
    "vision-backbone": Task(
        "Vision backbone, features alone",
        "DINOv2 without a head",
        model("Dinov2Model", "dinov2"),
        made(lambda n, generator: image(generator)),
        numbered("encoder.layer"),
        terms=FEATURES,
        args=ALONE,
    ),
    "object-detection": Task(
        "Object detection, without logits",
        "YOLOS",
        model("YolosForObjectDetection", "yolos", image_size=[IMAGE, IMAGE], num_detection_tokens=5),
        made(boxed),
        numbered("vit.encoder.layer"),
        lambda student: stack_with_boxes,
        terms=("task_loss", "feature_loss"),
        args={"logit_weight": 0.0},
    ),
    "time-series": Task(
        "Time series classification",
        "PatchTST",
        model("PatchTSTForClassification", "patchtst", **SERIES),
        made(series),
        numbered("model.encoder.layers"),
        args={"label_names": ["target_values"]},
    ),
    "plain-teacher": Task(
        "Image classification, plain PyTorch teacher",
        "ViT, and a CNN with `forward(self, x)`",
        model("ViTForImageClassification", "vit"),
        made(lambda n, generator: {**image(generator), "labels": n % CLASSES}),
        numbered("vit.layers", "vit.encoder.layer"),
        teacher=cnn,
    ),
}


# ---- Checks --------------------------------------------------------------------------------------------------------


def check_training(task: Task, folder: Any) -> None:
    """Every term that applies is finite and larger than 0 in both steps, and what is saved loads as it was."""
    trainer = task.trainer(folder, max_steps=2)
    student, before = trainer.student, weights(trainer.student)
    trainer.train()
    for term in ALL:
        values = losses(trainer, term)
        assert len(values) == (2 if term in task.terms else 0), (term, values)
        assert all(0 < value < 1e6 for value in values), (term, values)
    assert any(not torch.equal(before[name], value) for name, value in weights(student).items())
    trainer.save_model(str(folder / "saved"))
    loaded: Any = type(student).from_pretrained(folder / "saved").eval()
    assert_same_weights(weights(student), weights(loaded))
    inputs = InputSelector(student)(next(iter(trainer.get_test_dataloader(trainer.train_dataset))))
    with torch.no_grad():
        kept, read = (tensors(model.eval()(**inputs)) for model in (student, loaded))
    assert kept and len(kept) == len(read)
    for one, other in zip(kept, read, strict=True):
        # Equal weights at other addresses may be added up in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of a model's output, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = (
        outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, (tuple, list)) else ()
    )
    return [tensor for value in values for tensor in tensors(value)]


def check_feature_gradient(task: Task, folder: Any) -> None:
    """The feature term alone moves the weights of both blocks."""
    trainer = task.trainer(folder, **ALONE, learning_rate=5e-2, max_steps=3)
    before = weights(trainer.student)
    trainer.train()
    after = weights(trainer.student)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    for block in task.blocks:
        assert any(name.startswith(block) for name in before), f"no weights begin with {block}"
        assert any(name.startswith(block) for name in moved), block


def check_resume(task: Task, folder: Any) -> None:
    """A training that is resumed after two of four steps ends as one that was not interrupted."""
    assert_resumes(lambda seed, **args: task.trainer(folder, task.student_model(seed), **args), folder)
