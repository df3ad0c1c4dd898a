"""What cannot be known is asked for, and what cannot work is refused, before anything is trained."""

import json

import pytest
import torch
from PIL import Image
from recipe_parts import KINDS, QUICK, SILENT, command, read, save_bert, save_vit, sentences, write_rows
from transformers import BertModel

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.recipes.folder import RunFolder
from hf_semckd.recipes.prepare import prepare
from hf_semckd.recipes.rows import read_rows


@pytest.fixture
def go(teacher, rows, tmp_path):
    """Prepares a recipe with more flags."""

    def prepared(*flags, teacher=teacher, dataset=rows, size=("--num_layers", 1)):
        teachers = teacher if isinstance(teacher, tuple) else (teacher,)
        where = ("--teacher", *teachers, "--dataset", dataset, "--output_dir", tmp_path / "out")
        reading = read(*where, *size, *QUICK, *flags)
        found = read_rows(reading.recipe, SILENT)
        return prepare(reading.recipe, reading.args, RunFolder(str(tmp_path / "out")), found, SILENT)

    return prepared


def picture_folder(folder, *names, each=4):
    for split in ("train", "test"):
        for place, name in enumerate(names):
            for number in range(each):
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (20 * place, number, 0)).save(path)
    return folder


@pytest.mark.parametrize("named", [True, False])
def test_folders_that_are_named_by_numbers_are_the_outputs_of_these_numbers(named, go, tmp_path):
    names = [f"digit {n}" for n in range(12)] if named else [f"LABEL_{n}" for n in range(12)]
    teacher = save_vit(tmp_path / "vit", names)
    for folders in (("0", "1", "2", "10", "11"), ("3", "7")):
        made = go(teacher=teacher, dataset=picture_folder(tmp_path / "-".join(folders), *folders))
        samples = made.samples.splits.test
        assert sorted({int(samples[n]["labels"]) for n in range(len(samples))}) == sorted(map(int, folders))


def test_folders_that_are_named_by_words_say_nothing_of_a_teacher_without_names(go, tmp_path):
    teacher = save_vit(tmp_path / "vit", ["LABEL_0", "LABEL_1"])
    data = picture_folder(tmp_path / "data", "cat", "dog")
    with pytest.raises(ConfigurationError, match="class_names"):
        go(teacher=teacher, dataset=data)
    samples = go("--class_names", "dog", "cat", teacher=teacher, dataset=data).samples.splits.test
    reds = {int(samples[n]["labels"]): float(samples[n]["pixel_values"][0].mean()) for n in range(len(samples))}
    assert reds[0] > reds[1]  # dogs are redder, and the first class


def test_texts_that_are_digits_are_the_outputs_of_these_numbers(go, tmp_path):
    rows = [{"text": row["text"], "label": str(KINDS.index(row["label"]))} for row in sentences(24)]
    made = go(teacher=save_bert(tmp_path / "bert", 3), dataset=write_rows(tmp_path / "digits.jsonl", rows))
    words = made.samples.processor.convert_tokens_to_ids(list(KINDS))
    for row in made.samples.splits.train:
        assert words[row["labels"]] in row["input_ids"]


def test_teachers_with_classes_in_another_order_are_refused(go, teacher, tmp_path):
    other = save_bert(tmp_path / "other", KINDS[::-1])
    with pytest.raises(ConfigurationError, match="number their classes differently"):
        go(teacher=(teacher, other), size=("--student", teacher))
    same = save_bert(tmp_path / "same", [name.upper() for name in KINDS])
    assert len(go(teacher=(teacher, same), size=("--student", teacher)).teachers) == 2


def test_a_student_that_knows_the_classes_in_another_order_is_refused(go, tmp_path):
    other = save_bert(tmp_path / "other", KINDS[::-1])
    with pytest.raises(ConfigurationError, match="same classes in another order"):
        go(size=("--student", other))
    assert go(size=("--student", save_bert(tmp_path / "three", 3)))


def test_one_class_is_none(go, tmp_path):
    rows = write_rows(tmp_path / "one.jsonl", [{**row, "label": "good"} for row in sentences(8)])
    with pytest.raises(InputError, match="one class"):
        go(dataset=rows)


