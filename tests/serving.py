"""Servers for tests, as processes or within the tests' own, and requests to them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from pyllama.server import flags as server_flags
from pyllama.server.main import Program

ROOT = Path(__file__).parents[1]


class _Requests:
    """Requests to a server on a port of this machine."""

    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def send(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> http.client.HTTPResponse:
        """Sends a request (bytes as they are, anything else as JSON); the response, whose body is still to be read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        response.connection = connection  # lives as long as the response
        return response

    @contextlib.contextmanager
    def _response(self, *request: Any) -> Iterator[http.client.HTTPResponse]:
        """The response to a request, on a connection that is closed afterwards."""
        response = self.send(*request)
        try:
            yield response
        finally:
            response.close()
            response.connection.close()

    def json(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> Any:
        """Status and decoded body."""
        with self._response(method, path, body, headers) as response:
            assert response.headers["Content-Type"] == "application/json; charset=utf-8"
            return response.status, json.loads(response.read())

    def post(self, path: str, **fields: Any) -> Any:
        """The answer to a request that succeeds."""
        status, answer = self.json("POST", path, fields)
        assert status == 200, answer
        return answer

    def refused(self, path: str, body: object, code: int = 400) -> str:
        """The message of the error that answers a request."""
        status, answer = self.json("POST", path, body)
        assert (status, answer["error"]["code"]) == (code, code), answer
        assert answer["error"]["type"]
        return answer["error"]["message"]

    def stream(self, path: str, **fields: Any) -> Iterator[Any]:
        """The events of a stream as they come; ``[DONE]`` as it is."""
        with self._response("POST", path, {**fields, "stream": True}) as response:
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"] == "text/event-stream"
            yield from read_events(response)

    def is_idle(self) -> bool:
        """No slot is taken and no request waits."""
        health = self.json("GET", "/health")[1]
        return health["slots_processing"] == health["requests_waiting"] == 0


class ServerProcess(_Requests):
    """``server.py`` with some flags, on a port of its own; it ends with the ``with`` block.

    Args:
        flags: of the command line.
        wait: go on only when the model is loaded.
        script: what to start.
    """

    def __init__(self, *flags: str | Path, wait: bool = True, script: Path = ROOT / "server.py") -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
        command = [sys.executable, str(script), "--port", "0", *map(str, flags)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read_log, daemon=True).start()
        self.port = int(self.wait_for_log(r"listening on http://127\.0\.0\.1:(\d+)")[1])
        if wait:
            self.wait_for_log("is ready")

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends the server by a signal; its exit status."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=20)
        finally:
            self.process.kill()

    def wait_for_log(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """The next line of the log that matches."""
        end = time.monotonic() + seconds
        while True:
            line = self._lines.get(timeout=max(0.01, end - time.monotonic()))
            assert line is not None, f"the server ended: {''.join(self.log)}"
            if match := re.search(pattern, line):
                return match

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            self._lines.put(line)
        self._lines.put(None)


class ServerThread(_Requests):
    """A server within this process, whose books can be looked at; it ends with the ``with`` block.

    Args:
        flags: of the command line.
        environ: what stands in for flags.
        wait: go on only when the model is loaded.
    """

    def __init__(self, *flags: str | int | Path, environ: Mapping[str, str] | None = None, wait: bool = True) -> None:
        self.program = Program(server_flags.parse(["--port", "0", *map(str, flags)], environ or {}))
        ((_, self.port),) = self.program.server.addresses
        self._thread = threading.Thread(target=self.program.run, name="server")
        self._thread.start()
        if wait:
            wait_until(lambda: self.program.service.is_ready)

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *_: object) -> None:
        self.program.stop()
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def loading_server() -> Iterator[ServerThread]:
    """A server that is never done with loading its model."""
    enough = threading.Event()

    def load(path: Path, **_: object) -> None:
        enough.wait()
        raise ValueError("enough")

    with mock.patch("pyllama.models.load", load), ServerThread("-m", "slow.gguf", wait=False) as server:
        try:
            yield server
        finally:
            enough.set()


def read_events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The events of a response's body."""
    while line := response.readline():
        assert line.startswith(b"data: ")
        assert response.readline() == b"\n"
        text = line.removeprefix(b"data: ").decode().strip()
        yield text if text == "[DONE]" else json.loads(text)


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Waits for a condition that must come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
