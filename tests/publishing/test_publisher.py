"""`Publisher` alone: no trainer, no network; a recording client stands in for the Hub's."""

import ast
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from hf_semckd.errors import HubPushError
from hf_semckd.publishing import hub
from hf_semckd.publishing.facts import StudentFacts
from hf_semckd.publishing.hub import Publisher

STATE = ("optimizer*", "trainer_state.json")


class Client:
    """Records what is uploaded; one background job at a time, as the real client."""

    def __init__(self):
        self.created, self.branches, self.uploads, self.errors = [], [], [], []
        self.go_on = threading.Event()
        self.go_on.set()
        self.pool = ThreadPoolExecutor(max_workers=1)

    def create_repo(self, name, **options):
        self.created.append((name, options))
        if self.errors:
            raise self.errors.pop(0)
        return SimpleNamespace(repo_id=f"alice/{name.split('/')[-1]}")

    def create_branch(self, name, *, branch, **options):
        assert options["exist_ok"]
        self.branches.append((name, branch))

    def upload_folder(self, *, folder_path, **options):
        self.go_on.wait()
        if self.errors:
            raise self.errors.pop(0)
        files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        self.uploads.append((options["commit_message"], files, options))
        return options["commit_message"]

    def run_as_future(self, job, *arguments):
        return self.pool.submit(job, *arguments)


@pytest.fixture
def client(monkeypatch, tmp_path):
    made = Client()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(hub, "HfApi", lambda: made)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    yield made
    made.go_on.set()
    made.pool.shutdown()
    assert not list((tmp_path / "tmp").iterdir()), "a staging folder was left behind"


@pytest.fixture
def make(client, tmp_path):
    def made(is_main=True, **changes):
        args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none", **changes)
        return Publisher(args, is_main=is_main, training_state=STATE)

    return made


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "run" / "checkpoint-2"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt"):
        (folder / name).write_text("x")
    (folder / "trainer_state.json").write_text('{"best_model_checkpoint": "/home/mallory/run/checkpoint-1"}')
    return folder


def save(folder):
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "model.safetensors").write_text("x")


def card_of(publisher):
    return lambda: publisher.write_card(StudentFacts(publisher.name, "AutoModel", 10))


def test_a_push_creates_the_repository_and_uploads_the_student_with_a_card(make, client, tmp_path):
    publisher = make(hub_token="secret")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "association.png").write_text("x")
    result = publisher.push(save, card_of(publisher), commit_message="done", private=True)
    assert client.created == [("run", {"token": "secret", "private": True, "exist_ok": True})]
    ((message, files, options),) = client.uploads
    assert result == message == "done" and files == {"model.safetensors", "README.md"}
    assert options["repo_id"] == publisher.repo_id == "alice/run" and options["token"] == "secret"
    # The card's title is the id under which the Hub made the repository.
    assert "# alice/run\n" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_what_the_card_shows_is_uploaded_with_it(make, client, tmp_path):
    publisher = make()
    (tmp_path / "run").mkdir()
    for name in ("association.png", "evaluation.png", "evaluation.json"):
        (tmp_path / "run" / name).write_text("x")
    shown = StudentFacts("run", "AutoModel", 10, files=["association.png", "evaluation.png"])
    publisher.push(save, lambda: publisher.write_card(shown))
    # Without an evaluation its picture is that of another run.
    assert client.uploads[0][1] == {"model.safetensors", "README.md", "association.png"}


