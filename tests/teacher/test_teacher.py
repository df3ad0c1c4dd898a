"""The teacher: loaded, frozen, given its own inputs, and refused when it gives nonsense."""

import contextlib
import functools
import json

import pytest
import torch
from makers import (
    IMAGE,
    assert_same_weights,
    bert,
    distilbert,
    distiller,
    gpt2,
    losses,
    resnet,
    texts,
    traces,
    vit,
    weights,
)
from torch import nn
from transformers import BertForSequenceClassification, BertModel, ViTForImageClassification

from hf_semckd.data.columns import has_own_tokens
from hf_semckd.errors import InputError, LayerNotFoundError, TeacherOutputError
from hf_semckd.features.targets import TeacherTargets
from hf_semckd.losses import FeatureLoss
from hf_semckd.models.inputs import InputSelector
from hf_semckd.models.loading import load_model
from hf_semckd.teacher.outputs import TeacherOutputs, check_finite
from hf_semckd.teacher.running import TeacherRunner
from hf_semckd.teacher.teacher import Teacher


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


def batch_of_texts(types=True):
    rows = [texts(types=types)[index] for index in range(3)]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def pictures(count=2):
    return {"pixel_values": torch.randn(count, 3, IMAGE, IMAGE), "labels": torch.zeros(count, dtype=torch.long)}


# ---- Inputs ------------------------------------------------------------------------------------------------------


