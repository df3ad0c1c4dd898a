"""`hf-semckd inspect`: the layers of saved models, on inputs that are made up or on prepared data."""

import json
from unittest import mock

import pytest
from datasets import Dataset
from recipe_parts import command, save_bert, save_vit, sentences, tokenizer

from hf_semckd.errors import InputError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_bert(folder / "student", layers=2), save_bert(folder / "teacher", layers=4, width=32)


def test_layers_are_shown_of_both_models(models, capsys):
    assert command("inspect", *models) == 0
    out = capsys.readouterr().out
    assert "BertForSequenceClassification" in out and "student" in out.lower()


def test_json_has_every_block_with_its_size(models, capsys):
    assert command("inspect", *models, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    for name, count, width in (("student", 2, 16), ("teacher", 4, 32)):
        assert told[name]["layers"] == [str(place + 1) for place in range(count)]
        assert [spec["channels"] for spec in told[name]["specs"]] == [width] * count
        assert told[name]["task"] == "single_label" and told[name]["logits"][-1] == 3


def test_chosen_layers_and_prepared_data_are_taken(models, tmp_path, capsys):
    rows = [{**tokenizer()(row["text"]), "labels": place % 3} for place, row in enumerate(sentences(4))]
    Dataset.from_list(rows).save_to_disk(tmp_path / "data")
    flags = ("--student-layers", 1, "--teacher-layers", "bert.encoder.layer.1", "bert.encoder.layer.3", "--json")
    assert command("inspect", *models, *flags, "--dataset", tmp_path / "data") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["student"]["layers"] == ["1"]
    assert told["teacher"]["layers"] == ["bert.encoder.layer.1", "bert.encoder.layer.3"]
    # The longest of the first two texts.
    longest = max(len(row["input_ids"]) for row in rows[:2])
    assert {spec["length"] for spec in told["teacher"]["specs"]} == {longest}


def test_several_teachers_are_shown_together(models, capsys):
    assert command("inspect", models[0], models[1], models[1]) == 0
    assert capsys.readouterr().out.count("layer") >= 2


@pytest.mark.parametrize(
    ("words", "said"),
    [(("none", "none"), "could not be loaded"), (("--student-layers", 9), "9")],
)
def test_what_cannot_be_inspected_is_refused(models, tmp_path, words, said, capsys):
    given = [tmp_path / word for word in words] if words[0] == "none" else [*models, *words]
    assert command("inspect", *given) == 2
    out, err = capsys.readouterr()
    assert said in err and not out


def test_images_are_made_up_too(tmp_path, capsys):
    assert command("inspect", save_vit(tmp_path / "vit"), save_vit(tmp_path / "large", layers=3)) == 0
    assert "ViTForImageClassification" in capsys.readouterr().out


def test_models_of_other_inputs_are_refused_with_a_way_out(models, monkeypatch, capsys):
    unknown = mock.Mock(side_effect=InputError("not known"))
    monkeypatch.setattr("hf_semckd.cli.inspect.example_inputs", unknown)
    assert command("inspect", *models) == 2 and "--dataset" in capsys.readouterr().err
