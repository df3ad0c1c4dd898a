"""Requests, responses and refusals, as the Hub words them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import Any

USER = "tester"


class HubError(Exception):
    """A refusal, as the Hub words it: a status, a message and the code the client chooses its exception by."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        """Keep the parts; ``extra`` goes to the body."""
        super().__init__(message)
        self.status, self.code, self.extra = status, code, extra
        self.headers: dict[str, str] = {}

    def reply(self) -> Reply:
        """Return the refusal as a response."""
        message = str(self)
        one_line = " ".join(message.split()).encode("ascii", "replace").decode()
        headers = {"X-Error-Message": one_line} | self.headers
        if self.code:
            headers["X-Error-Code"] = self.code
        return Reply.json({"error": message} | self.extra, status=self.status, headers=headers)


@dataclass(frozen=True)
class Request:
    """One request, its body already read. ``authenticated`` is true when it came with the hub's token."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message
    body: bytes
    authenticated: bool = False

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object."""
        return json_object(self.body)


@dataclass(frozen=True)
class Reply:
    """One response."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
        """Return a response whose body is ``value`` as JSON."""
        body = json.dumps(value, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


def json_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise HubError(400, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise HubError(400, "not a JSON object")
    return value


def require_owner(name: str, request: Request) -> None:
    if not request.authenticated:
        raise HubError(401, "Invalid username or password.")
    if not name.startswith(f"{USER}/"):
        raise HubError(403, f"You don't have the rights to write under the namespace of {name}")