def test_whole_floats_are_asked_about(go, tmp_path):
    base = save_bert(tmp_path / "base", head=BertModel)
    rows = write_rows(
        tmp_path / "stars.jsonl", [{**row, "label": float(n % 5)} for n, row in enumerate(sentences(20))]
    )
    flags = ("--teacher_epochs", 1)
    with pytest.raises(ConfigurationError, match="regression: true, or regression: false"):
        go(*flags, teacher=base, dataset=rows)
    assert go(*flags, "--regression", True, teacher=base, dataset=rows).student.config.num_labels == 1
    with pytest.raises(InputError, match="other values than numbers"):
        go(*flags, "--regression", True, teacher=base)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--num_train_epochs", 0, "--max_steps", -1), "not trained at all"),
        (("--resume_from_checkpoint", "there"), "resumes by itself"),
        (("--teacher_epochs", 1, "--class_names", "a", "b"), "class_names"),
        (("--max_length", 1), "at least 4 tokens"),
        (("--metric", "acuracy"), "not known for the labels"),
        (("--method", "semkd"), "semckd"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_teacher_is_loaded_or_trained(
    flags, said, teacher, rows, tmp_path, capsys
):
    where = ("--teacher", teacher, "--dataset", rows, "--num_layers", 1, "--output_dir", tmp_path / "out")
    assert command("distill", *where, *QUICK, *flags) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "model.safetensors").exists()


def test_a_broken_picture_is_named(go, tmp_path):
    data = picture_folder(tmp_path / "data", *KINDS)
    (data / "train" / "bad" / "0.png").write_bytes(b"\x89PNG broken")
    made = go(teacher=save_vit(tmp_path / "vit"), dataset=data)
    with pytest.raises(InputError, match=r"bad.0\.png"):
        [made.samples.splits.train[place] for place in range(12)]


def test_rows_of_another_kind_are_said_with_one_of_them(go, tmp_path):
    from transformers import BertForQuestionAnswering

    teacher = save_bert(tmp_path / "bert", head=BertForQuestionAnswering)
    rows = [{"question": "who?", "context": "me", "answers": "me"}]
    with pytest.raises(InputError, match="(?s)question-answering.*who"):
        go(teacher=teacher, dataset=write_rows(tmp_path / "rows.jsonl", rows * 8))


def test_other_peoples_files_are_left_alone(teacher, rows, tmp_path, capsys):
    where = ("--teacher", teacher, "--dataset", rows, "--num_layers", 1, *QUICK, "--output_dir", tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("precious")
    for more in ((), ("--dry-run",)):
        assert command("distill", *where, *more) == 2
        assert "something that no recipe made" in capsys.readouterr().err
    assert (tmp_path / "mine" / "README.md").read_text() == "precious"
    (tmp_path / "file").write_text("")
    for taken in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command("distill", *where[:-1], taken) == 2
        assert "a file is in its place" in capsys.readouterr().err


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = read("--teacher", "~/t", "--student", "~/s", "--dataset", "~/d", "--output_dir", "~/o")
    assert found.recipe.models.teacher == [f"{tmp_path}/t"] and found.recipe.models.student == f"{tmp_path}/s"
    assert found.recipe.data.dataset == f"{tmp_path}/d" and found.args.output_dir == f"{tmp_path}/o"


def test_an_equal_path_is_no_other_option(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(rows.parent)
    folder = RunFolder(str(tmp_path / "out"))
    folder.claim({"dataset": str(rows)}, is_main=True)
    notes = json.loads((tmp_path / "out" / "recipe.json").read_text())
    (tmp_path / "out" / "recipe.json").write_text(json.dumps({**notes, "trained": True}))
    (tmp_path / "out" / "config.json").write_text("{}")
    assert folder.check({"dataset": f"{rows.parent}/./{rows.name}"})
    with pytest.raises(ConfigurationError, match="other options"):
        folder.check({"dataset": "other"})


def test_the_test_split_counts_as_unlabeled_whatever_its_column_is_called(go, tmp_path):
    labeled = [{"text": row["text"], "kind": row["label"]} for row in sentences(24)]
    folder = tmp_path / "data"
    write_rows(folder / "train.jsonl", labeled)
    write_rows(folder / "test.jsonl", [{"text": row["text"], "kind": None} for row in sentences(6)])
    made = go("--label_column", "kind", "--input_columns", "text", dataset=folder)
    assert len(made.samples.splits.test) == 2 and len(made.samples.splits.train) == 22
    assert torch.is_tensor(made.samples.collator([made.samples.splits.train[0]])["labels"])
