"""Clients that mean harm, or know no better: whatever they send, read or leave, the server answers others, and in the end no
slot, block, thread, connection or file is still taken.

The server runs within this process, so that its books can be compared; signals are sent to one that is a process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ServerProcess, ServerThread, wait_until
from tests.tiny_models import make_llama

ENDLESS = {"prompt": "hello", "n_predict": -1, "ignore_eos": True}
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(path, specials=["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
    return path


@pytest.fixture(scope="module")
def shared(tiny_path) -> Iterator[ServerThread]:
    """Small batches, so that prompts take their time."""
    with ServerThread("-m", tiny_path, "-np", 2, "-cb", "-c", 8192, "-b", 16, "--queue", 6, "--embedding") as server:
        yield server


@pytest.fixture
def server(shared) -> Iterator[ServerThread]:
    """A server of which a test must leave nothing taken, nothing wrong in the log, and the same answers as before."""
    log = _Log()
    loggers = [logging.getLogger(name) for name in ("pyllama", "waitress")]
    for logger in loggers:
        logger.addHandler(log)
    expected, before = answer_of(shared), settled_books(shared)
    yield shared
    assert answer_of(shared) == expected
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not taken(shared, before), 5)
    assert taken(shared, before) == {}
    shared.program.service.engine._cache.check()
    for logger in loggers:
        logger.removeHandler(log)
    assert not log.exceptions


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.exceptions: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.exceptions.append(logging.Formatter().format(record))


def answer_of(server: ServerThread) -> str:
    """A greedy answer, which has to come soon, whatever else is going on."""
    began = time.monotonic()
    fields = {"prompt": "hello world", "n_predict": 8, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    answer = server.post("/completion", **fields)
    assert time.monotonic() - began < 10
    return answer["content"]


def books(server: ServerThread) -> dict[str, Any]:
    """Everything that a request takes and has to give back."""
    service, listeners = server.program.service, server.program.server._listeners
    engine = service.engine
    cache = engine._cache
    return {
        "running": engine.n_running,
        "waiting": engine.n_waiting,
        "sequences": len(engine._sequences),
        "open": service._n_open,
        "streams": len(service._streams),
        "blocks": cache.n_owned_by_sequences,
        "available blocks": cache.n_available,
        "connections": sum(len(listener.active_channels) for listener in listeners),
        "threads": sorted(thread.name for thread in threading.enumerate() if "serve" not in thread.name),
        "files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
    }


def settled_books(server: ServerThread) -> dict[str, Any]:
    """The books once all clients are known to have gone and nothing changes any more."""
    last: dict[str, Any] = {}

    def is_settled() -> bool:
        nonlocal last
        before, last = last, books(server)
        return last == before and last["connections"] == 0 and is_idle(server)

    with contextlib.suppress(AssertionError):  # a test that failed may have left a connection open
        wait_until(is_settled, 1)
    return last


def taken(server: ServerThread, before: dict[str, Any]) -> dict[str, Any]:
    """What differs from the books before, beyond connections and files that have been closed meanwhile."""
    now = books(server)
    return {
        name: (before[name], now[name])
        for name in now
        if now[name] != before[name] and not (name in ("connections", "files") and now[name] < before[name])
    }


def is_idle(server: ServerThread) -> bool:
    engine = server.program.service.engine
    return engine.n_running == engine.n_waiting == server.program.service._n_open == 0


# ---- connections -------------------------------------------------------------------------------------------------------


def connect(server: ServerThread | ServerProcess, *, buffer: int | None = None) -> socket.socket:
    """A connection; ``buffer``: bytes that may arrive without being read."""
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    return connection


def reset(connection: socket.socket) -> None:
    """Leaves without a farewell."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


LEAVE = [pytest.param(socket.socket.close, id="close"), pytest.param(reset, id="reset")]


