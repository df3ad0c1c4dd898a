"""The examples run as a user runs them: as scripts, in a process of their own, from another folder."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from launching import python, torchrun
from PIL import Image
from transformers import TrainerState

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TINY = ("--max_steps", "3", "--max_train_samples", "64", "--student_train_samples", "40", "--max_eval_samples", "50")
TINY_MODELS = ("--teacher_depth", "2", "--teacher_width", "48", "--student_depth", "1", "--student_width", "24")
SIZES = {"pixel_values": 8, "teacher_pixel_values": 16}
METHODS = ("alone", "+ KD", "+ SemCKD")
ROWS = ["teacher", *(f"{start} student {method}" for start in ("new", "cut") for method in METHODS)]
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
    """The lines of the table; those of the progress have a colon after the name."""
    return [line for line in output.splitlines() if line.startswith(tuple(ROWS)) and ":" not in line]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    arguments = ("--output_dir", "out", "--use_cpu", "True", *TINY, *TINY_MODELS)
    return folder / "out", succeed(EXAMPLES / "distill_vit.py", *arguments, cwd=folder)


@pytest.mark.slow
def test_vit_prints_the_table_and_a_line_for_each_model(tiny):
    _, result = tiny
    rows = table_rows(result.stdout)
    assert [next(name for name in reversed(ROWS) if row.startswith(name)) for row in rows] == ROWS
    assert "AutoModelForImageClassification.from_pretrained" in result.stdout
    lines = [line for line in result.stdout.splitlines() if ": trained " in line]
    assert [line.partition(":")[0] for line in lines] == ROWS
    assert all(re.search(r": trained [\d.]+ epochs in \d+ s, accuracy [\d.]+ %$", line) for line in lines)
    # No terminal: no bars, and never a line for each log.
    assert not re.search(r"\d%\||it/s|{'", result.stdout + result.stderr)


@pytest.mark.slow
def test_vit_reports_rows_that_were_trained_alike(tiny):
    out, _ = tiny
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert set(report) == {"data", "seed", "metric", "rows", "association", "settings", "environment"}
    assert [row["name"] for row in report["rows"]] == ROWS
    teacher, *students = report["rows"]
    assert len({row["parameters"] for row in students[:3]}) == len({row["parameters"] for row in students[3:]}) == 1
    assert teacher["parameters"] > students[3]["parameters"] and teacher["parameters"] > 4 * students[0]["parameters"]
    assert all(row["kept"][0] == pytest.approx(row["metric"] / teacher["metric"]) for row in report["rows"])
    assert {row["steps"] for row in report["rows"]} == {3}
    assert all(0 <= row["metric"] <= 1 and row["seconds"] > 0 for row in report["rows"])
    assert report["data"]["teacher_train_samples"] == 64
    assert report["data"]["student_train_samples"] == 40
    assert np.array(report["association"]["weights"]).shape == (1, 2)
    assert np.allclose(np.sum(report["association"]["weights"], axis=1), 1, atol=1e-4)
    assert report["settings"]["association"] == "similarity"
    assert str(out.parent) not in json.dumps(report)


@pytest.mark.slow
def test_vit_writes_the_heat_map(tiny):
    out, _ = tiny
    with Image.open(out / "association.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100


@pytest.mark.slow
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
    import distill_text

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["distill_text.py"])
    # A message as exit status is printed without a traceback.
    with pytest.raises(SystemExit, match=r"data/text.*python scripts/fetch_text_parts\.py"):
        distill_text.main()


def test_a_bar_shows_the_name_of_the_model_and_the_loss(capsys):
    from comparison import NamedProgress

    progress, state = NamedProgress("student + KD"), TrainerState(max_steps=2, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    progress.on_log(None, state, None, logs={"loss": 1.5})
    progress.on_log(None, state, None, logs={"train_runtime": 2.0})
    progress.on_train_end(None, state, None)
    progress.on_log(None, state, None, logs={"eval_loss": 2.5})
    shown = "".join(capsys.readouterr())
    assert re.search(r"student \+ KD:   0%.*loss=1\.500", shown)
    assert "{" not in shown


# ---- Data -------------------------------------------------------------------------------------------------------


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_digits_are_split_once_and_for_all():
    from distill_vit import load_digits_images

    data, again = load_digits_images(), load_digits_images()
    assert {name: len(split) for name, split in data.items()} == {"train": 900, "validation": 297, "test": 600}
    assert data["test"]["label"][:] == again["test"]["label"][:]
    seen = {name: {image.tobytes() for image in split["image"]} for name, split in data.items()}
    assert not seen["train"] & seen["test"]


@pytest.fixture
def fashion(tmp_path):
    """A folder with twelve images, and these."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 28, 28), np.uint8), np.arange(12, dtype=np.uint8) % 10
    for prefix in ("train", "t10k"):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return tmp_path, images


