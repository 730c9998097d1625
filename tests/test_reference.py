"""docs/reference.md: its table has no gap and no empty cell, its tests exist, and what no other test asks of a running server is
asked here, one row a case."""

from __future__ import annotations

import ast
import contextlib
import functools
import http.client
import json
import mmap
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from pyllama.server.app import create_app
from pyllama.server.fields import Fields
from pyllama.server.flags import FLAGS
from pyllama.server.service import Service
from tests.serving import ROOT, ServerProcess, ServerThread, wait_until
from tests.tiny_models import make_gemma3, make_llama

PAGE = ROOT / "docs" / "reference.md"


class Row(NamedTuple):
    section: str
    names: tuple[str, ...]
    """What stands in code in the first cell; without any, the cell itself."""
    cells: tuple[str, ...]
    tests: tuple[str, ...]


def read_rows() -> list[Row]:
    rows, section = [], ""
    for line in PAGE.read_text(encoding="utf-8").partition("## The table")[2].splitlines():
        if line.startswith("### "):
            section = line.removeprefix("### ")
        elif line.startswith("| ") and not line.endswith("| Test |"):
            cells = tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            names = tuple(re.findall(r"`([^`]+)`", cells[0])) or (cells[0],)
            rows.append(Row(section, names, cells, tuple(re.findall(r"`([^`]+)`", cells[-1]))))
    return rows


ROWS = read_rows()


def names_in(*sections: str) -> set[str]:
    """What the rows of some sections are about."""
    found = {name for row in ROWS if row.section in sections for name in row.names}
    assert found, sections
    return found


def names_shown_by(test: str) -> set[str]:
    """Names of the rows that a test of this file shows."""
    return {name for row in ROWS for name in row.names if f"tests/test_reference.py::{test}" in row.tests}


# ---- the table itself ---------------------------------------------------------------------------------------------------


@functools.cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.names[0])
def test_every_row_is_complete_and_names_tests_that_exist(row):
    assert len(row.cells) == 3 and all(row.cells)
    assert row.tests
    for test in row.tests:
        path, _, name = test.partition("::")
        assert name in functions_of(path), test


def test_every_flag_has_a_row():
    known = {name for flag in FLAGS for name in flag.names} | {"-h", "--help", "--version", "LLAMA_ARG_…", "PYLLAMA_CPU"}
    assert names_in("Flags") == known


OPENAI_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


def test_every_option_has_a_row(tiny, monkeypatch):
    """The names are those that the server itself asks for when a request comes."""
    asked: set[str] = set()
    get = Fields.get

    def note(self: Fields, name: str) -> Any:
        asked.add(self._prefix + name)
        return get(self, name)

    monkeypatch.setattr(Fields, "get", note)
    body = {"prompt": "a", "n_predict": 1, "max_tokens": 1, "content": "a", "tokens": [1], "input": "a",
            "input_prefix": "a", "messages": [{"role": "user", "content": "a"}], "logprobs": 1}  # fmt: skip
    documented = {
        "/completion": ("Options of /completion",),
        "/infill": ("Options of /completion", "The other endpoints"),
        **dict.fromkeys(("/tokenize", "/detokenize", "/embedding"), ("The other endpoints",)),
        **dict.fromkeys(OPENAI_PATHS, ("Options of /completion", "OpenAI's endpoints")),
    }
    for path, sections in documented.items():
        asked.clear()
        fields = {**body, "logprobs": True} if "chat" in path else body
        status, answer = (
            tiny.json("POST", path, fields) if path != "/infill" else (tiny.send("POST", path, fields).status, "")
        )
        assert status == (501 if path == "/infill" else 200), answer
        assert asked and asked <= names_in(*sections), path


def test_every_endpoint_has_a_row(monkeypatch):
    monkeypatch.setattr("pyllama.server.app._with_cors", lambda app: app)
    routes = [route for route in create_app(Service()).routes if route.method != "ANY"]
    known = {f"{route.method} {re.sub(':path>', '>', route.rule)}" for route in routes}
    methods = ("GET ", "POST ", "OPTIONS")
    rows = {name for name in names_in("The other endpoints", "OpenAI's endpoints") if name.startswith(methods)}
    assert rows == known | {"OPTIONS", "GET /"}


