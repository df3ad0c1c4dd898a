"""Texts beside images: padding changes nothing, and each tower or part is compared where a person would look."""

import pytest
import torch
import transformers as tf
from makers import Samples, config, losses

from hf_semckd import SemCKDTrainer, inspect_models
from hf_semckd.features.modalities import TextPlace, text_places

SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 64, "max_position_embeddings": 32}
PATCHES = {"image_size": 32, "patch_size": 8}
SPECIAL = {"bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
# Dropout would be other for other lengths.
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def vilt(layers):
    sizes = {**SIZES, **WORDS, **PATCHES, **STILL, "num_hidden_layers": layers}
    return tf.ViltForQuestionAnswering(tf.ViltConfig(**sizes, num_labels=3))


def git(layers):
    vision = {**SIZES, **PATCHES, "num_hidden_layers": 2}
    sizes = {**SIZES, **WORDS, **SPECIAL, **STILL, "num_hidden_layers": layers}
    return tf.GitForCausalLM(tf.GitConfig(vision_config=vision, **sizes))


def clip(layers):
    text, vision = {**SIZES, **WORDS, **SPECIAL}, {**SIZES, **PATCHES}
    parts = {name: {**part, "num_hidden_layers": layers} for name, part in (("text", text), ("vision", vision))}
    return tf.CLIPModel(tf.CLIPConfig(text_config=parts["text"], vision_config=parts["vision"], projection_dim=8))


def blip(layers):
    text = {**SIZES, **WORDS, **SPECIAL, **STILL, "encoder_hidden_size": 16, "projection_dim": 8, "sep_token_id": 2}
    vision = {**SIZES, **PATCHES, "num_hidden_layers": 2}
    made = tf.BlipConfig(text_config={**text, "num_hidden_layers": layers}, vision_config=vision, projection_dim=8)
    return tf.BlipForConditionalGeneration(made)


def layoutlm(layers):
    sizes = {"coordinate_size": 2, "shape_size": 4, "max_2d_position_embeddings": 64, "num_hidden_layers": layers}
    made = tf.LayoutLMv3Config(**SIZES, **WORDS, **STILL, **sizes, input_size=32, patch_size=8, num_labels=3)
    return tf.LayoutLMv3ForTokenClassification(made)


ALL = TextPlace(0)
# What makes the model, the layers of two blocks, and where the text lies in each; None: none. ViLT shuffles patches.
FAMILIES = {
    "vilt": (vilt, ["vilt.encoder.layer.0", "vilt.encoder.layer.1"], [TextPlace(0, False)] * 2),
    "git": (git, ["git.encoder.layer.0", "git.encoder.layer.1"], [TextPlace(17)] * 2),
    "clip": (
        clip,
        [f"{tower}_model.encoder.layers.{n}" for tower in ("vision", "text") for n in range(2)],
        [None, None, ALL, ALL],
    ),
    "blip": (blip, ["text_decoder.bert.encoder.layer.0", "text_decoder.bert.encoder.layer.1"], [ALL] * 2),
    "layoutlmv3": (layoutlm, ["layoutlmv3.encoder.layer.0", "layoutlmv3.encoder.layer.1"], [ALL] * 2),
}


def made(family, layers, seed=0):
    torch.manual_seed(seed)
    return FAMILIES[family][0](layers).eval()


def rows(family, padding=0):
    generator = torch.Generator().manual_seed(3)
    samples = []
    for n in range(4):
        length = 10 - n
        ids = torch.cat([torch.randint(5, 60, (length,), generator=generator), torch.zeros(n + padding).long()])
        mask = (torch.arange(len(ids)) < length).long()
        row = {"input_ids": ids, "attention_mask": mask}
        row["pixel_values"] = torch.randn(3, 32, 32, generator=generator)
        if family in ("git", "blip"):
            row["labels"] = ids.where(mask == 1, -100)
        if family == "vilt":
            row["labels"] = torch.eye(3)[n % 3]
        if family == "layoutlmv3":
            row["bbox"] = torch.tensor([[1, 2, 8, 9]]).expand(len(ids), 4) * mask[:, None]
            row["labels"] = (ids % 3).where(mask == 1, -100)
        samples.append(row)
    return Samples(samples)


def batch_of(samples):
    return {name: torch.stack([row[name] for row in samples.rows]) for name in samples.rows[0]}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_the_blocks_that_read_the_text(family):
    _, names, _ = FAMILIES[family]
    report = inspect_models(made(family, 2), made(family, 3, seed=1), batch_of(rows(family)))
    assert report.student.modules == names and report.student.masked


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_begins_where_its_first_word_changes_something(family):
    _, names, places = FAMILIES[family]
    batch = batch_of(rows(family))
    batch.pop("labels", None)
    assert text_places(made(family, 2), batch, names) == places


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_term(family, tmp_path):
    own = family != "clip"
    args = {"max_steps": 2, "learning_rate": 0.0, "target_norm": "none", "association": "uniform", "temperature": 2.0}
    args |= {"remove_unused_columns": False} | ({} if own else {"task_weight": 0.0, "logit_weight": 0.0})
    seen = []
    for padding in (0, 4):
        torch.manual_seed(0)
        trainer = SemCKDTrainer(
            made(family, 2),
            config(tmp_path, **args, max_tokens=0, per_device_train_batch_size=4),
            train_dataset=rows(family, padding),
            teacher_model=made(family, 3, seed=1),
        )
        trainer.train()
        seen.append([losses(trainer, term) for term in (("logit_loss", "feature_loss") if own else ("feature_loss",))])
    for one, other in zip(*seen, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_padded_patches_do_not_count():
    """SigLIP 2 cuts images into as many patches as fit, and fills up with patches that a mask leaves out."""
    text, vision = {**SIZES, **WORDS, "num_hidden_layers": 2}, {**SIZES, "num_hidden_layers": 2, "patch_size": 4}
    made = tf.Siglip2Config(text_config=text, vision_config={**vision, "num_patches": 64})
    model = tf.Siglip2ForImageClassification(made)
    mask = (torch.arange(16) < torch.tensor([[16], [12]])).long()
    shapes = {"pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4], [3, 4]])}
    report = inspect_models(model, model, {"pixel_values": torch.randn(2, 16, 48), **shapes})
    assert report.student.masked
