from types import SimpleNamespace

import pytest
from hub_clients import image_processor
from makers import vit

from hf_semckd.cli import main
from hf_semckd.publishing import push


class Address(str):
    repo_id = "alice/beans"


@pytest.fixture
def made(monkeypatch):
    calls = []
    client = SimpleNamespace(
        create_repo=lambda name, **options: Address(f"https://hub/{name}"),
        create_branch=lambda *arguments, **options: None,
        create_commit=lambda name, operations, **options: calls.append((name, options)),
    )
    monkeypatch.setattr(push, "HfApi", lambda: client)
    return calls


def test_a_folder_is_pushed_and_the_terminal_says_where_and_what(made, tmp_path, capsys):
    vit().save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    words = ["--repo-id", "alice/beans", "--private", "--revision", "v1", "--message", "late"]
    assert main(["push", str(tmp_path), *words]) == 0
    assert made == [("alice/beans", {"commit_message": "late", "revision": "v1"})]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Pushed to https://hub/alice/beans/tree/v1"
    assert [line.strip() for line in lines[1:]] == [
        "README.md",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    # The processor in the folder is in the card that was made.
    assert 'AutoImageProcessor.from_pretrained("alice/beans")' in (tmp_path / "README.md").read_text()


def test_a_folder_without_a_student_is_an_error_without_a_traceback(made, tmp_path, capsys):
    assert main(["push", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-semckd: There is no student in this folder.") and made == []
