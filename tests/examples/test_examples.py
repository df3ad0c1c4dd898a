"""The examples run as a user runs them: as scripts, in a process of their own, from another folder."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from launching import python, torchrun
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TINY = ("--max_steps", "3", "--max_train_samples", "64", "--student_train_samples", "40", "--max_eval_samples", "50")
TINY_MODELS = ("--teacher_depth", "2", "--teacher_width", "48", "--student_depth", "1", "--student_width", "24")
ROWS = ["teacher", "student alone", "student + KD", "student + SemCKD"]
WITHOUT_THE_LIBRARY = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_semckd":
            raise ImportError("hf_semckd is not there")

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def succeed(*command, cwd, start=python):
    result = start(*command, cwd=cwd, HF_HUB_OFFLINE="1", HF_HOME=str(Path(cwd) / "hf_home"))
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def table_rows(output):
    return [line for line in output.splitlines() if line.startswith(tuple(ROWS))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    arguments = ("--output_dir", "out", "--use_cpu", "True", *TINY, *TINY_MODELS)
    return folder / "out", succeed(EXAMPLES / "distill_vit.py", *arguments, cwd=folder)


def test_vit_prints_the_table_and_no_line_for_each_log(tiny):
    _, result = tiny
    rows = table_rows(result.stdout)
    assert [next(name for name in reversed(ROWS) if row.startswith(name)) for row in rows] == ROWS
    assert "AutoModelForImageClassification.from_pretrained" in result.stdout
    assert "{'loss'" not in result.stdout + result.stderr
    assert "student + SemCKD: 100%" in result.stderr


def test_vit_reports_rows_that_were_trained_alike(tiny):
    out, _ = tiny
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(report) == {"data", "seed", "metric", "rows", "association", "settings", "environment"}
    assert [row["name"] for row in report["rows"]] == ROWS
    teacher, *students = report["rows"]
    assert {row["parameters"] for row in students} == {students[0]["parameters"]}
    assert teacher["parameters"] > 4 * students[0]["parameters"]
    assert {row["steps"] for row in report["rows"]} == {3}
    assert all(0 <= row["metric"] <= 1 and row["seconds"] > 0 for row in report["rows"])
    assert report["data"]["teacher_train_samples"] == 64
    assert report["data"]["student_train_samples"] == 40
    assert np.array(report["association"]["weights"]).shape == (1, 2)
    assert np.allclose(np.sum(report["association"]["weights"], axis=1), 1, atol=1e-4)
    assert report["settings"]["association"] == "similarity"
    assert str(out.parent) not in json.dumps(report)


def test_vit_writes_the_heat_map(tiny):
    out, _ = tiny
    with Image.open(out / "association.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100


def test_vit_student_loads_where_the_library_is_absent(tiny):
    out, _ = tiny
    code = """
