"""The card that a trainer writes: of this run and its student, and of nothing that another run left behind."""

import json
import re
from pathlib import Path

import pytest
from hub_server import check_card
from huggingface_hub import ModelCard
from makers import bert, config, distiller, images, texts, vit
from transformers import TrainerCallback

from hf_semckd import SemCKDTrainer
from hf_semckd.evaluation.metrics import Share
from hf_semckd.evaluation.table import Evaluation
from hf_semckd.publishing.facts import environment
from hf_semckd.publishing.rows import Latency, Row


def card_of(trainer, **arguments):
    trainer.create_model_card(**arguments)
    text = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert check_card(text) == ([], [])
    return text


def evaluation(name="teacher"):
    rows = [
        Row(model, "PyTorch", "cpu", quality, Share(quality / 0.8, 0.8, 1.1), 0.9, 0.1, count, None, None, (latency,))
        for model, quality, count, latency in (
            (name, 0.8, 9000, Latency(1, 20.0, 21.0)),
            ("student", 0.6, 3000, Latency(1, 5.0, 6.0)),
        )
    ]
    return Evaluation(tuple(rows), "accuracy", True, 50, {}, environment())


def parameters(text):
    return int(re.search(r"with ([\d,]+) parameters", text)[1].replace(",", ""))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    made = distiller(tmp_path_factory.mktemp("run"), eval_dataset=images(6, seed=3))
    made.train()
    made.evaluate()
    return made


def test_it_tells_of_the_training(trainer):
    text = card_of(trainer)
    for part in (
        "| learning rate | 0.01 |",
        "| steps | 3 |",
        "| batch size | 4 |",
        "| seed | 42 |",
        "transformers 5.",
    ):
        assert part in text, part
    assert "](association.png)" in text and "| `loss` |" in text and "evaluation.json" not in text
    assert "(SemCKD) from `ViTForImageClassification`" in text and "None" not in text
    assert parameters(text) == vit().num_parameters()


def test_an_evaluation_is_saved_beside_it_and_shown(trainer):
    text = card_of(trainer, evaluation=evaluation(), dataset="uoft-cs/cifar10")
    assert (
        "Compared with its teacher, it keeps 75.0% (80.0% – 110.0%) of the accuracy and runs 4 times as fast" in text
    )
    folder = Path(trainer.args.output_dir)
    assert json.loads((folder / "evaluation.json").read_text())["samples"] == 50
    assert "](evaluation.json)" in text and "](evaluation.png)" in text and (folder / "evaluation.png").is_file()
    values = {entry.metric_type: entry.metric_value for entry in ModelCard(text).data.eval_results}
    assert values == {"accuracy": 0.6}


def test_an_evaluation_that_names_a_folder_is_not_published(trainer):
    text = card_of(trainer, evaluation=evaluation("/home/mallory/teacher"))
    assert "mallory" not in text and "evaluation.json" not in text and "evaluation.png" not in text


def test_what_an_earlier_run_left_in_the_folder_is_not_shown(tmp_path):
    for name in ("association.png", "evaluation.png", "evaluation.json"):
        (tmp_path / name).write_text("of another run")
    text = card_of(distiller(tmp_path))
    assert not re.search(r"\]\((association|evaluation)", text)
    assert "Its quality was not measured." in text


def test_in_training_it_counts_the_student_alone_and_shows_no_picture(tmp_path):
    class Write(TrainerCallback):
        def on_step_end(self, *_, **__):
            texts.append(card_of(made))

    texts = []
    (tmp_path / "association.png").write_text("of another run")
    made = distiller(tmp_path, args={"max_steps": 1}, callbacks=[Write()])
    made.train()
    assert parameters(texts[0]) == vit().num_parameters() and "association.png" not in texts[0]


def test_an_adapter_is_counted_and_loaded_as_one(tmp_path):
    peft = pytest.importorskip("peft")
    student = bert()
    student.config._name_or_path = "alice/base-1"
    student = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    made = SemCKDTrainer(
        student, config(tmp_path, max_steps=1), teacher_model=bert(3, 24, seed=9), train_dataset=texts()
    )
    text = card_of(made)
    made.save_model()
    assert parameters(text) == made.student.get_nb_trainable_parameters()[0]
    assert ModelCard(text).data.base_model_relation == "adapter"
    assert 'AutoModelForSequenceClassification.from_pretrained("alice/base-1", num_labels=3)' in text


def test_a_task_and_a_base_model_of_the_caller_go_first(trainer):
    data = ModelCard(card_of(trainer, tasks=["zero-shot-image-classification"], finetuned_from="alice/vit-2")).data
    assert (data.pipeline_tag, data.base_model) == ("zero-shot-image-classification", "alice/vit-2")
    assert data.base_model_relation == "finetune"
