"""The server as a program: how it starts, fails and ends."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import ROOT, ServerProcess, loading_server
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(path)
    return path


@contextlib.contextmanager
def serving(model: Path, *flags: str | Path) -> Iterator[ServerProcess]:
    """A server that is ready; in the end it exits cleanly, without having met anything unexpected."""
    server = ServerProcess("-m", model, *flags)
    try:
        yield server
    finally:
        status = server.stop()
    assert status == 0 and "Traceback" not in "".join(server.log), server.log


def failure(*flags: str | Path) -> str:
    """The last line of a server that cannot start."""
    command = [sys.executable, str(ROOT / "server.py"), "--port", "0", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done
    return done.stderr.splitlines()[-1]


def test_answers_while_the_model_is_loading(model):
    answers = []
    with ServerProcess("-m", model, wait=False) as server:
        while not answers or answers[-1][0] != 200:
            answers.append(server.json("GET", "/health"))
    assert answers[-1][1]["status"] == "ok"
    for status, answer in answers[:-1]:
        assert status == 503 and answer["error"]["code"] == 503 and "load" in answer["error"]["message"]


def test_the_page_is_there_while_the_model_is_loading():
    with loading_server() as server:
        assert server.json("GET", "/health")[0] == 503
        response = server.send("GET", "/")
        assert response.status == 200 and response.read().startswith(b"<!doctype html>")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_within_seconds(model, how):
    events = []
    server = ServerProcess("-m", model, "-c", "512")
    try:
        stream = server.stream("/completion", prompt="a", ignore_eos=True)
        events.append(next(stream))
        thread = threading.Thread(target=lambda: events.extend(stream))
        thread.start()
        began = time.monotonic()
        assert server.stop(how) == 0
        assert time.monotonic() - began < 5
        thread.join(timeout=10)
        assert not thread.is_alive()
    finally:
        server.process.kill()
    assert events[-1]["error"]["code"] == 503  # the client is told: the stream does not just break off


def test_a_signal_while_loading(model):
    assert ServerProcess("-m", model, wait=False).stop() == 0


def test_a_second_signal_ends_it_at_once(model):
    """The first one waits a few seconds for clients to read their answers."""
    server = ServerProcess("-m", model, "-c", "4096")
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        body = json.dumps({"prompt": "a", "ignore_eos": True, "stream": True, "n_probs": 300}).encode()
        slow.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        slow.recv(1)
        time.sleep(1)  # what waits to be read is now more than the system's buffers hold
        server.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert server.process.poll() is None
        began = time.monotonic()
        assert server.stop(signal.SIGINT) == -signal.SIGINT
        assert time.monotonic() - began < 1


def test_a_step_that_takes_long_is_abandoned(model, tmp_path):
    """As of a large model that reads a prompt: the server does not wait for it to end."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from pyllama.models import Model\n"
        "from pyllama.server import http, main\n"
        "http.STOP_SECONDS, main._STEP_SECONDS = 0.5, 0.5\n"
        "run = Model.run\n"
        "Model.run = lambda *args, **more: (print('running', file=sys.stderr, flush=True), time.sleep(60), run(*args, **more))\n"
        "sys.exit(main.main())\n"
    )
    with ServerProcess("-m", model, script=script) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(b'POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"prompt": "a"}')
            server.wait_for_log("^running")
            began = time.monotonic()
            assert server.stop() == 0
        assert time.monotonic() - began < 8
        assert any("it is abandoned" in line for line in server.log)


def test_one_line_for_each_request(model):
    with serving(model) as server:
        server.post("/completion", prompt="abc", n_predict=3, ignore_eos=True)
        line = server.wait_for_log("/completion").string
        assert "127.0.0.1 POST /completion 200" in line and "generated 3" in line
        server.json("GET", "/nowhere%0A%1B")
        assert r"GET /nowhere\n\x1b 404" in server.wait_for_log("nowhere").string


