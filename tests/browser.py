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

    def open(
        self,
        url: str,
        *,
        width: int = 1000,
        height: int = 800,
        dark: bool = False,
        before: str = "",
        beside: Page | None = None,
    ) -> Page:
        """Opens a page in a window of its own; its scripts may still be on their way.

        Args:
            url: its address.
            width, height: of the window; a narrow one is a phone's.
            dark: the theme that the system prefers.
            before: a script that runs before those of the page, each time that it is loaded.
            beside: a page with which it shares what the browser keeps (storage, databases); otherwise it has all for itself.
        """
        context = self.call("Target.createBrowserContext")["browserContextId"] if beside is None else beside.context
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target, context)
        page.call("Page.enable")
        page.call("Runtime.enable")
        page.call("Log.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        media = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in media.items()]
        page.call("Emulation.setEmulatedMedia", features=features)
        page.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        page.call("Page.navigate", url=url)
        page.wait_for("location.href !== 'about:blank' && document.body !== null")
        return page


_KEYS = {
    "Backspace": ("Backspace", 8),
    "Tab": ("Tab", 9),
    "Enter": ("Enter", 13),
    "Escape": ("Escape", 27),
    "End": ("End", 35),
    "Home": ("Home", 36),
    "ArrowLeft": ("ArrowLeft", 37),
    "ArrowRight": ("ArrowRight", 39),
    "Delete": ("Delete", 46),
    "F2": ("F2", 113),
}
"""Codes and numbers of keys that write nothing."""


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str, target: str, context: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.context = context

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str, seconds: float = 60) -> Any:
        """Waits until an expression is true (as Python sees it: an element is not); returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{script} did not become true"
            time.sleep(0.03)
        return value

    def press(self, key: str, *, ctrl: bool = False, alt: bool = False, shift: bool = False) -> None:
        """Presses a key where the focus is."""
        code, number = _KEYS.get(key, (f"Key{key.upper()}" if key.isalpha() and len(key) == 1 else "", ord(key[0].upper())))
        modifiers = (1 if alt else 0) | (2 if ctrl else 0) | (8 if shift else 0)
        text = {} if ctrl or alt or key in _KEYS and key != "Enter" else {"text": "\r" if key == "Enter" else key}
        parameters = {"key": key, "code": code, "windowsVirtualKeyCode": number, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **parameters, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **parameters)

    def write(self, selector: str, text: str) -> None:
        """Puts a text into a field as if typed, in place of what is there."""
        self.run(f"(() => {{ const field = {self._find(selector)}; field.focus(); field.select() }})()")
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.press("Delete")
        self.run(f"{self._find(selector)}.dispatchEvent(new Event('change', {{ bubbles: true }}))")

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element, which must be in sight and not covered."""
        self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, selector, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        """Moves the pointer to an element, once that is there."""
        self.wait_for(f"{self._find(selector)}?.getClientRects().length")
        self.run(f"{self._find(selector)}.scrollIntoView({{ block: 'nearest', behavior: 'instant' }})")
        self._mouse("mouseMoved", selector)

    def _mouse(self, kind: str, selector: str, **more: Any) -> None:
        box = self.run(f"JSON.stringify({self._find(selector)}.getBoundingClientRect())")
        x, y, width, height = (json.loads(box)[name] for name in ("x", "y", "width", "height"))
        self.call("Input.dispatchMouseEvent", type=kind, x=x + width / 2, y=y + height / 2, **more)

    @staticmethod
    def _find(selector: str) -> str:
        return f"document.querySelector({json.dumps(selector)})"

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
