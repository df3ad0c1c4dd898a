"""The server and its HTTP."""

from __future__ import annotations

import os
import re
import threading
import traceback
from collections.abc import Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from launching import HANG

from .messages import USER, HubError, Reply, Request, require_owner
from .repository import Blob, Repo, is_lfs
from .routing import ROUTES, with_key

DEFAULT_TOKEN = "hf_test_token_of_the_loopback_hub"
# Variables that would let the developer's own settings (offline mode, token, cache) leak into a client under test.
_CLIENT_PREFIXES = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_")


class HubServer:
    """The server. Use it as a context manager; every attribute may be read while it runs.

    Attributes:
        repos: The repositories, ``user/name`` for a model and ``datasets/user/name`` for a dataset.
        requests: The method and the path, without the query, of every request seen so far.
        errors: Tracebacks of bugs in this file. The client got a 501 for them, which it does not retry.
    """

    def __init__(self, token: str = DEFAULT_TOKEN) -> None:
        """Take a free port; requests are answered from ``__enter__`` on."""
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self.closed = False
        self.tickets: dict[str, tuple[Repo, str, int]] = {}  # the LFS uploads that may be sent: repo, sha256, size
        self._failures: list[list[Any]] = []
        self._lock = threading.RLock()
        self._http = _Server(self)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, name="hub-server", daemon=True
        )

    def __enter__(self) -> HubServer:
        """Start to answer."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, and give the port back."""
        self.closed = True
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """The address to give to the client as ``HF_ENDPOINT``."""
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the whole environment for a client in a subprocess; ``os.environ`` itself is not changed.

        The client's settings of this process are left out, because the test-suite itself may well run offline.

        Args:
            home: The client's ``HF_HOME``. A folder that does not exist yet makes an empty cache.
            token: The token to send, if not the right one. An empty string makes an anonymous client.
        """
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_CLIENT_PREFIXES)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            # A busy machine may take longer than the client's 10 s.
            "HF_HUB_ETAG_TIMEOUT": str(HANG),
            "HF_HUB_DOWNLOAD_TIMEOUT": str(HANG),
            # Written out, not only left out, for a caller that merges this into its own environment.
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            # Loading a .bin checkpoint would otherwise ask a Space on the internet to convert it.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add_repo(
        self, name: str, files: Mapping[str, bytes] | None = None, kind: str = "models", private: bool = False
    ) -> Repo:
        """Create a repository from inside the test, without the client."""
        repo = Repo(name, kind, private)
        if files:
            tree = {path: Blob(data, is_lfs(path, len(data), data[:512])) for path, data in files.items()}
            repo.commit("main", tree, "add files")
        self.repos[repo.url_path] = repo
        return repo

    def fail_next(self, pattern: str, status: int, times: int = 1) -> None:
        """Answer the next ``times`` requests whose path matches the regular expression with ``status``.

        Mind the client's retries: it sends a request again after 1, 2, 4, 8 and 8 seconds when the status is 408, 429,
        500, 502, 503 or 504 and the request is ``preupload``, an LFS ``batch``, ``PUT`` or ``verify``, the ``HEAD`` of
        a file that is not in the cache, or (in 2.4, not yet in 1.33) a listing. Every other status fails at once, and
        so does every status for ``repos/create``, ``validate-yaml``, ``commit``, ``whoami-v2`` and a model info. To
        test a push that fails, use 400 or 403, or any status on ``/commit/``.
        """
        with self._lock:
            self._failures.append([re.compile(pattern), status, times])

    def answer(self, request: Request) -> Reply:
        """Answer one request; the requests of all threads are answered one after the other."""
        with self._lock:
            self.requests.append((request.method, request.path))
            try:
                self._maybe_fail(request.path)
                return self._dispatch(request)
            except HubError as error:
                return error.reply()
            except Exception:
                self.errors.append(traceback.format_exc())
                return HubError(501, f"bug in the test hub: {self.errors[-1]}").reply()

    def readable(self, key: str, request: Request) -> Repo:
        """Return a repository that the sender of the request may read."""
        repo = self.repos.get(key)
        if repo and (not repo.private or (request.authenticated and repo.name.startswith(f"{USER}/"))):
            return repo
        # As on the Hub, an anonymous client cannot tell a private repository from one that does not exist.
        if not request.authenticated:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")

    def writable(self, key: str, request: Request) -> Repo:
        """Return a repository that the sender of the request may write to."""
        repo = self.readable(key, request)
        require_owner(repo.name, request)
        return repo

    def _maybe_fail(self, path: str) -> None:
        for failure in self._failures:
            pattern, status, times = failure
            if times > 0 and pattern.search(path):
                failure[2] -= 1
                raise HubError(status, f"failure {status} asked for by the test")

    def _dispatch(self, request: Request) -> Reply:
        authorization = request.headers.get("Authorization")
        if authorization is not None and authorization != f"Bearer {self.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        request = replace(request, authenticated=authorization is not None)
        method = "GET" if request.method == "HEAD" else request.method
        for route_method, pattern, function in ROUTES:
            match = pattern.fullmatch(request.path)
            if route_method == method and match:
                # Groups are unquoted only now: a quoted slash in a branch name must not split the path.
                groups = {name: unquote(value or "") for name, value in match.groupdict().items()}
                return function(self, request, **with_key(groups))
        raise HubError(404, f"the test hub has no {request.method} {request.path}")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that keeps its connection open must not delay the end of the test
    request_queue_size = 64

    def __init__(self, hub: HubServer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hub.errors.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else the delayed acknowledgements of TCP cost 40 ms for each request
    server: _Server

    def _handle(self) -> None:
        try:
            if self.server.hub.closed:  # connections that are kept open must not outlive it
                self.close_connection = True
                return
            body = self._read_body()  # always, also for a request that is refused: the next one follows on the line
            url = urlsplit(self.path)
            query = parse_qs(url.query, keep_blank_values=True)
            reply = self.server.hub.answer(Request(self.command, url.path, query, self.headers, body))
            self._send(reply)
        except ConnectionError:  # the client has gone away
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815 (the names that http.server looks up)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers, up to the empty line
            pass
        return b"".join(chunks)

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: a test reads ``HubServer.requests``."""
