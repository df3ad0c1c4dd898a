"""What cannot work is refused before the first step; what breaks later costs neither weights nor checkpoints."""

import pytest
import torch
from datasets import Dataset as HubDataset
from makers import (
    Samples,
    assert_same_weights,
    bert,
    bert_mlm,
    config,
    distilbert,
    distiller,
    gpt2,
    images,
    losses,
    resnet,
    texts,
    vit,
    weights,
)
from tiny import tokenizer as padding_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    default_data_collator,
)

from hf_semckd import DistillationTrainer, SemCKDConfig, SemCKDTrainer
from hf_semckd.errors import (
    ConfigurationError,
    InputError,
    LayerNotFoundError,
    NonFiniteLossError,
    SemCKDError,
    TeacherOutputError,
)
from hf_semckd.training.checks import learned_positions


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Drawing takes longer than training."""
    monkeypatch.setattr("hf_semckd.training.callbacks.save_association_plot", lambda *_, **__: None)


def assert_helpful(error, facts):
    """Check that an error says what came, what was expected, what to do, and the facts of the case."""
    text = str(error)
    for part in ("received:", "expected:", "what to do:", *facts):
        assert part in text, f"{part!r} is not in:\n{text}"


def refuse(folder, kind, *facts, **parts):
    """Check that a training is refused before its first step."""
    student = parts.setdefault("model", vit())
    before = weights(student) if isinstance(student, nn.Module) else None
    with pytest.raises(SemCKDError) as caught:
        distiller(folder, **parts).train()
    assert type(caught.value) is kind
    assert_helpful(caught.value, facts)
    if before is not None:
        assert_same_weights(weights(student), before)


def blocks(model):
    """Return the transformer blocks, wherever a version keeps them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len))


# ---- Models that do not fit --------------------------------------------------------------------------------------


def test_other_numbers_of_labels(tmp_path):
    facts = ("student (2, 3)", "teacher (2, 5)", "num_labels", "logit_weight=0")
    refuse(tmp_path, InputError, *facts, teacher_model=vit(3, 24, labels=5))


def test_other_vocabularies(tmp_path):
    rows = texts(labels="input", types=False)
    teacher = bert_mlm(layers=3, seed=9, vocab_size=50)
    facts = ("10, 40)", "10, 50)", "vocabulary", "logit_weight=0")
    refuse(tmp_path, InputError, *facts, model=bert_mlm(), teacher_model=teacher, train_dataset=rows)


def test_other_numbers_of_labels_do_not_matter_to_features(tmp_path):
    trainer = distiller(tmp_path, teacher_model=vit(3, 24, labels=5), args={"logit_weight": 0.0})
    trainer.train()
    assert len(losses(trainer, "feature_loss")) == 3


