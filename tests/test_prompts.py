"""What becomes of a prompt in a running server: its forms, several at a time, filling in, and the system prompt before it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import ServerProcess, read_events, wait_until
from tests.tiny_models import make_gemma3, make_llama

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
GREEDY = {"temperature": 0, "ignore_eos": True, "n_predict": 6}
UNSHARED = {**GREEDY, "cache_prompt": False}
"""All of the prompt is evaluated anew."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def coder(folder) -> Iterator[ServerProcess]:
    """Byte-level, can fill in, wants no BOS; two slots."""
    make_llama(folder / "coder.gguf", specials=FIM)
    with ServerProcess("-m", folder / "coder.gguf", "-np", "2", "-cb", "-c", "2048", "--embedding") as server:
        yield server


@pytest.fixture(scope="module")
def pieces(folder) -> Iterator[ServerProcess]:
    """SentencePiece, can fill in, texts begin with BOS and a space; one slot."""
    make_gemma3(folder / "pieces.gguf", specials=("▁<PRE>", "▁<SUF>", "▁<MID>"), space_prefix=True)
    with ServerProcess("-m", folder / "pieces.gguf", "-c", "1024") as server:
        yield server


def tokens_of(server: ServerProcess, text: str, **more: Any) -> list[int]:
    return server.post("/tokenize", content=text, **more)["tokens"]


def assert_same_tokens(server: ServerProcess, answer: dict[str, Any], expected: list[int], content: str) -> None:
    """The prompt of an answer, to UNSHARED options, was this one: all that can be shared is, and the same text follows."""
    again = server.post("/completion", prompt=expected, n_predict=0)
    assert answer["tokens_evaluated"] == again["tokens_evaluated"] == len(expected)
    assert again["timings"]["prompt_n"] == 1
    assert server.post("/completion", prompt=expected, **UNSHARED)["content"] == content


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_no_space_and_no_bos_come_by_themselves(pieces):
    plain, spaced = tokens_of(pieces, "hello"), tokens_of(pieces, " hello")
    assert len(plain) == len(spaced) == 1 and plain != spaced
    for text in ("hello", " hello", "  x", "", "\n a"):
        assert pieces.post("/detokenize", tokens=tokens_of(pieces, text)) == {"content": text}
    (bos,) = tokens_of(pieces, "", add_special=True)
    assert tokens_of(pieces, "hello", add_special=True) == [bos, *plain]
    answer = pieces.post("/completion", prompt="hello", **UNSHARED)
    assert_same_tokens(pieces, answer, [bos, *spaced], answer["content"])


def test_pieces_of_tokens(coder, pieces):
    told = tokens_of(pieces, "the day", with_pieces=True)
    assert [item["piece"] for item in told] == ["the", " day"]
    assert [item["id"] for item in told] == tokens_of(pieces, "the day")
    assert [item["piece"] for item in tokens_of(coder, "é", with_pieces=True)] == [[0xC3], [0xA9]]


def test_a_mixed_prompt_begins_once(pieces):
    (bos,) = tokens_of(pieces, "", add_special=True)
    spaced, plain, day = tokens_of(pieces, " hello"), tokens_of(pieces, "hello"), tokens_of(pieces, " day")
    for prompt, expected in (
        (["hello", day[0]], [bos, *spaced, *day]),
        (["hello", day[0], "hello"], [bos, *spaced, *day, *plain]),
        ([day[0], "hello"], [*day, *plain]),
    ):
        answer = pieces.post("/completion", prompt=prompt, **UNSHARED)
        assert answer["prompt"] == prompt
        assert_same_tokens(pieces, answer, expected, answer["content"])


def test_an_echoed_prompt_is_the_text_that_was_sent(pieces):
    options = {"prompt": "hello day", "echo": True, "max_tokens": 1, "logprobs": 1}
    (choice,) = pieces.post("/v1/completions", **options)["choices"]
    assert choice["text"].startswith("hello day")
    assert choice["logprobs"]["tokens"][:3] == ["<bos>", " hello", " day"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 5, 9]
    first, *_ = pieces.stream("/v1/completions", **options)
    assert first["choices"][0]["text"] == "hello day" and first["choices"][0]["logprobs"]["text_offset"] == [0, 0, 5]
    assert "context of more than" in pieces.refused("/v1/completions", {**options, "prompt": "day " * 1100})