def test_no_local_path_of_an_adapter_is_uploaded(make, client, checkpoint, monkeypatch):
    def read(*, folder_path, **options):
        paths = sorted(Path(folder_path).rglob("*"))
        seen.append({str(path.relative_to(folder_path)): path.read_text() for path in paths if path.is_file()})

    seen = []
    monkeypatch.setattr(client, "upload_folder", read)
    (checkpoint / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/mallory/base", "r": 2}')
    (checkpoint / "README.md").write_text("base_model: /home/mallory/base")
    publisher = make(hub_strategy="checkpoint")
    publisher.push_checkpoint(checkpoint, "step 2", card_of(publisher))
    publisher.wait()
    assert not any("mallory" in content for content in seen[0].values())
    assert json.loads(seen[0]["adapter_config.json"]) == {"base_model_name_or_path": None, "r": 2}
    assert "last-checkpoint/README.md" not in seen[0]


def test_a_push_without_waiting_gives_a_future(make, client):
    publisher = make()
    client.go_on.clear()
    future = publisher.push(save, card_of(publisher), blocking=False, revision="branch")
    assert not future.done() and not client.uploads
    client.go_on.set()
    assert future.result() == "End of training" and client.uploads[0][2]["revision"] == "branch"
    assert client.branches == [("alice/run", "branch")]


def test_other_processes_save_and_upload_nothing(make, client, checkpoint):
    saved = []
    publisher = make(is_main=False, hub_strategy="every_save")
    assert publisher.push(saved.append, pytest.fail) is None
    publisher.push_checkpoint(checkpoint, "step 2", pytest.fail)
    assert len(saved) == 2 and not client.created and not client.uploads


def test_a_refused_repository_comes_after_saving(make, client, tmp_path):
    client.errors.append(OSError("403\n\nyou may not"))
    publisher = make(hub_model_id="alice/x", hub_revision="v1")
    with pytest.raises(HubPushError, match=r"received: alice/x \(OSError: 403 you may not\)") as raised:
        publisher.push(save, card_of(publisher), private=True)
    assert (tmp_path / "run" / "model.safetensors").is_file() and publisher.repo_id is None
    assert "# alice/x\n" in (tmp_path / "run" / "README.md").read_text()
    command = f"hf-semckd push {tmp_path / 'run'} --repo-id alice/x --private --revision v1"
    assert str(raised.value).endswith(f"log in with `hf auth login`, then run: {command}")


def test_a_repository_that_is_refused_before_training_names_no_command(make, client):
    client.errors.append(OSError("403"))
    with pytest.raises(HubPushError, match="what to do: .*hf auth login") as raised:
        make().create_repository()
    assert "hf-semckd push" not in str(raised.value)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_failing_upload_says_that_nothing_is_lost(make, client, blocking):
    publisher = make()
    publisher.create_repository()
    client.errors.append(ConnectionError("down"))
    with pytest.raises(HubPushError, match="nothing is lost(.|\n)*ConnectionError: down(.|\n)*hf-semckd push /"):
        result = publisher.push(save, card_of(publisher), blocking=blocking)
        assert not blocking and result.result()


def test_a_failing_card_costs_only_itself(make, client, checkpoint, caplog):
    def fail():
        raise RuntimeError("broken")

    publisher = make(hub_strategy="every_save")
    (checkpoint / "README.md").write_text("the card of PEFT")
    publisher.push(save, fail)
    publisher.push_checkpoint(checkpoint, "step 2", fail)
    publisher.wait()
    assert [files for _, files, _ in client.uploads] == [{"model.safetensors"}] * 2
    assert caplog.text.count("The model card could not be written") == 2 and "broken" in caplog.text


def test_a_failing_save_leaves_no_staging_folder(make):
    def fail(*_):
        raise RuntimeError("broken")

    publisher = make()
    with pytest.raises(RuntimeError, match="broken"):
        publisher.push(lambda folder: save(folder) if Path(folder).name == "run" else fail(), fail)


@pytest.mark.parametrize(
    ("strategy", "extra"),
    [("end", None), ("every_save", ""), ("checkpoint", "last-checkpoint"), ("all_checkpoints", "checkpoint-2")],
)
def test_the_strategy_says_what_of_a_checkpoint_is_uploaded(make, client, checkpoint, strategy, extra):
    publisher = make(hub_strategy=strategy)
    publisher.push_checkpoint(checkpoint, "step 2", card_of(publisher))
    publisher.wait()
    inside = {f"{extra}/{name}" for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")}
    expected = {"model.safetensors", "README.md", *(inside if extra else ())}
    assert [upload[:2] for upload in client.uploads] == (
        [] if extra is None else [("Training in progress, step 2", expected)]
    )


def test_the_path_of_the_best_checkpoint_is_shortened(make, client, checkpoint, monkeypatch):
    def read(*, folder_path, **options):
        states.append((Path(folder_path) / "last-checkpoint" / "trainer_state.json").read_text())

    states = []
    monkeypatch.setattr(client, "upload_folder", read)
    publisher = make(hub_strategy="checkpoint")
    publisher.push_checkpoint(checkpoint, "step 2", card_of(publisher))
    publisher.wait()
    assert len(states) == 1 and '"checkpoint-1"' in states[0] and "mallory" not in states[0]


@pytest.mark.parametrize("always", [True, False])
def test_checkpoints_wait_for_each_other_or_are_skipped(make, client, checkpoint, always):
    publisher = make(hub_strategy="every_save", hub_always_push=always)
    client.go_on.clear()
    for step in (1, 2, 3):
        publisher.push_checkpoint(checkpoint, f"step {step}", card_of(publisher))
    client.go_on.set()
    publisher.push(save, card_of(publisher))
    steps = [1, 2, 3] if always else [1]
    expected = [*(f"Training in progress, step {step}" for step in steps), "End of training"]
    assert [upload[0] for upload in client.uploads] == expected


def test_a_checkpoint_that_cannot_be_uploaded_is_logged(make, client, checkpoint, caplog):
    publisher = make(hub_strategy="every_save", hub_always_push=True)
    client.errors.append(ConnectionError("down"))
    publisher.push_checkpoint(checkpoint, "step 1", card_of(publisher))
    publisher.push_checkpoint(checkpoint.parent / "nowhere", "step 2", card_of(publisher))
    publisher.push_checkpoint(checkpoint, "step 3", card_of(publisher))
    publisher.wait()
    assert [upload[0] for upload in client.uploads] == ["Training in progress, step 3"]
    assert "ConnectionError: down" in caplog.text and "could not be prepared for the Hub" in caplog.text


def test_publishing_knows_no_trainer():
    for path in Path(hub.__file__).parent.glob("*.py"):
        names = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert "Trainer" not in names, path.name
