"""A Hugging Face Hub on the loopback interface, for tests that use the real ``huggingface_hub`` client.

Everything lives in memory and dies with the context manager. The server speaks the part of the Hub's HTTP interface
that ``huggingface_hub`` and ``transformers`` call to create a repository, push to it and load from it again, and it is
strict where the Hub is strict (tokens, LFS checksums, model-card metadata, unknown commit operations), so that a push
accepted here has a fair chance of being accepted by the Hub.

Where it knowingly differs from the Hub: a new repository starts with an empty commit instead of a ``.gitattributes``;
LFS files are served directly instead of through a redirect to a CDN; there are no pull requests, no organizations, no
Xet storage, no ``.gitignore`` rules, and the listings are not paginated.

The client reads ``HF_ENDPOINT`` once, at import. Client code therefore runs in a subprocess, started with
:meth:`HubServer.environment`.
"""

from __future__ import annotations

from . import routes, uploads  # noqa: F401 (they register what answers requests)
from .card import check_card
from .repository import Repo, is_lfs
from .server import DEFAULT_TOKEN, HubServer

__all__ = ["DEFAULT_TOKEN", "HubServer", "Repo", "check_card", "is_lfs"]