class Classifier(nn.Module):
    """Logits, and no hidden states."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = nn.Conv2d(3, 5, 3), nn.Linear(5, 3)

    def forward(self, pixel_values):
        return self.classifier(self.features(pixel_values).mean((2, 3)))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_no_hidden_states_and_no_names(tmp_path, role):
    parts = {"teacher_model": Classifier()} if role == "teacher" else {"model": Classifier()}
    refuse(tmp_path, InputError, f"{role} returns no hidden states", f"{role}_layers", "feature_weight=0", **parts)


def test_without_features_no_hidden_states_are_needed(tmp_path):
    trainer = distiller(tmp_path, teacher_model=Classifier(), args={"feature_weight": 0.0})
    trainer.train()
    assert len(losses(trainer, "logit_loss")) == 3


@pytest.mark.parametrize(("index", "nearest"), [(7, 3), (-5, 0)])
def test_a_layer_index_that_is_not_there(tmp_path, index, nearest):
    facts = (f"teacher has no hidden state {index}", "from 0", "to 3", f"nearest is {nearest}")
    refuse(tmp_path, LayerNotFoundError, *facts, args={"teacher_layers": [1, index]})


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_layer_name_that_is_not_there(tmp_path, role):
    facts = (f"{role} has no module `vit.layernom`", "'vit.layernorm'", "named_modules")
    refuse(tmp_path, LayerNotFoundError, *facts, args={f"{role}_layers": ["vit.layernom"]})


def test_a_layer_that_never_runs(tmp_path):
    student = Classifier()
    student.unused = nn.Linear(2, 2)
    facts = ("Module `unused` of the student", "student_layers")
    refuse(tmp_path, InputError, *facts, model=student, args={"student_layers": ["unused"]})


def test_the_student_as_its_own_teacher(tmp_path):
    student = vit()
    facts = ("the same object", "ViTForImageClassification", "copy.deepcopy(student)")
    refuse(tmp_path, InputError, *facts, model=student, teacher_model=student)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_teacher_that_shares_parameters(tmp_path):
    student, teacher = vit(), vit(seed=9)
    teacher.classifier = student.classifier
    facts = ("share parameters", "classifier.weight", "load the teacher separately")
    refuse(tmp_path, InputError, *facts, model=student, teacher_model=teacher)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_no_teacher(tmp_path):
    facts = ("no teacher", "teacher_model=None", "logit_weight=1.0", "feature_weight=0 for plain")
    refuse(tmp_path, InputError, *facts, teacher_model=None)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_folder_that_is_not_there(tmp_path, role):
    name = str(tmp_path / "models" / "not-there")
    key = "model" if role == "student" else "teacher_model"
    refuse(tmp_path, InputError, f"{role} could not be loaded", "not-there", "config.json", **{key: name})


def test_a_name_that_is_not_on_the_hub(tmp_path):
    """Without a connection, as here, it is the same to the user."""
    facts = ("teacher could not be loaded", "'no-such-user/no-such-model'", "check the name, the connection")
    refuse(tmp_path, InputError, *facts, teacher_model="no-such-user/no-such-model")


def test_a_folder_without_weights(tmp_path):
    vit().config.save_pretrained(tmp_path)
    refuse(tmp_path, InputError, "teacher could not be loaded", "safetensors", teacher_model=str(tmp_path))


def test_something_that_is_no_model(tmp_path):
    refuse(tmp_path, InputError, "teacher is not a model", "BertConfig", teacher_model=BertConfig())


def test_a_teacher_of_another_kind(tmp_path):
    facts = ("BertForSequenceClassification takes nothing of the batch", "'pixel_values'", "'input_ids'", "teacher_")
    refuse(tmp_path, InputError, *facts, teacher_model=bert(3, 24, seed=9))


def test_an_image_size_that_a_student_cannot_take(tmp_path):
    """A teacher's positions are interpolated; the student gets the size that it will get later."""
    facts = ("student cannot take the training data", "(2, 3, 16, 16)", "32*32", "teacher_pixel_values")
    refuse(tmp_path, InputError, *facts, model=vit(image_size=32))


def test_tokens_outside_the_vocabulary(tmp_path):
    parts = {"teacher_model": bert(3, 24, vocab_size=20), "train_dataset": texts()}
    facts = ("teacher cannot take the training data", "vocabulary", "teacher_input_ids")
    refuse(tmp_path, InputError, *facts, model=bert(), **parts)


