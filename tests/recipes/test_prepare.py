"""Teachers and students of every kind, and the samples that they get."""

import pytest
import torch
from makers import assert_same_weights, weights
from PIL import Image
from recipe_parts import (
    KINDS,
    QUICK,
    SILENT,
    WORDS,
    bert_config,
    read,
    save_bert,
    save_gpt2,
    save_vit,
    sentences,
    tokenizer,
    write_rows,
)
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, GPT2LMHeadModel

from hf_semckd.errors import ConfigurationError, InputError
from hf_semckd.recipes.folder import RunFolder
from hf_semckd.recipes.prepare import prepare
from hf_semckd.recipes.rows import read_rows
from hf_semckd.recipes.training import student_trainer


@pytest.fixture
def ready(teacher, rows, tmp_path):
    """Prepares a recipe with more flags; `out` is its folder."""

    def go(*flags, teacher=teacher, dataset=rows, trains=False):
        sources = teacher if isinstance(teacher, tuple) else (teacher,)
        given = ("--teacher", *sources, "--dataset", dataset, "--output_dir", tmp_path / "out")
        reading = read(*given, *QUICK, *flags)
        found = read_rows(reading.recipe, SILENT)
        made = prepare(reading.recipe, reading.args, RunFolder(str(tmp_path / "out")), found, SILENT)
        if trains:
            student_trainer(reading.recipe, reading.args, made).train()
        return made

    return go


def batch_of(prepared, count=4):
    train = prepared.samples.splits.train
    return prepared.samples.collator([train[place] for place in range(count)])


# ---- Teachers --------------------------------------------------------------------------------------------------


def test_a_teacher_without_the_head_is_refused_with_advice(ready, tmp_path):
    from transformers import BertModel

    bare = save_bert(tmp_path / "bare", head=BertModel)
    with pytest.raises(InputError, match="(?s)has not learned text-classification.*set teacher_epochs"):
        ready("--num_layers", 1, "--task", "text-classification", teacher=bare)


def test_a_teacher_with_another_head_is_refused_for_a_task_that_is_named(ready, tmp_path):
    other = save_gpt2(tmp_path / "lm", GPT2LMHeadModel)
    with pytest.raises(InputError, match="(?s)has not learned text-classification"):
        ready("--num_layers", 1, "--task", "text-classification", teacher=other)


def test_a_model_that_is_not_there_is_refused(ready, tmp_path):
    with pytest.raises(InputError, match="(?s)teacher could not be loaded.*none"):
        ready("--num_layers", 1, teacher=tmp_path / "none")
    with pytest.raises(InputError, match="(?s)student could not be loaded.*none"):
        ready("--student", tmp_path / "none")


def test_a_model_without_a_tokenizer_is_refused(ready, tmp_path):
    BertForSequenceClassification(bert_config()).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="(?s)no tokenizer for"):
        ready("--num_layers", 1, teacher=tmp_path / "bare")


def test_a_teacher_is_fine_tuned_first_and_kept(ready, tmp_path):
    from transformers import BertModel

    bare = save_bert(tmp_path / "bare", head=BertModel, layers=2)
    flags = (
        "--num_layers",
        1,
        "--task",
        "text-classification",
        "--teacher_epochs",
        2,
        "--teacher_learning_rate",
        "1e-2",
    )
    made = ready(*flags, teacher=bare)
    kept = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "teacher")
    assert_same_weights(weights(kept), weights(made.teachers[0]))
    assert kept.config.id2label == dict(enumerate(sorted(KINDS)))
    assert not list((tmp_path / "out" / "teacher").glob("checkpoint-*"))
    before = BertModel.from_pretrained(bare).state_dict()["encoder.layer.0.output.dense.weight"]
    assert not torch.equal(kept.state_dict()["bert.encoder.layer.0.output.dense.weight"], before)
    # All labels were used: after two epochs it is better than it was.
    again = ready(*flags, teacher=bare)
    assert_same_weights(weights(again.teachers[0]), weights(kept))


def test_several_teachers_have_to_read_alike(ready, teacher, tmp_path):
    other = save_bert(tmp_path / "other")
    student = save_bert(tmp_path / "new", layers=1)
    assert len(ready("--student", student, teacher=(teacher, other)).teachers) == 2
    tokenizer(words=WORDS[::-1]).save_pretrained(other)
    with pytest.raises(InputError, match="(?s)teachers read their inputs differently"):
        ready("--student", student, teacher=(teacher, other))


# ---- Students --------------------------------------------------------------------------------------------------


def size(model):
    return sum(entry.numel() for entry in model.parameters())