def test_every_example_has_a_row():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "examples").rglob("*") if path.is_file()}
    assert files <= names_in("Examples and clients")


# ---- flags --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(path)
    return path


@pytest.fixture(scope="module")
def tiny(model_path) -> Iterator[ServerThread]:
    with ServerThread("-m", model_path, "-np", 2, "-cb", "-c", 256, "--embedding") as server:
        yield server


Serve = Callable[..., contextlib.AbstractContextManager[ServerThread]]
FLAG_CASES: dict[str, Callable[[Serve, Path], None]] = {}


def shows(*names: str) -> Callable[[Callable[[Serve, Path], None]], Callable[[Serve, Path], None]]:
    """Registers what shows a flag, under all its names."""

    def register(case: Callable[[Serve, Path], None]) -> Callable[[Serve, Path], None]:
        FLAG_CASES.update(dict.fromkeys(names, case))
        return case

    return register


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.names[-1] in FLAG_CASES or not flag.missing],
                         ids=lambda flag: flag.field)  # fmt: skip
def test_flags(model_path, tmp_path, flag):
    if flag.field in ("log_format", "verbose"):  # shown by other tests
        assert not names_shown_by("test_flags") & set(flag.names)
        return
    FLAG_CASES[flag.names[-1]](functools.partial(ServerThread, "-m", model_path), tmp_path)


def test_every_flag_that_is_shown_here_has_its_case():
    assert names_shown_by("test_flags") == set(FLAG_CASES)


TEXT = {"prompt": "the day", "n_predict": 12, "ignore_eos": True, "cache_prompt": False}
GREEDY = {**TEXT, "temperature": 0, "repeat_penalty": 1}


def probabilities(server: ServerThread) -> list[float]:
    """Of the likeliest tokens after a text that is long enough for positions to matter."""
    answer = server.post("/completion", **{**GREEDY, "prompt": "hello world time " * 12}, n_probs=5)
    return [p["prob"] for entry in answer["completion_probabilities"] for p in entry["probs"]]


def changes(serve: Serve, *flags: object, beside: tuple[object, ...] = ()) -> None:
    """The model's probabilities are others with the flags than without them."""
    with serve(*beside) as before, serve(*beside, *flags) as after:
        assert probabilities(before) == probabilities(before)
        assert probabilities(before) != probabilities(after)


@shows("-t", "--threads")
def _(serve, _folder):
    with serve("-t", 2) as server:
        assert server.program.service.model.n_threads == server.program.service.model.n_threads_batch == 2
        assert server.post("/completion", **TEXT)["tokens_predicted"] == 12


@shows("-tb", "--threads-batch")
def _(serve, _folder):
    with serve("-t", 1, "-tb", 2) as server:
        assert (server.program.service.model.n_threads, server.program.service.model.n_threads_batch) == (1, 2)
        assert server.post("/completion", **TEXT)["tokens_predicted"] == 12


@shows("-m", "--model")
def _(_serve, folder):
    make_llama(folder / "other.gguf", n_ctx=77)
    with ServerThread("-m", folder / "other.gguf", "-c", 0) as server:
        assert server.json("GET", "/v1/models")[1]["data"][0]["id"] == str(folder / "other.gguf")
        assert server.json("GET", "/model.json")[1]["n_ctx"] == 77


@shows("-a", "--alias")
def _(serve, _folder):
    with serve("-a", "a name") as server:
        assert server.post("/completion", **TEXT)["model"] == "a name"
        assert server.json("GET", "/v1/models")[1]["data"][0]["id"] == "a name"


@shows("-c", "--ctx-size")
def _(serve, _folder):
    for flags, n_ctx in (((), 512), (("-c", 96), 96), (("-c", 0), 512)):
        with serve(*flags) as server:
            assert server.json("GET", "/model.json")[1]["n_ctx"] == n_ctx
    assert server.program.service.model.n_ctx == 512


