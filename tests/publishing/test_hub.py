"""What is saved and pushed is the plain student: complete, without this library, without secrets.

The functions named `client_...` run in a subprocess, because the client reads `HF_ENDPOINT` when it is imported: one
process trains and pushes, a second one, which cannot import `hf_semckd`, loads everything again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_clients import error_of, files, image_processor, run, same, tokenizer
from hub_server import HubServer, Repo, check_card
from huggingface_hub import ModelCard
from makers import (
    IMAGE,
    assert_same_weights,
    bert,
    config,
    distiller,
    images,
    plain_arguments,
    resnet,
    texts,
    vit,
    weights,
)
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

TOKEN = "hf_" + "kLmNoPqRsTuVwXyZ" + "0123456789"
SAVED = {"config.json", "model.safetensors", "distillation_config.json"}
TRAINING_STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "feature_loss.safetensors"}
TRAINING_STATE |= {"checkpoint_files.json"}


# --- What both processes need ---------------------------------------------------------------------------------------


def bert_teacher() -> Any:
    return bert(3, 24, seed=9)


def bert_parts() -> dict[str, Any]:
    """Return a text classification with its tokenizer."""
    return {
        "model": bert(),
        "teacher_model": bert_teacher(),
        "train_dataset": texts(),
        "eval_dataset": texts(6, seed=3),
        "processing_class": tokenizer(),
    }


def vit_parts() -> dict[str, Any]:
    """Return an image classification with its processor."""
    return {"eval_dataset": images(6, seed=3), "processing_class": image_processor()}


def resnet_parts() -> dict[str, Any]:
    """Return one without a processor."""
    return {"model": resnet(), "teacher_model": resnet((8, 12, 16), seed=9)}


PARTS = {"bert": bert_parts, "vit": vit_parts, "resnet": resnet_parts}
PLAIN = {"bert": bert, "vit": vit, "resnet": resnet}
HEADS = {
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "resnet": "AutoModelForImageClassification",
}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def some_inputs(kind: str) -> dict[str, torch.Tensor]:
    """Return two fixed samples."""
    rows = texts(2, seed=8) if kind == "bert" else images(2, seed=8)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "labels"}


def some_logits(kind: str, model: Any) -> list[list[float]]:
    """Return a model's answer to the two samples."""
    with torch.no_grad():
        return model.eval()(**some_inputs(kind)).logits.tolist()


def plainly_saved(kind: str, state: dict[str, Any], folder: Path) -> dict[str, bytes]:
    """Return the files that a plain `Trainer` writes for a model with these weights, but for its pickled arguments."""
    data = {"train_dataset": images(), **PARTS[kind]()}
    data.pop("teacher_model", None)
    trainer = Trainer(**{"model": PLAIN[kind](), **data}, args=plain_arguments(folder, max_steps=1))
    trainer.train()
    trainer.model.load_state_dict(state)
    trainer.save_model()
    (folder / "training_args.bin").unlink()
    return files(folder)


# --- What the clients do --------------------------------------------------------------------------------------------


