"""`push_folder` alone: a recording client stands in for the Hub's."""

from types import SimpleNamespace

import pytest
from makers import resnet

from hf_semckd.errors import HubPushError, InputError
from hf_semckd.publishing import push
from hf_semckd.publishing.push import push_command, push_folder


class Address(str):
    @property
    def repo_id(self):
        return self.removeprefix("https://hub/")


class Client:
    def __init__(self):
        self.calls, self.error = [], None

    def create_repo(self, name, *, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        return Address(f"https://hub/{name if '/' in name else f'alice/{name}'}")

    def create_branch(self, name, *, branch, token, exist_ok):
        self.calls.append(("branch", name, branch, exist_ok))

    def create_commit(self, name, operations, *, commit_message, revision):
        if self.error is not None:
            raise self.error
        self.calls.append(("commit", name, commit_message, revision))
        self.files = {entry.path_in_repo for entry in operations}
        return SimpleNamespace()


@pytest.fixture
def client(monkeypatch):
    made = Client()
    monkeypatch.setattr(push, "HfApi", lambda: made)
    return made


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "beans"
    resnet().save_pretrained(made)
    return made


def test_a_folder_is_pushed_under_its_name_with_a_card_that_has_it(client, folder):
    pushed = push_folder(folder)
    assert client.calls == [
        ("create", "beans", None, True),
        ("commit", "alice/beans", "Upload the student", None),
    ]
    assert pushed.url == "https://hub/alice/beans" and set(pushed.files) == client.files
    assert client.files == {"README.md", "config.json", "model.safetensors"}
    assert "# alice/beans\n" in (folder / "README.md").read_text()


def test_the_card_names_the_repository_unless_the_caller_does(client, folder):
    (folder / "README.md").write_text('# alice/old\n\n`alice/old`, `from_pretrained("alice/old")`, alice/older\n')
    push_folder(folder)
    assert client.calls[0][1] == "alice/old"
    push_folder(folder, repo_id="bob/new", private=True, revision="v1", message="again")
    assert client.calls[2:] == [
        ("create", "bob/new", True, True),
        ("branch", "bob/new", "v1", True),
        ("commit", "bob/new", "again", "v1"),
    ]
    text = (folder / "README.md").read_text()
    assert text == '# bob/new\n\n`bob/new`, `from_pretrained("bob/new")`, alice/older\n'


def test_only_pictures_that_the_card_shows_are_pushed(client, folder):
    for name in ("association.png", "evaluation.png", "other.png"):
        (folder / name).write_text("x")
    (folder / "README.md").write_text("# alice/x\n\n![a](association.png) ![b](other.png)\n")
    push_folder(folder)
    assert {name for name in client.files if name.endswith(".png")} == {"association.png"}


def test_a_pull_request_is_no_branch_to_make(client, folder):
    push_folder(folder, revision="refs/pr/1")
    assert [call[0] for call in client.calls] == ["create", "commit"]


def test_a_failure_names_the_command_that_repeats_it(client, folder):
    client.error = ConnectionError("down\nfor now")
    with pytest.raises(HubPushError, match=r"\(ConnectionError: down for now\)") as raised:
        push_folder(folder, repo_id="alice/x", revision="v1")
    assert str(raised.value).endswith(f"run again: hf-semckd push {folder} --repo-id alice/x --revision v1")
    assert (folder / "README.md").is_file()


def test_what_holds_no_student_reaches_no_hub(client, tmp_path):
    with pytest.raises(InputError, match="no student"):
        push_folder(tmp_path)
    assert client.calls == []


def test_a_command_can_be_pasted_into_a_shell():
    assert push_command("my run", "a/b", True, None) == "hf-semckd push 'my run' --repo-id a/b --private"
