"""The HTTP server under clients that behave, and under those that do not. The applications are small; no model is involved."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyllama.server.errors import ApiError
from pyllama.server.http import CLIENT, MAX_BODY, NOTES, Client, RequestRecord, Server
from pyllama.server.sse import send_events

Application = Callable[..., Iterable[bytes]]


def hello(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
    body = environ["wsgi.input"].read()
    environ[NOTES]["read"] = len(body)
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


class Running:
    """A server in a thread, and what it recorded."""

    def __init__(self, application: Application, *, on_stop: Callable[[], None] = lambda: None, **options: Any) -> None:
        self.records: list[RequestRecord] = []
        options = {"n_threads": 2, "timeout": 5, **options}
        self.server = Server(application, "127.0.0.1", 0, on_request=self.records.append, **options)
        ((self.host, self.port),) = self.server.addresses
        self.thread = threading.Thread(target=self.server.run, args=[on_stop])
        self.thread.start()

    def connect(self, timeout: float = 10) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=timeout)

    def get(self, path: str = "/", **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=10)
        connection.request("GET", path, headers=headers)
        return connection.getresponse()

    def record(self, n: int = 1) -> RequestRecord:
        """The n-th record, which may come a moment after the answer."""
        wait_for(lambda: len(self.records) >= n)
        return self.records[n - 1]

    def stop(self) -> float:
        """Stops; returns how long that took."""
        began = time.monotonic()
        self.server.stop()
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()
        return time.monotonic() - began


@contextlib.contextmanager
def running(application: Application, **options: Any) -> Iterator[Running]:
    server = Running(application, **options)
    try:
        yield server
    finally:
        server.stop()


def wait_for(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def reset(connection: socket.socket) -> None:
    """Closes a connection as a client does that has died."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def read_all(connection: socket.socket) -> bytes:
    chunks = []
    while chunk := connection.recv(65536):
        chunks.append(chunk)
    return b"".join(chunks)