import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("out/student")
processor = AutoImageProcessor.from_pretrained("out/student")
logits = model(**processor(Image.fromarray(np.zeros((30, 20), np.uint8)), return_tensors="pt")).logits
assert not [name for name in sys.modules if name.startswith("hf_semckd")]
print(tuple(logits.shape), model.config.id2label[7])
"""
    script = out.parent / "load.py"
    script.write_text(WITHOUT_THE_LIBRARY + code, encoding="utf-8")
    assert "(1, 10) 7" in succeed("-I", script, cwd=out.parent).stdout


def test_text_says_how_to_fetch_what_is_missing(tmp_path, monkeypatch):
    import common
    import distill_text

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["distill_text.py"])
    # A message as exit status is printed without a traceback.
    with pytest.raises(SystemExit, match=r"data/text.*python scripts/fetch_text_parts\.py"):
        common.run_example(distill_text.TextArguments, distill_text.DEFAULTS, distill_text.prepare)


# ---- Data -------------------------------------------------------------------------------------------------------


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_digits_are_split_once_and_for_all():
    from image_data import load_digits_images

    data, again = load_digits_images(), load_digits_images()
    assert {name: len(split) for name, split in data.items()} == {"train": 900, "validation": 297, "test": 600}
    assert data["test"]["label"][:] == again["test"]["label"][:]
    seen = {name: {image.tobytes() for image in split["image"]} for name, split in data.items()}
    assert not seen["train"] & seen["test"]


def test_fashion_mnist_is_read_from_its_idx_files(tmp_path, monkeypatch):
    from image_data import load_fashion_mnist

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = load_fashion_mnist(tmp_path)
    assert set(data) == {"train", "test"}
    assert np.array_equal(np.array(data["test"][3]["image"]), images[3])
    assert data["train"].features["label"].int2str(data["train"][9]["label"]) == "Ankle boot"


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x01\x00\x00\x00\x05abc"])
def test_a_damaged_idx_file_is_refused(tmp_path, content):
    from image_data import read_idx

    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"x\.gz.*fetch it again"):
        read_idx(path)


def test_missing_fashion_mnist_names_the_package(tmp_path):
    from image_data import load_fashion_mnist

    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        load_fashion_mnist(tmp_path)


@pytest.fixture
def picture_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(5):
            pixels = rng.integers(0, 256, (12, 10, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    return tmp_path / "pictures"


def test_an_image_folder_gets_a_test_split(picture_folder, tmp_path, monkeypatch):
    from image_data import load_image_dataset

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = load_image_dataset(image_folder=str(picture_folder))
    assert {name: len(split) for name, split in data.items()} == {"train": 8, "test": 2}
    assert data["train"].column_names == ["image", "label"]
    assert data["train"].features["label"].names == ["cat", "dog"]


def test_images_prepared_at_once_equal_those_prepared_on_reading(monkeypatch):
    import image_data
    from distill_vit import load_processor

    data = image_data.load_digits_images()["validation"].select(range(6))
    processors = {"pixel_values": load_processor(None, 8), "teacher_pixel_values": load_processor(None, 16)}
    at_once = image_data.prepare_images(data, processors)
    monkeypatch.setattr(image_data, "MOST_PREPARED_VALUES", 0)
    on_reading = image_data.prepare_images(data, processors)
    for name, shape in (("pixel_values", (3, 8, 8)), ("teacher_pixel_values", (3, 16, 16))):
        assert np.shape(at_once[2][name]) == shape
        assert np.allclose(at_once[:4][name], on_reading[:4][name])
    assert list(at_once[:]["labels"]) == list(data["label"])


# ---- The whole examples -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vit_with_its_defaults(tmp_path):
    succeed(EXAMPLES / "distill_vit.py", cwd=tmp_path)
    report = json.loads((tmp_path / "outputs" / "vit" / "report.json").read_text(encoding="utf-8"))
    teacher, alone, kd, semckd = (row["metric"] for row in report["rows"])
    assert teacher > 0.94
    assert alone > 0.85
    assert semckd > alone
    assert kd > 0.85


@pytest.mark.slow
def test_vit_takes_a_folder_and_a_saved_teacher_of_another_size(picture_folder, tmp_path):
    common = ("--image_folder", "pictures", "--use_cpu", "True", "--max_steps", "2", *TINY_MODELS)
    succeed(EXAMPLES / "distill_vit.py", *common, "--image_size", "16", "--output_dir", "one", cwd=tmp_path)
    again = ("--teacher_name_or_path", "one/teacher", "--image_size", "8", "--output_dir", "two")
    succeed(EXAMPLES / "distill_vit.py", *common, *again, cwd=tmp_path)
    report = json.loads((tmp_path / "two" / "report.json").read_text(encoding="utf-8"))
    assert report["rows"][0]["seconds"] is None
    assert not (tmp_path / "two" / "teacher").exists()


@pytest.mark.slow
def test_vit_in_two_processes_prints_and_writes_once(tmp_path):
    arguments = ("--output_dir", "out", "--use_cpu", "True", *TINY, *TINY_MODELS)
    result = succeed(EXAMPLES / "distill_vit.py", *arguments, cwd=tmp_path, start=torchrun)
    assert len(table_rows(result.stdout)) == 4
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["settings"]["processes"] == 2
    assert (tmp_path / "out" / "association.png").is_file()


@pytest.mark.slow
@pytest.mark.network
def test_text_with_few_steps(tmp_path):
    parts = ROOT / "data" / "text"
    if not (parts / "minilm-l6").is_dir():
        pytest.skip("needs `python scripts/fetch_text_parts.py`")
    arguments = ("--text_dir", parts, "--output_dir", "out", "--use_cpu", "True", *TINY)
    result = succeed(EXAMPLES / "distill_text.py", *arguments, cwd=tmp_path)
    assert len(table_rows(result.stdout)) == 4
    assert (tmp_path / "out" / "student" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "association.png").is_file()