def test_a_student_is_cut_by_its_layers_and_starts_with_the_teachers_weights(ready):
    made = ready("--num_layers", 1)
    assert made.student.config.num_hidden_layers == 1
    own, theirs = made.student.state_dict(), made.teachers[0].state_dict()
    assert torch.equal(own["classifier.weight"], theirs["classifier.weight"])
    assert torch.equal(own["bert.embeddings.word_embeddings.weight"], theirs["bert.embeddings.word_embeddings.weight"])


@pytest.mark.parametrize(
    ("flags", "fits"),
    [
        (("--parameters", 0.6), lambda student, teacher: size(student) <= 0.6 * size(teacher)),
        (("--hidden_size", 8), lambda student, teacher: student.config.hidden_size == 8),
        (("--latency_ms", 1e6), lambda student, teacher: size(student) == size(teacher)),
        (("--num_layers", 2, "--importance", "loss", "--calibration_samples", 4),
         lambda student, teacher: student.config.num_hidden_layers == 2),
    ],
)  # fmt: skip
def test_a_student_is_cut_to_a_budget(ready, flags, fits):
    made = ready(*flags)
    assert fits(made.student, made.teachers[0])
    assert made.student(**batch_of(made)).loss.isfinite()


def test_a_budget_that_cannot_be_met_is_refused(ready):
    with pytest.raises(ConfigurationError):
        ready("--parameters", 1e-6)


def test_random_weights_depend_on_the_seed_and_on_nothing_else(ready, tmp_path):
    import shutil

    def start(*flags):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return weights(ready("--num_layers", 1, "--init", "random", *flags).student)

    first = start()
    torch.rand(5)
    assert_same_weights(first, start())
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(first[name], start("--seed", 5)[name])


def test_a_configuration_alone_is_a_new_student_that_reads_what_the_teacher_reads(ready, tmp_path):
    bert_config(names=2, layers=1, width=8).save_pretrained(tmp_path / "new")
    for source in (tmp_path / "new", tmp_path / "new" / "config.json"):
        made = ready("--student", source, trains=True)
        assert made.student.config.hidden_size == 8 and made.student.config.id2label == dict(enumerate(KINDS))
        assert set(made.samples.splits.train.column_names) == {
            "input_ids", "token_type_ids", "attention_mask", "labels",
        }  # fmt: skip


def test_a_student_with_another_tokenizer_gets_its_own_tokens(ready, tmp_path):
    student = save_bert(tmp_path / "other", layers=1)
    own = tokenizer(words=("movie", *WORDS[::-1][:-1]))
    own.save_pretrained(student)
    made = ready("--student", student, trains=True)
    first = made.samples.splits.train[0]
    text = made.rows.splits.train[0]["text"]
    assert first["input_ids"] == own(text)["input_ids"]
    assert first["teacher_input_ids"] == tokenizer()(text)["input_ids"] != first["input_ids"]
    # The head that is learned anew has the teacher's classes.
    assert made.student.config.id2label == dict(enumerate(KINDS))


def test_a_student_of_another_image_size_gets_its_own_pixels(ready, tmp_path):
    for place in range(12):
        folder = tmp_path / "pictures" / KINDS[place % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (10, 9), 20 * place).save(folder / f"{place}.png")
    teacher, student = save_vit(tmp_path / "large", size=16), save_vit(tmp_path / "small", size=8, layers=1)
    made = ready("--student", student, teacher=teacher, dataset=tmp_path / "pictures", trains=True)
    batch = batch_of(made)
    assert batch["pixel_values"].shape[-1] == 8 and batch["teacher_pixel_values"].shape[-1] == 16
    # Folders are numbered by their names, and the teacher's classes are not in that order.
    cells = made.rows.splits.train["label"][:4]
    assert [KINDS[label] for label in batch["labels"].tolist()] == [sorted(KINDS)[cell] for cell in cells]


def test_a_longer_text_than_a_model_takes_is_refused(ready):
    with pytest.raises(InputError, match="(?s)max_length=33.*at most 32 tokens"):
        ready("--num_layers", 1, "--max_length", 33)
    assert max(map(len, ready("--num_layers", 1, "--max_length", 5).samples.splits.train["input_ids"])) == 5


def test_language_models_with_two_tokenizers_are_refused(ready, tmp_path):
    teacher, student = save_gpt2(tmp_path / "a", GPT2LMHeadModel), save_gpt2(tmp_path / "b", GPT2LMHeadModel)
    made = tokenizer(words=WORDS[::-1], pad_token=None, eos_token="[SEP]")
    data = write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in sentences(40)])
    assert ready("--student", student, "--max_length", 16, teacher=teacher, dataset=data).samples.length == 16
    made.save_pretrained(student)
    with pytest.raises(InputError, match="one tokenizer for text-generation"):
        ready("--student", student, "--max_length", 16, teacher=teacher, dataset=data)
