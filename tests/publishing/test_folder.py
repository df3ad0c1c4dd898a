"""What is published of a folder, and the card that is made from it alone."""

import json

import pytest
from makers import bert, resnet

from hf_semckd.errors import InputError
from hf_semckd.publishing.folder import (
    card_name,
    card_of_folder,
    folder_facts,
    published_content,
    published_files,
)

PRIVATE = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "pytorch_model.bin",
    "feature_loss.safetensors",
    "events.out.tfevents.1",
    "evaluation.txt",
    ".env",
    "train.log",
    "checkpoint-2/model.safetensors",
    "runs/events",
    "cache/0.arrow",
)
PUBLIC = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "spiece.model",
    "preprocessor_config.json",
    "chat_template.jinja",
    "model.onnx",
    "onnx/model_int8.onnx",
    "LICENSE",
)


@pytest.fixture
def folder(tmp_path):
    resnet().save_pretrained(tmp_path)
    return tmp_path


def test_the_student_and_its_processor_are_published_and_nothing_else(folder):
    for name in (*PRIVATE, *PUBLIC):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert set(published_files(folder)) == {"config.json", "model.safetensors", *PUBLIC}


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_student_is_refused(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(InputError, match="no student in this folder"):
        published_files(folder)
    with pytest.raises(InputError, match="no student in this folder"):
        published_files(folder / "nowhere")


@pytest.mark.parametrize(("base", "kept"), [("alice/base-1", True), ("/home/mallory/base", False), (None, False)])
def test_an_adapter_names_its_base_model_only_where_that_is_on_the_hub(tmp_path, base, kept):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": base, "r": 2}))
    found = json.loads(published_content(path))
    assert found == {"base_model_name_or_path": base if kept else None, "r": 2}


def test_a_card_is_made_of_what_is_there(folder):
    settings = {
        "method": "SemCKD",
        "distillation": {"temperature": 4.0},
        "training": {"learning_rate": 0.01},
        "base_model": "alice/base-1",
        "teacher": "alice/teacher-2",
        "versions": {"torch": "2.13.0"},
        "dataset": "alice/beans",
    }
    history = [{"eval_accuracy": 0.25}, {"loss": 1.0}, {"eval_accuracy": 0.5, "eval_runtime": 3.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (folder / "distillation_config.json").write_text(json.dumps(settings))
    (folder / "association.png").write_text("x")
    facts = folder_facts(folder, "alice/x", "AutoImageProcessor")
    assert facts.parameters == sum(entry.numel() for entry in resnet().parameters())
    card = card_of_folder(folder, "alice/x", "AutoImageProcessor")
    for part in (
        "# alice/x\n",
        "initialized from [alice/base-1]",
        "The license of alice/base-1 and alice/teacher-2 is not known here",
        "distillation (SemCKD) from [alice/teacher-2]",
        'AutoModelForImageClassification.from_pretrained("alice/x")',
        "| learning rate | 0.01 |",
        "| `temperature` | `4` |",
        "| versions | torch 2.13.0 |",
        "on the evaluation split of [alice/beans]",
        "| `accuracy` | 0.5000 |",
        "](association.png)",
    ):
        assert part in card, part


def test_a_card_that_is_there_stays_but_the_empty_one_of_peft_does_not(folder):
    assert card_name(folder) is None
    (folder / "README.md").write_text("# alice/mine\n\nMy words.\n")
    assert card_of_folder(folder, "alice/x", None) == "# alice/mine\n\nMy words.\n"
    assert card_name(folder) == "alice/mine"
    (folder / "README.md").write_text("---\nbase_model: /home/mallory/x\n---\n\n# Model Card for Model ID\n")
    assert card_name(folder) is None and "mallory" not in card_of_folder(folder, "alice/x", None)


def test_a_saved_adapter_says_what_it_is(tmp_path):
    peft = pytest.importorskip("peft")
    model = bert()
    model.config._name_or_path = model.name_or_path = "alice/base-1"
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")).save_pretrained(
        tmp_path
    )
    assert set(published_files(tmp_path)) == {"adapter_config.json", "adapter_model.safetensors"}
    facts = folder_facts(tmp_path, "alice/x", None)
    assert (facts.loader, facts.base_model, facts.student_class) == (
        "peft",
        "alice/base-1",
        "AutoModelForSequenceClassification",
    )


def test_a_file_that_is_no_json_costs_only_what_it_tells(folder, caplog):
    (folder / "distillation_config.json").write_text("{")
    assert folder_facts(folder, "alice/x", None).student_class == "AutoModelForImageClassification"
    assert "distillation_config.json cannot be read" in caplog.text