def spoil(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(torch.nan)


def test_nan_in_the_teachers_weights(tmp_path):
    """The first broken layer is named, not what follows from it."""
    teacher = vit(3, 24, seed=9)
    spoil(blocks(teacher)[1])
    facts = ("teacher's layer 2 is not finite", "batch index 0, 1", "teacher's weights")
    refuse(tmp_path, TeacherOutputError, *facts, teacher_model=teacher)


def test_nan_in_the_teachers_head(tmp_path):
    teacher = vit(3, 24, seed=9)
    spoil(teacher.classifier)
    refuse(tmp_path, TeacherOutputError, "teacher's logits are not finite", "batch index 0, 1", teacher_model=teacher)


# ---- Data that do not fit ----------------------------------------------------------------------------------------


def test_columns_that_neither_takes(tmp_path):
    data = HubDataset.from_dict({"sentence": ["a", "b"], "idx": [0, 1], "labels": [0, 1]})
    facts = ("'sentence', 'idx'", "pixel_values", "remove_unused_columns=False")
    refuse(tmp_path, InputError, *facts, train_dataset=data)


def test_samples_without_column_names_that_neither_takes(tmp_path):
    data = Samples([{"sentence": torch.zeros(3), "labels": 0}] * 8)
    refuse(tmp_path, InputError, "sentence", "pixel_values", train_dataset=data)


@pytest.mark.parametrize("data", [Samples([]), HubDataset.from_dict({"pixel_values": [], "labels": []})])
def test_an_empty_dataset(tmp_path, data):
    refuse(tmp_path, InputError, "dataset is empty", "0 samples", train_dataset=data)


def test_labels_that_are_missing(tmp_path):
    facts = ("no labels", "'pixel_values'", "task_weight=1.0", "'labels'", "set task_weight=0")
    refuse(tmp_path, InputError, *facts, train_dataset=images(labels=None))


def test_without_a_task_loss_no_labels_are_needed(tmp_path):
    trainer = distiller(tmp_path, train_dataset=images(labels=None), args={"task_weight": 0.0})
    before = weights(trainer.student)
    trainer.train()
    assert not torch.equal(trainer.student.classifier.weight, before["classifier.weight"])
    assert losses(trainer, "logit_loss") and not losses(trainer, "task_loss")


def test_without_a_task_loss_labels_of_other_classes_do_no_harm(tmp_path):
    """The student would raise if it saw them."""
    data = Samples([{**row, "labels": 7} for row in images()])
    trainer = distiller(tmp_path, train_dataset=data, args={"task_weight": 0.0})
    trainer.train()
    assert len(losses(trainer, "logit_loss")) == 3


def published(folder, samples, **changes):
    args = SemCKDConfig.published(
        output_dir=str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=5, max_steps=2, **changes
    )
    return SemCKDTrainer(vit(), args, teacher_model=vit(3, 24, seed=9), train_dataset=images(samples))


def test_a_ragged_last_batch_in_the_published_form(tmp_path):
    with pytest.raises(InputError) as caught:
        published(tmp_path, 12)
    facts = ("12 samples in batches of 5", "dataloader_drop_last=True", "takes any batch size")
    assert_helpful(caught.value, facts)


@pytest.mark.parametrize(("samples", "changes"), [(12, {"dataloader_drop_last": True}), (10, {})])
def test_whole_batches_in_the_published_form(tmp_path, samples, changes):
    trainer = published(tmp_path, samples, **changes)
    trainer.train()
    assert trainer.association().shape == (2, 3)


# ---- Arguments that cannot work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_weight", -1.0),
        ("logit_weight", float("nan")),
        ("feature_weight", float("inf")),
        ("feature_weight", "much"),
        ("temperature", 0.0),
        ("temperature", -4.0),
        ("association_temperature", 0.0),
        ("association", "similar"),
        ("student_layers", []),
        ("teacher_layers", [1, "vit.layernorm"]),
    ],
)
def test_values_out_of_range(tmp_path, name, value):
    with pytest.raises(ConfigurationError) as caught:
        config(tmp_path, **{name: value})
    assert_helpful(caught.value, (f"`{name}`", repr(value)))


@pytest.mark.parametrize("nonsense", ["semkcd", 3, nn.MSELoss()])
def test_a_feature_loss_that_is_none(tmp_path, nonsense):
    with pytest.raises(ConfigurationError) as caught:
        DistillationTrainer(vit(), config(tmp_path), teacher_model=vit(3), feature_loss=nonsense)
    assert_helpful(caught.value, ("`feature_loss`", repr(nonsense), "'semckd'", "hf_semckd.losses.FeatureLoss"))


# ---- What breaks during training ---------------------------------------------------------------------------------


class Ordered(SemCKDTrainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *_):
        return SequentialSampler(self.train_dataset)


def ordered(folder, rows=None, callbacks=None, **changes):
    """Return a trainer that writes a checkpoint after every step of four samples."""
    args = config(folder, save_strategy="steps", save_steps=1, max_steps=5, **changes)
    return Ordered(
        vit(), args, teacher_model=vit(3, 24, seed=9), train_dataset=rows or images(20), callbacks=callbacks
    )


