"""Headless Chromium for tests, driven through a pipe by the DevTools protocol: nothing but the browser is needed."""

from __future__ import annotations

import itertools
import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import time
from typing import Any

__all__ = ["Browser", "Page", "find_chromium"]


def find_chromium() -> str | None:
    """The browser's program, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A browser with an empty profile; it ends with the ``with`` block."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="pyllama-browser-", ignore_cleanup_errors=True)
        commands, self._to_browser = os.pipe()
        self._from_browser, answers = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        command = [str(find_chromium()), *flags, f"--user-data-dir={self._profile.name}", "about:blank"]
        # The browser reads commands from file 3 and answers on file 4.
        shell = ["sh", "-c", f'exec "$@" 3</dev/fd/{commands} 4>/dev/fd/{answers}', "sh", *command]
        self._process = subprocess.Popen(shell, pass_fds=(commands, answers), stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(answers)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[dict[str, Any]]] = {}
        self.events: list[dict[str, Any]] = []
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._to_browser)
        self._profile.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol (https://chromedevtools.github.io/devtools-protocol)."""
        number = next(self._numbers)
        answers = self._waiting[number] = queue.SimpleQueue()
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        os.write(self._to_browser, json.dumps(message).encode() + b"\0")
        answer = answers.get(timeout=60)
        assert "error" not in answer, answer
        return answer["result"]

    def _read(self) -> None:
        with open(self._from_browser, "rb") as pipe:
            buffer = b""
            while data := pipe.read1(1 << 16):
                *messages, buffer = (buffer + data).split(b"\0")
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._waiting.pop(message["id"]).put(message)
                    else:
                        self.events.append(message)

    def open(self, url: str, *, width: int = 1000, height: int = 800, dark: bool = False) -> Page:
        """Opens a page in a window of its own; its scripts may still be on their way."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        page.call("Page.enable")
        page.call("Runtime.enable")
        page.call("Log.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[theme])
        page.call("Page.navigate", url=url)
        page.wait_for("location.href !== 'about:blank' && document.body !== null")
        return page


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """Waits until an expression is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} did not become true"
            time.sleep(0.03)
        return value

    def press(self, key: str, *, ctrl: bool = False) -> None:
        """Presses a key where the focus is."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=2 if ctrl else 0)

    @property
    def complaints(self) -> list[str]:
        """Errors in the page's console, and exceptions that nobody caught."""
        found = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            parameters = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(parameters["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and parameters["entry"]["level"] == "error":
                entry = parameters["entry"]
                if not entry.get("url", "").endswith("/favicon.ico"):  # asked for by the browser, not by the page
                    found.append(entry["text"])
        return found