def test_a_model_gets_what_its_signature_names_and_no_labels():
    batch = {**batch_of_texts(), "teacher_input_ids": torch.zeros(3, 2), "idx": torch.arange(3)}
    assert set(InputSelector(bert())(batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(InputSelector(distilbert())(batch)) == {"input_ids", "attention_mask"}


def test_a_plain_module_gets_the_one_tensor_under_its_own_name():
    values = torch.zeros(2, 4)
    assert InputSelector(Plain())({"pixel_values": values, "labels": torch.zeros(2)}) == {"x": values}


def test_two_tensors_for_one_unnamed_input_are_not_guessed():
    with pytest.raises(InputError, match="(?s)Plain takes nothing of the batch.*'a', 'b'.*'x'.*rename"):
        InputSelector(Plain())({"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)})


def test_two_unnamed_inputs_are_not_guessed():
    with pytest.raises(InputError, match="TwoInputs takes nothing"):
        InputSelector(TwoInputs())({"a": torch.zeros(2, 4)})


def test_the_parameters_leave_out_catch_alls():
    class Any(nn.Module):
        def forward(self, pixel_values, *rest, labels=None, **others): ...

    assert InputSelector(Any()).parameters == ["pixel_values", "labels"]


def test_columns_of_its_own_lose_the_prefix():
    batch = {**batch_of_texts(), "teacher_input_ids": torch.ones(3, 2), "teacher_attention_mask": torch.ones(3, 2)}
    inputs = Teacher(bert()).inputs(batch)
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"] is batch["teacher_input_ids"]
    assert has_own_tokens(batch) and not has_own_tokens(batch_of_texts())


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
    assert outputs.logits is None and len(outputs.features.layers) == 2 and outputs.mask is None
    outputs = teacher.run(pictures(), logits=True, features=False)
    assert outputs.logits.shape == (2, 3) and outputs.features.layers == ()


def test_features_are_the_models_own_hidden_states():
    model, batch = bert(), batch_of_texts()
    outputs = Teacher(model, [0, 2]).run(batch, logits=True, features=True)
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.features.whole(0), expected.hidden_states[0])
    assert torch.equal(outputs.features.whole(1), expected.hidden_states[2])
    assert torch.equal(outputs.mask, batch["attention_mask"])


def test_a_teacher_without_logits_can_give_features():
    teacher = Teacher(BertModel(bert().config).eval(), [1])
    assert teacher.run(batch_of_texts(), logits=False, features=True).features.whole(0).shape == (3, 10, 16)
    with pytest.raises(InputError, match="(?s)teacher returns no logits.*last_hidden_state.*task head"):
        teacher.run(batch_of_texts(), logits=True, features=False)


def test_named_modules_are_recorded_and_no_hook_stays():
    teacher = Teacher(Plain(), ["body"])
    outputs = teacher.run({"x": torch.ones(2, 4)}, logits=True, features=True)
    assert torch.equal(outputs.features.whole(0), teacher.model.body(torch.ones(2, 4)))
    assert not any(module._forward_hooks for module in teacher.model.modules())


def test_an_unknown_module_is_refused_at_once_with_its_neighbors():
    with pytest.raises(LayerNotFoundError, match="(?s)teacher has no module `bodi`.*'body'"):
        Teacher(Plain(), ["bodi"])


def test_plain_modules_give_no_hidden_states():
    with pytest.raises(InputError, match="(?s)teacher returns no hidden states.*teacher_layers.*feature_weight=0"):
        Teacher(Plain(), [1]).run({"x": torch.ones(2, 4)}, logits=True, features=True)


def test_signatures_are_read_once(monkeypatch):
    teacher, batch = Teacher(vit(), [1]), pictures()
    monkeypatch.setattr("inspect.signature", None)
    assert len(teacher.run(batch, logits=True, features=True).features.layers) == 1


# ---- Compiled ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """Take a compiler that counts the graphs it is given, and changes nothing."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("make", [vit, bert, gpt2, resnet])
def test_compiled_it_gives_the_same(make, compiler):
    model = make()
    batch = pictures() if make in (vit, resnet) else batch_of_texts(types=make is bert)
    before = traces(model.eval().requires_grad_(False))
    expected = Teacher(model, [0, 1]).run(batch, logits=True, features=True)
    teacher = Teacher(model, [0, 1], compiled=True)
    for graphs in (0, 1, 1):
        outputs = teacher.run(batch, logits=True, features=True)
        assert (len(compiler) > 0) == (graphs > 0)
        torch.testing.assert_close(outputs.logits, expected.logits)
        for one, other in zip(outputs.features.tensors(), expected.features.tensors(), strict=True):
            torch.testing.assert_close(one, other)
    graphs = len(compiler)
    teacher.run(batch, logits=True, features=True)
    assert len(compiler) == graphs, "nothing is compiled again"
    teacher.remove_traces()
    assert traces(model) == before


def test_compiled_it_gives_hidden_states_in_every_training(tmp_path, compiler):
    seen = []
    for compiled in (True, False):
        trainer = distiller(tmp_path, {"teacher_compile": compiled})
        trainer.train()
        trainer.train()
        assert not compiled or (compiler and trainer.pair.teacher.compiled.active)
        seen.append(losses(trainer, "feature_loss") + losses(trainer, "logit_loss"))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_without_a_compiler_it_runs_as_it_is_and_says_so_once(monkeypatch, caplog):
    def backend(_graph, _inputs):
        raise RuntimeError("no C++ compiler")

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    teacher, batch = Teacher(vit(), [1], compiled=True), pictures()
    outputs = [teacher.run(batch, logits=True, features=True) for _ in range(4)]
    assert all(torch.equal(one.logits, outputs[0].logits) for one in outputs)
    assert [record.levelname for record in caplog.records if "torch.compile" in record.message] == ["WARNING"]
    torch.compiler.reset()


def test_what_the_model_cannot_take_is_its_own_error(compiler):
    teacher = Teacher(vit(), compiled=True)
    teacher.run(pictures(), logits=True, features=False)
    with pytest.raises(ValueError, match="image size"):
        teacher.run({"pixel_values": torch.zeros(1, 3, 7, 7)}, logits=True, features=False)


def test_named_layers_are_not_compiled(caplog, compiler):
    teacher = Teacher(Plain(), ["body"], compiled=True)
    for _ in range(3):
        assert len(teacher.run({"x": torch.ones(2, 4)}, logits=True, features=True).features.layers) == 1
    assert not compiler
    assert sum("named layers" in record.message for record in caplog.records) == 1


@pytest.mark.slow
def test_the_real_compiler_gives_the_same():
    torch.compiler.reset()
    model, batch = vit(), pictures()
    teacher = Teacher(model, [1], compiled=True)
    first, second = (teacher.run(batch, logits=True, features=True) for _ in range(2))
    assert teacher.compiled.active
    torch.testing.assert_close(first.features.whole(0), second.features.whole(0))


# ---- Beside the student ------------------------------------------------------------------------------------------


class WholeFeatures(FeatureLoss):
    """Keeps the features as they are."""

    def compare(self, student_features, targets, student_mask): ...


class Stream:
    """Writes down what a CUDA stream is asked for."""

    def __init__(self, name, told):
        self.name, self.told, self.device = name, told, torch.device("cuda")

    def wait_stream(self, other):
        self.told.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.told.append(f"on {self.name}")

    def __exit__(self, *_):
        self.told.append(f"off {self.name}")


def test_on_cuda_it_runs_beside_the_student_until_it_is_waited_for(monkeypatch):
    told = []
    current = Stream("student", told)
    monkeypatch.setattr("torch.cuda.current_stream", lambda _device: current)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: stream)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda _tensor, stream: told.append(f"kept for {stream.name}"))
    teacher = Teacher(vit(), [1, 2])
    teacher.stream = Stream("teacher", told)
    run = TeacherRunner(teacher, WholeFeatures(), True, lambda: told.append("run") or contextlib.nullcontext())
    run(pictures())
    assert told[:4] == ["teacher waits for student", "on teacher", "run", "off teacher"]
    assert told[4:] == ["kept for student"] * 3, "logits and two features"
    run.wait()
    assert told[-1] == "student waits for teacher"


def test_on_the_cpu_there_is_nothing_to_wait_for():
    teacher = Teacher(vit(), [1])
    teacher.to(torch.device("cpu"))
    run = TeacherRunner(teacher, WholeFeatures(), False, contextlib.nullcontext)
    assert len(run(pictures()).features.layers) == 1
    run.wait()


# ---- Values ------------------------------------------------------------------------------------------------------


def test_bad_logits_are_reported_with_all_their_samples():
    logits = torch.zeros(4, 3)
    logits[1, 0], logits[3, 2] = torch.nan, torch.inf
    with pytest.raises(TeacherOutputError, match=r"(?s)teacher's logits are not finite.*batch index 1, 3\b"):
        check_finite(TeacherOutputs(logits), ["body"])


def test_a_bad_feature_is_reported_with_its_layer():
    features = [torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)]
    features[1][0, 2, 3] = torch.nan
    with pytest.raises(TeacherOutputError, match=r"(?s)layer head is not finite.*batch index 0\b"):
        check_finite(TeacherOutputs(torch.zeros(2, 3), TeacherTargets.of_whole(features)), ["body", "head"])