def stop(trainer, kind, *facts):
    """Train, and check that it stops with a helpful error after two steps, whose weights are in the checkpoint."""
    with pytest.raises(SemCKDError) as caught:
        trainer.train()
    assert type(caught.value) is kind
    assert_helpful(caught.value, facts)
    folder = f"{trainer.args.output_dir}/checkpoint-2"
    loaded, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(bool(value.isfinite().all()) for value in weights(loaded).values())
    assert_same_weights(weights(loaded), weights(trainer.student))
    assert trainer.state.global_step == 2 and len(losses(trainer)) == 2


def at_call(number, spoil_output):
    """Return a forward hook that spoils a module's output, from its `number`-th call on (in training, say)."""
    calls = []

    def hook(_module, _inputs, output):
        calls.append(1)
        return spoil_output(output) if len(calls) >= number else output

    return hook


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_student_that_overflows(tmp_path, value):
    trainer = ordered(tmp_path)
    trainer.student.classifier.register_forward_hook(at_call(3, lambda output: output * value))
    stop(trainer, NonFiniteLossError, "in step 3", "task_loss = nan", "logit_loss = nan", "resume_from_checkpoint")


def test_a_feature_term_alone(tmp_path):
    def spoil_output(output):
        output.per_sample = output.per_sample * torch.nan
        return output

    trainer = ordered(tmp_path)
    trainer.feature_loss.register_forward_hook(at_call(3, spoil_output))
    stop(trainer, NonFiniteLossError, "in step 3", "received: feature_loss = nan\n")


def test_the_second_micro_batch_of_a_step(tmp_path):
    """The first one's gradient is there already, and must not reach a weight."""
    trainer = ordered(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.student.classifier.register_forward_hook(at_call(6, lambda output: output * torch.nan))
    stop(trainer, NonFiniteLossError, "in step 3")


def test_finite_terms_whose_sum_overflows(tmp_path):
    student = vit()
    before = weights(student)
    trainer = distiller(tmp_path, model=student, args={"task_weight": 3e38, "feature_weight": 3e38})
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    assert_helpful(caught.value, ("in step 1", "a sum of finite terms that overflows"))
    assert_same_weights(weights(student), before)


def nan_rows(index):
    def spoil_output(output):
        spoiled = output.clone()
        spoiled[index] = torch.nan
        return spoiled

    return spoil_output


def test_a_teacher_whose_layer_breaks(tmp_path):
    trainer = ordered(tmp_path)
    inside = [module for module in blocks(trainer.teacher)[1].modules() if isinstance(module, nn.Linear)]
    # One call for the first step's statistics, and one a step.
    inside[-1].register_forward_hook(at_call(4, nan_rows([1, 2])))
    stop(trainer, TeacherOutputError, "teacher's layer 2 is not finite", "batch index 1, 2")


def test_a_teacher_whose_logits_break(tmp_path):
    trainer = ordered(tmp_path, feature_weight=0.0)
    trainer.teacher.classifier.register_forward_hook(at_call(3, nan_rows([3])))
    stop(trainer, TeacherOutputError, "teacher's logits are not finite", "batch index 3\n")


def test_a_sample_with_nan(tmp_path):
    """Both models would break by it. It is found one step before: the data loader reads ahead."""
    rows = images(20)
    rows.rows[13]["pixel_values"][0, 0, 0] = torch.nan
    trainer = ordered(tmp_path, rows)
    stop(trainer, InputError, "`pixel_values`: NaN or infinity in row 1 of the batch", "such samples")


def test_training_goes_on_from_the_checkpoint_when_the_sample_is_mended(tmp_path):
    rows, mended = images(20), images(20)
    rows.rows[13]["pixel_values"][0, 0, 0] = torch.nan
    stop(ordered(tmp_path, rows), InputError)
    resumed = ordered(tmp_path, mended)
    resumed.train(resume_from_checkpoint=True)
    whole = ordered(tmp_path / "whole", mended)
    whole.train()
    assert losses(resumed) == losses(whole)
    assert_same_weights(weights(resumed.student), weights(whole.student))


@pytest.mark.parametrize("where", ["first rows", "anywhere in the table"])
def test_labels_that_are_no_class_are_refused_before_training(where, tmp_path):
    rows = images(12).rows
    rows[0 if where == "first rows" else 9]["labels"] = 5
    data = rows if where == "first rows" else HubDataset.from_list([{**row} for row in rows]).with_format("torch")
    place = "row 0 of the batch" if where == "first rows" else "the data set"
    with pytest.raises(InputError, match=rf"(?s)outside the student's 3 classes.*5 in {place}.*num_labels"):
        distiller(tmp_path, train_dataset=data)


def test_a_student_that_is_frozen_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"(?s)nothing to train.*requires_grad"):
        distiller(tmp_path, model=vit().requires_grad_(False))