def test_the_log_in_json(model):
    with serving(model, "--log-format", "json", "-ngl", "9", "--verbose") as server:
        server.post("/completion", prompt="abc", n_predict=3, ignore_eos=True)
        request = json.loads(server.wait_for_log("/completion").string)
    assert (request["method"], request["status"], request["generated"]) == ("POST", 200, 3)
    lines = [json.loads(line) for line in server.log]
    assert any(line["level"] == "debug" and "kernels" in line["message"] for line in lines)
    assert any(line["level"] == "warning" and "--n-gpu-layers has no effect" in line["message"] for line in lines)


@pytest.mark.parametrize(
    "content, complaint",
    [(None, "No such file"), (b"GIF89a", "not a GGUF file"), (b"GGUF\x03\0\0\0" + bytes(16), "general.architecture")],
    ids=["no file", "no GGUF", "no model"],
)
def test_a_model_that_cannot_be_loaded(tmp_path, content, complaint):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    line = failure("-m", path)
    assert complaint in line and "bad.gguf" in line


def test_kernels_that_cannot_be_had(model, monkeypatch):
    monkeypatch.setenv("PYLLAMA_CPU", "sse")
    assert "cannot be loaded: PYLLAMA_CPU is 'sse', but there are no such kernels: this processor runs" in failure("-m", model)


def test_an_address_that_cannot_be_had(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in failure("-m", model, "--port", str(port))
    assert "cannot listen on nowhere.invalid:" in failure("-m", model, "--host", "nowhere.invalid")


@pytest.mark.parametrize(
    "content, complaint",
    [
        (None, "No such file"),
        ("{", "is neither JSON nor text"),
        (b"\xff", "is neither JSON nor text"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"system_prompt": []}', "must be an object or a string"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt": "x", "assistant_name": [1]}', "assistant_name"),
    ],
)
def test_a_system_prompt_file_that_is_wrong(model, tmp_path, content, complaint):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    line = failure("-m", model, "-spf", path)
    assert complaint in line and "bad.json" in line


@pytest.mark.parametrize("form", ["object", "member", "text"])
def test_a_system_prompt_file(model, tmp_path, form):
    path = tmp_path / "prompt.json"
    value = {"prompt": "hello", "anti_prompt": "User:", "assistant_name": "Bot:"}
    texts = {"object": json.dumps(value), "member": json.dumps({"system_prompt": value}), "text": "hello"}
    path.write_text(texts[form])
    names = {"assistant_name": "", "user_name": ""} if form == "text" else {"assistant_name": "Bot:", "user_name": "User:"}
    with serving(model, "-spf", path) as server:
        assert server.json("GET", "/props") == (200, names)
        n = [len(server.post("/tokenize", content=text)["tokens"]) for text in ("hello", "day")]
        assert server.post("/completion", prompt="day", n_predict=1)["tokens_evaluated"] == sum(n)


def test_a_chat_template(model):
    with serving(model, "--chat-template", "{% for m in messages %}[{{ m.content }}]{% endfor %}") as server:
        answer = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "xyz"}], max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == 5
    assert "the chat template" in failure("-m", model, "--chat-template", "{% for %}")


def test_flags_reach_the_model(model):
    flags = "-a name -c 128 -b 32 -np 3 -n 5 -s 7 -t 1 -tb 2 --memory-f32 --mlock --no-mmap"
    with serving(model, *flags.split()) as server:
        status, settings = server.json("GET", "/model.json")
        assert status == 200
        assert (settings["model"], settings["n_ctx"], settings["n_predict"]) == ("name", 128, 5)
        assert server.json("GET", "/health")[1]["slots_idle"] == 3
        assert server.json("GET", "/v1/models")[1]["data"][0]["id"] == "name"
        answers = [server.post("/completion", prompt="abc", ignore_eos=True) for _ in range(2)]
        assert answers[0]["tokens_predicted"] == 5 and answers[0]["content"] == answers[1]["content"]