def error_in(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Content-Type: application/json; charset=utf-8" in head
    assert b"Access-Control-Allow-Origin: *" in head
    return json.loads(body)["error"]


def test_a_request_is_recorded():
    with running(hello) as server:
        assert server.get("/some/path?query=1").read() == b"hello"
        record = server.record()
    assert (record.client, record.method, record.path, record.status) == ("127.0.0.1", "GET", "/some/path", 200)
    assert record.n_bytes == 5 and 0 <= record.seconds < 5 and record.notes == {"read": 0}


def test_chunks_arrive_when_they_are_made():
    proceed = threading.Event()

    def slow(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        yield b"data: 1\n\n"
        assert proceed.wait(10)
        yield b"data: 2\n\n"

    with running(slow) as server:
        response = server.get()
        assert response.getheader("Transfer-Encoding") == "chunked"
        assert response.read1() == b"data: 1\n\n"
        proceed.set()
        assert response.read() == b"data: 2\n\n"


class News:
    """An application whose body is what the test pushes, None for the end."""

    def __init__(self, first: bytes = b"first ") -> None:
        self.client: Client | None = None
        self.pieces = collections.deque([first])
        self.is_closed = threading.Event()
        self.threads: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if environ["PATH_INFO"] != "/news":
            return hello(environ, start_response)
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        self.client = environ[CLIENT]
        self.client.stream(self._body())
        return []

    def _body(self) -> Iterator[bytes]:
        try:
            while True:
                self.threads.append(threading.current_thread().name)
                piece = self.pieces.popleft() if self.pieces else b"" if not self.client.is_gone() else None
                if piece is None:
                    return
                yield piece
        finally:
            self.is_closed.set()

    def push(self, *pieces: bytes | None) -> None:
        wait_for(lambda: self.client is not None)
        self.pieces.extend(pieces)
        self.client.write_news()


def test_news_are_written_in_the_thread_that_brings_them():
    news = News()
    with running(news, n_threads=1) as server:
        response = server.get("/news")
        assert response.getheader("Transfer-Encoding") == "chunked"
        assert response.read1() == b"first "
        n_here = 0
        for i in range(10):
            time.sleep(0.01)  # the handler may still be at the piece before
            del news.threads[:]
            news.push(b"piece %d " % i)
            assert response.read1() == b"piece %d " % i
            n_here += threading.current_thread().name in news.threads
        assert n_here > 5
        assert server.get().read() == b"hello"  # though there is but one thread for handlers
        news.push(b"last", None)
        assert response.read() == b"last"
        record = server.record(2)
    assert news.is_closed.is_set()
    assert (record.path, record.status, record.n_bytes) == ("/news", 200, len(b"first " + 10 * b"piece 0 " + b"last"))


def test_news_that_come_together_are_sent_together():
    news = News()
    with running(news) as server, server.connect() as connection:
        connection.sendall(b"GET /news HTTP/1.1\r\nHost: here\r\n\r\n")
        answer = b""
        while not answer.endswith(b"\r\nfirst \r\n"):
            answer += connection.recv(65536)
        news.push(b"one ", b"two ", b"three ")
        assert connection.recv(65536) == b"4\r\none \r\n4\r\ntwo \r\n6\r\nthree \r\n"
        news.push(None)


def test_news_for_clients_that_know_no_chunks():
    news = News()
    with running(news) as server, server.connect() as connection:
        connection.sendall(b"GET /news HTTP/1.0\r\n\r\n")
        news.push(b"last", None)
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert b"Transfer-Encoding" not in head
    assert body == b"first last"


def test_news_from_several_threads_come_in_order():
    news = News(b"\n")
    with running(news) as server:
        response = server.get("/news")
        news.push()
        numbers = iter(range(1000))

        def push() -> None:
            for _ in range(100):
                with lock:
                    news.pieces.append(b"%d\n" % next(numbers))
                news.client.write_news()

        lock = threading.Lock()
        threads = [threading.Thread(target=push) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        news.push(None)
        assert response.read().split() == [b"%d" % i for i in range(400)]


def test_a_silent_body_whose_client_leaves_is_closed():
    news = News()
    with running(news) as server:
        with server.connect() as connection:
            connection.sendall(b"GET /news HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(10)
        assert news.is_closed.wait(5)
        assert server.record().path == "/news"


def test_a_slow_reader_of_news_holds_nobody_up(monkeypatch):
    monkeypatch.setattr("pyllama.server.http.MAX_UNREAD", 1 << 16)
    news = News()
    with running(news) as server, server.connect() as connection:
        connection.sendall(b"GET /news HTTP/1.1\r\nHost: x\r\n\r\n")
        piece = bytes(1 << 18)
        began = time.monotonic()
        news.push(*[piece] * 100, None)  # more than any socket takes
        assert time.monotonic() - began < 5
        assert len(news.pieces) > 10
        assert server.get().read() == b"hello"
        answer = read_all(connection)
        assert answer.endswith(b"\r\n0\r\n\r\n") and len(answer) > 100 * len(piece)
        assert news.is_closed.wait(5)


def test_a_reader_of_news_that_never_reads_is_given_up(monkeypatch):
    monkeypatch.setattr("pyllama.server.http.MAX_UNREAD", 1 << 16)
    news = News()
    with running(news, timeout=1) as server, server.connect() as connection:
        connection.sendall(b"GET /news HTTP/1.1\r\nHost: x\r\n\r\n")
        news.push(*[bytes(1 << 18)] * 100)
        assert news.is_closed.wait(10)


def test_news_that_fail_end_the_answer(caplog):
    def broken(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        environ[CLIENT].stream(pieces())
        return []

    def pieces() -> Iterator[bytes]:
        yield b"so far"
        raise RuntimeError("no more")

    with running(broken) as server, server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = read_all(connection)
        assert b"so far" in answer and not answer.endswith(b"\r\n0\r\n\r\n")
        assert server.record().n_bytes == len(b"so far")
    assert "no more" in caplog.text


def test_an_error_in_place_of_a_stream_is_an_ordinary_one():
    def refused(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream"), ("Access-Control-Allow-Origin", "*")])
        environ[CLIENT].stream(pieces())
        return []

    def pieces() -> Iterator[bytes]:
        raise ApiError(503, "not now")
        yield b"never"

    with running(refused) as server:
        response = server.get()
        assert server.record().status == response.status == 503
        assert response.getheader("Content-Type") == "application/json; charset=utf-8"
        error = json.loads(response.read())["error"]
        assert error == {"code": 503, "message": "not now", "type": "unavailable_error"}
        assert response.getheader("Connection") == "close"


def test_a_failure_in_place_of_a_stream_is_told(caplog):
    def broken(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream"), ("Access-Control-Allow-Origin", "*")])
        environ[CLIENT].stream(pieces())
        return []

    def pieces() -> Iterator[bytes]:
        raise RuntimeError("a fault of ours")
        yield b"never"

    with running(broken) as server, server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert error_in(answer) == {"code": 500, "message": "Internal Server Error", "type": "server_error"}
        assert server.record().status == 500
    assert "a fault of ours" in caplog.text


def test_events_that_nobody_asked_for_are_closed():
    """The client left before the first."""

    def pieces() -> Iterator[object]:
        try:
            yield None
            yield "never"
        finally:
            closed.set()

    closed, values, bodies = threading.Event(), pieces(), []
    assert send_events(values, SimpleNamespace(stream=bodies.append)) == b""
    bodies[0].close()
    assert closed.is_set()


def test_a_stop_ends_what_waits_for_news(monkeypatch):
    monkeypatch.setattr("pyllama.server.http.STOP_SECONDS", 0.3)
    news = News()
    server = Running(news)
    response = server.get("/news")
    assert response.read1() == b"first "
    news.push()
    assert server.stop() < 5
    assert news.is_closed.is_set()


def test_a_client_that_leaves_is_noticed():
    noticed = threading.Event()

    def wait(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        start_response("200 OK", [])
        wait_for(environ["waitress.client_disconnected"])
        noticed.set()
        return [b"too late"]

    with running(wait) as server:
        connection = server.connect()
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert not noticed.wait(0.3)
        connection.close()
        assert noticed.wait(5)


def test_a_stream_whose_client_leaves_is_closed():
    closed = threading.Event()

    def endless(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            while True:
                yield b"data"
                time.sleep(0.01)
        finally:
            closed.set()

    with running(endless) as server:
        connection = server.connect()
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(10)
        connection.close()
        assert closed.wait(5)
        assert server.get().read(4) == b"data"


def test_a_client_that_does_not_read_is_given_up():
    closed = threading.Event()

    def flood(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        try:
            while True:
                yield bytes(1 << 16)
        finally:
            closed.set()

    with running(flood, timeout=1) as server:
        connection = server.connect()
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert closed.wait(10)
        connection.close()


def test_a_client_that_sends_half_a_request_is_given_up():
    with running(hello, timeout=1) as server:
        halves = [b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{", b""]
        connections = [server.connect() for _ in halves]
        for connection, half in zip(connections, halves, strict=True):
            connection.sendall(half)
        assert server.get().read() == b"hello"
        for connection in connections:
            assert connection.recv(1) == b""
            connection.close()


def test_requests_that_leave_in_the_middle_do_no_harm():
    with running(hello) as server:
        for half in (b"", b"GET", b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nab"):
            with server.connect() as connection:
                connection.sendall(half)
        assert server.get().read() == b"hello"


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"], ids=["plain", "expect"])
def test_a_large_body_is_refused_before_it_is_read(expect):
    with running(hello) as server, server.connect() as connection:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n" + expect
        connection.sendall(head + b"\r\n")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        error = error_in(answer)
        assert error["code"] == 413 and str(MAX_BODY) in error["message"]
        assert error["type"] == "request_too_large_error"
        assert server.record().status == 413


def test_a_client_that_goes_on_sending_a_large_body_sees_the_answer():
    with running(hello) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
        connection.request("POST", "/", body=bytes(100_000_000))
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == 413


def test_a_refused_client_may_be_gone_when_its_connection_is_closed(caplog):
    refused = threading.Event()
    server = Server(hello, "127.0.0.1", 0, n_threads=1, timeout=5, on_request=lambda record: refused.set())
    server._listeners[0].adj.send_bytes = 1 << 20  # what is written waits for the loop, as when the socket takes no more
    try:
        with socket.create_connection(server.addresses[0]) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
            while not refused.wait(0.01):
                server._poll(0)
            (channel,) = server._listeners[0].active_channels.values()
            wait_for(lambda: channel.close_when_flushed)
            reset(connection)
        wait_for(lambda: server._poll(0) or not server._listeners[0].active_channels)
        channel.handle_write()  # as when reading has closed it and writing comes next
    finally:
        server.stop()
        server.run()
    assert not caplog.records


def test_a_large_body_in_chunks_is_refused():
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY // (1 << 20) + 2):
            yield bytes(1 << 20)

    with running(hello) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=20)
        connection.request("POST", "/", body=chunks(), encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        assert connection.getresponse().status == 413
        assert server.record().notes == {}


@pytest.mark.parametrize(
    "request_, code",
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: -5\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", 431),
        (b"\xff\xfe\x00" * 50_000, 431),
    ],
    ids=["no head", "negative length", "no colon", "coding", "chunk size", "long header", "bytes"],
)
def test_what_is_not_http_gets_an_error_object(request_, code):
    with running(hello) as server:
        with server.connect() as connection:
            connection.sendall(request_)
            answer = read_all(connection)
            assert answer.startswith(b"HTTP/1.") and answer.split(b" ", 2)[1] == str(code).encode()
            assert error_in(answer)["code"] == code
        assert server.get().read() == b"hello"


def test_an_exception_of_the_application_shows_nothing_of_itself(caplog):
    def broken(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        raise RuntimeError("secret")

    with running(broken) as server, server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 500 ") and b"secret" not in answer and b"Traceback" not in answer
        assert error_in(answer)["type"] == "server_error"
    assert "secret" in caplog.text  # but the log knows


def test_more_connections_than_threads():
    entered, proceed = threading.Semaphore(0), threading.Event()

    def busy(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        if environ["PATH_INFO"] == "/slow":
            entered.release()
            assert proceed.wait(10)
        return hello(environ, start_response)

    with running(busy, n_threads=3) as server:
        slow = []
        for _ in range(2):
            slow.append(http.client.HTTPConnection(server.host, server.port, timeout=10))
            slow[-1].request("GET", "/slow")
            assert entered.acquire(timeout=10)
        assert server.get("/quick").read() == b"hello"
        proceed.set()
        assert all(connection.getresponse().read() == b"hello" for connection in slow)


def test_a_flood_of_connections_keeps_nobody_out(monkeypatch):
    monkeypatch.setattr("pyllama.server.http.MAX_CONNECTIONS", 20)
    with running(hello, timeout=600) as server, contextlib.ExitStack() as stack:
        for i in range(36):
            connection = stack.enter_context(server.connect())
            connection.sendall(b"GET / HTTP/1.1\r\n" if i % 2 else b"")
        assert server.get().read() == b"hello"


def test_one_connection_for_many_requests():
    with running(hello) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
        for _ in range(3):
            connection.request("GET", "/")
            assert connection.getresponse().read() == b"hello"


def test_a_stop_lets_answers_be_finished_and_lets_nobody_in():
    stopping, begun = threading.Event(), threading.Event()

    def until_stop(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [])
        yield b"begun "
        begun.set()
        assert stopping.wait(10)
        yield b"ended"

    server = Running(until_stop, on_stop=stopping.set)
    response = server.get()
    assert begun.wait(5)
    assert server.stop() < 5
    assert response.read() == b"begun ended"
    with pytest.raises(ConnectionRefusedError):
        server.connect()


def test_a_stop_does_not_wait_for_ever(caplog, monkeypatch):
    monkeypatch.setattr("pyllama.server.http.STOP_SECONDS", 0.5)
    begun, proceed = threading.Event(), threading.Event()

    def stuck(environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        begun.set()
        proceed.wait(20)
        return hello(environ, start_response)

    caplog.set_level(logging.ERROR, "waitress")
    server = Running(stuck)
    with server.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert begun.wait(5)
        assert server.stop() < 5
    proceed.set()


def test_stops_at_once_when_idle():
    server = Running(hello)
    with server.connect():
        assert server.stop() < 3


def test_an_address_that_is_taken_or_nobodys():
    with running(hello) as server, pytest.raises(OSError, match="in use"):
        Server(hello, server.host, server.port, n_threads=1, timeout=5, on_request=print)
    with pytest.raises(OSError, match="not an address"):
        Server(hello, "no.such.host.invalid", 0, n_threads=1, timeout=5, on_request=print)