def test_a_depth_cut_without_its_configuration_is_refused(tmp_path):
    """Saved and loaded again, the two missing blocks would be random."""
    student = bert(4)
    student.bert.encoder.layer = student.bert.encoder.layer[:2]
    rows = texts(8).rows
    with pytest.raises(InputError, match=r"(?s)describes a deeper model.*encoder\.layer\.2.*num_hidden_layers"):
        distiller(tmp_path, model=student, teacher_model=bert(3, 24, seed=9), train_dataset=rows)
    student.config.num_hidden_layers = 2
    distiller(tmp_path, model=student, teacher_model=bert(3, 24, seed=9), train_dataset=rows)


def test_a_head_that_the_configuration_does_not_describe_is_told(tmp_path, caplog):
    student = vit()
    student.classifier = nn.Sequential(nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 3))
    distiller(tmp_path, model=student)
    told = [record.message for record in caplog.records if "from_pretrained will not load" in record.message]
    assert len(told) == 1 and "classifier.weight" in told[0]


def long_texts(model, tokens):
    rows = [{"input_ids": [5] * count, "attention_mask": [1] * count, "labels": 0} for count in (4, 6, tokens, 5)]
    return {
        "model": model(),
        "teacher_model": model(3, 24, seed=9),
        "train_dataset": HubDataset.from_list(rows),
        "data_collator": DataCollatorWithPadding(padding_tokenizer()),
    }


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("model", [bert, distilbert])
def test_texts_longer_than_the_positions_are_refused_before_training(model, shuffled, tmp_path):
    positions = model().config.max_position_embeddings
    distiller(tmp_path, **long_texts(model, positions))
    parts = long_texts(model, positions + 1)
    if shuffled:
        parts["train_dataset"] = parts["train_dataset"].shuffle(seed=1)
    with pytest.raises(InputError, match=rf"(?s)longer than the student can read.*{positions + 1} tokens.*truncation"):
        distiller(tmp_path, **parts)


def test_the_positions_of_roberta_begin_after_the_padding():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = RobertaForSequenceClassification(RobertaConfig(max_position_embeddings=20, vocab_size=30, **sizes))
    assert learned_positions(model) == 18
    model(input_ids=torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 19), 5))


def test_the_temperature_suits_the_task(tmp_path):
    rows = texts(4, labels="input", types=False)
    written = distiller(tmp_path, model=gpt2(), teacher_model=gpt2(3, 24, seed=9), train_dataset=rows)
    assert written.distillation_settings()["temperature"] == 1.0
    assert distiller(tmp_path).distillation_settings()["temperature"] == 4.0
    given = distiller(tmp_path, {"temperature": 2.0})
    assert given.distillation.plan.temperature == 2.0


def test_a_teacher_with_another_tokenizer_needs_columns_of_its_own(tmp_path):
    """Its ids would be read as other words, and nothing would say so."""

    def words(order):
        known = Tokenizer(WordLevel({f"w{n}": index for index, n in enumerate(order)}, unk_token="w0"))
        return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="w0")

    own, theirs = words(range(40)), words([*range(38), 39, 38])
    folder = tmp_path / "teacher"
    bert(3, 24, seed=9).save_pretrained(folder)
    theirs.save_pretrained(folder)
    parts = {"model": bert(), "teacher_model": str(folder), "processing_class": own}
    rows = texts(8, types=False).rows
    with pytest.raises(InputError, match=r"(?s)another tokenizer.*2 are other ids.*teacher_input_ids"):
        distiller(tmp_path, **parts, train_dataset=rows)
    both = [{**row, **{f"teacher_{name}": row[name] for name in ("input_ids", "attention_mask")}} for row in rows]
    distiller(tmp_path, **parts, train_dataset=both, data_collator=default_data_collator)
    own.save_pretrained(folder)
    distiller(tmp_path, **parts, train_dataset=rows)


