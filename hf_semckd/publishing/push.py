"""Pushing the folder of a saved student to the Hub, and the errors of every push."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import HubPushError
from ..files import write_atomic
from .card import linked_files, renamed_card
from .folder import CARD, card_name, card_of_folder, published_content, published_files


@dataclass(frozen=True)
class PushedFolder:
    """The address of the repository or of its branch, and the paths that were uploaded."""

    url: str
    files: tuple[str, ...]


def push_folder(
    folder: Path,
    *,
    repo_id: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload the student",
    processor: str | None = None,
) -> PushedFolder:
    """Upload a saved student with its processor, card, pictures and ONNX files, and nothing else of its folder.

    The repository is made if it does not exist. A card is written where there is none.

    Args:
        folder: What `trainer.save_model` or `save_pretrained` wrote.
        repo_id: Hub id; None: the one in the title of the card, or the name of the folder.
        private: Whether a new repository is private; None: as the account says.
        revision: Branch, made if it does not exist; None: main.
        message: Title of the commit.
        processor: The auto class that loads the processor, for a card that is made.

    Raises `InputError` where the folder holds no student, `HubPushError` when the upload fails.
    """
    files, api = published_files(folder), HfApi()
    name = repo_id or card_name(folder) or folder.resolve().name
    card = card_of_folder(folder, name, processor)
    again = push_command(folder, repo_id, private, revision)
    todo = f"check the connection and `hf auth whoami`, then run again: {again}"
    with push_errors("The folder was not pushed to the Hub", name, todo):
        url = api.create_repo(name, private=private, exist_ok=True)
        card = renamed_card(card, url.repo_id)
        write_atomic(folder / CARD, card.encode())
        files |= {entry: folder / entry for entry in (CARD, *linked_files(card)) if (folder / entry).is_file()}
        make_branch(api, url.repo_id, revision)
        contents = {entry: published_content(path) for entry, path in sorted(files.items())}
        operations = [CommitOperationAdd(path_in_repo=entry, path_or_fileobj=what) for entry, what in contents.items()]
        api.create_commit(url.repo_id, operations, commit_message=message, revision=revision)
    return PushedFolder(f"{url}/tree/{revision}" if revision else str(url), tuple(contents))


def push_command(folder: Path | str, repo_id: str | None, private: bool | None, revision: str | None) -> str:
    """Return the command that pushes a folder."""
    words = ["hf-semckd", "push", str(folder)]
    words += ["--repo-id", repo_id] if repo_id else []
    words += ["--private"] * bool(private)
    words += ["--revision", revision] if revision else []
    return shlex.join(words)


def make_branch(api: HfApi, repo_id: str, revision: str | None, token: str | None = None) -> None:
    """Make the branch that is pushed to, if it does not exist."""
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)


@contextmanager
def push_errors(what: str, name: str, todo: str) -> Iterator[None]:
    """Turn every failure of the client, the network or the server into a `HubPushError`."""
    try:
        yield
    except Exception as error:  # the client raises many kinds, and all mean the same here
        raise HubPushError(
            what,
            received=f"{name} ({type(error).__name__}: {' '.join(str(error).split())})",
            expected="a repository that your token may write, and a connection to the Hub",
            todo=todo,
        ) from error