def test_padding_may_hold_anything():
    features, mask = [torch.zeros(2, 3, 4)], torch.tensor([[1, 1, 0], [1, 1, 1]])
    features[0][0, 2] = torch.nan
    check_finite(TeacherOutputs(None, TeacherTargets.of_whole(features, mask), mask), ["body"])
    features[0][1, 2] = torch.nan
    with pytest.raises(TeacherOutputError, match=r"batch index 1\b"):
        check_finite(TeacherOutputs(None, TeacherTargets.of_whole(features, mask), mask), ["body"])


# ---- Loading -----------------------------------------------------------------------------------------------------


def test_a_module_is_returned_as_it_is():
    model = Plain()
    assert load_model(model, "student") is model


def test_in_another_precision_a_module_is_copied_and_stays_as_it_is():
    model = vit()
    before = weights(model)
    half = load_model(model, "teacher", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert_same_weights(weights(model), before)
    assert load_model(model, "teacher", dtype=torch.float32) is model


def test_a_folder_is_loaded_in_the_precision_that_is_asked_for(tmp_path):
    vit().save_pretrained(tmp_path)
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        loaded = load_model(str(tmp_path), "teacher", dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype or torch.float32}


def test_a_model_that_cannot_be_cast_is_refused(monkeypatch):
    model = Plain()

    def to(*_args, **_kwargs):
        raise ValueError("a quantized model")

    monkeypatch.setattr(Plain, "to", to)
    with pytest.raises(
        InputError, match="(?s)cannot be had in torch.float16.*a quantized model.*teacher_dtype='auto'"
    ):
        load_model(model, "teacher", dtype=torch.float16)


@pytest.mark.parametrize("cache", [False, True])
def test_a_teacher_in_half_precision_teaches(tmp_path, cache):
    teacher = vit(3, 24, seed=9)
    folder = str(tmp_path / "cache") if cache else None
    args = {"teacher_dtype": "bfloat16", "teacher_cache_dir": folder, "association": "uniform"}
    trainer = distiller(tmp_path, args, teacher_model=teacher)
    trainer.train()
    assert trainer.teacher is not teacher and trainer.teacher.dtype is torch.bfloat16
    assert teacher.dtype is torch.float32
    exact = distiller(tmp_path, {"association": "uniform"}, teacher_model=teacher)
    exact.train()
    for name in ("feature_loss", "logit_loss"):
        assert losses(trainer, name) == pytest.approx(losses(exact, name), rel=0.05, abs=1e-2)


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