class Notebook(TrainerCallback):
    """Notes the steps, to show that training went on."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append(state.global_step)


def pushing(folder: str, kind: str, name: str, strategy: str = "end", parts: Any = None, **changes: Any) -> Any:
    """Return a trainer that pushes to a repository."""
    args = {
        "push_to_hub": True,
        "hub_model_id": f"tester/{name}",
        "hub_strategy": strategy,
        "hub_always_push": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps" if "eval_dataset" in PARTS[kind]() else "no",
        "eval_steps": 1,
        **changes,
    }
    parts = {**PARTS[kind](), "compute_metrics": accuracy, **(parts or {})}
    return distiller(Path(folder) / name, args=args, **parts)


def client_push(folder: str) -> dict[str, Any]:
    """Train and push, in all ways that end well and in some that do not."""
    refused = error_of(lambda: pushing(folder, "resnet", "refused"))
    pushed = {}
    # From and with the Hub: both models by name, a token in the arguments.
    named = {"model": "tester/base", "teacher_model": "tester/master"}
    every = pushing(folder, "bert", "every", "every_save", named, hub_token=os.environ["HF_TOKEN"])
    every.train()
    every.push_to_hub(dataset="tester/sentences", tags=["tiny"], license="mit", language="en")
    pushed["every"] = some_logits("bert", every.student)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    checkpoint = pushing(folder, "vit", "checkpoint", "checkpoint", **best)
    checkpoint.train()
    checkpoint._finish_current_push()
    pushed["checkpoint"] = some_logits("vit", checkpoint.student)
    private = pushing(folder, "resnet", "private", hub_private_repo=True)
    private.train()
    private.save_model()
    pushed["private"] = some_logits("resnet", private.student)
    later = pushing(folder, "vit", "later", push_to_hub=False)
    later.train()
    first = later.push_to_hub(private=True)
    later.push_to_hub(blocking=False, commit_message="and again").result()
    pushed["later"] = some_logits("vit", later.student)
    return {"refused": refused, "logits": pushed, "url": str(first), **client_fail(folder)}


def client_fail(folder: str) -> dict[str, Any]:
    """Push to a repository that refuses the first commit, at the end and in training."""
    fails = pushing(folder, "bert", "fails", push_to_hub=False)
    fails.train()
    error = error_of(fails.push_to_hub)
    on_disk = sorted(files(fails.args.output_dir))
    logits = some_logits("bert", type(fails.student).from_pretrained(fails.args.output_dir))
    again = error_of(fails.push_to_hub)
    flaky = pushing(folder, "resnet", "flaky", "every_save", {"callbacks": [notes := Notebook()]}, max_steps=4)
    flaky.train()
    flaky._finish_current_push()
    return {
        "fails": {"error": error, "again": again, "files": on_disk, "logits": logits},
        "failed": some_logits("bert", fails.student),
        "flaky": {"steps": notes.steps, "logits": some_logits("resnet", flaky.student)},
        "staging": [path.name for path in Path(os.environ["TMPDIR"]).glob("hf_semckd_push_*")],
    }


LOADER = """
import json, sys
sys.modules["hf_semckd"] = None  # importing it raises
import numpy, torch, transformers

