import ast
import re
import string
from pathlib import Path

import numpy as np
import pytest
import yaml
from hub_server import check_card
from huggingface_hub import ModelCard

from hf_semckd import SemCKDConfig
from hf_semckd.errors import InputError
from hf_semckd.publishing.card import create_model_card, linked_files, renamed_card
from hf_semckd.publishing.facts import StudentFacts
from hf_semckd.publishing.redaction import HIDDEN, is_hub_id
from hf_semckd.publishing.sources import Source

TOKEN = "hf_" + "aB3dE6gH9jK2mN5pQ8sT" + "1vW4xY7z"

MINIMAL = {
    "repo_name": "alice/vit",
    "student_class": "AutoModelForImageClassification",
    "parameters": 10,
}

ADDRESS = "https://huggingface.co"
GOLDEN = f"""\
---
base_model: WinKawaks/vit-tiny-patch16-224
datasets:
- AI-Lab-Makerere/beans
language:
- en
library_name: transformers
license: apache-2.0
metrics:
- accuracy
pipeline_tag: image-classification
tags:
- knowledge-distillation
- semckd
- generated_from_trainer
- vision
base_model_relation: finetune
model-index:
- name: alice/vit-tiny-beans
  results:
  - task:
      type: image-classification
    dataset:
      name: AI-Lab-Makerere/beans
      type: AI-Lab-Makerere/beans
    metrics:
    - type: accuracy
      value: 0.9063
---

# alice/vit-tiny-beans

`alice/vit-tiny-beans` is a model with 5,526,346 parameters, initialized from \
[WinKawaks/vit-tiny-patch16-224]({ADDRESS}/WinKawaks/vit-tiny-patch16-224) \
and trained by knowledge distillation (SemCKD) from \
[nateraw/vit-base-beans]({ADDRESS}/nateraw/vit-base-beans) \
(85,800,963 parameters, 15.5 times as many) on \
[AI-Lab-Makerere/beans]({ADDRESS}/datasets/AI-Lab-Makerere/beans). \
Compared with its teacher, it keeps 98.3% (95.5% – 101.0%) of the accuracy and runs 9 times as fast (batch of 1).

## Evaluation

| model | run by | accuracy | kept (95% interval) | parameters | size | ms, batch of 1 | ms, batch of 32 |
|---|---|---:|---:|---:|---:|---:|---:|
| teacher | PyTorch | 0.9219 | 100.0% | 85,800,963 | 343.3 MB | 61.2 | 1,650 |
| student | PyTorch | 0.9063 | 98.3% (95.5% – 101.0%) | 5,526,346 | 22.2 MB | 6.8 | 141 |

Quality on 128 samples; latency is the median of a forward pass, on Intel(R) Xeon(R) CPU at 2.20GHz, 2 threads. \
*Kept* is the share of the first row's accuracy. All measurements are in [evaluation.json](evaluation.json).

![accuracy over latency: a color for each model, a marker for each way to run it](evaluation.png)

Results on the evaluation split of [AI-Lab-Makerere/beans]({ADDRESS}/datasets/AI-Lab-Makerere/beans), during training:

| metric | student | teacher, by its card |
|---|---:|---:|
| `loss` | 0.2513 | – |
| `accuracy` | 0.9688 | 0.9700 |

## Usage

Plain `transformers` loads the model; `hf_semckd`, which trained it, is not needed.

```python
from transformers import pipeline

pipe = pipeline("image-classification", model="alice/vit-tiny-beans")
print(pipe("picture.jpg"))
```

The same without a pipeline:

```python
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("alice/vit-tiny-beans")
model = AutoModelForImageClassification.from_pretrained("alice/vit-tiny-beans")
```

## Training

| training | |
|---|---|
| learning rate | 5e-05 |
| learning-rate schedule | cosine |
| optimizer | adamw_torch |
| epochs | 3 |
| batch size | 64 (16 x 2 accumulation steps x 2 devices) |
| seed | 42 |
| precision | bf16 (mixed) |
| versions | hf_semckd 0.1.0, transformers 5.23.0, torch 2.13.0, accelerate 1.15.0 |
| hardware | Intel(R) Xeon(R) CPU at 2.20GHz |

| distillation | |
|---|---|
| `association` | `similarity` |
| `temperature` | `4` |
| `teacher_layers` | `3, 6, 9, 12` |

Mean association weights at the end of training: how much each student layer (row) learned from each teacher layer \
(column).

![Heat map of the mean association weights between student layers and teacher layers](association.png)

## Limits

- Trained on [AI-Lab-Makerere/beans]({ADDRESS}/datasets/AI-Lab-Makerere/beans) alone: other kinds of data were not \
tested.
- It imitates its teacher, mistakes and biases included.
- Its confidence is off by 4.4 percentage points on average (expected calibration error; first row of the table: 3.1).
- Latencies hold for the machine named above and no other.

## License

Carried over from WinKawaks/vit-tiny-patch16-224 (apache-2.0) and nateraw/vit-base-beans (apache-2.0).

## Citation

"""
CITATION = """\
```bibtex
@inproceedings{chen2021semckd,
  title     = {Cross-Layer Distillation with Semantic Calibration},
  author    = {Chen, Defang and Mei, Jian-Ping and Zhang, Yuan and Wang, Can and Wang, Zhe and Feng, Yan
               and Chen, Chun},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  volume    = {35},
  number    = {8},
  pages     = {7028--7036},
  year      = {2021}
}

@article{wang2023semckd,
  title   = {{SemCKD}: Semantic Calibration for Cross-Layer Knowledge Distillation},
  author  = {Wang, Can and Chen, Defang and Mei, Jian-Ping and Zhang, Yuan and Feng, Yan and Chen, Chun},
  journal = {IEEE Transactions on Knowledge and Data Engineering},
  volume  = {35},
  number  = {6},
  year    = {2023},
  doi     = {10.1109/TKDE.2022.3171571}
}

@misc{hinton2015distilling,
  title         = {Distilling the Knowledge in a Neural Network},
  author        = {Hinton, Geoffrey and Vinyals, Oriol and Dean, Jeff},
  year          = {2015},
  eprint        = {1503.02531},
  archivePrefix = {arXiv}
}
```
"""