# ---- several prompts -------------------------------------------------------------------------------------------------

SEVERAL = [["the day", "hello world"], [[300, 301, 302], "the day", ["hello", 300]]]


@pytest.mark.parametrize("prompts", SEVERAL, ids=["strings", "arrays"])
def test_several_prompts(coder, prompts):
    alone = [
        coder.post("/completion", prompt=prompt if isinstance(prompt, list) else [prompt], **GREEDY)
        for prompt in prompts
    ]
    answers = coder.post("/completion", prompt=prompts, n_probs=1, **GREEDY)
    assert [answer["index"] for answer in answers] == list(range(len(prompts)))
    assert [answer["prompt"] for answer in answers] == prompts
    assert [answer["content"] for answer in answers] == [answer["content"] for answer in alone]
    assert all(len(answer["completion_probabilities"]) == 6 for answer in answers)
    assert all("index" not in answer for answer in alone)
    streamed = [""] * len(prompts)
    ended = []
    for event in coder.stream("/completion", prompt=prompts, **GREEDY):
        streamed[event["index"]] += event["content"]
        if event["stop"]:
            ended.append((event["index"], event["prompt"]))
    assert streamed == [answer["content"] for answer in alone]
    assert sorted(ended, key=lambda end: end[0]) == list(enumerate(prompts))


def overlap(order: list[int]) -> bool:
    """Do the streams 0 and 1 both begin before either ends?"""
    first, last = {i: order.index(i) for i in (0, 1)}, {i: len(order) - 1 - order[::-1].index(i) for i in (0, 1)}
    return max(first.values()) < min(last.values())


def test_several_prompts_come_side_by_side(coder):
    """Both streams of a request are heard before either has ended."""
    options = {**GREEDY, "n_predict": 200, "cache_prompt": False}
    order = [event["index"] for event in coder.stream("/completion", prompt=["the", "day"], **options)]
    assert overlap(order)
    chunks = coder.stream("/v1/completions", prompt="the", n=2, ignore_eos=True, max_tokens=100)
    order = [chunk["choices"][0]["index"] for chunk in chunks if chunk != "[DONE]"]
    assert overlap(order)


def test_more_prompts_than_slots(coder):
    answers = coder.post("/completion", prompt=[f"the {i}" for i in range(9)], **GREEDY)
    assert [answer["index"] for answer in answers] == list(range(9))
    assert {answer["slot_id"] for answer in answers} == {0, 1}


def test_a_client_that_leaves_several_streams(coder):
    with contextlib.closing(
        coder.send("POST", "/completion", {"prompt": ["a", "b", "c"], "stream": True, "ignore_eos": True})
    ) as r:
        assert r.readline()
        r.connection.close()
    wait_until(coder.is_idle, 3)


# ---- filling in ------------------------------------------------------------------------------------------------------


def infill(server: ServerProcess, **fields: Any) -> tuple[str, dict[str, Any]]:
    """The text, and the last event; always a stream."""
    *chunks, last = server.stream("/infill", **fields)
    return "".join(chunk["content"] for chunk in chunks), last


@pytest.mark.parametrize(
    "prefix, suffix", [("the day", " world"), ("", "hello"), ("hello <|im_end|>", ""), ("a", " <|fim_middle|>")]
)
def test_filling_in_of_a_byte_level_model(coder, prefix, suffix):
    text, last = infill(coder, input_prefix=prefix, input_suffix=suffix, prompt="ignored", **UNSHARED)
    plain = [byte for text in (prefix, suffix) for byte in plain_tokens(coder, text)]
    n_prefix = len(plain_tokens(coder, prefix))
    assert_same_tokens(coder, last, [3, *plain[:n_prefix], 4, *plain[n_prefix:], 5], text)
    assert (last["prompt"], last["generation_settings"]["stream"], last["tokens_predicted"]) == ("", True, 6)


def plain_tokens(server: ServerProcess, text: str) -> list[int]:
    """Those of a text in which special tokens are spelled out, letter by letter, as no word of the vocabulary has these signs."""
    if "<|" not in text:
        return tokens_of(server, text)
    words, _, rest = text.partition("<")
    return [*tokens_of(server, words), *(token for letter in "<" + rest for token in tokens_of(server, letter))]