def request(fields: object, path: str = "/completion", headers: str = "") -> bytes:
    body = json.dumps(fields).encode()
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_all(connection: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            data += piece
    return data


def status_of(data: bytes) -> int:
    """The status of a response, whose body is an error object if it is an error."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    if status >= 400:
        assert json.loads(body)["error"]["code"] == status
    return status


# ---- fields ------------------------------------------------------------------------------------------------------------

SAMPLING = {
    "temperature", "top_k", "top_p", "min_p", "tfs_z", "typical_p", "repeat_penalty", "repeat_last_n", "penalize_nl",
    "presence_penalty", "frequency_penalty", "penalty_prompt", "mirostat", "mirostat_tau", "mirostat_eta", "grammar",
    "seed", "ignore_eos", "logit_bias", "n_probs", "n_predict", "n_keep", "stream", "stop", "slot_id", "cache_prompt",
    "image_data", "json_schema", "response_format", "system_prompt",
}  # fmt: skip
OPENAI = {"max_tokens", "n", "stream_options", "logprobs"}
FIELDS = {
    "/completion": SAMPLING | {"prompt"},
    "/infill": SAMPLING - {"stream"} | {"input_prefix", "input_suffix"},
    "/tokenize": {"content", "add_special", "with_pieces"},
    "/detokenize": {"tokens"},
    "/embedding": {"content"},
    "/v1/chat/completions": SAMPLING
    | OPENAI
    | {"messages", "top_logprobs", "max_completion_tokens", "tools", "functions"},
    "/v1/completions": SAMPLING | OPENAI | {"prompt", "echo", "suffix", "best_of"},
    "/v1/embeddings": {"input", "encoding_format", "dimensions"},
}
LIMITS = {"n_predict", "max_tokens", "max_completion_tokens", "n"}
GOOD = {
    "prompt": "hi",
    "input_prefix": "hi",
    "content": "hi",
    "tokens": [5],
    "messages": MESSAGES,
    "input": "hi",
    "n_predict": 1,
    "max_tokens": 1,
}


def deep(n: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(n):
        value = [value]
    return value


VALUES: list[Any] = [
    True, False, 0, -1, -(2**31), 2**31, 2**63, 2**64, 10**400, 2.5, -0.0, 1e-320, 1e38, -1e308, "", "x", "\0", "\ud800",
    "7" * 60, "../" * 9, [], [[]], [None], ["x"], [-1], [10**9], [1.5], [[1]], [[1, 2, 3]], [["x", None]], [{}], {},
    {"x": {}}, {"prompt": 5}, {"role": "user"}, {"type": "x"}, {"7": {}}, deep(60),
]  # fmt: skip


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_with_values_of_every_kind(server, path):
    """The answer is a result, or an error that is the client's and names the field."""
    statuses = set()
    for field in sorted(FIELDS[path]):
        for value in VALUES:
            if field in LIMITS and isinstance(value, (int, float)) and (value > 50 or value == -1):
                continue  # valid, and long: the tests of disconnections have those
            status, body = exchange(server, path, {**GOOD, field: value})
            statuses.add(status)
            assert status in (200, 400, 501), (field, value, body)
            if status != 200:
                assert field in json.loads(body)["error"]["message"], (field, value, body)
    assert {200, 400} <= statuses


def exchange(server: ServerThread, path: str, fields: object) -> tuple[int, str]:
    """Status and body of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps(fields))
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_random_objects(server):
    """Several fields at once, at any endpoint."""
    rng = random.Random(7)
    names = sorted(set().union(*FIELDS.values()) - LIMITS)
    for _ in range(300):
        path = rng.choice(list(FIELDS))
        fields = {**GOOD, **{name: rng.choice(VALUES) for name in rng.sample(names, rng.randrange(1, 6))}}
        status, body = exchange(server, path, fields)
        assert status in (200, 400, 501), (path, fields, body)
    server.post("/completion", prompt="hi", n_predict=0, system_prompt="")  # one of them may have set another


# ---- bodies ------------------------------------------------------------------------------------------------------------

MILLION = 1 << 20
BODIES = {
    "nothing": b"",
    "null": b"null",
    "number": b"1",
    "no json": b"{'prompt': 1}",
    "cut": b'{"prompt": "x',
    "more than one": b'{"prompt": "x"}{"prompt": "y"}',
    "bad utf-8": b'{"prompt": "\xc3\x28 \xf5\x80\x80\x80 \xed\xa0\x80"}',
    "zeros": bytes(MILLION),
    "nan": b'{"prompt": "x", "top_p": NaN}',
    "infinity": b'{"prompt": "x", "top_p": [[-Infinity]]}',
    "large exponent": b'{"prompt": "x", "top_p": 1e99999}',
    "many digits": b'{"prompt": "x", "seed": ' + b"7" * MILLION + b"}",
    "deep arrays": b'{"prompt": ' + b"[" * (8 * MILLION),
    "deep objects": b'{"prompt": ' + b'{"a":' * MILLION,
    "deep and closed": b'{"prompt": ' + b"[" * MILLION + b"]" * MILLION + b"}",
    "many names": b"{" + b",".join(b'"%d":0' % i for i in range(MILLION)) + b"}",
    "the same name": b"{" + b'"prompt":"x",' * MILLION + b'"prompt":1.5}',
    "long name": b'{"' + b"n" * (8 * MILLION) + b'": 1}',
    "many tokens": b'{"prompt": [' + b"5," * (4 * MILLION) + b'"x", 1e9]}',
    "many strings": json.dumps({"prompt": "x", "stop": ["x"] * MILLION}).encode(),
    "many biases": json.dumps({"prompt": "x", "n_predict": 1, "logit_bias": [[5, 1]] * 300_000 + [1]}).encode(),
    "many messages": json.dumps({"messages": [{"role": "user", "content": ""}] * 100_000 + [5]}).encode(),
    "endless grammar": json.dumps({"prompt": "x", "grammar": 'root ::= root "x"'}).encode(),
    "long grammar": json.dumps({"prompt": "x", "grammar": "root ::= " + "(" * MILLION}).encode(),
    "grammar of many choices": json.dumps({"prompt": "x", "grammar": 'root ::= ' + '"x" | ' * 200_000 + "y"}).encode(),
}  # fmt: skip


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies(server, body):
    """Each is refused, soon, with a message that is not longer than it needs to be; others are answered meanwhile."""
    began = time.monotonic()
    for path in ("/completion", "/v1/chat/completions"):
        if path == "/completion" and b"messages" in body[:20]:
            continue
        message = server.refused(path, body)
        assert len(message) < 300
    assert time.monotonic() - began < 10


def test_long_texts(server):
    """As long as a body may be."""
    for text in ("x" * (15 * MILLION), "hello " * (2 * MILLION), "\U0001f999" * MILLION, "<|im_start|>" * MILLION):
        began = time.monotonic()
        assert server.post("/tokenize", content=text)["tokens"]
        assert time.monotonic() - began < 20
    text = "the day " * 250_000
    assert server.post("/completion", prompt=text, n_predict=1, ignore_eos=True)["truncated"]
    assert server.post("/completion", prompt="x", n_predict=1, penalty_prompt=text)
    assert server.post("/completion", prompt="hi", n_predict=3, stop=["x" * 50_000] * 256, ignore_eos=True)


def test_a_hundred_megabytes(server):
    """With a length, in chunks, and both when they are only announced; a client that goes on sending sees the answer."""
    size = 100_000_000
    head = b"POST /completion HTTP/1.1\r\nHost: x\r\n"

    def chunks() -> Iterator[bytes]:
        for _ in range(size // 500_000):
            yield bytes(500_000)

    for options in ({"body": bytes(size)}, {"body": chunks(), "encode_chunked": True}):
        headers = {"Transfer-Encoding": "chunked"} if "encode_chunked" in options else {}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", "/completion", headers=headers, **options)
            response = connection.getresponse()
            assert response.status == 413 and json.loads(response.read())["error"]["code"] == 413
    for announced in (f"Content-Length: {size}\r\n\r\n{{".encode(), b"Content-Length: " + b"9" * 30 + b"\r\n\r\n"):
        with connect(server) as connection:
            connection.sendall(head + announced)
            assert status_of(read_all(connection)) in (400, 413)
    with connect(server) as connection:  # one chunk, of which most never comes
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n5f5e100\r\n" + bytes(MILLION))
    with connect(server) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n" + bytes(MILLION))


# ---- what is no HTTP, or strange HTTP ----------------------------------------------------------------------------------

NO_HTTP = {
    "nonsense": b"nonsense\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "http/9": b"GET / HTTP/9.9\r\n\r\n",
    "zeros": bytes(70_000),
    "bytes": bytes(range(256)) * 300,
    "long line": b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}xxxx",
    "length and chunks": b"POST /tokenize HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "many digits": b"POST /tokenize HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "a length that is none": b"POST /tokenize HTTP/1.1\r\nContent-Length: +5\r\n\r\n{}xxx",
    "coding": b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    "chunk size": b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n\r\n",
    "long chunk size": b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * (14 * MILLION),
    "long chunk extension": b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;" + b"a=b;" * 20_000 + b"!\r\n",
    "long trailer": b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * MILLION,
    "chunk end": b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}xx\r\n0\r\n\r\n",
    "name of a header": b"GET / HTTP/1.1\r\nX Y: z\r\n\r\n",
    "folded header": b"GET / HTTP/1.1\r\nX: y\r\n z\r\n\r\n",
    "header with zero": b"GET / HTTP/1.1\r\nX: \0\r\n\r\n",
    "bad method": b"GE\xffT / HTTP/1.1\r\n\r\n",
    "lower case": b"get /health HTTP/1.1\r\n\r\n",
    "unknown method": b"BREW /coffee HTTP/1.1\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\n\r\n",
    "whole address": b"GET http://elsewhere.invalid/x HTTP/1.1\r\n\r\n",
    "address that is none": b"GET http://[::1/health HTTP/1.1\r\n\r\n",
    "connect": b"CONNECT elsewhere.invalid:443 HTTP/1.1\r\n\r\n",
    "bad path": b"GET /%ff%fe%00 HTTP/1.1\r\n\r\n",
    "path of bytes": b"GET /\xff\xfe HTTP/1.1\r\n\r\n",
    "traversal": b"GET /../../../../etc/passwd HTTP/1.1\r\n\r\n",
    "bad query": b"GET /health?%ff=%&&&=== HTTP/1.1\r\n\r\n",
    "bad origin": b"GET /health HTTP/1.1\r\nOrigin: \xff\xfe\r\n\r\n",
    "bad host": b"GET /health HTTP/1.1\r\nHost: \xff:99999999\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "expect": b"POST /tokenize HTTP/1.1\r\nExpect: a miracle\r\nContent-Length: 2\r\n\r\n{}",
    "range": b"GET /completion.js HTTP/1.1\r\nRange: bytes=-5-,9-1,x\r\n\r\n",
    "many ranges": b"GET /completion.js HTTP/1.1\r\nRange: bytes=" + b"0-1," * 9000 + b"\r\n\r\n",
    "date": b"GET /completion.js HTTP/1.1\r\nIf-Modified-Since: \xff 99 Foo 99999\r\n\r\n",
    "form": b"POST /completion HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=\r\nContent-Length: 2\r\n\r\n--",
}  # fmt: skip


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP)
def test_strange_requests(server, data):
    """Each is answered, with an error object if it is refused."""
    with connect(server) as connection:
        connection.sendall(data)
        with http.client.HTTPResponse(connection) as response:
            response.begin()
            body = response.read()
            assert response.status in (200, 206, 304) or json.loads(body)["error"]["code"] == response.status
    assert response.status < 500 or b"gzip" in data
    assert b"root:" not in body and b"Traceback" not in body


@pytest.mark.parametrize("data", NO_HTTP.values(), ids=NO_HTTP)
def test_strange_requests_whose_clients_leave(server, data):
    for leave in (socket.socket.close, reset):
        for _ in range(3):
            connection = connect(server)
            connection.sendall(data)
            leave(connection)


# ---- leaving -----------------------------------------------------------------------------------------------------------

LONG = {"prompt": "the day " * 4000, "n_predict": 1, "cache_prompt": False}


@contextlib.contextmanager
def all_slots_taken(server: ServerThread) -> Iterator[list[Iterator[Any]]]:
    """Endless streams in all slots."""
    streams = [server.stream("/completion", **ENDLESS) for _ in range(2)]
    for stream in streams:
        next(stream)
    yield streams
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("data", [b"", b"POST /comp", request(ENDLESS)[:40], request(ENDLESS)[:-3],
                                  request(ENDLESS, headers="Expect: 100-continue\r\n").partition(b"{")[0]],
                         ids=["nothing", "line", "head", "body", "continue"])  # fmt: skip
def test_leaving_in_the_middle_of_a_request(server, leave, data):
    connections = [connect(server) for _ in range(20)]
    for connection in connections:
        connection.sendall(data)
    assert answer_of(server)
    for connection in connections:
        leave(connection)


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_leaving_the_queue(server, leave, stream):
    with all_slots_taken(server) as others:
        connections = [connect(server) for _ in range(5)]
        for connection in connections:
            connection.sendall(request({**ENDLESS, "stream": stream}))
        wait_until(lambda: server.program.service.engine.n_waiting == 5)
        for connection in connections:
            leave(connection)
        wait_until(lambda: server.program.service.engine.n_waiting == 0, 3)
        assert not next(others[0])["stop"] and not next(others[1])["stop"]


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("path", ["/completion", "/embedding", "/v1/chat/completions", "/v1/completions"])
def test_leaving_during_the_prompt(server, leave, path):
    text = f"{path} {leave.__name__} {LONG['prompt']}"  # not known from another test: embeddings always share what is known
    fields = {**LONG, "content": text, "messages": [{"role": "user", "content": text}], "n": 3}
    connection = connect(server)
    connection.sendall(request(fields, path))
    wait_until(lambda: server.program.service.engine.n_running > 0)
    leave(connection)
    began = time.monotonic()
    wait_until(lambda: is_idle(server), 5)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("path", ["/completion", "/v1/chat/completions", "/v1/completions"])
def test_leaving_a_stream(server, leave, path):
    fields = {**ENDLESS, "messages": MESSAGES, "stream": True, "n": 3, "max_tokens": 100_000}
    connection = connect(server)
    connection.sendall(request(fields, path))
    connection.recv(200)
    assert not is_idle(server)
    leave(connection)
    wait_until(lambda: is_idle(server), 3)


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("n_predict", [1, -1])
def test_leaving_before_reading(server, leave, n_predict):
    for stream in (False, True):
        connections = [connect(server) for _ in range(6)]
        for connection in connections:
            connection.sendall(request({**ENDLESS, "n_predict": n_predict, "stream": stream}))
        for connection in connections:
            leave(connection)
        wait_until(lambda: is_idle(server), 5)


@pytest.mark.parametrize("leave", LEAVE)
@pytest.mark.parametrize("n", [2, 3, 500])
def test_leaving_requests_that_were_sent_ahead(server, leave, n):
    """What has not been read yet must not hide that the client has gone."""
    connection = connect(server)
    connection.sendall(request(ENDLESS) * n)
    wait_until(lambda: server.program.service.engine.n_running > 0)
    leave(connection)
    wait_until(lambda: is_idle(server), 5)


# ---- slow, many ---------------------------------------------------------------------------------------------------------


def test_requests_that_were_sent_ahead_are_answered_in_order(server):
    with connect(server) as connection:
        texts = [f"text {i}" for i in range(40)]
        last = request({"content": "end"}, "/tokenize", "Connection: close\r\n")
        connection.sendall(b"".join(request({"content": text}, "/tokenize") for text in texts) + last)
        bodies = [part.partition(b"\r\n\r\n")[2] for part in read_all(connection).split(b"HTTP/1.1 200 OK")[1:]]
    assert [json.loads(body) for body in bodies] == [server.post("/tokenize", content=t) for t in [*texts, "end"]]


def test_a_request_that_comes_byte_by_byte(server):
    with connect(server) as connection:
        for byte in request({"prompt": "hello", "n_predict": 1}, headers="Connection: close\r\n"):
            connection.sendall(bytes([byte]))
            time.sleep(0.001)
        assert status_of(read_all(connection)) == 200


def test_a_slow_reader_gets_everything_and_holds_up_nobody(server):
    fields = {**ENDLESS, "n_predict": 2000, "n_probs": 20, "stream": True}
    with connect(server, buffer=2048) as connection:
        connection.sendall(request(fields, headers="Connection: close\r\n"))
        time.sleep(1)
        began = time.monotonic()
        assert answer_of(server)
        assert time.monotonic() - began < 2
        assert b'"tokens_predicted":2000' in read_all(connection)


def test_a_client_that_does_not_read(tiny_path):
    with (
        ServerThread("-m", tiny_path, "-np", 1, "-c", 1024, "-to", 1) as server,
        connect(server, buffer=2048) as connection,
    ):
        connection.sendall(request({**ENDLESS, "n_probs": 100, "stream": True}))
        wait_until(lambda: server.program.service.engine.n_running == 1)
        wait_until(lambda: is_idle(server), 20)
        wait_until(lambda: books(server)["connections"] == 0)


def test_connections_that_never_finish_a_request_keep_nobody_out(server, monkeypatch):
    """Each sends a byte now and then, which is not silence, and there are more of them than may be open."""
    monkeypatch.setattr(server.program.server._listeners[0].adj, "connection_limit", 30)
    stop = threading.Event()

    def drip(connections: list[socket.socket]) -> None:
        while not stop.wait(0.1):
            for i, connection in enumerate(connections):
                try:
                    connection.sendall(b"x")
                except OSError:
                    connection.close()
                    connections[i] = connect(server)
                    connections[i].sendall(b"GET / HTTP/1.1\r\nX: ")

    connections = [connect(server) for _ in range(40)]
    for connection in connections:
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
    thread = threading.Thread(target=drip, args=[connections])
    thread.start()
    try:
        assert answer_of(server)
    finally:
        stop.set()
        thread.join()
        for connection in connections:
            connection.close()


def test_many_at_once(server):
    """All of it side by side, for a few seconds."""
    end = time.monotonic() + 4

    def misbehave(seed: int) -> None:
        rng = random.Random(seed)
        paths = ["/completion", "/v1/chat/completions", "/v1/completions", "/embedding", "/tokenize"]
        while time.monotonic() < end:
            fields = {
                **GOOD,
                **rng.choice([ENDLESS, LONG, {"prompt": 5}, {"stream": True}, {"n": 4}, {"messages": []}]),
            }
            data = rng.choice(
                [request(fields, rng.choice(paths)), rng.choice(list(NO_HTTP.values())), request(fields) * 3]
            )
            with contextlib.suppress(ConnectionError, TimeoutError), connect(server) as connection:
                connection.sendall(data[: rng.choice([len(data), rng.randrange(len(data))])])
                connection.settimeout(rng.choice([0.001, 0.05, 0.2]))
                connection.recv(rng.choice([1, 1000, 100_000]))
                if rng.random() < 0.5:
                    reset(connection)

    threads = [threading.Thread(target=misbehave, args=[seed]) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: is_idle(server), 5)


# ---- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_among_all_of_them(tiny_path, number):
    flags = ("-np", 2, "-cb", "-c", 8192, "-b", 16)
    with ServerProcess("-m", tiny_path, *flags) as server, contextlib.ExitStack() as stack:
        for data in (b"", b"GET / HT", request(ENDLESS)[:-2], request(ENDLESS) * 3, request({**ENDLESS, "stream": True}),
                     request(ENDLESS), request(LONG)):  # fmt: skip
            stack.enter_context(connect(server, buffer=2048)).sendall(data)
        wait_until(lambda: server.json("GET", "/health")[1]["requests_waiting"] > 0)
        began = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - began < 10
    assert "Traceback" not in "".join(server.log)