@shows("-b", "--batch-size")
def _(serve, _folder):
    with serve("-b", 7) as server:
        lengths, run = [], server.program.service.model.run
        server.program.service.model.run = lambda inputs, **more: (
            lengths.append(sum(len(item.tokens) for item in inputs)),
            run(inputs, **more),
        )[1]
        server.post("/completion", **{**TEXT, "prompt": [5] * 40, "n_predict": 1})
        assert max(lengths) == 7 and sum(lengths) == 40


@shows("-n", "--n-predict")
def _(serve, _folder):
    with serve("-n", 5) as server:
        assert server.post("/completion", prompt="a", ignore_eos=True)["tokens_predicted"] == 5


@shows("--memory-f32")
def _(serve, _folder):
    changes(serve, "--memory-f32")


def changes_with_type(folder: Path, flag: str) -> None:
    make_llama(folder / "wide.gguf", n_head=2, n_head_kv=1)  # heads of 32, which can be quantized
    for kind in ("f32", "q8_0", "q4_0"):
        changes(functools.partial(ServerThread, "-m", folder / "wide.gguf"), flag, kind)


@shows("-ctk", "--cache-type-k")
def _(_serve, folder):
    changes_with_type(folder, "-ctk")


@shows("-ctv", "--cache-type-v")
def _(_serve, folder):
    changes_with_type(folder, "--cache-type-v")