def card(**changes):
    return create_model_card(StudentFacts(**{**MINIMAL, **changes}))


def metadata(content):
    """The YAML block, read by the plain YAML parser."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, re.DOTALL).group(1))


MACHINE = {"processor": "Intel(R) Xeon(R) CPU @ 2.20GHz", "torch_threads": 2, "accelerator": None}
VERSIONS = {
    "python": "3.11.9",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "hf_semckd": "0.1.0",
    **MACHINE,
}


def row(model, quality, kept, error, parameters, size, times):
    """A row as in evaluation.json."""
    return {
        "model": model,
        "runtime": "PyTorch",
        "device": "cpu",
        "quality": quality,
        "kept": dict(zip(("value", "low", "high"), kept, strict=True)),
        "calibration_error": error,
        "parameters": parameters,
        "disk_bytes": size,
        "latency": [{"samples": count, "p50": time} for count, time in zip((1, 32), times, strict=True)],
    }


def evaluation(**changes):
    rows = [
        row("teacher", 0.9219, (1, 1, 1), 0.031, 85_800_963, 343_268_000, (61.2, 1650.0)),
        row("student", 0.9063, (0.983, 0.955, 1.01), 0.044, 5_526_346, 22_165_000, (6.8, 141.2)),
    ]
    return {"rows": rows, "metric": "accuracy", "samples": 128, "machine": MACHINE, "notes": [], **changes}


def test_golden_card():
    content = card(
        repo_name="alice/vit-tiny-beans",
        student_class="AutoModelForImageClassification",
        pipeline_tag="image-classification",
        base_model="WinKawaks/vit-tiny-patch16-224",
        teacher="nateraw/vit-base-beans",
        sources=[
            Source("WinKawaks/vit-tiny-patch16-224", "apache-2.0"),
            Source("nateraw/vit-base-beans", "apache-2.0", results={("AI-Lab-Makerere/beans", "accuracy"): 0.97}),
        ],
        dataset="AI-Lab-Makerere/beans",
        metrics={"eval_loss": 0.2513, "eval_accuracy": np.float32(0.96875), "eval_runtime": 3.2, "epoch": 3.0},
        settings={
            "association": "similarity",
            "temperature": 4.0,
            "student_layers": None,
            "teacher_layers": [3, 6, 9, 12],
            "teacher_compile": True,
        },
        training={
            "learning_rate": 5e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0,
            "optim": "adamw_torch",
            "num_train_epochs": 3.0,
            "max_steps": -1,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 2,
            "total_train_batch_size": 64,
            "seed": 42,
            "bf16": True,
            "fp16": False,
        },
        versions=VERSIONS,
        parameters=5_526_346,
        teacher_parameters=85_800_963,
        evaluation=evaluation(),
        files=["association.png", "evaluation.png", "evaluation.json"],
        language=["en"],
        processor="AutoImageProcessor",
        tags=["vision"],
    )
    assert content == GOLDEN + CITATION
    assert check_card(content) == ([], [])


def test_the_hub_client_reads_the_card_back():
    read = ModelCard(GOLDEN + CITATION)
    assert str(read) == GOLDEN + CITATION
    assert read.data.base_model == "WinKawaks/vit-tiny-patch16-224"
    assert read.data.library_name == "transformers"
    assert read.data.model_name == "alice/vit-tiny-beans"
    (result,) = read.data.eval_results
    assert (result.task_type, result.dataset_type) == ("image-classification", "AI-Lab-Makerere/beans")
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.9063)
    assert read.data.base_model_relation == "finetune" and read.data.license == "apache-2.0"


def test_an_adapter_says_what_it_needs():
    base = "google-bert/bert-base-uncased"
    content = card(
        loader="peft",
        adapter_type="LORA",
        student_class="AutoModelForSequenceClassification",
        pipeline_tag="text-classification",
        processor="AutoTokenizer",
        base_model=base,
        teacher="alice/teacher-1",
        teacher_parameters=100,
        labels=["negative", "positive"],
    )
    read = metadata(content)
    assert (read["base_model"], read["base_model_relation"], read["library_name"]) == (base, "adapter", "peft")
    assert "is a LoRA adapter with 10 parameters for [google-bert/bert-base-uncased]" in content
    (code,) = re.findall(r"```python\n(.*?)```", content, re.DOTALL)
    ast.parse(code)
    assert "from peft import PeftModel\n" in code and 'model = PeftModel.from_pretrained(base, "alice/vit")' in code
    assert f'.from_pretrained("{base}", id2label={{0: "negative", 1: "positive"}})' in code
    assert "Plain `transformers`" not in content and "times as many" not in content


@pytest.mark.parametrize(
    ("labels", "argument"),
    [(["LABEL_0", "LABEL_1", "LABEL_2"], "num_labels=3"), (['"); import os', "b"], "num_labels=2"), ([], None)],
)
def test_an_adapter_of_a_local_model_names_no_folder(labels, argument):
    content = card(loader="peft", adapter_type="IA3", base_model="/home/mallory/base", labels=labels)
    assert "is an adapter with 10 parameters for a local model" in content and "lora" not in metadata(content)["tags"]
    assert "mallory" not in content and "which is local and not in this repository" in content
    (code,) = re.findall(r"```python\n(.*?)```", content, re.DOTALL)
    call = f", {argument})" if argument else ")"
    assert f'from_pretrained("folder of the base model"{call}' in code
    ast.parse(code)


def test_a_module_of_ones_own_is_loaded_from_its_weights():
    content = card(loader="torch", student_class="AutoModel")
    assert 'load_file(hf_hub_download("alice/vit", "model.safetensors"))' in content
    assert "AutoModel" not in content and "library_name" not in metadata(content)


def test_a_measurement_of_an_unknown_form_costs_only_its_table(caplog):
    content = card(evaluation={"rows": "all"}, metrics={"accuracy": 0.5}, files=["evaluation.png"])
    assert "evaluation.png" not in content and "| `accuracy` | 0.5000 |" in content
    assert "no deploy table" in caplog.text


def test_a_license_that_is_not_known_is_not_claimed():
    sources = [Source("alice/base-1", "mit"), Source("ViTForImageClassification")]
    content = card(sources=sources)
    assert "license" not in metadata(content)
    assert "The license of ViTForImageClassification is not known here" in content
    assert metadata(card(sources=sources, license="mit"))["license"] == "mit"


def test_a_license_with_terms_of_its_own_is_carried_over_and_pointed_out():
    link = "https://huggingface.co/alice/base-1/blob/main/LICENSE"
    content = card(sources=[Source("alice/base-1", "other", "llama9", link), Source("bob/teacher-2", "mit")])
    read = metadata(content)
    assert (read["license"], read["license_name"], read["license_link"]) == ("other", "llama9", link)
    assert "alice/base-1 (llama9) may restrict the use of this model" in content


def test_a_card_gets_the_name_of_another_repository():
    content = GOLDEN + CITATION
    renamed = renamed_card(content, "bob/beans")
    assert "alice" not in renamed and "vit-tiny-beans" not in renamed
    assert metadata(renamed)["model-index"][0]["name"] == "bob/beans" and "# bob/beans\n" in renamed
    assert renamed_card(renamed, "alice/vit-tiny-beans") == content
    # Where the name is an ordinary word, only the name changes.
    plain = card(repo_name="student", evaluation=evaluation())
    assert renamed_card(plain, "a/b").count("| student | PyTorch") == 1
    assert renamed_card("no title", "a/b") == "no title"


def test_a_card_links_to_nothing_but_what_it_may_show():
    assert linked_files(GOLDEN) == ["association.png", "evaluation.png", "evaluation.json"]
    assert linked_files(card(files=["association.png", "evaluation.json", "passwords.txt"])) == ["association.png"]


def test_a_card_of_what_little_is_known():
    content = card()
    assert metadata(content) == {
        "library_name": "transformers",
        "tags": ["knowledge-distillation", "semckd", "generated_from_trainer"],
    }
    assert "`alice/vit` is a model with 10 parameters, trained by knowledge distillation (SemCKD).\n" in content
    assert "No evaluation results were recorded." in content and "No settings were recorded." in content
    assert "None" not in content
    assert str(ModelCard(content)) == content


@pytest.mark.parametrize("processor", ["AutoTokenizer", "AutoImageProcessor", None])
def test_the_example_is_python_that_needs_transformers_only(processor):
    code = re.search(r"```python\n(.*?)```", card(processor=processor), re.DOTALL).group(1)
    tree = ast.parse(code)
    (imported,) = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert imported.module == "transformers"
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    names = {alias.name for alias in imported.names}
    assert names == {"AutoModelForImageClassification", *([processor] if processor else [])}
    called = {node.func.value.id for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert called == names
    assert {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)} == {"alice/vit"}


@pytest.mark.parametrize(
    "path",
    [
        "/home/mallory/models/vit",
        "/vit",
        "~/vit",
        "./vit",
        "../vit",
        "mallory/runs/vit",
        "runs/vit",
        "out/checkpoint-500",
        "mallory/checkpoint-500",
        "C:\\Users\\mallory\\vit",
        "C:/Users/mallory/vit",
        "\\\\server\\mallory\\vit",
        "mallory\\vit",
        "file:///home/mallory/vit",
        "s3://mallory/vit",
        "mallory/vit.safetensors",
        "/home/mallory/my models/vit",
    ],
)
def test_no_path_gets_into_the_card(path):
    content = card(
        repo_name=path,
        base_model=path,
        teacher=path,
        dataset=path,
        pipeline_tag=path,
        license=path,
        language=[path],
        tags=[path],
        metrics={path: 1.0},
        settings={
            "cache": path,
            "folder": Path(path),
            "bare": Path("mallory"),
            "nested": {"a": [path]},
            f"key {path}": 1,
            "text": f"see {path} there",
        },
        method=path,
    )
    assert path not in content
    for part in ("mallory", "runs", "home", "server", "Users"):
        assert part not in content
    assert "initialized from a local model and" in content and "from a local model on a local data set" in content
    assert set(metadata(content)) == {"library_name", "tags"}
    title = re.search(r"^# (.*)$", content, re.MULTILINE).group(1)
    assert title in ("vit", "checkpoint-500", "vit.safetensors")


def test_what_is_on_this_disk_is_local(tmp_path, monkeypatch):
    names = {"teacher": "mallory/teacher", "base_model": "mallory/base-1", "dataset": "mallory/data"}
    assert all(is_hub_id(name) for name in names.values())
    for name in names.values():
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    content = card(**names, settings={"x": "mallory/teacher", "y": "in mallory/data, there"})
    assert "mallory" not in content
    assert "base_model" not in metadata(content) and "datasets" not in metadata(content)


def test_the_run_s_own_folder_may_have_the_name_of_the_repository(tmp_path, monkeypatch):
    (tmp_path / "alice" / "vit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "# alice/vit\n" in card()


def test_no_secret_gets_into_the_card():
    content = card(
        repo_name=f"alice/{TOKEN}",
        base_model=TOKEN,
        teacher=f"alice/{TOKEN}",
        dataset=f"data with {TOKEN}",
        tags=[TOKEN],
        license=TOKEN,
        metrics={TOKEN: 1.0},
        settings={
            "x": TOKEN,
            "y": {"deep": [f"a {TOKEN}"]},
            "hub_token": "swordfish",
            "nested": {"password": "swordfish"},
            "url": "https://mallory:swordfish@example.org/",
            "pad_token": 3,
        },
    )
    assert TOKEN not in content and "swordfish" not in content
    assert "| `pad_token` | `3` |" in content


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("google/vit-base-patch16-224", True),
        ("gpt2", True),
        ("alice/hf_semckd_student", True),
        ("", False),
        (".", False),
        ("a/b/c", False),
        ("alice/ä", False),
        ("alice/two words", False),
        ("alice/x--y", False),
        ("outputs", False),
        ("alice/train.csv", False),
        (TOKEN, False),
    ],
)
def test_hub_ids(name, expected):
    assert is_hub_id(name) is expected


@pytest.mark.parametrize(
    ("base_model", "shown", "in_metadata"),
    [
        ("gpt2", "`gpt2`", True),
        ("bert-base-uncased", "`bert-base-uncased`", True),
        ("google/vit", "[google/vit](https://huggingface.co/google/vit)", True),
        ("ViTForImageClassification", "`ViTForImageClassification`", False),
        ("student", "`student`", False),
    ],
)
def test_only_a_hub_id_becomes_a_base_model(base_model, shown, in_metadata):
    content = card(base_model=base_model)
    assert f"initialized from {shown} and" in content
    assert metadata(content).get("base_model") == (base_model if in_metadata else None)


@pytest.mark.parametrize(
    ("dataset", "shown", "in_metadata"),
    [
        ("uoft-cs/cifar100", "[uoft-cs/cifar100](https://huggingface.co/datasets/uoft-cs/cifar100)", True),
        ("imdb", "[imdb](https://huggingface.co/datasets/imdb)", True),
        ("CIFAR-100", "CIFAR-100", False),
        ("CIFAR-100, 10 % of it", "CIFAR-100, 10 % of it", False),
        ("images in /home/mallory", "a local data set", False),
        ("train.csv", "a local data set", False),
    ],
)
def test_data_sets(dataset, shown, in_metadata):
    content = card(dataset=dataset, pipeline_tag="image-classification", metrics={"accuracy": 0.5})
    assert f" on {shown}.\n" in content and f"Results on the evaluation split of {shown}:\n" in content
    assert metadata(content).get("datasets") == ([dataset] if in_metadata else None)
    assert ("model-index" in metadata(content)) is in_metadata


def test_without_a_task_there_is_no_index():
    assert "model-index" not in metadata(card(dataset="imdb", metrics={"accuracy": 0.5}))


def test_numbers_that_are_none_stay_out_of_the_index():
    metrics = {"eval_accuracy": float("nan"), "eval_f1": 0.123456789, "eval_samples_per_second": 3.0}
    content = card(dataset="imdb", pipeline_tag="text-classification", metrics=metrics)
    (entry,) = metadata(content)["model-index"]
    assert entry["results"][0]["metrics"] == [{"type": "f1", "value": 0.123457}]
    assert "| `accuracy` | nan |" in content and "samples" not in content


HOSTILE = "a: [b] | `c` \\| *d* <script>e</script>\n---\n# f \x00\u202e & {g} ![h](i) ```"


def test_text_that_would_break_yaml_or_markdown_is_left_out():
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    # Hostile text wherever text may stand, and a tail that must still be two sections of its own.
    content = card(
        dataset=HOSTILE,
        method=HOSTILE,
        license=HOSTILE,
        pipeline_tag=HOSTILE,
        language=[HOSTILE, "no"],
        tags=[HOSTILE, "- x: y", "no", "1.0"],
        metrics={HOSTILE: 0.5, "plain": 0.25},
        settings={HOSTILE: HOSTILE, "pipe": "a|b", "backslash": "a\\", "tick": "a`b", "empty": ""},
    )
    read = metadata(content)
    # What YAML would take for a list, a truth value or a number stays text.
    assert read["tags"][2:] == ["- x: y", "no", "1.0"] and read["language"] == ["no"]
    assert set(read) == {"language", "library_name", "metrics", "tags"}
    assert ModelCard(content).data.to_dict() == read
    body = content.split("---\n", 2)[2]
    html = markdown.render(body)
    rows = re.findall(r"<tr>\n(.*?)</tr>", html, re.DOTALL)
    assert [len(re.findall("<t[dh]", row)) for row in rows] == [2] * 7
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Evaluation", "Usage", "Training", "Limits", "Citation"]
    assert html.count("<h1>") == 1 and html.count("<pre>") == 2
    assert "<script" not in html and "<em>" not in html and "<img" not in html and "<hr" not in html
    assert not re.search("[\x00\u202e]", body)
    cells = re.findall(r"<td><code>(.*?)</code></td>", html)
    assert cells == ["plain", *(word for name in ("pipe", "backslash", "tick", "empty") for word in (name, HIDDEN))]


def test_no_character_of_markup_passes():
    allowed = set(" .,:%+()-_" + string.ascii_letters + string.digits)
    texts = [f"see {chr(code)} there" for code in (*range(128), 0x202E) if chr(code) not in allowed]
    contents = {
        card(
            dataset=text,
            method=text,
            license=text,
            pipeline_tag=text,
            language=[text],
            tags=[text],
            metrics={text: 1.0},
            settings={text: 1, "x": text, "student_layers": text},
        )
        for text in texts
    }
    assert len(contents) == 1 and "there" not in contents.pop()


def test_long_values_are_shortened():
    line = next(line for line in card(settings={"student_layers": ["y" * 1000]}).splitlines() if "yyy" in line)
    assert line == f"| `student_layers` | `{'y' * 199}…` |"


def table(content):
    return dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", content, re.MULTILINE))


def test_values_of_settings():
    settings = {"a": True, "b": 5e-5, "teacher_layers": ("x.0", None), "d": {"k": 400.0}, "e": np.float32(0.1)}
    expected = {"a": "True", "b": "5e-05", "teacher_layers": "x.0, None", "d": "k=400", "e": "0.1"}
    assert table(card(settings=settings)) == expected


def test_only_known_words_are_shown():
    settings = {"association": "sinkhorn", "note": "uniform", "host": "mallory", "x": object(), "y": ["last", "me"]}
    expected = {"association": "sinkhorn", "note": "uniform", "host": HIDDEN, "x": HIDDEN, "y": f"last, {HIDDEN}"}
    assert table(card(settings=settings)) == expected


def test_settings_that_had_no_effect_are_left_out(tmp_path):
    layers = {"student_layers": ["layer1", "layer2.0"], "teacher_layers": [-1, 3]}
    config = SemCKDConfig.published(str(tmp_path), report_to="none", teacher_cache_dir=str(tmp_path), **layers)
    shown = table(card(settings=config.distillation_settings()))
    assert HIDDEN not in shown.values() and "None" not in shown.values()
    assert shown["association"] == "learned" and shown["projector"] == "pairwise" and shown["feature_weight"] == "400"
    assert shown["student_layers"] == "layer1, layer2.0" and shown["teacher_layers"] == "-1, 3"
    assert not {"association_bank", "teacher_compile", "teacher_dtype", "target_norm", "projection_init"} & set(shown)


def test_a_baseline_is_not_called_semckd():
    content = card(method="FitNet", settings={"feature_loss": "fitnet"})
    assert "knowledge distillation (FitNet)" in content
    assert metadata(content)["tags"] == ["knowledge-distillation", "generated_from_trainer"]
    # The library's name stays: it is what was used.
    assert "SemCKD" not in content and "chen2021" not in content and "hinton2015distilling" in content


def test_semckd_is_cited_beside_another_loss():
    content = card(method="SemCKD + CRD")
    assert "knowledge distillation (SemCKD + CRD)" in content and "semckd" in metadata(content)["tags"]
    assert "chen2021semckd" in content


def test_the_papers_are_cited():
    block = re.search(r"```bibtex\n(.*?)```", card(), re.DOTALL).group(1)
    assert re.findall(r"@(\w+)\{", block) == ["inproceedings", "article", "misc"]
    assert block.count("{") == block.count("}")
    for fact in ("10.1109/TKDE.2022.3171571", "1503.02531", "AAAI", "7028--7036"):
        assert fact in block


@pytest.mark.parametrize(
    ("change", "received"),
    [
        ({"student_class": "torch.nn.Module"}, "torch.nn.Module"),
        ({"processor": 'x"; import os'}, "import os"),
        ({"student_class": "/home/mallory/x"}, "/home/mallory/x"),
        ({"parameters": 0}, "0"),
        ({"teacher_parameters": -1}, "-1"),
        ({"metrics": {"confusion": [[1, 0]]}}, "list"),
        ({"metrics": {"ok": True}}, "bool"),
    ],
)
def test_what_makes_no_card_is_refused(change, received):
    with pytest.raises(InputError, match=f"received: .*{received}"):
        card(**change)


def test_arguments_are_left_as_they_were():
    metrics, configuration, tags = {"eval_loss": 1.0}, {"layers": [1, 2]}, ["a"]
    card(metrics=metrics, settings=configuration, tags=tags)
    assert (metrics, configuration, tags) == ({"eval_loss": 1.0}, {"layers": [1, 2]}, ["a"])
