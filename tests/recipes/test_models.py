"""Models by name, folder or file, with the head of the task and the names of its classes."""

import pytest
import torch
from makers import assert_same_weights, weights
from recipe_parts import bert_config, save_bert, save_gpt2
from safetensors.torch import load_file, save_file
from transformers import (
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPForImageClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_semckd.errors import InputError, SourceError
from hf_semckd.models.tasks import class_names
from hf_semckd.recipes.classes import Classes
from hf_semckd.recipes.models import has_head, head_of, load_teacher, new_model, read_config
from hf_semckd.recipes.tasks.generation import TextGeneration, TextToText
from hf_semckd.recipes.tasks.images import ImageClassification
from hf_semckd.recipes.tasks.text import TextClassification, TokenClassification

CLASSES = Classes(("x", "y"), "single", ("x", "y"))


def test_a_teacher_is_loaded_as_it_is(tmp_path):
    saved = BertForSequenceClassification.from_pretrained(save_bert(tmp_path))
    assert_same_weights(weights(load_teacher(str(tmp_path), TextClassification)), weights(saved))


@pytest.mark.parametrize("task", [TokenClassification, TextGeneration])
def test_a_teacher_of_another_task_is_refused(tmp_path, task):
    with pytest.raises(InputError, match=f"(?s)has not learned {task.name}.*teacher_epochs"):
        load_teacher(str(save_bert(tmp_path)), task)


def test_heads_are_known_by_their_names(tmp_path):
    config = read_config(str(save_gpt2(tmp_path, GPT2LMHeadModel)), "teacher")
    assert has_head(config, TextGeneration) and not has_head(config, TextClassification)


def test_pretrained_weights_get_a_new_head_of_the_datas_classes(tmp_path):
    bare = BertModel.from_pretrained(save_bert(tmp_path, head=BertModel))
    made = new_model(str(tmp_path), "student", TextClassification, head_of(None, CLASSES))
    assert made.config.id2label == {0: "x", 1: "y"} and made.classifier.out_features == 2
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(made.bert.state_dict()[name], bare.state_dict()[name])


def test_a_head_of_another_size_is_learned_anew(tmp_path):
    made = new_model(str(save_bert(tmp_path)), "student", TextClassification, head_of(None, CLASSES))
    assert made.classifier.out_features == 2 and made.config.problem_type == "single_label_classification"


def test_a_new_head_is_no_news_and_other_new_weights_are_told(tmp_path, caplog, capfd):
    save_bert(tmp_path, head=BertModel)
    new_model(str(tmp_path), "student", TextClassification, head_of(None, CLASSES))
    assert not caplog.text and "newly initialized" not in capfd.readouterr().err
    rewrite(tmp_path, lambda name, value: None if "pooler" in name else (name, value))
    new_model(str(tmp_path), "student", TextClassification, head_of(None, CLASSES))
    assert "begins with new weights" in caplog.text and "bert.pooler.dense.weight" in caplog.text


def test_a_checkpoint_of_other_names_is_refused(tmp_path):
    save_bert(tmp_path, head=BertModel)
    rewrite(tmp_path, lambda name, value: (f"wrapped_{name}", value))
    with pytest.raises(InputError, match="(?s)nothing of the checkpoint.*and [0-9]+ more.*save_pretrained"):
        new_model(str(tmp_path), "student", TextClassification, head_of(None, CLASSES))


@pytest.mark.parametrize("change", ["wrapped_{}", "{}.foreign"])
def test_a_model_without_a_base_model_of_its_own_is_looked_at_whole(tmp_path, caplog, change):
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path)
    new_model(str(tmp_path), "student", TextToText, {})
    assert not caplog.text
    rewrite(tmp_path, lambda name, value: (change.format(name), value))
    with pytest.raises(InputError, match="nothing of the checkpoint"):
        new_model(str(tmp_path), "student", TextToText, {})


def test_a_new_head_is_no_news_where_no_module_is_the_base_model(tmp_path, caplog):
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision, text = {**tower, "image_size": 8, "patch_size": 4}, {**tower, "vocab_size": 40}
    CLIPForImageClassification(CLIPConfig(vision_config=vision, text_config=text)).save_pretrained(tmp_path)
    new_model(str(tmp_path), "student", ImageClassification, {"num_labels": 5})
    assert "new weights" not in caplog.text


def test_the_output_layer_of_a_language_model_is_no_new_head(tmp_path, caplog):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(num_hidden_layers=2, **sizes)).save_pretrained(tmp_path)
    new_model(str(tmp_path), "student", TextGeneration, {})
    assert "begins with new weights" in caplog.text and "lm_head.weight" in caplog.text


@pytest.mark.parametrize("content", ["half", "pointer", "nothing"])
def test_files_that_are_not_whole_are_refused(tmp_path, content):
    path = save_bert(tmp_path) / "model.safetensors"
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes({"half": half, "pointer": b"version https://git-lfs.github.com/spec/v1", "nothing": b""}[content])
    with pytest.raises(InputError, match="(?s)could not be loaded.*whole"):
        new_model(str(tmp_path), "student", TextClassification, head_of(None, CLASSES))
    with pytest.raises(InputError, match="(?s)could not be loaded.*whole"):
        load_teacher(str(tmp_path), TextClassification)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    kept = [change(name, value) for name, value in load_file(path).items()]
    save_file(dict(entry for entry in kept if entry is not None), path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_configuration_alone_is_a_new_model(tmp_path, name):
    bert_config(names=7).save_pretrained(tmp_path)
    made = new_model(str(tmp_path / name), "student", TextClassification, head_of(None, CLASSES))
    assert isinstance(made, BertForSequenceClassification) and made.config.id2label == {0: "x", 1: "y"}


def test_what_has_no_such_head_is_refused(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="(?s)could not be loaded for text-generation.*AutoModelForCausalLM"):
        new_model(str(tmp_path), "student", TextGeneration, {})
    with pytest.raises(SourceError, match="student could not be loaded"):
        read_config(str(tmp_path / "none"), "student")


@pytest.mark.parametrize(
    ("names", "expected"),
    [(("good", "bad"), {0: "good", 1: "bad"}), (2, {0: "x", 1: "y"})],
    ids=["the teacher's", "the data's where it has none"],
)
def test_a_student_has_the_teachers_names(names, expected):
    model = BertForSequenceClassification(bert_config(names))
    found = head_of(model, CLASSES)
    assert found["id2label"] == expected and found["label2id"] == {name: place for place, name in expected.items()}
    assert class_names(model.config) == (None if names == 2 else [*names])


def test_a_regression_and_a_language_model_have_no_names():
    model = BertForSequenceClassification(bert_config(1))
    assert head_of(model, Classes((), "regression")) == {"num_labels": 1, "problem_type": "regression"}
    assert head_of(model, None) == {}


def test_gpt2_is_a_classifier_too(tmp_path):
    folder = save_gpt2(tmp_path, GPT2LMHeadModel)
    made = new_model(str(folder), "teacher", TextClassification, head_of(None, CLASSES))
    assert isinstance(made, GPT2ForSequenceClassification) and made.score.out_features == 2