@pytest.mark.parametrize("relations", [0.0, 1.0])
@pytest.mark.parametrize("bank", [0, 64])
@pytest.mark.parametrize("association", ["similarity", "learned"])
def test_one_sample_in_a_micro_batch_is_told_where_it_matters(association, bank, relations, tmp_path, caplog):
    chosen = {"association": association, "association_bank": bank, "relation_weight": relations}
    distiller(tmp_path, {"per_device_train_batch_size": 1, **chosen})
    told = [record.message for record in caplog.records if "With one sample in a micro-batch" in record.message]
    alone = association == "similarity" and not bank
    assert len(told) == (alone or relations > 0)
    assert all(("the association is uniform" if alone else "the relation error is 0") in text for text in told)


def test_a_loss_of_absurd_size_is_told_once(tmp_path, caplog):
    rows = texts(8).rows
    for row in rows:
        row["labels"] = torch.tensor(1e9)
    models = [bert(layers, labels=1, problem_type="regression") for layers in (2, 3)]
    trainer = distiller(tmp_path, model=models[0], teacher_model=models[1], train_dataset=rows)
    trainer.train()
    told = [record.message for record in caplog.records if "drown everything else" in record.message]
    assert len(told) == 1 and told[0].startswith("The task_loss is 1e+18")


# ---- What must not be refused --------------------------------------------------------------------------------------


def test_labels_that_a_transform_maps_are_not_judged_by_the_table(tmp_path):
    rows = HubDataset.from_list([{**row, "labels": 5 + row["labels"]} for row in images(8).rows])
    mapped = rows.with_transform(
        lambda batch: {
            "pixel_values": [torch.tensor(image) for image in batch["pixel_values"]],
            "labels": [label - 5 for label in batch["labels"]],
        }
    )
    distiller(tmp_path, {"remove_unused_columns": False}, train_dataset=mapped)


def test_a_loss_of_the_users_may_ignore_any_label(tmp_path):
    rows = images(8).rows
    rows[0]["labels"] = -1
    distiller(tmp_path, train_dataset=rows, compute_loss_func=lambda outputs, labels, **_: outputs["logits"].mean())


def test_a_teacher_tokenizer_with_more_tokens_may_read_the_students_ids(tmp_path):
    def words(count):
        known = Tokenizer(WordLevel({f"w{n}": n for n in range(count)}, unk_token="w0"))
        return PreTrainedTokenizerFast(tokenizer_object=known, pad_token="w0")

    folder = tmp_path / "teacher"
    bert(3, 24, seed=9).save_pretrained(folder)
    words(41).save_pretrained(folder)
    rows = texts(8, types=False).rows
    distiller(tmp_path, model=bert(), teacher_model=str(folder), processing_class=words(40), train_dataset=rows)


def test_a_student_with_an_adapter_of_transformers_is_not_judged_by_its_configuration(tmp_path):
    peft = pytest.importorskip("peft")
    student = bert()
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    distiller(tmp_path, model=student, teacher_model=bert(3, 24, seed=9), train_dataset=texts(8).rows)


def test_a_replaced_classifier_with_numbers_in_its_name_is_told_and_not_refused(tmp_path, caplog):
    student = resnet()
    student.classifier = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(12, 3)))
    distiller(tmp_path, model=student, teacher_model=resnet((8, 16), seed=9))
    assert any("from_pretrained will not load" in record.message for record in caplog.records)


def test_a_module_with_an_input_of_any_name_may_have_named_labels(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(2))
            self.head = nn.Linear(3, 3)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    trainer = distiller(tmp_path, {"label_names": ["labels"]}, model=Plain(), teacher_model=vit(3, 24, seed=9))
    trainer.train()
