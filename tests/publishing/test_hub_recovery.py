"""Pushes that are interrupted, refused or cut off: nothing is lost, and `hf-semckd push` repeats them.

The functions named `client_...` run in a subprocess, because the client reads `HF_ENDPOINT` when it is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_clients import error_of, image_processor, run
from hub_server import HubServer, check_card
from launching import python
from makers import distiller
from safetensors.torch import load, load_file
from transformers import TrainerCallback

pytestmark = pytest.mark.slow
TOKEN = "hf_" + "kLmNoPqRsTuVwXyZ" + "0123456789"
STUDENT = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "distillation_config.json"}


class At(TrainerCallback):
    """Does something after a checkpoint was saved, and its push begun."""

    def __init__(self, step: int, action: Any):
        self.step, self.action = step, action

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.action()


def pushing(folder: str, **changes: Any) -> Any:
    args = {
        "push_to_hub": True,
        "hub_model_id": "tester/student",
        "hub_always_push": True,
        "hub_strategy": "every_save",
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        **changes,
    }
    return distiller(Path(folder) / "out", args=args, processing_class=image_processor())


def client_strategy(folder: str, strategy: str) -> dict[str, Any]:
    """Train with a strategy, to a branch of a private repository, and push at the end."""
    changes = {"hub_revision": "run/1", "hub_private_repo": True, "max_steps": 2}
    trainer = pushing(folder, hub_strategy=strategy, **changes)
    trainer.train()
    trainer.push_to_hub()
    return {}


def client_killed(folder: str) -> None:
    """Train, and end as if killed after the second step was pushed."""

    def die() -> None:
        trainer._finish_current_push()
        os._exit(9)

    trainer = pushing(folder)
    trainer.add_callback(At(2, die))
    trainer.train()


def client_resumed(folder: str) -> dict[str, Any]:
    """Go on from the last checkpoint, and push."""
    trainer = pushing(folder)
    trainer.train(resume_from_checkpoint=True)
    trainer.push_to_hub()
    return {"step": trainer.state.global_step}


def client_cut_off(folder: str) -> dict[str, Any]:
    """Train, and tell after the second step; go on when the Hub has gone, and try to push in the end."""

    def wait() -> None:
        trainer._finish_current_push()
        Path(folder, "pushed").touch()
        while not Path(folder, "gone").exists():
            time.sleep(0.02)

    trainer = pushing(folder)
    trainer.add_callback(At(2, wait))
    trainer.train()
    return {"step": trainer.state.global_step, "error": error_of(trainer.push_to_hub)}


def client_failing(folder: str) -> dict[str, Any]:
    """Train without the Hub, and push in the end."""
    trainer = pushing(folder, push_to_hub=False)
    trainer.train()
    return {"error": error_of(lambda: trainer.push_to_hub(private=True))}


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    sys.exit()


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(token=TOKEN) as made:
        yield made
        assert made.errors == []


def push_again(server: HubServer, folder: Path, *words: str) -> str:
    """Run `hf-semckd push` on what was saved, with an empty home, and return what it prints."""
    env = server.environment(folder / "again")
    done = python("-m", "hf_semckd", "push", folder / "out", *words, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def same_weights(stored: bytes, path: Path) -> bool:
    on_server, on_disk = load(stored), load_file(path)
    return on_server.keys() == on_disk.keys() and all((on_server[name] == on_disk[name]).all() for name in on_disk)


@pytest.mark.parametrize(
    ("strategy", "titles", "folders"),
    [
        ("end", [], set()),
        ("every_save", [1, 2], set()),
        ("checkpoint", [1, 2], {"last-checkpoint"}),
        ("all_checkpoints", [1, 2], {"checkpoint-1", "checkpoint-2"}),
    ],
)
def test_every_strategy_pushes_to_a_branch_of_a_private_repository(
    server: HubServer, tmp_path: Path, strategy: str, titles: list[int], folders: set[str]
) -> None:
    run([__file__, "client_strategy", str(tmp_path), strategy], server.environment(tmp_path / "home"), tmp_path)
    repo = server.repos["tester/student"]
    assert repo.private and repo.files == {}
    commits = [commit.message for commit in repo.log("run/1")][::-1][1:]
    assert commits == [*(f"Training in progress, step {step}" for step in titles), "End of training"]
    stored = repo.resolve("run/1").files
    assert {name.partition("/")[0] for name in stored} == STUDENT | {"association.png"} | folders
    assert {name for name in stored if name.endswith("optimizer.pt")} == {f"{name}/optimizer.pt" for name in folders}
    assert same_weights(stored["model.safetensors"], tmp_path / "out" / "model.safetensors")


def test_a_run_that_was_killed_and_resumed_pushes_on(server: HubServer, tmp_path: Path) -> None:
    env = server.environment(tmp_path / "home")
    killed = python(__file__, "client_killed", tmp_path, env=env, cwd=tmp_path)
    assert killed.returncode == 9, killed.stdout + killed.stderr
    repo = server.repos["tester/student"]
    steps = [f"Training in progress, step {step}" for step in (1, 2, 3, 4)]
    assert [commit.message for commit in repo.commits[1:]] == steps[:2]
    assert run([__file__, "client_resumed", str(tmp_path)], env, tmp_path)["step"] == 4
    assert [commit.message for commit in repo.commits[1:]] == [*steps, "End of training"]
    assert same_weights(repo.files["model.safetensors"], tmp_path / "out" / "model.safetensors")
    # Those of a run that nothing interrupts.
    whole = distiller(tmp_path / "whole", args={"max_steps": 4}, processing_class=image_processor())
    whole.train()
    whole.save_model()
    found, expected = load(repo.files["model.safetensors"]), load_file(tmp_path / "whole" / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.allclose(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("pattern", "status"), [("/commit/", 500), ("/commit/", 403), ("repos/create", 403)])
def test_a_push_that_was_refused_is_repeated_from_the_folder(
    server: HubServer, tmp_path: Path, pattern: str, status: int
) -> None:
    server.fail_next(pattern, status)
    env = server.environment(tmp_path / "home")
    error = run([__file__, "client_failing", str(tmp_path)], env, tmp_path)["error"]
    assert error["type"] == "HubPushError" and str(status) in error["text"]
    command = f"hf-semckd push {tmp_path / 'out'} --repo-id tester/student"
    assert command in error["text"] and TOKEN not in error["text"]
    printed = push_again(server, tmp_path, *(["--private"] if pattern == "repos/create" else []))
    repo = server.repos["tester/student"]
    assert repo.private and set(repo.files) == STUDENT | {"association.png"}
    assert same_weights(repo.files["model.safetensors"], tmp_path / "out" / "model.safetensors")
    assert printed.splitlines()[0] == f"Pushed to {server.url}/tester/student"
    assert {line.strip() for line in printed.splitlines()[1:]} == set(repo.files)


def test_a_hub_that_goes_down_in_training_costs_only_the_pushes(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        with HubServer(token=TOKEN) as gone:
            env = gone.environment(tmp_path / "home")
            client = pool.submit(run, [__file__, "client_cut_off", str(tmp_path)], env, tmp_path)
            while not (tmp_path / "pushed").exists() and not client.done():
                time.sleep(0.02)
        (tmp_path / "gone").touch()
        found = client.result()
    assert found["step"] == 4 and found["error"]["type"] == "HubPushError"
    assert "nothing is lost" in found["error"]["text"] and "hf-semckd push" in found["error"]["text"]
    assert "A push during training failed, and training goes on" in found["output"]
    with HubServer(token=TOKEN) as back:
        push_again(back, tmp_path, "--repo-id", "tester/elsewhere", "--revision", "repaired", "--message", "late")
        repo = back.repos["tester/elsewhere"]
        commit = repo.resolve("repaired")
        assert commit.message == "late" and repo.files == {}
        assert same_weights(commit.files["model.safetensors"], tmp_path / "out" / "model.safetensors")
        card = commit.files["README.md"].decode()
        assert check_card(card)[0] == [] and "# tester/elsewhere\n" in card and "tester/student" not in card


def test_a_folder_without_a_card_gets_one_and_nothing_private_is_uploaded(server: HubServer, tmp_path: Path) -> None:
    trainer = distiller(tmp_path / "out", args={"save_strategy": "steps"}, processing_class=image_processor())
    trainer.train()
    trainer.save_model()
    left = ("optimizer.pt", "training_args.bin", "events.out.tfevents.1", "trainer_state.json", "notes.txt", ".env")
    for name in (*left, "model.onnx", "model_int8.onnx", "cache/shard.arrow", "checkpoint-1/model.safetensors"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(b"x")
    printed = push_again(server, tmp_path, "--repo-id", "student")
    stored = server.repos["tester/student"].files
    onnx = {"model.onnx", "model_int8.onnx"}
    assert set(stored) == STUDENT | onnx | {"association.png"}
    assert f"Pushed to {server.url}/tester/student\n" in printed
    card = stored["README.md"].decode()
    assert 'AutoModelForImageClassification.from_pretrained("tester/student")' in card
    assert "| learning rate | 0.01 |" in card and str(tmp_path) not in card


def test_the_command_says_in_a_line_what_it_cannot_push(server: HubServer, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    env = server.environment(tmp_path / "home")
    done = python("-m", "hf_semckd", "push", tmp_path / "out", env=env, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("hf-semckd: There is no student in this folder.")
    assert "Traceback" not in done.stderr and server.repos == {}