def test_filling_in_of_a_sentencepiece_model(pieces):
    """The prefix begins a text, with a space; the suffix goes on with one."""
    (bos,) = tokens_of(pieces, "", add_special=True)
    (pre,), (suf,), (mid,) = (tokens_of(pieces, f"▁<{mark}>") for mark in ("PRE", "SUF", "MID"))
    before, after = tokens_of(pieces, " hello"), tokens_of(pieces, "day world")
    text, last = infill(pieces, input_prefix="hello", input_suffix="day world", **UNSHARED)
    assert_same_tokens(pieces, last, [bos, pre, *before, suf, *after, mid], text)


def test_infill_takes_the_options_of_completion(coder):
    options = {**GREEDY, "n_predict": 4, "n_probs": 2, "stop": ["\n"], "grammar": 'root ::= "hello"'}
    body = {"input_prefix": "the", "input_suffix": "day", **options, "stream": False}
    with contextlib.closing(coder.send("POST", "/infill", body)) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        *chunks, last = read_events(response)
    assert "".join(chunk["content"] for chunk in chunks) == "hello"
    assert all(1 <= len(entry["probs"]) <= 2 for chunk in chunks for entry in chunk["completion_probabilities"])
    settings = last["generation_settings"]
    assert {name: settings[name] for name in ("n_predict", "n_probs", "stop", "grammar")} == {
        name: options[name] for name in ("n_predict", "n_probs", "stop", "grammar")
    }


def test_text_completions_with_a_suffix(coder):
    whole = coder.post("/v1/completions", prompt="the", suffix=" day", max_tokens=6, temperature=0, ignore_eos=True)
    text, _ = infill(coder, input_prefix="the", input_suffix=" day", **GREEDY)
    assert whole["choices"][0]["text"] == text


# ---- the system prompt -----------------------------------------------------------------------------------------------

SYSTEM = {
    "prompt": "the day will be there and what have they for this world " * 8,
    "anti_prompt": "U:",
    "assistant_name": "A:",
}


@pytest.fixture
def slots(folder) -> Iterator[ServerProcess]:
    """Three slots."""
    make_llama(folder / "slots.gguf", specials=FIM)
    with ServerProcess("-m", folder / "slots.gguf", "-np", "3", "-cb", "-c", "2048", "--embedding") as server:
        yield server


def test_a_system_prompt_stands_before_everything_that_is_generated(slots):
    talk = [{"role": "user", "content": "hello"}]
    requests = {
        "/completion": {"prompt": "hello", **GREEDY},
        "/v1/completions": {"prompt": "hello", "max_tokens": 2},
        "/v1/chat/completions": {"messages": talk, "max_tokens": 2},
    }

    def n_prompt(path: str) -> int:
        answer = slots.post(path, **requests[path])
        return answer["tokens_evaluated"] if path == "/completion" else answer["usage"]["prompt_tokens"]

    before = {path: n_prompt(path) for path in requests}
    n_embedding = slots.post("/v1/embeddings", input="hello")["usage"]["prompt_tokens"]
    n_infill = infill(slots, input_prefix="a", input_suffix="b", **GREEDY)[1]["tokens_evaluated"]
    n_system = len(tokens_of(slots, SYSTEM["prompt"]))
    slots.post("/v1/chat/completions", messages=talk, max_tokens=1, system_prompt=SYSTEM)  # any endpoint may bring it
    assert {path: n_prompt(path) - n_system for path in requests} == before
    assert infill(slots, input_prefix="a", input_suffix="b", **GREEDY)[1]["tokens_evaluated"] == n_infill + n_system
    assert slots.post("/v1/embeddings", input="hello")["usage"]["prompt_tokens"] == n_embedding
    (choice,) = slots.post("/v1/completions", prompt="hello day", echo=True, max_tokens=0, logprobs=1)["choices"]
    assert choice["text"] == "hello day" and choice["logprobs"]["tokens"] == ["hello", " day"]
    assert None not in choice["logprobs"]["token_logprobs"]  # the system prompt stands before all of them
    slots.post("/completion", prompt="a", n_predict=0, system_prompt="")
    assert {path: n_prompt(path) for path in requests} == before
    assert slots.json("GET", "/props")[1] == {"assistant_name": "", "user_name": ""}


