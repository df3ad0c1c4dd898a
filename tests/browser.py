"""A headless Chromium, driven through chromedriver's HTTP interface alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"]
FLAGS += ["disable-component-update", "disable-sync", "hide-scrollbars"]


def installed() -> bool:
    return shutil.which("chromedriver") is not None and any(map(shutil.which, NAMES))


class Browser:
    """One session; `errors` are what the console was told."""

    def __init__(self, address: str):
        self.address = address

    def send(self, path: str, body: Any = None, method: str = "POST") -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(
            f"{self.address}{path}", data, {"Content-Type": "application/json"}, method=method
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.send("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, page: Path, width: int, *, dark: bool = False) -> None:
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.send("/url", {"url": page.as_uri()})

    def ask(self, script: str) -> Any:
        return self.send("/execute/sync", {"script": f"return {script}", "args": []})

    @property
    def errors(self) -> list[Any]:
        return self.send("/se/log", {"type": "browser"})


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([str(shutil.which("chromedriver")), f"--port={port}"], **quiet)
    server, session = Browser(f"http://127.0.0.1:{port}"), None
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                server.send("/status", method="GET")
                break
            time.sleep(0.1)
        options = {
            "binary": next(filter(None, map(shutil.which, NAMES))),
            "args": [*(f"--{flag}" for flag in FLAGS), f"--user-data-dir={profile}"],
        }
        wanted = {"goog:loggingPrefs": {"browser": "ALL"}, "goog:chromeOptions": options}
        made = server.send("/session", {"capabilities": {"alwaysMatch": wanted}})
        session = Browser(f"{server.address}/session/{made['sessionId']}")
        yield session
    finally:
        if session is not None:
            session.send("", method="DELETE")
        process.terminate()
        process.wait()
