"""ONNX files give PyTorch's logits for any number of samples and any length; int8 files are smaller."""

import logging
import warnings

import onnxruntime
import pytest
import torch
from makers import bert, resnet, traces, vit, weights
from matrix.cells import FIRST_TASK, case
from matrix.tasks import TASKS
from torch import nn

from hf_semckd import export_onnx
from hf_semckd.errors import InputError, MissingDependencyError
from hf_semckd.evaluation import export

SLOW = (pytest.mark.slow, pytest.mark.matrix)
FAMILIES = ["distilbert", "roberta", "gpt2", "llama", "qwen2", "t5", "bart", "vit", "deit", "swin", "resnet"]
FAMILIES += ["convnext", "segformer", "mobilenet_v2", "wav2vec2", "whisper", "deberta-v2"]


def run(path, inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    named = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
    return [torch.from_numpy(entry) for entry in session.run(None, named)]


def words(rows, length):
    ids = torch.randint(1, 40, (rows, length), generator=torch.Generator().manual_seed(rows))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.slow
def test_a_text_model_takes_any_number_of_texts_of_any_length(tmp_path):
    model = bert().train()
    before, hooks = weights(model), traces(model)
    # One text, with what a deployed model does not get.
    path, int8 = export_onnx(model, tmp_path, {**words(1, 6), "labels": torch.tensor([0])}, int8=True)
    assert (path.name, int8.name) == ("model.onnx", "model_int8.onnx")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model_int8.onnx"]
    assert model.training and traces(model) == hooks
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    model.eval()
    for rows, length in ((1, 3), (5, 9), (2, 32)):
        with torch.no_grad():
            expected = model(**words(rows, length)).logits
        torch.testing.assert_close(run(path, words(rows, length))[0], expected, rtol=1e-4, atol=1e-5)
        assert (run(int8, words(rows, length))[0] - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("make", [vit, pytest.param(resnet, marks=pytest.mark.slow)])
def test_an_image_model_takes_any_number_of_images(make, tmp_path):
    model = make().eval()
    [path] = export_onnx(model, tmp_path, {"pixel_values": torch.randn(2, 3, 16, 16)})
    for rows in (1, 7):
        inputs = {"pixel_values": torch.randn(rows, 3, 16, 16)}
        with torch.no_grad():
            torch.testing.assert_close(run(path, inputs)[0], model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_nothing_is_said_of_an_export_that_went_well(tmp_path, caplog, capfd, recwarn):
    model = bert().train()
    export_onnx(model, tmp_path, words(2, 6))
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [entry.message for entry in recwarn] and not "".join(capfd.readouterr())


def test_what_the_exporter_says_of_a_model_gets_through(tmp_path, monkeypatch, caplog):
    def strange(*args, **settings):
        logging.getLogger(export.EXPORTER_LOG).warning("an operator is strange")
        logging.getLogger(export.EXPORTER_LOG).warning(export.MISSING_OPERATORS)
        warnings.warn("a shape is strange", UserWarning, stacklevel=2)
        raise ValueError("too strange")

    monkeypatch.setattr(torch.onnx, "export", strange)
    with pytest.warns(UserWarning, match="a shape is strange"), pytest.raises(InputError, match="too strange"):
        export_onnx(bert(), tmp_path, words(2, 6))
    assert "an operator is strange" in caplog.text and export.MISSING_OPERATORS not in caplog.text
    logging.getLogger(export.EXPORTER_LOG).warning(export.MISSING_OPERATORS)
    assert export.MISSING_OPERATORS in caplog.text


@pytest.mark.slow
def test_int8_weights_are_smaller(tmp_path):
    paths = export_onnx(bert(2, 64), tmp_path, words(2, 6), int8=True)
    sizes = [path.stat().st_size for path in paths]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("family", [pytest.param(name, marks=SLOW) for name in FAMILIES if name in FIRST_TASK])
def test_families_are_exported(family, tmp_path):
    model, inputs = case(family)
    [path] = export_onnx(model, tmp_path, inputs)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    torch.testing.assert_close(run(path, inputs)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.matrix
def test_spans_have_a_start_and_an_end(tmp_path):
    model = TASKS["question-answering"].student_model().eval()
    path = export_onnx(model, tmp_path, words(2, 8))[0]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_outputs()] == ["start_logits", "end_logits"]


@pytest.mark.slow
def test_files_of_another_model_do_not_stay(tmp_path):
    export_onnx(bert(1), tmp_path, words(2, 4), int8=True)
    export_onnx(bert(1, labels=5), tmp_path, words(2, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


class ByValue(nn.Module):
    """Its way depends on the values, which no graph can hold."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values):
        return self.head(pixel_values) if pixel_values.sum() > 0 else pixel_values[:, :3]


class OneSize(nn.Module):
    """It says something else in an exported graph than elsewhere."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, pixel_values):
        return self.head(pixel_values) + float(torch.compiler.is_exporting())


@pytest.mark.parametrize(
    ("model", "said"), [(ByValue(), "cannot be written"), (OneSize(), "does not do what the model")]
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(model, said, tmp_path):
    with pytest.raises(InputError, match=f"(?s){type(model).__name__}.*{said}|{said}.*{type(model).__name__}"):
        export_onnx(model, tmp_path, {"pixel_values": torch.ones(2, 4)})
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "is_installed", lambda name: name != "onnxscript")
    with pytest.raises(MissingDependencyError, match=r"(?s)without onnxscript.*hf-semckd\[onnx\]"):
        export_onnx(bert(), tmp_path, words(2, 4))
