"""The programs and pages in ``examples/``, each against a real server, with the real model where the text matters."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, find_chromium
from tests.serving import ROOT, ServerProcess, wait_until
from tests.tiny_models import make_llama

EXAMPLES = ROOT / "examples"
KEY = "a key"

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
needs_curl = pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="curl or jq is not installed")
needs_chromium = pytest.mark.skipif(find_chromium() is None, reason="Chromium is not installed")

CHATS = [
    pytest.param(("node", "chat.mjs"), marks=needs_node, id="chat.mjs"),
    pytest.param(("node", "--no-experimental-fetch", "chat.mjs"), marks=needs_node, id="chat.mjs without fetch"),
    pytest.param(("bash", "chat.sh"), marks=needs_curl, id="chat.sh"),
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Iterator[ServerProcess]:
    flags = ("-c", "1024", "-np", "2", "-cb", "--seed", "1", "--path", EXAMPLES / "pages")
    with ServerProcess("-m", smollm2_path, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[ServerProcess]:
    """A small context, and a key."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(path)
    with ServerProcess("-m", path, "-c", "256", "--seed", "1", "--api-key", KEY) as server:
        yield server


def run(command: tuple[str, ...], *words: str, says: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs an example in its folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")} | environ
    return subprocess.run(
        [*command, *words], cwd=EXAMPLES, env=environment, input=says, capture_output=True, text=True, timeout=60
    )


def usage(server: ServerProcess, path: str) -> list[tuple[int, int, int]]:
    """Tokens of the prompt, of those the ones that were known, and of the answer, for each request in the log."""
    pattern = rf"POST {path} 200 .*\(prompt (\d+), reused (\d+), generated (\d+)"
    return [tuple(map(int, match.groups())) for line in server.log if (match := re.search(pattern, line))]


# ---- chats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", CHATS)
def test_a_chat_remembers_what_was_said(smollm2, command):
    path = "/completion" if "chat.sh" in command else "/v1/chat/completions"
    before = len(usage(smollm2, path))
    done = run(command, smollm2.url, says="What is the capital of France?\n\nWhat is its largest river?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.split()) > 3
    wait_until(lambda: len(usage(smollm2, path)) == before + 2)
    (prompt, _, generated), (prompt_2, reused_2, _) = usage(smollm2, path)[before:]
    assert prompt_2 > prompt + generated
    assert reused_2 >= prompt - 1  # the second request begins as the first


@pytest.mark.parametrize("command", CHATS)
def test_answers_are_shown_while_they_come(smollm2, command):
    process = subprocess.Popen([*command, smollm2.url], cwd=EXAMPLES, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"Tell me a long story about a fox.")
    process.stdin.close()
    pieces = [os.read(process.stdout.fileno(), 65536) for _ in range(10)]
    assert all(pieces)
    process.terminate()
    process.wait(timeout=10)
    process.stdout.close()
    wait_until(smollm2.is_idle)


@pytest.mark.parametrize("command", CHATS)
def test_a_chat_outgrows_the_context(tiny, command):
    done = run(command, tiny.url, says="hello world, what time is it there?\n" * 12, LLAMA_API_KEY=KEY)
    assert (done.returncode, done.stderr) == (0, "")
    if "chat.mjs" in command:
        wait_until(tiny.is_idle)
        assert all(prompt <= 0.8 * 256 for prompt, _, _ in usage(tiny, "/v1/chat/completions"))


@pytest.mark.parametrize("command", CHATS)
def test_a_chat_says_what_is_wrong(tiny, command):
    done = run(command, tiny.url, says="hello\n")
    assert done.returncode != 0 and done.stdout == "" and "key" in done.stderr
    done = run(command, "http://127.0.0.1:9", says="hello\n")
    assert done.returncode != 0 and done.stdout == "" and "connect" in done.stderr.lower()


# ---- one request -----------------------------------------------------------------------------------------------------


@needs_curl
def test_curl(smollm2):
    done = run(("bash", "curl.sh"), smollm2.url)
    assert done.returncode == 0
    completion, chat = map(json.loads, done.stdout.splitlines())
    assert completion["content"] and completion["tokens_predicted"] <= 128
    assert chat["choices"][0]["message"]["content"] and chat["object"] == "chat.completion"


@needs_node
def test_node(smollm2):
    done = run(("node", "index.js"), smollm2.url)
    assert done.returncode == 0 and len(done.stdout.split()) > 20


def test_openais_client(smollm2):
    pytest.importorskip("openai")
    done = run((sys.executable, "openai_client.py"), smollm2.url)
    assert done.returncode == 0 and len(done.stdout.split()) > 3


@needs_chromium
def test_a_page_of_ones_own(smollm2):
    with Browser() as browser:
        page = browser.open(f"{smollm2.url}/jokes.html")
        page.wait_for("document.body.textContent.trim().length > 200")
        assert page.complaints == []
    wait_until(smollm2.is_idle)  # the page was left in the middle


# ---- OpenAI's API over /completion -------------------------------------------------------------------------------------


@contextlib.contextmanager
def translating(server: ServerProcess, *flags: str) -> Iterator[str]:
    """The URL of api_like_OAI.py."""
    command = [sys.executable, "api_like_OAI.py", "--port", "0", "--llama-api", server.url, *flags]
    process = subprocess.Popen(command, cwd=EXAMPLES, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        yield re.search(r"listening on (http://127\.0\.0\.1:\d+)", line)[1]
    finally:
        process.terminate()
        process.wait(timeout=10)
        process.stdout.close()


def client(url: str, key: str = "none") -> Any:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def translated(smollm2) -> Iterator[str]:
    with translating(smollm2) as url:
        yield url


QUESTION = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]


def test_translated_chats(translated):
    for base in (translated, f"{translated}/v1"):
        options = {"model": "any", "messages": QUESTION, "temperature": 0, "max_tokens": 40}
        chat = client(base).chat.completions.create(**options)
        (choice,) = chat.choices
        assert "Paris" in choice.message.content and not choice.message.content.startswith(" ")
        assert (chat.model, chat.object) == ("any", "chat.completion")
        assert choice.finish_reason == ("length" if chat.usage.completion_tokens == 40 else "stop")
        assert chat.usage.prompt_tokens + chat.usage.completion_tokens == chat.usage.total_tokens
        first, *middle, last = client(base).chat.completions.create(**options, stream=True)
        assert first.choices[0].delta.role == "assistant" and last.choices[0].finish_reason == choice.finish_reason
        assert "".join(chunk.choices[0].delta.content for chunk in middle) == choice.message.content
        assert len({chunk.id for chunk in (first, *middle, last)}) == 1


def test_translated_texts(translated):
    options = {"model": "any", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 4}
    options["extra_body"] = {"cache_prompt": False}
    text = client(translated).completions.create(**options)
    assert text.choices[0].text.startswith(" Paris") and text.choices[0].finish_reason == "length"
    assert (text.usage.prompt_tokens, text.usage.completion_tokens) == (5, 4)
    chunks = list(client(translated).completions.create(**options, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    other = client(translated).completions.create(**options, logit_bias={"7042": -100}, stop=" the")
    assert "Paris" not in other.choices[0].text and " the" not in other.choices[0].text


def test_translated_errors(translated):
    import openai

    options = {"model": "any", "prompt": "x"}
    with pytest.raises(openai.BadRequestError, match="temperature must be a number"):
        client(translated).completions.create(**options, temperature="hot", stream=True)
    with pytest.raises(openai.BadRequestError, match="only one answer"):
        client(translated).completions.create(**options, n=2)
    for messages in (None, "x", [1], [{"role": "user"}], [{"role": "nobody", "content": "x"}]):
        with pytest.raises(openai.BadRequestError, match="messages must be"):
            client(translated).post("/chat/completions", body={"messages": messages}, cast_to=object)
    with pytest.raises(openai.NotFoundError):
        client(translated).models.list()


def test_the_names_of_a_translated_chat(tiny):
    """The prompt that reaches the server is made of the flags' words."""
    flags = ("--chat-prompt", "hello ", "--system-name", "\\nthe ", "--user-name", "\\nyou ", "--ai-name", "\\nall ")
    with translating(tiny, *flags, "--stop", "") as url:
        chat = client(url, KEY).chat.completions.create(model="x", messages=QUESTION, max_tokens=1)
    text = f"hello \nthe {QUESTION[0]['content']}\nyou {QUESTION[1]['content']}\nall"
    _, answer = tiny.json("POST", "/tokenize", {"content": text}, {"Authorization": f"Bearer {KEY}"})
    assert chat.usage.prompt_tokens == len(answer["tokens"])


def test_the_keys_of_a_translated_chat(tiny):
    import openai

    with translating(tiny, "--api-key", KEY) as url:
        assert client(url, KEY).completions.create(model="x", prompt="hello", max_tokens=1)
        with pytest.raises(openai.AuthenticationError):
            client(url, "another").completions.create(model="x", prompt="hello", max_tokens=1)
    with translating(tiny) as url, pytest.raises(openai.AuthenticationError):  # the server's own refusal
        client(url, "another").completions.create(model="x", prompt="hello", max_tokens=1)


def test_a_translated_stream_that_is_left(smollm2, translated):
    messages = [{"role": "user", "content": "Count to one thousand."}]
    stream = client(translated).chat.completions.create(
        model="x", messages=messages, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in zip(range(5), stream):
        pass
    assert not smollm2.is_idle()
    stream.close()
    wait_until(smollm2.is_idle)


def test_every_example_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.rglob("*"):
        assert path.is_dir() or path.name in text