def test_it_is_evaluated_once_for_all_slots(slots):
    n_system = len(tokens_of(slots, SYSTEM["prompt"]))
    first = slots.post("/completion", prompt="hello", system_prompt=SYSTEM, **GREEDY)
    n_evaluated = [first["timings"]["prompt_n"]]
    answers = slots.post("/completion", prompt=["the day", "world", "hello one"], **GREEDY)
    n_evaluated += [answer["timings"]["prompt_n"] for answer in answers]
    assert {answer["slot_id"] for answer in answers} == {0, 1, 2}
    # A prompt that begins in the middle of a block shares all of the system prompt as well.
    assert all(answer["tokens_evaluated"] - n_system >= n for answer, n in zip([first, *answers], n_evaluated))
    assert slots.json("GET", "/props")[1] == {"assistant_name": "A:", "user_name": "U:"}


def test_a_change_leaves_running_requests_alone(slots):
    options = {"prompt": "hello", "temperature": 0, "ignore_eos": True, "n_predict": 300}
    alone = slots.post("/completion", **options)["content"]
    results: list[str] = []
    threads = []
    for _ in range(2):
        stream = slots.stream("/completion", **options, cache_prompt=False)
        first = next(stream)["content"]
        threads.append(
            threading.Thread(target=lambda s=stream, f=first: results.append(f + "".join(e["content"] for e in s)))
        )
        threads[-1].start()
    changed = slots.post("/completion", prompt="hello", system_prompt=SYSTEM, **GREEDY)
    assert changed["tokens_evaluated"] > len(tokens_of(slots, SYSTEM["prompt"]))
    for thread in threads:
        thread.join(timeout=30)
    assert results == [alone, alone]


def test_changes_and_requests_at_once(slots):
    """Each answer is the one of its own system prompt or of a current one; nothing waits for ever, nothing is lost."""
    systems = ["", "the day", "hello world and"]
    expected = {
        slots.post("/completion", prompt=" there", system_prompt=system, **GREEDY)["content"] for system in systems
    }
    own = {
        system: slots.post("/completion", prompt=" there", system_prompt=system, **GREEDY)["content"]
        for system in systems
    }
    wrong: list[Any] = []

    def ask(i: int) -> None:
        for k in range(6):
            system = systems[(i + k) % 3]
            more = {"system_prompt": system} if i % 2 else {}
            content = slots.post("/completion", prompt=" there", **more, **GREEDY)["content"]
            if content != own[system] if more else content not in expected:
                wrong.append((system, content))

    threads = [threading.Thread(target=ask, args=[i]) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert wrong == []
    assert slots.is_idle()


def test_a_refused_request_changes_nothing(slots):
    slots.post("/completion", prompt="a", system_prompt=SYSTEM, n_predict=0)
    for more in ({"temperature": "hot"}, {"slot_id": 99}, {"prompt": [10**9]}):
        slots.refused("/completion", {"prompt": "a", "system_prompt": "the", **more})
        assert slots.json("GET", "/props")[1] == {"assistant_name": "A:", "user_name": "U:"}
    names = {"prompt": SYSTEM["prompt"], "assistant_name": "B:"}
    slots.post("/completion", prompt="a", system_prompt=names, n_predict=0)
    assert slots.json("GET", "/props")[1] == {"assistant_name": "B:", "user_name": ""}


def test_without_continuous_batching_too(folder):
    make_llama(folder / "one.gguf")
    with ServerProcess("-m", folder / "one.gguf", "-np", "2") as server:
        stream = server.stream("/completion", prompt="hello", ignore_eos=True, n_predict=100)
        next(stream)
        answers: list[dict[str, Any]] = []
        threads = [
            threading.Thread(
                target=lambda s=s: answers.append(server.post("/completion", prompt="a", system_prompt=s, **GREEDY))
            )
            for s in ("the day", "hello")
        ]
        for thread in threads:
            thread.start()
        assert sum(event["stop"] for event in stream) == 1
        for thread in threads:
            thread.join(timeout=30)
        assert sorted(answer["tokens_predicted"] for answer in answers) == [6, 6]