def test_fashion_mnist_is_read_from_its_idx_files(fashion):
    from distill_vit import load_fashion_mnist

    folder, images = fashion
    data = load_fashion_mnist(folder)
    assert set(data) == {"train", "test"}
    assert np.array_equal(np.array(data["test"][3]["image"]), images[3])
    assert data["train"].features["label"].int2str(data["train"][9]["label"]) == "Ankle boot"


@pytest.mark.parametrize("content", [b"", b"\x00\x00\x08\x01\x00\x00\x00\x05abc"])
@pytest.mark.parametrize("file", ["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
def test_a_damaged_idx_file_is_refused(fashion, file, content):
    from distill_vit import load_fashion_mnist

    folder, _ = fashion
    (folder / file).write_bytes(gzip.compress(content))
    with pytest.raises(ValueError):
        load_fashion_mnist(folder)


def test_missing_fashion_mnist_names_the_package(tmp_path):
    from distill_vit import load_fashion_mnist

    with pytest.raises(SystemExit, match="apt install dataset-fashion-mnist"):
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


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.usefixtures("cache")
def test_an_image_folder_gets_a_test_split(picture_folder):
    from distill_vit import ImageArguments, load_images

    data = load_images(ImageArguments(image_folder=str(picture_folder)), seed=42)
    assert {name: len(split) for name, split in data.items()} == {"train": 8, "test": 2}
    assert data["train"].column_names == ["image", "label"]
    assert data["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.usefixtures("cache")
def test_csv_labels_become_classes_in_their_own_order(tmp_path):
    from distill_text import TextArguments, load_texts

    (tmp_path / "train.csv").write_text('id,review,stars\n0,good,10\n1,bad,2\n2,,2\n3,"fine, really",7\n')
    (tmp_path / "test.csv").write_text("id,review,stars\n4,fair,7\n")
    files = {"train_file": str(tmp_path / "train.csv"), "test_file": str(tmp_path / "test.csv")}
    data = load_texts(TextArguments(**files, text_column="review", label_column="stars"), seed=0)
    assert data["train"].features["label"].names == ["2", "7", "10"]
    assert data["train"][:] == {"text": ["good", "bad", "fine, really"], "label": [2, 0, 1]}
    assert data["test"][:] == {"text": ["fair"], "label": [1]}


@pytest.mark.usefixtures("cache")
def test_a_validation_split_takes_the_place_of_a_test_split_without_labels(tmp_path):
    from comparison import load_labeled

    features = Features({"label": ClassLabel(names=["no", "yes"]), "sentence": Value("string")})
    rows = {"train": [0, 1, 1], "validation": [1, 0], "test": [-1, -1]}
    splits = {
        name: Dataset.from_dict({"label": labels, "sentence": [f"{name} {label}" for label in labels]}, features)
        for name, labels in rows.items()
    }
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    columns = {"text": "sentence", "label": ClassLabel}
    data = load_labeled(str(tmp_path / "saved"), None, columns, seed=0)
    assert set(data) == {"train", "test"}
    assert data["test"][:] == {"text": ["validation 1", "validation 0"], "label": [1, 0]}


def test_images_prepared_at_once_equal_those_prepared_on_reading(monkeypatch):
    import distill_vit

    data = distill_vit.load_digits_images()["validation"].select(range(6))
    processors = {name: distill_vit.load_processor(None, size) for name, size in SIZES.items()}
    at_once = distill_vit.prepare_images(data, processors)
    monkeypatch.setattr(distill_vit, "MOST_PREPARED_VALUES", 0)
    on_reading = distill_vit.prepare_images(data, processors)
    for name, size in SIZES.items():
        assert np.shape(at_once[2][name]) == (3, size, size)
        assert np.allclose(at_once[:4][name], on_reading[:4][name])
    assert list(at_once[:]["labels"]) == list(data["label"])


# ---- The whole examples -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vit_with_its_defaults(tmp_path):
    succeed(EXAMPLES / "distill_vit.py", cwd=tmp_path)
    report = json.loads((tmp_path / "outputs" / "vit" / "report.json").read_text(encoding="utf-8"))
    quality = {row["name"]: row["metric"] for row in report["rows"]}
    assert quality["teacher"] > 0.94 and min(quality.values()) > 0.85
    for start in ("new", "cut"):
        assert quality[f"{start} student + SemCKD"] > quality[f"{start} student alone"]
    assert quality["cut student alone"] > quality["new student alone"]


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
    assert len(table_rows(result.stdout)) == len(ROWS)
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
    assert len(table_rows(result.stdout)) == len(ROWS)
    assert (tmp_path / "out" / "cut_student" / "tokenizer.json").is_file()
    assert (tmp_path / "out" / "association.png").is_file()
