"""The teacher: loaded, frozen, given its own inputs, and refused when it gives nonsense."""

import json

import pytest
import torch
from makers import IMAGE, bert, distilbert, resnet, texts, vit
from torch import nn
from transformers import BertForSequenceClassification, BertModel, ViTForImageClassification

from hf_semckd.errors import InputError, LayerNotFoundError, TeacherOutputError
from hf_semckd.teacher import Teacher, TeacherOutputs, forward_parameters, load_model, select_inputs


class Plain(nn.Module):
    """A module with one input of an arbitrary name, and logits for output."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


class TwoInputs(nn.Module):
    def forward(self, left, right, scale=1.0):
        return left + right * scale


def batch_of_texts():
    rows = [texts()[index] for index in range(3)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def pictures(count=2):
    return {"pixel_values": torch.randn(count, 3, IMAGE, IMAGE), "labels": torch.zeros(count, dtype=torch.long)}


# ---- Inputs ------------------------------------------------------------------------------------------------------


def test_a_model_gets_what_its_signature_names_and_no_labels():
    batch = {**batch_of_texts(), "teacher_input_ids": torch.zeros(3, 2), "idx": torch.arange(3)}
    assert set(select_inputs(bert(), batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(select_inputs(distilbert(), batch)) == {"input_ids", "attention_mask"}


def test_a_plain_module_gets_the_one_tensor_under_its_own_name():
    values = torch.zeros(2, 4)
    assert select_inputs(Plain(), {"pixel_values": values, "labels": torch.zeros(2)}) == {"x": values}


def test_two_tensors_for_one_unnamed_input_are_not_guessed():
    with pytest.raises(InputError, match="(?s)Plain takes nothing of the batch.*'a', 'b'.*'x'.*rename"):
        select_inputs(Plain(), {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)})


def test_two_unnamed_inputs_are_not_guessed():
    with pytest.raises(InputError, match="TwoInputs takes nothing"):
        select_inputs(TwoInputs(), {"a": torch.zeros(2, 4)})


def test_forward_parameters_leave_out_catch_alls():
    class Any(nn.Module):
        def forward(self, pixel_values, *rest, labels=None, **others): ...

    assert forward_parameters(Any()) == ["pixel_values", "labels"]


def test_columns_of_its_own_lose_the_prefix():
    batch = {**batch_of_texts(), "teacher_input_ids": torch.ones(3, 2), "teacher_attention_mask": torch.ones(3, 2)}
    inputs = Teacher(bert()).inputs(batch)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"] is batch["teacher_input_ids"]
    assert Teacher(bert()).has_own_tokens(batch) and not Teacher(bert()).has_own_tokens(batch_of_texts())


def test_floats_are_cast_to_the_teachers_precision_and_integers_are_not():
    images = Teacher(vit().to(torch.bfloat16)).inputs(pictures())
    assert images["pixel_values"].dtype is torch.bfloat16
    words = Teacher(bert().to(torch.bfloat16)).inputs(batch_of_texts())
    assert words["input_ids"].dtype is torch.long


# ---- Running -----------------------------------------------------------------------------------------------------


def test_it_is_frozen_and_evaluates_from_the_start():
    teacher = Teacher(vit(hidden_dropout_prob=0.5).train())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(module.training for module in teacher.model.modules())


def test_it_evaluates_again_after_somebody_called_train():
    teacher = Teacher(vit(hidden_dropout_prob=0.5))
    batch = pictures()
    first = teacher.run(batch, logits=True, features=False).logits
    teacher.model.train()
    assert torch.equal(teacher.run(batch, logits=True, features=False).logits, first)
    assert not any(module.training for module in teacher.model.modules())


def test_what_is_not_asked_for_is_not_given():
    teacher = Teacher(vit(), [1, 2])
    outputs = teacher.run(pictures(), logits=False, features=True)
    assert outputs.logits is None and len(outputs.features) == 2 and outputs.mask is None
    outputs = teacher.run(pictures(), logits=True, features=False)
    assert outputs.logits.shape == (2, 3) and outputs.features == []


def test_features_are_the_models_own_hidden_states():
    model, batch = bert(), batch_of_texts()
    outputs = Teacher(model, [0, 2]).run(batch, logits=True, features=True)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.features[0], expected.hidden_states[0])
    assert torch.equal(outputs.features[1], expected.hidden_states[2])
    assert torch.equal(outputs.mask, batch["attention_mask"])


def test_a_teacher_without_logits_can_give_features():
    teacher = Teacher(BertModel(bert().config).eval(), [1])
    assert teacher.run(batch_of_texts(), logits=False, features=True).features[0].shape == (3, 10, 16)
    with pytest.raises(InputError, match="(?s)teacher returns no logits.*last_hidden_state.*task head"):
        teacher.run(batch_of_texts(), logits=True, features=False)


def test_named_modules_are_recorded_and_no_hook_stays():
    teacher = Teacher(Plain(), ["body"])
    outputs = teacher.run({"x": torch.ones(2, 4)}, logits=True, features=True)
    assert torch.equal(outputs.features[0], teacher.model.body(torch.ones(2, 4)))
    assert not any(module._forward_hooks for module in teacher.model.modules())


def test_an_unknown_module_is_refused_at_once_with_its_neighbours():
    with pytest.raises(LayerNotFoundError, match="(?s)teacher has no module `bodi`.*'body'"):
        Teacher(Plain(), ["bodi"])


def test_plain_modules_give_no_hidden_states():
    with pytest.raises(InputError, match="(?s)teacher returns no hidden states.*teacher_layers.*feature_weight=0"):
        Teacher(Plain(), [1]).run({"x": torch.ones(2, 4)}, logits=True, features=True)


# ---- Values ------------------------------------------------------------------------------------------------------


def test_bad_logits_are_reported_with_all_their_samples():
    logits = torch.zeros(4, 3)
    logits[1, 0], logits[3, 2] = torch.nan, torch.inf
    with pytest.raises(TeacherOutputError, match=r"(?s)teacher's logits are not finite.*batch index 1, 3\b"):
        Teacher(Plain(), ["body"]).check_finite(TeacherOutputs(logits))


def test_a_bad_feature_is_reported_with_its_layer():
    features = [torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)]
    features[1][0, 2, 3] = torch.nan
    with pytest.raises(TeacherOutputError, match=r"(?s)layer head is not finite.*batch index 0\b"):
        Teacher(Plain(), ["body", "head"]).check_finite(TeacherOutputs(torch.zeros(2, 3), features))


def test_padding_may_hold_anything():
    features, mask = [torch.zeros(2, 3, 4)], torch.tensor([[1, 1, 0], [1, 1, 1]])
    features[0][0, 2] = torch.nan
    teacher = Teacher(Plain(), ["body"])
    teacher.check_finite(TeacherOutputs(None, features, mask))
    features[0][1, 2] = torch.nan
    with pytest.raises(TeacherOutputError, match=r"batch index 1\b"):
        teacher.check_finite(TeacherOutputs(None, features, mask))


# ---- Loading -----------------------------------------------------------------------------------------------------


def test_a_module_is_returned_as_it_is():
    model = Plain()
    assert load_model(model, "student") is model


@pytest.mark.parametrize("as_path", [False, True])
def test_a_folder_is_loaded_with_the_head_it_was_saved_with(tmp_path, as_path):
    model = vit(seed=5)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path if as_path else str(tmp_path), "teacher")
    assert type(loaded) is ViTForImageClassification
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_teacher_gets_the_students_kind_of_head(tmp_path):
    bert().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": ["BertModel"]}))
    assert type(load_model(str(tmp_path), "teacher", like=distilbert())) is BertForSequenceClassification


def test_of_another_family_the_head_fits_the_teacher(tmp_path):
    resnet().save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path), "teacher", like=vit())).__name__ == "ResNetForImageClassification"


def test_a_name_that_is_nowhere_is_refused_with_its_role(tmp_path):
    missing = tmp_path / "nothing-here"
    with pytest.raises(InputError, match="(?s)The teacher could not be loaded.*nothing-here.*config.json.*check the"):
        load_model(str(missing), "teacher")


def test_anything_else_is_no_model():
    with pytest.raises(InputError, match="(?s)The student is not a model.*received: int.*PreTrainedModel"):
        load_model(3, "student")  # type: ignore[arg-type]
