"""The report of a real training, from its trainer and from the files that it left; the log that it is made of."""

import json
import shutil

import numpy as np
import pytest
from makers import config, distiller, images, losses, vit
from reports import deploy

from hf_semckd import DistillationTrainer, SemCKDTrainer
from hf_semckd.cli import main
from hf_semckd.errors import InputError
from hf_semckd.evaluation.table import Evaluation
from hf_semckd.publishing.facts import environment
from hf_semckd.publishing.report.report import DistillationReport
from hf_semckd.training.run_report import compare_or_say_why
from hf_semckd.training.saved_report import report_of_folder

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = distiller(folder, args={**SAVING, "feature_weight": 2.0}, eval_dataset=images(9, seed=5))
    trainer.train()
    trainer.save_model()
    return trainer, folder


@pytest.fixture
def folder(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    return tmp_path / "run"


def evaluation():
    table = deploy()
    return Evaluation(table.rows, table.metric, table.higher_is_better, table.samples, {}, environment(), table.notes)


def test_the_trainer_tells_all_of_it(trained, tmp_path):
    trainer, _ = trained
    report = trainer.distillation_report(evaluation())
    assert not report.missing and (report.run.method, report.run.student) == ("SemCKD", "ViTForImageClassification")
    assert report.losses[0].values == tuple(losses(trainer))
    np.testing.assert_allclose(report.association.maps[-1].weights, trainer.association(), rtol=1e-6)
    assert report.association.teacher_layers == ("1", "2", "3")
    assert report.comparison.samples == 9 and len(report.comparison.examples) == 9
    assert report.comparison.examples[0].picture
    assert report.save(tmp_path).read_text().count("<section") == 7
    assert DistillationReport.load(tmp_path / "report.json") == report


def test_settings_are_told_with_the_reason(trained):
    settings = {entry.name: entry for entry in trained[0].distillation_report().run.settings}
    assert (settings["feature_weight"].value, settings["feature_weight"].why) == ("2", "given")
    assert settings["task_weight"].why == "default"
    assert settings["relation_weight"].value == "20"
    assert settings["relation_weight"].why.startswith("chosen for image models with a transformer: 20 between image")
    assert settings["student_layers"].value == "1, 2"
    assert settings["temperature"].why.startswith("left open: 1 for language models")


def test_the_errors_of_layers_are_logged_and_not_printed(trained, capsys):
    """By hand: the feature term without relations is the mean over the layers."""
    args = {"relation_weight": 0.0, "max_steps": 2}
    trainer = distiller(trained[1].parent / "errors", args=args)
    trainer.train()
    for row in trainer.state.log_history[:2]:
        assert np.mean(row["association_errors"]) == pytest.approx(row["feature_loss"], rel=1e-4)
    assert "association_errors" not in capsys.readouterr().out


def test_a_loss_without_association_or_evaluation_says_so(tmp_path):
    args = config(tmp_path, max_steps=1)
    trainer = DistillationTrainer(vit(), args, teacher_model=vit(), train_dataset=images(), feature_loss="fitnet")
    trainer.train()
    report = trainer.distillation_report()
    assert {*report.missing} == {"deploy", "association", "comparison"} and not report.layer_errors
    assert "There was no eval_dataset" in report.missing["comparison"]


def test_data_that_cannot_be_compared_costs_its_section_alone(trained):
    report = trained[0].distillation_report(dataset=images(4, labels=None))
    assert report.comparison is None and "has no labels" in report.missing["comparison"]
    first = trained[0].distillation_report(dataset={"one": images(3), "two": images(4)})
    assert first.comparison.samples == 3


def test_a_sharded_student_is_not_run_for_the_report():
    compared = compare_or_say_why(vit(), lambda: [vit(3, 24, seed=9)], images(3), sharded=True)
    assert compared[0] is None and "sharded" in compared[1]["comparison"]


def test_what_cannot_be_reported_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match="has not trained yet"):
        distiller(tmp_path).distillation_report()
    plain = SemCKDTrainer(
        vit(), config(tmp_path, logit_weight=0, feature_weight=0, max_steps=1), train_dataset=images()
    )
    plain.train()
    with pytest.raises(InputError, match="without distillation"):
        plain.distillation_report()
    with pytest.raises(InputError, match="This is no evaluation"):
        trained[0].distillation_report({"rows": []})


# ---- From the files ------------------------------------------------------------------------------------------------


def test_the_files_of_a_training_tell_what_its_trainer_does(trained, folder):
    trainer, _ = trained
    live, stored = trainer.distillation_report(), report_of_folder(folder)
    assert {*stored.missing} == {"deploy", "comparison"}
    assert (stored.losses, stored.association, stored.layer_errors) == (
        live.losses,
        live.association,
        live.layer_errors,
    )
    assert stored.run.settings == live.run.settings and stored.run.method == "SemCKD"
    assert stored.run.usage.splitlines()[0] == live.run.usage.splitlines()[0]


def test_the_newest_checkpoint_counts_and_what_is_missing_is_said(folder):
    for name in ("config.json", "distillation_config.json"):
        (folder / name).unlink()
        (folder / "checkpoint-4" / name).unlink()
    report = report_of_folder(folder)
    assert report.losses[0].steps == (1, 2, 3, 4) and report.association.student_layers == ("1", "2")
    assert {*report.missing} == {"deploy", "comparison", "settings", "usage"}


def test_the_command_writes_the_page_and_takes_a_later_evaluation(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == (folder / "report.html").as_uri()
    evaluation().save(folder)
    assert main(["report", str(folder), "--output", str(folder / "page"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deploy"]["samples"] == 500
    assert "keeps 97.3%" in (folder / "page" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", '{"global_step": 9}'),
        ("trainer_state.json", '{"global_step": 9, "log_history": [[1]]}'),
        ("trainer_state.json", '{"global_step": 9, "log_history": [{"step": 1, "association": {"a": 1}}]}'),
        ("trainer_state.json", '{"global_step": 9, "log_history": [{"step": 1, "association": [[7]]}]}'),
        ("trainer_state.json", '{"global_step": 9, "log_history": [{"association_errors": "x"}]}'),
        ("trainer_state.json", "not JSON"),
        ("distillation_config.json", '{"layers": {"student_layers": 3}}'),
        ("distillation_config.json", '{"settings": [{"name": 1}]}'),
        ("distillation_config.json", '{"teacher": {}}'),
        ("distillation_config.json", "[]"),
        ("config.json", '{"architectures": "x"}'),
        ("evaluation.json", '{"rows": 3}'),
        ("report.json", "{}"),
    ],
)
def test_files_that_do_not_fit_are_one_message(folder, name, content, capsys):
    (folder / name).write_text(content)
    assert main(["report", str(folder)]) == 2
    assert "what to do:" in capsys.readouterr().err


def test_a_folder_without_a_training_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2 == main(["report", str(tmp_path / "nowhere")])
    assert "no training in this folder" in capsys.readouterr().err


def test_nothing_private_is_reported(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    trained[0].distillation_report(evaluation()).save(tmp_path)
    for name in ("report.html", "report.json"):
        text = (tmp_path / name).read_text()
        assert str(trained[1].parent) not in text and "hf_aaaa" not in text


def test_a_resumed_training_reports_the_whole(trained, tmp_path):
    shutil.copytree(trained[1], tmp_path / "run")
    trainer = distiller(tmp_path / "run", args={**SAVING, "feature_weight": 2.0}, eval_dataset=images(9, seed=5))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    report = trainer.distillation_report()
    assert report.losses[0].steps == (1, 2, 3, 4) and report.association.maps[0].first == 1
