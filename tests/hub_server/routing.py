"""Which function answers which request."""

from __future__ import annotations

import re
from collections.abc import Callable

from .messages import Reply

ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Reply]]] = []
_PARTS = {
    "KIND": "(?P<kind>models|datasets|spaces)",
    "PREFIX": "(?P<prefix>(?:datasets/|spaces/)?)",
    "REPO": "(?P<repo>[^/]+(?:/[^/]+)?)",
    "REV": "(?P<rev>[^/]+)",
}


def route(method: str, pattern: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    for name, expression in _PARTS.items():
        pattern = pattern.replace(name, expression)

    def register(function: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


def with_key(groups: dict[str, str]) -> dict[str, str]:
    """Replace the parts of a URL that name a repository by its key in ``HubServer.repos``."""
    if "repo" in groups:
        kind = groups.pop("kind", "models")
        prefix = groups.pop("prefix", "" if kind == "models" else f"{kind}/")
        groups["key"] = prefix + groups.pop("repo")
    return groups
