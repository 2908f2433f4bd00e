"""A headless Chromium, driven by its DevTools protocol."""

import json
import re
import shutil
import subprocess
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from tests.waiting import wait_until

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
"""Chromium, or None."""

EVENT_S = 300
"""Limit of the wait for an event."""

KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "ArrowRight": (39, ""), "ArrowLeft": (37, "")}
"""Code and text of keys."""


class Browser:
    """A page of a running browser.

    Args:
        socket: connection to the page.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.number = socket, 0
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=EVENT_S))
            if message.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(message["params"]["exceptionDetails"]))
            elif message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] != "network":
                self.errors.append(message["params"]["entry"]["text"])
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    def open(self, url: str, width: int, is_dark: bool = False) -> None:
        """Open a page at a width."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 500
        )
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """Return the value of an expression."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until an expression is true."""
        wait_until(partial(self.run, script), EVENT_S)

    def choose_files(self, selector: str, *paths: Path) -> None:
        """Choose files in an input."""
        node = self.send("Runtime.evaluate", expression=f"document.querySelector({json.dumps(selector)})")["result"]
        self.send("DOM.setFileInputFiles", objectId=node["objectId"], files=list(map(str, paths)))

    def type(self, text: str) -> None:
        """Type into the focused field."""
        self.send("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """Press a key of KEYS."""
        code, text = KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start the browser for the length of a with block."""
    assert PROGRAM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0",
             f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        try:
            assert process.stderr
            address = next(found for line in process.stderr if (found := re.search(r"ws://([^/]+)/", line)))[1]
            threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop it
            with urllib.request.urlopen(f"http://{address}/json") as answer:
                [page] = [target for target in json.load(answer) if target["type"] == "page"]
            with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
                yield Browser(socket)
        finally:
            process.terminate()
            process.wait()