samples, jobs = sys.argv[1], json.loads(sys.argv[2])
seen = {}
for head, kind, source, processor in jobs:
    model, info = getattr(transformers, head).from_pretrained(source, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(**torch.load(samples)[kind]).logits.tolist()
    wrong = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    seen[source] = {"logits": logits, "wrong": wrong, "class": type(model).__name__}
    if processor == "tokenizer":
        seen[source]["processor"] = transformers.AutoTokenizer.from_pretrained(source)("w5 w7")["input_ids"]
    if processor == "image":
        made = transformers.AutoImageProcessor.from_pretrained(source)(numpy.zeros((30, 20, 3), numpy.uint8))
        seen[source]["processor"] = list(numpy.array(made["pixel_values"][0]).shape)
try:
    transformers.AutoConfig.from_pretrained("tester/private", token=False, force_download=True)
except OSError as error:
    seen["anonymous"] = str(error)
print(json.dumps(seen))
"""


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    sys.exit()


# --- On disk --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training."""
    monkeypatch.setattr("hf_semckd.training.callbacks.save_association_plot", lambda *_, **__: None)


def trained(kind: str, folder: Path, **args: Any) -> Any:
    trainer = distiller(folder, args={"save_strategy": "steps", "save_steps": 2, **args}, **PARTS[kind]())
    trainer.train()
    return trainer


def assert_plain(folder: Path, expected: dict[str, bytes], extra: set[str]) -> None:
    """Check that a folder holds the plain student as a plain `Trainer` writes it, and nothing else."""
    found = files(folder)
    assert set(found) == set(expected) | extra
    assert json.loads(found["config.json"]) == json.loads(expected["config.json"])
    mine, theirs = load_file(folder / "model.safetensors"), load_file(folder.parent / "plain" / "model.safetensors")
    assert_same_weights(mine, theirs)
    for name in set(expected) - {"config.json", "model.safetensors"}:
        assert found[name] == expected[name], name


@pytest.mark.parametrize("kind", PARTS)
def test_what_is_saved_is_what_a_plain_trainer_would_save(tmp_path: Path, kind: str) -> None:
    trainer = trained(kind, tmp_path / "run")
    expected = plainly_saved(kind, weights(trainer.student), tmp_path / "plain")
    trainer.save_model(str(tmp_path / "saved"))
    assert_plain(tmp_path / "saved", expected, {"distillation_config.json"})
    assert json.loads(expected["config.json"])["architectures"] == [type(PLAIN[kind]()).__name__]


@pytest.mark.parametrize("kind", PARTS)
def test_a_checkpoint_is_the_student_and_the_state_of_training(tmp_path: Path, kind: str) -> None:
    trainer = trained(kind, tmp_path, max_steps=2)
    expected = plainly_saved(kind, weights(trainer.student), tmp_path / "plain")
    assert_plain(tmp_path / "checkpoint-2", expected, {"distillation_config.json", *TRAINING_STATE})


def test_saving_in_the_middle_of_training_is_as_at_its_end(tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            trainer.save_model(str(tmp_path / "saved"))

    trainer = distiller(tmp_path / "run", callbacks=[Save()], **resnet_parts())
    trainer.train()
    expected = plainly_saved("resnet", weights(trainer.student), tmp_path / "plain")
    assert_plain(tmp_path / "saved", expected, {"distillation_config.json"})


def test_an_output_folder_holds_no_pickle_outside_checkpoints(tmp_path: Path) -> None:
    trainer = trained("vit", tmp_path)
    trainer.save_model()
    pickles = [path for end in ("bin", "pt", "pth", "pkl") for path in tmp_path.rglob(f"*.{end}")]
    assert {path.parent.name for path in pickles} == {"checkpoint-2", "checkpoint-3"}
    assert {path.name for path in pickles} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_without_features_nothing_else_is_saved(tmp_path: Path) -> None:
    trainer = trained("resnet", tmp_path / "run", feature_weight=0.0)
    trainer.save_model(str(tmp_path / "saved"))
    assert set(files(tmp_path / "saved")) == SAVED
    expected = SAVED | TRAINING_STATE - {"feature_loss.safetensors"}
    assert set(files(tmp_path / "run" / "checkpoint-3")) == expected


def test_the_settings_tell_no_path_and_no_token(tmp_path: Path) -> None:
    bert_teacher().save_pretrained(tmp_path / "teacher")
    cache = str(tmp_path / "cache")
    args = config(tmp_path / "run", hub_token=TOKEN, teacher_cache_dir=cache, temperature=3.0, run_name="secret-run")
    parts = {**bert_parts(), "teacher_model": str(tmp_path / "teacher")}
    trainer = type(distiller(tmp_path))(args=args, **parts)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    for path in (tmp_path / "saved").iterdir():
        content = path.read_bytes()
        for secret in (TOKEN, str(tmp_path), "secret-run"):
            assert secret.encode() not in content, path
    settings = json.loads((tmp_path / "saved" / "distillation_config.json").read_text())
    assert settings["distillation"]["temperature"] == 3.0
    assert settings["training"]["per_device_train_batch_size"] == settings["training"]["total_train_batch_size"] == 4
    assert settings["method"] == "SemCKD" and settings["dataset"] is None and settings["base_model"] is None
    assert settings["teacher"] == "BertForSequenceClassification"
    assert settings["versions"]["transformers"] and settings["versions"]["torch"]


# --- On the Hub -----------------------------------------------------------------------------------------------------


class Hub:
    """What two clients did with one server, and what was left behind."""

    def __init__(self, server: HubServer, folder: Path):
        self.server, self.folder = server, folder
        self.samples = folder / "samples.pt"
        torch.save({kind: some_inputs(kind) for kind in PARTS}, self.samples)
        for name, model in (("tester/base", bert()), ("tester/master", bert_teacher())):
            # Not below the clients' working directory, where the name would mean the folder.
            model.save_pretrained(folder / "sources" / name)
            server.add_repo(name, files(folder / "sources" / name))
        server.fail_next("/api/repos/create", 403)
        server.fail_next("tester/fails/commit/", 403)
        server.fail_next("tester/flaky/commit/", 403)
        self.pushed = self._push()
        self.loaded = self._load()

    def _push(self) -> dict[str, Any]:
        (self.folder / "tmp").mkdir()
        env = self.server.environment(self.folder / "pushing-home") | {"TMPDIR": str(self.folder / "tmp")}
        env |= {"PYTHONPATH": str(Path(__file__).parents[2])}
        return run([__file__, "client_push", str(self.folder)], env, self.folder)

    def _load(self) -> dict[str, Any]:
        trainer = trained("vit", self.folder / "local", max_steps=2)
        trainer.save_model()
        jobs = [(HEADS[kind], kind, f"tester/{name}", processor) for name, (kind, processor) in REPOSITORIES.items()]
        for place in ("local", "local/checkpoint-2"):
            jobs.append((HEADS["vit"], "vit", str(self.folder / place), "image"))
        self.local = some_logits("vit", trainer.student)
        env = self.server.environment(self.folder / "loading-home")
        return run(["-c", LOADER, str(self.samples), json.dumps(jobs)], env, self.folder)

    def repo(self, name: str) -> Repo:
        return self.server.repos[f"tester/{name}"]


# Those that were pushed when training had ended.
SHOWN = {"every", "private", "later", "fails"}
# What is on the Hub in the end, with the kind of model and of processor.
REPOSITORIES = {
    "every": ("bert", "tokenizer"),
    "checkpoint": ("vit", "image"),
    "private": ("resnet", None),
    "later": ("vit", "image"),
    "fails": ("bert", "tokenizer"),
    "flaky": ("resnet", None),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One server, one process that pushes and one that loads."""
    with HubServer(token=TOKEN) as server:
        yield Hub(server, tmp_path_factory.mktemp("hub"))
        assert server.errors == []


def test_every_pushed_student_loads_without_this_library(hub: Hub) -> None:
    expected = {**hub.pushed["logits"], "fails": hub.pushed["failed"], "flaky": hub.pushed["flaky"]["logits"]}
    for name, (kind, processor) in REPOSITORIES.items():
        seen = hub.loaded[f"tester/{name}"]
        assert same(seen["logits"], expected[name]), name
        assert seen["class"] == type(PLAIN[kind]()).__name__ and seen["wrong"] == []
        answers = {"tokenizer": [5, 7], "image": [3, IMAGE, IMAGE], None: None}
        assert seen.get("processor") == answers[processor]


def test_a_saved_student_and_a_checkpoint_load_without_this_library(hub: Hub) -> None:
    for place in ("local", "local/checkpoint-2"):
        assert same(hub.loaded[str(hub.folder / place)]["logits"], hub.local)


def test_the_server_holds_exactly_the_student(hub: Hub, tmp_path: Path) -> None:
    for name, (kind, _) in REPOSITORIES.items():
        expected = {*plainly_saved(kind, PLAIN[kind]().state_dict(), tmp_path / name), *SAVED, "README.md"}
        if name in SHOWN:
            expected.add("association.png")
        if name == "checkpoint":
            inside = expected - {"README.md"} | TRAINING_STATE
            expected |= {f"last-checkpoint/{file}" for file in inside}
        assert set(hub.repo(name).files) == expected, name


def test_each_strategy_pushes_when_it_says(hub: Hub) -> None:
    titles = {name: [commit.message for commit in hub.repo(name).commits[1:]] for name in REPOSITORIES}
    progress = [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert titles["every"][:3] == progress and titles["every"][-1] == "End of training"
    assert titles["checkpoint"][:3] == progress
    assert titles["private"] == ["Model save"]
    assert titles["later"] == ["End of training", "and again"][: len(titles["later"])]
    assert titles["flaky"][:3] == [f"Training in progress, step {step}" for step in (2, 3, 4)]


def test_neither_token_nor_local_path_is_on_the_server(hub: Hub) -> None:
    secrets = (TOKEN, str(hub.folder), os.path.expanduser("~/"), tempfile.gettempdir())
    for name in REPOSITORIES:
        for commit in hub.repo(name).commits:
            for path, content in commit.files.items():
                for secret in secrets:
                    assert secret.encode() not in content, (name, path, secret)


def test_a_pushed_checkpoint_can_be_told_from_others(hub: Hub) -> None:
    state = json.loads(hub.repo("checkpoint").files["last-checkpoint/trainer_state.json"])
    assert state["global_step"] == 3 and state["best_model_checkpoint"].startswith("checkpoint-")


def test_the_card_is_complete(hub: Hub) -> None:
    text = hub.repo("every").card
    assert check_card(text)[0] == []
    data = ModelCard(text).data
    assert data.base_model == "tester/base" and data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification" and data.license == "mit" and data.language in ("en", ["en"])
    assert {"tiny", "knowledge-distillation"} <= set(data.tags)
    assert data.datasets in ("tester/sentences", ["tester/sentences"]) and "accuracy" in data.metrics
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert 0 <= values["accuracy"] <= 1
    assert "AutoModelForSequenceClassification" in text and "AutoTokenizer" in text
    assert text.count('from_pretrained("tester/every")') == 2
    assert "tester/master" in text


def test_every_card_is_valid_and_tells_how_to_load(hub: Hub) -> None:
    for name, (kind, _) in REPOSITORIES.items():
        text = hub.repo(name).card
        assert check_card(text)[0] == [], name
        assert HEADS[kind] in text and f'from_pretrained("tester/{name}")' in text, name


def test_a_private_repository_stays_private(hub: Hub) -> None:
    assert hub.repo("private").private and hub.repo("later").private and not hub.repo("every").private
    # With the token it was loaded, see above; without it the same request fails.
    assert "anonymous" in hub.loaded


def test_a_repository_that_is_refused_stops_before_training(hub: Hub) -> None:
    error = hub.pushed["refused"]
    assert error["type"] == "HubPushError" and "tester/refused" in error["text"]
    for part in ("403", "received:", "expected:", "what to do:", "hf auth login"):
        assert part in error["text"]


def test_a_failing_push_loses_nothing(hub: Hub) -> None:
    fails = hub.pushed["fails"]
    assert fails["error"]["type"] == "HubPushError"
    for part in (
        "nothing is lost",
        "403",
        "tester/fails",
        "what to do:",
        f"hf-semckd push {hub.folder / 'fails'} --repo-id tester/fails",
    ):
        assert part in fails["error"]["text"], part
    assert TOKEN not in fails["error"]["text"]
    assert SAVED <= set(fails["files"]) and "tokenizer.json" in fails["files"]
    assert same(fails["logits"], hub.pushed["failed"])
    assert fails["again"] == {}


def test_a_failing_push_during_training_does_not_stop_it(hub: Hub) -> None:
    assert hub.pushed["flaky"]["steps"] == [1, 2, 3, 4]
    assert "A push during training failed, and training goes on" in hub.pushed["output"]


def test_no_staging_folder_and_no_token_is_left_behind(hub: Hub) -> None:
    assert hub.pushed["staging"] == []
    assert TOKEN not in hub.pushed["output"]