@shows("--mlock")
def _(serve, _folder):
    def locked() -> int:
        return int(re.search(r"VmLck:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    if not Path("/proc/self/status").exists():
        pytest.skip("this system does not tell how much memory is locked")
    with serve() as server:
        before = locked()
    with serve("--mlock") as server:
        assert locked() > before
        assert server.post("/completion", **TEXT)["tokens_predicted"] == 12


@shows("--no-mmap")
def _(serve, _folder):
    texts = set()
    for flags in ((), ("--no-mmap",)):
        with mock.patch("pyllama.gguf.mmap_module.mmap", wraps=mmap.mmap) as mapping, serve(*flags) as server:
            assert mapping.called == (not flags)
            texts.add(server.post("/completion", **GREEDY)["content"])
    assert len(texts) == 1


@shows("--numa")
def _(serve, _folder):
    for flags in (("--numa",), ("--numa", "distribute")):
        with serve(*flags) as server:
            assert server.post("/completion", **TEXT)["tokens_predicted"] == 12


@shows("--rope-scaling")
def _(serve, _folder):
    changes(serve, "--rope-scaling", "none", beside=("--rope-freq-scale", 0.25))


@shows("--rope-freq-base")
def _(serve, _folder):
    changes(serve, "--rope-freq-base", 500)


@shows("--rope-freq-scale")
def _(serve, _folder):
    changes(serve, "--rope-freq-scale", 0.25)


YARN = ("--rope-scaling", "yarn", "--rope-freq-scale", 0.125, "--yarn-orig-ctx", 4096)


@shows("--yarn-orig-ctx")
def _(serve, _folder):
    changes(serve, "--yarn-orig-ctx", 16, beside=YARN)


@shows("--yarn-ext-factor")
def _(serve, _folder):
    changes(serve, "--yarn-ext-factor", 0.5, beside=YARN)


@shows("--yarn-attn-factor")
def _(serve, _folder):
    changes(serve, "--yarn-attn-factor", 0.5, beside=YARN)


@shows("--yarn-beta-slow")
def _(serve, _folder):
    changes(serve, "--yarn-beta-slow", 4, beside=YARN)


@shows("--yarn-beta-fast")
def _(serve, _folder):
    changes(serve, "--yarn-beta-fast", 4, beside=YARN)


@shows("-s", "--seed")
def _(serve, _folder):
    with serve("-s", 7) as server:
        texts = {server.post("/completion", **{**TEXT, **seed})["content"] for seed in ({}, {}, {"seed": 7})}
        assert len(texts) == 1
        assert server.post("/completion", **TEXT, seed=8)["content"] not in texts


@shows("-np", "--parallel")
def _(serve, _folder):
    for flags, n in (((), 1), (("-np", 3), 3)):
        with serve(*flags) as server:
            assert server.json("GET", "/health")[1]["slots_idle"] == n


@shows("-cb", "--cont-batching")
def _(serve, _folder):
    endless = {**TEXT, "n_predict": -1}
    for flags in (("-np", 2), ("-np", 2, "-cb")):
        with serve(*flags) as server, contextlib.closing(server.stream("/completion", **endless)) as first:
            next(first)
            second = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            with contextlib.closing(second):
                second.request("POST", "/completion", json.dumps({**TEXT, "n_predict": 1}))
                if "-cb" not in flags:
                    wait_until(functools.partial(is_waiting, server))
                    for _ in range(50):
                        assert not next(first)["stop"]
                    assert is_waiting(server)
                    first.close()
                assert second.getresponse().status == 200


def is_waiting(server: ServerThread) -> bool:
    """One request waits, though there is a second slot."""
    engine = server.program.service.engine
    return (engine.n_running, engine.n_waiting) == (1, 1)


@shows("--embedding", "--embeddings")
def _(serve, _folder):
    for flag in ("--embedding", "--embeddings"):
        with serve(flag) as server:
            assert len(server.post("/embedding", content="hello")["embedding"]) == 64


@shows("-spf", "--system-prompt-file")
def _(serve, folder):
    (folder / "system.json").write_text('{"prompt": "hello", "anti_prompt": "User:", "assistant_name": "Bot:"}')
    with serve("-spf", folder / "system.json") as server:
        assert server.json("GET", "/props")[1] == {"assistant_name": "Bot:", "user_name": "User:"}


@shows("--chat-template")
def _(serve, _folder):
    with serve("--chat-template", "{% for m in messages %}[{{ m.content }}]{% endfor %}") as server:
        messages = [{"role": "user", "content": "xyz"}]
        answer = server.post("/v1/chat/completions", messages=messages, max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == 5


@shows("-to", "--timeout")
def _(serve, _folder):
    with serve("-to", 1) as server, socket.create_connection(("127.0.0.1", server.port), timeout=10) as half:
        half.sendall(b"POST /completion HTTP/1.1\r\n")
        assert half.recv(1) == b""


@shows("--host")
def _(serve, _folder):
    with serve("--host", "localhost") as server:
        assert server.json("GET", "/health")[0] == 200
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):  # an address that nobody has
        serve("--host", "192.0.2.1")


@shows("--port")
def _(serve, _folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with serve("--port", port) as server:
        assert server.port == port and server.json("GET", "/health")[0] == 200


@shows("--path")
def _(serve, folder):
    (folder / "mine.html").write_text("<p>mine</p>")
    with serve("--path", folder) as server:
        assert server.send("GET", "/mine.html").read() == b"<p>mine</p>"
        assert server.send("GET", "/completion.js").status == 200


def has_keys(server: ServerThread, *keys: str) -> None:
    for key, status in ((None, 401), ("wrong", 401), *((key, 200) for key in keys)):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        assert server.json("POST", "/tokenize", {"content": "x"}, headers)[0] == status


@shows("--api-key")
def _(serve, _folder):
    with serve("--api-key", "one,two") as server:
        has_keys(server, "one", "two")


@shows("--api-key-file")
def _(serve, folder):
    (folder / "keys").write_text("one\n\ntwo\n")
    with serve("--api-key-file", folder / "keys") as server:
        has_keys(server, "one", "two")


@shows("--queue")
def _(serve, _folder):
    with serve("--queue", 0) as server, contextlib.closing(
        server.stream("/completion", **{**TEXT, "n_predict": -1})
    ) as first:  # fmt: skip
        next(first)
        assert "try again" in server.refused("/completion", TEXT, 429)


@shows("--lookup", "--draft", "--draft-max")
def _(serve, _folder):
    again = {**GREEDY, "n_predict": 100, "grammar": 'root ::= "abcdefgh "*'}
    contents, accepted = set(), []
    for flags in ((), ("--draft", 4), ("--lookup", "--draft-max", 1), ("--lookup",)):
        with serve(*flags) as server:
            answer = server.post("/completion", **again)
        contents.add(answer["content"])
        accepted.append(answer["timings"].get("draft_n_accepted", 0))
    assert len(contents) == 1
    assert accepted[0] == accepted[1] == 0 < accepted[2] <= 50 < accepted[3]


@shows("-md", "--model-draft")
def _(serve, folder):
    make_llama(folder / "draft.gguf")
    answers = []
    for flags in ((), ("-md", folder / "draft.gguf"), ("--lookup", "--model-draft", folder / "draft.gguf")):
        with serve(*flags) as server:
            answers.append(server.post("/completion", **{**GREEDY, "n_predict": 100}))
    assert len({answer["content"] for answer in answers}) == 1
    assert all(answer["timings"]["draft_n"] for answer in answers[1:])


def test_flags_without_effect(model_path):
    """Each says so in one clear line at the start, and the server runs all the same."""
    values = {flag.names[-1]: "1" for flag in FLAGS if flag.missing}
    assert set(values) == {name for name in names_shown_by("test_flags_without_effect") if name.startswith("--")}
    flags = [word for pair in values.items() for word in pair]
    with ServerProcess("-m", model_path, *flags) as server:
        for name in values:
            (line,) = [line for line in server.log if f"{name} has no effect: " in line]
            assert len(line) < 120
        assert server.post("/completion", **TEXT)["tokens_predicted"] == 12


def test_environment(model_path):
    environ = {
        "LLAMA_ARG_MODEL": str(model_path),
        "LLAMA_ARG_CTX_SIZE": "128",
        "LLAMA_ARG_N_PARALLEL": "9",
        "LLAMA_ARG_EMBEDDINGS": "1",
        "LLAMA_API_KEY": "secret",
    }
    with ServerThread("-np", 2, environ=environ) as server:
        has_keys(server, "secret")
        assert server.json("GET", "/model.json")[1]["n_ctx"] == 128
        assert server.json("GET", "/health")[1]["slots_idle"] == 2  # the command line has precedence
        headers = {"Authorization": "Bearer secret"}
        assert server.json("POST", "/embedding", {"content": "x"}, headers)[0] == 200


# ---- options of /completion ---------------------------------------------------------------------------------------------

Ask = Callable[..., dict[str, Any]]


def is_greedy(ask: Ask, **option: Any) -> None:
    """An option that leaves one candidate makes the text the likeliest one, whatever the seed."""
    assert ask(**TEXT, repeat_penalty=1, seed=1, **option)["content"] == ask(**GREEDY)["content"]


def has_no_repetition(ask: Ask, **option: Any) -> None:
    tokens = chosen(ask, {**GREEDY, "n_predict": 30, **option})
    assert len(set(tokens)) == len(tokens)


def chosen(ask: Ask, fields: dict[str, Any]) -> list[str]:
    """The tokens of an answer, as text."""
    return [entry["content"] for entry in ask(**fields, n_probs=1)["completion_probabilities"]]


def is_differing(ask: Ask, a: dict[str, Any], b: dict[str, Any]) -> None:
    """Two values of an option give different texts with the same seed."""
    fields = {**TEXT, "n_predict": 40, "seed": 3, "repeat_penalty": 1}
    assert ask(**{**fields, **a})["content"] != ask(**{**fields, **b})["content"]


NEWLINE, END = 13, 2


def newlines(ask: Ask, **option: Any) -> int:
    """How many newlines a model says that would say nothing else if it were not for the penalty."""
    return ask(**GREEDY, logit_bias=[[NEWLINE, 500]], presence_penalty=1000, **option)["content"].count("\n")


def option_cases() -> dict[str, Callable[[ServerThread, Ask], object]]:
    """What shows each option: a function that asserts, or returns what must be true."""

    def temperature(server: ServerThread, ask: Ask) -> None:
        assert ask(**TEXT, temperature=0, seed=1)["content"] == ask(**TEXT, temperature=-1, seed=2)["content"]
        is_differing(ask, {"temperature": 0.1}, {"temperature": 5})

    def n_keep(server: ServerThread, ask: Ask) -> None:
        long = {
            "prompt": list(range(50, 150)),
            "n_predict": 300,
            "ignore_eos": True,
            "temperature": 0,
            "repeat_penalty": 1,
        }
        texts = [ask(**long, n_keep=n)["content"] for n in (0, 100, -1)]
        assert texts[0] != texts[1] == texts[2]

    def stream(server: ServerThread, ask: Ask) -> None:
        *pieces, last = server.stream("/completion", **GREEDY)
        assert "".join(piece["content"] for piece in pieces) == ask(**GREEDY, stream=False)["content"]
        assert last["stop"] and not any(piece["stop"] for piece in pieces)

    def stop(server: ServerThread, ask: Ask) -> None:
        text = ask(**GREEDY)["content"]
        assert ask(**GREEDY, stop=[text[3:5]])["content"] == text[: text.index(text[3:5])]

    def penalty_prompt(server: ServerThread, ask: Ask) -> None:
        (first,) = server.post("/tokenize", content=ask(**{**GREEDY, "n_predict": 1, "prompt": "hello"})["content"])[
            "tokens"
        ]
        options = {**GREEDY, "n_predict": 1, "prompt": "hello", "presence_penalty": 1000}
        usual = ask(**options)["content"]
        assert (
            ask(**options, penalty_prompt=[first])["content"] != usual == ask(**options, penalty_prompt="")["content"]
        )
        assert usual == ask(**options, penalty_prompt=None)["content"]

    def seed(server: ServerThread, ask: Ask) -> None:
        assert ask(**TEXT, seed=5)["content"] == ask(**TEXT, seed=5)["content"]
        is_differing(ask, {"seed": 5}, {"seed": 6})

    def ignore_eos(server: ServerThread, ask: Ask) -> None:
        fields = {**GREEDY, "logit_bias": [[END, 20]]}
        assert ask(**{**fields, "ignore_eos": False})["stopped_eos"]
        assert ask(**{**fields, "ignore_eos": True})["tokens_predicted"] == 12

    def logit_bias(server: ServerThread, ask: Ask) -> None:
        first = ask(**{**GREEDY, "n_predict": 1})["content"]
        (token,) = server.post("/tokenize", content=first)["tokens"]
        assert ask(**{**GREEDY, "n_predict": 3}, logit_bias=[[token, 100]])["content"] == 3 * first
        for never in ([[token, -100]], [[token, False]], {str(token): -100}):
            assert first not in chosen(ask, {**GREEDY, "logit_bias": never})

    def image_data(server: ServerThread, ask: Ask) -> None:
        assert ask(**TEXT, image_data=[])
        assert "images" in server.refused("/completion", {**TEXT, "image_data": [{"data": "", "id": 1}]}, 501)

    def cache_prompt(server: ServerThread, ask: Ask) -> None:
        fields = {**GREEDY, "prompt": "hello " * 20}
        for share, n in ((True, 1), (False, ask(**fields)["tokens_evaluated"])):
            assert ask(**{**fields, "cache_prompt": share})["timings"]["prompt_n"] == n

    def system_prompt(server: ServerThread, ask: Ask) -> None:
        alone = ask(**TEXT)["tokens_evaluated"]
        try:
            told = {"prompt": "hello ", "anti_prompt": "User:", "assistant_name": "Bot:"}
            assert ask(**TEXT, system_prompt=told)["tokens_evaluated"] > alone
            assert server.json("GET", "/props")[1] == {"assistant_name": "Bot:", "user_name": "User:"}
        finally:
            assert ask(**TEXT, system_prompt="")["tokens_evaluated"] == alone

    return {
        "temperature": temperature,
        "top_k": lambda _, ask: is_greedy(ask, top_k=1),
        "top_p": lambda _, ask: is_greedy(ask, top_p=0),
        "min_p": lambda _, ask: is_greedy(ask, min_p=1),
        "tfs_z": lambda _, ask: is_differing(ask, {"tfs_z": 0.01}, {"tfs_z": 1}),
        "typical_p": lambda _, ask: is_differing(ask, {"typical_p": 0.01}, {"typical_p": 1}),
        "n_predict": lambda _, ask: (
            [ask(**{**GREEDY, "n_predict": n})["tokens_predicted"] for n in (0, 1, 7)] == [0, 1, 7]
        ),
        "n_keep": n_keep,
        "stream": stream,
        "stop": stop,
        "repeat_penalty": lambda _, ask: has_no_repetition(ask, repeat_penalty=50, temperature=0),
        "repeat_last_n": lambda _, ask: is_greedy(ask, repeat_last_n=0, presence_penalty=1000, temperature=0),
        "penalize_nl": lambda _, ask: [newlines(ask, penalize_nl=on) for on in (False, True)] == [12, 1],
        "presence_penalty": lambda _, ask: has_no_repetition(ask, presence_penalty=1000),
        "frequency_penalty": lambda _, ask: has_no_repetition(ask, frequency_penalty=1000),
        "penalty_prompt": penalty_prompt,
        "mirostat": lambda _, ask: [is_differing(ask, {"mirostat": n}, {"mirostat": 0}) for n in (1, 2)],
        "mirostat_tau": lambda _, ask: is_greedy(ask, mirostat=2, mirostat_tau=0.001),
        "mirostat_eta": lambda _, ask: is_differing(ask, *({"mirostat": 2, "mirostat_eta": eta} for eta in (0.1, 5))),
        "grammar": lambda _, ask: ask(prompt="a", grammar='root ::= "hello " [a-c]')["content"][:6] == "hello ",
        "seed": seed,
        "ignore_eos": ignore_eos,
        "logit_bias": logit_bias,
        "n_probs": lambda _, ask: {len(e["probs"]) for e in ask(**TEXT, n_probs=4)["completion_probabilities"]} == {4},
        "image_data": image_data,
        "slot_id": lambda _, ask: [ask(**TEXT, slot_id=i)["slot_id"] for i in (1, 0, 1)] == [1, 0, 1],
        "cache_prompt": cache_prompt,
        "system_prompt": system_prompt,
    }


OPTION_CASES = option_cases()


@pytest.mark.parametrize("option", OPTION_CASES)
def test_options(tiny, option):
    assert OPTION_CASES[option](tiny, functools.partial(tiny.post, "/completion")) is not False


def test_every_option_that_is_shown_here_has_its_case():
    assert names_shown_by("test_options") == set(OPTION_CASES)


# ---- the result of /completion -------------------------------------------------------------------------------------------

RESULT_CASES: dict[str, Callable[[Ask], bool]] = {
    "content": lambda ask: len(ask(**TEXT)["content"]) > 0 == len(ask(**{**TEXT, "n_predict": 0})["content"]),
    "stop": lambda ask: ask(**TEXT)["stop"] is True,
    "generation_settings": lambda ask: ask(**TEXT, top_k=7)["generation_settings"]["top_k"] == 7,
    "model": lambda ask: ask(**TEXT)["model"].endswith("tiny.gguf"),
    "prompt": lambda ask: [ask(**{**TEXT, "prompt": p})["prompt"] for p in ("a", [5, "b"])] == ["a", [5, "b"]],
    "stopped_eos": lambda ask: (
        [ask(**{**TEXT, "ignore_eos": on}, logit_bias=[[END, 500]])["stopped_eos"] for on in (False, True)]
        == [True, False]
    ),
    "stopped_limit": lambda ask: (
        [ask(**{**TEXT, "ignore_eos": on}, logit_bias=[[END, 500]])["stopped_limit"] for on in (True, False)]
        == [True, False]
    ),
    "stopped_word": lambda ask: (
        [ask(prompt="a", grammar='root ::= "hello world"', stop=[word])["stopped_word"] for word in ("wor", "day")]
        == [True, False]
    ),
    "stopping_word": lambda ask: (
        [ask(prompt="a", grammar='root ::= "hello world"', stop=[word])["stopping_word"] for word in ("wor", "day")]
        == ["wor", ""]
    ),
    "timings": lambda ask: ask(**TEXT)["timings"]["predicted_n"] == 12,
    "tokens_cached": lambda ask: ask(**{**TEXT, "prompt": [5] * 9})["tokens_cached"] == 9 + 12,
    "tokens_evaluated": lambda ask: ask(**{**TEXT, "prompt": [5] * 9})["tokens_evaluated"] == 9,
    "tokens_predicted": lambda ask: ask(**TEXT)["tokens_predicted"] == 12,
    "truncated": lambda ask: [ask(**{**TEXT, "prompt": [5] * n})["truncated"] for n in (9, 250)] == [False, True],
    "slot_id": lambda ask: ask(**TEXT, slot_id=1)["slot_id"] == 1,
    "completion_probabilities": lambda ask: (
        [len(e["probs"]) for e in ask(**TEXT, n_probs=2)["completion_probabilities"]] == [2] * 12
    ),
}


@pytest.mark.parametrize("field", RESULT_CASES)
def test_result_fields(tiny, field):
    assert RESULT_CASES[field](functools.partial(tiny.post, "/completion"))


def test_every_result_field_has_a_row(tiny):
    result = tiny.post("/completion", **TEXT, n_probs=1)
    several = tiny.post("/completion", **{**TEXT, "prompt": ["a", "b"]})
    event = next(tiny.stream("/completion", **TEXT))
    assert {*result, *several[0], *event} == names_in("The result of /completion")
    assert names_shown_by("test_result_fields") == set(RESULT_CASES)


# ---- the rest -----------------------------------------------------------------------------------------------------------


def test_tokenize(tmp_path):
    make_gemma3(tmp_path / "gemma.gguf")
    with ServerThread("-m", tmp_path / "gemma.gguf") as server:
        plain = server.post("/tokenize", content="hello")["tokens"]
        begin = 2  # <bos>
        assert server.post("/tokenize", content="hello", add_special=True)["tokens"] == [begin, *plain]
        assert begin not in plain


CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "ignore_eos": True}


@pytest.mark.parametrize(
    "option",
    ["stop", "logit_bias", "presence_penalty", "frequency_penalty", "temperature", "top_p", "response_format",
     "response_format.type"],
)  # fmt: skip
def test_openai_options(tiny, option):
    def ask(**fields: Any) -> str:
        fields = {**CHAT, "temperature": 0, "repeat_penalty": 1, **fields}
        return tiny.post("/v1/chat/completions", **fields)["choices"][0]["message"]["content"]

    text = ask()
    if option == "stop":
        for stop in (text[3:5], [text[3:5], "never"]):
            assert ask(stop=stop) == text[: text.index(text[3:5])]
    elif option == "logit_bias":
        assert ask(logit_bias={str(NEWLINE): 100}) == "\n" * 12
    elif option.endswith("_penalty"):
        assert ask(logit_bias={str(NEWLINE): 100}, **{option: 1000}).count("\n") == 0  # the template has some
    elif option == "temperature":
        assert ask(temperature=3, seed=1) == ask(temperature=3, seed=1) != text
    elif option == "top_p":
        assert ask(temperature=3, top_p=0) == text
    else:
        assert ask(response_format={"type": "text"}) == text
        assert ask(response_format={"type": "json_object"}).startswith("{")
        assert "response_format" in tiny.refused("/v1/chat/completions", {**CHAT, "response_format": {"type": "xml"}})


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_llama_complete(tiny, tmp_path):
    shutil.copy(ROOT / "public" / "completion.js", tmp_path / "completion.mjs")
    (tmp_path / "test.mjs").write_text(
        f"""
import {{ llamaComplete }} from './completion.mjs'
const fetch_ = fetch
globalThis.fetch = (url, options) => fetch_(url.replace('http://127.0.0.1:8080', '{tiny.url}'), options)
let text = ''
const params = {json.dumps(GREEDY)}
await llamaComplete(params, new AbortController(), (chunk) => (text += chunk.data.content))
console.log(JSON.stringify(text))
"""
    )
    done = subprocess.run(["node", "test.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tiny.post("/completion", **GREEDY)["content"]
