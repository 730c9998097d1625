"""The server as a process: every endpoint, what it refuses, and clients that behave badly."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import jsonschema
import numpy as np
import pytest

from tests.serving import ServerProcess, read_events, wait_until
from tests.tiny_models import make_gemma3, make_llama


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    make_llama(path)
    return path


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    folder.mkdir()
    (folder / "mine.html").write_text("<p>mine</p>")
    (folder / "deep").mkdir()
    (folder / "deep" / "module.mjs").write_text("export const x = 1;")
    (folder.parent / "secret.txt").write_text("secret")
    (folder.parent / "pages-2").mkdir()
    (folder.parent / "pages-2" / "secret.txt").write_text("secret")
    (folder / "out.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "outside").symlink_to(folder.parent)
    (folder / "inside.html").symlink_to("mine.html")
    (folder / "circle").symlink_to("circle")
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_path, pages) -> Iterator[ServerProcess]:
    """A model that talks nonsense, at once; three slots."""
    with ServerProcess("-m", tiny_path, "-np", "3", "-cb", "-c", "8192", "--embedding", "--path", pages) as server:
        yield server


@pytest.fixture(scope="module")
def smollm2(smollm2_path) -> Iterator[ServerProcess]:
    with ServerProcess("-m", smollm2_path, "-a", "smollm2", "-np", "4", "-cb", "-c", "2048", "--embedding") as server:
        yield server


# ---- /completion -----------------------------------------------------------------------------------------------------

SETTINGS = {
    "frequency_penalty": 0.0, "grammar": "", "ignore_eos": False, "logit_bias": [], "min_p": 0.05, "mirostat": 0,
    "mirostat_eta": 0.1, "mirostat_tau": 5.0, "model": "smollm2", "n_ctx": 2048, "n_keep": 0, "n_predict": 8,
    "n_probs": 0, "penalize_nl": True, "presence_penalty": 0.0, "repeat_last_n": 64, "repeat_penalty": 1.1,
    "seed": 4294967295, "stop": [], "stream": False, "temp": 0.0, "tfs_z": 1.0, "top_k": 40, "top_p": 0.95,
    "typical_p": 1.0,
}  # fmt: skip
FRANCE = {"prompt": "The capital of France is", "n_predict": 8, "temperature": 0}


def test_a_completion(smollm2):
    answer = smollm2.post("/completion", **FRANCE, cache_prompt=False)
    assert answer["content"].startswith(" Paris.")
    assert answer["generation_settings"] == SETTINGS
    timings = answer["timings"]
    assert (timings["prompt_n"], timings["predicted_n"]) == (5, 8)
    for kind in ("prompt", "predicted"):
        n, ms = timings[f"{kind}_n"], timings[f"{kind}_ms"]
        assert timings[f"{kind}_per_second"] == pytest.approx(1e3 * n / ms)
        assert timings[f"{kind}_per_token_ms"] == pytest.approx(ms / n)
    expected = {
        "model": "smollm2", "prompt": FRANCE["prompt"], "stop": True, "stopped_eos": False, "stopped_limit": True,
        "stopped_word": False, "stopping_word": "", "tokens_cached": 13, "tokens_evaluated": 5, "tokens_predicted": 8,
        "truncated": False,
    }  # fmt: skip
    assert {name: answer[name] for name in expected} == expected
    assert set(answer) == {*expected, "content", "generation_settings", "timings", "slot_id"}
    assert "completion_probabilities" not in answer


def test_a_streamed_completion_is_the_same(smollm2):
    whole = smollm2.post("/completion", **FRANCE)
    *chunks, last = smollm2.stream("/completion", **FRANCE)
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert len(chunks) == 8
    for chunk in chunks:
        assert set(chunk) == {"content", "multimodal", "slot_id", "stop"}
        assert chunk["slot_id"] == last["slot_id"] in range(4)
        assert (chunk["stop"], chunk["multimodal"]) == (False, False)
    assert set(last) == set(whole)
    assert (last["content"], last["stop"], last["generation_settings"]["stream"]) == ("", True, True)


def test_a_prompt_that_was_seen_is_not_evaluated_again(smollm2):
    prompt = "Once upon a time there was a small server that liked to answer questions about " * 3
    first = smollm2.post("/completion", prompt=prompt + "trees", n_predict=1)
    second = smollm2.post("/completion", prompt=prompt + "birds", n_predict=1)
    assert second["tokens_evaluated"] == first["tokens_evaluated"]
    assert second["timings"]["prompt_n"] < 4
    assert second["tokens_cached"] == second["tokens_evaluated"] + 1
    third = smollm2.post("/completion", prompt=prompt + "birds", n_predict=1, cache_prompt=False)
    assert third["timings"]["prompt_n"] == third["tokens_evaluated"]


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities(smollm2, stream):
    *chunks, last = smollm2.stream("/completion", **FRANCE, n_probs=2)
    entries = [entry for chunk in chunks for entry in chunk["completion_probabilities"]]
    if not stream:
        last = smollm2.post("/completion", **FRANCE, n_probs=2)
        assert last["completion_probabilities"] == entries
    assert len(entries) == last["tokens_predicted"] == 8
    assert entries[0]["content"] == " Paris"
    assert [probability["tok_str"] for probability in entries[0]["probs"]] == [" Paris", " the"]
    assert entries[0]["probs"][0]["prob"] == pytest.approx(0.77, abs=0.05)


@pytest.mark.parametrize(
    "prompt", ["Hello world", ["Hello world"], [[19556, 905]], [19556, 905], ["Hello", 905], [19556, " world"]]
)
def test_forms_of_prompts(smollm2, prompt):
    options = {"n_predict": 4, "temperature": 0}
    answer = smollm2.post("/completion", prompt=prompt, **options)
    assert answer["prompt"] == prompt
    assert answer["tokens_evaluated"] == 2
    assert answer["content"] == smollm2.post("/completion", prompt="Hello world", **options)["content"]


def test_an_empty_prompt_begins_a_text(tiny):
    for prompt in ("", []):
        assert tiny.post("/completion", prompt=prompt, n_predict=2)["tokens_evaluated"] == 1


@pytest.mark.parametrize("n", [0, 1, 3])
def test_exactly_n_tokens(tiny, n):
    answer = tiny.post("/completion", prompt="hello", n_predict=n, ignore_eos=True)
    *chunks, last = tiny.stream("/completion", prompt="hello", n_predict=n, ignore_eos=True, n_probs=1)
    assert answer["tokens_predicted"] == last["tokens_predicted"] == n
    assert sum(len(chunk["completion_probabilities"]) for chunk in chunks) == n
    assert answer["stopped_limit"] and (n or answer["content"] == "")


def test_stop_words_are_never_sent(smollm2):
    for stop in (["States"], "States", ["never", " United States"]):
        answer = smollm2.post("/completion", **FRANCE, stop=stop)
        *chunks, last = smollm2.stream("/completion", **FRANCE, stop=stop)
        assert answer["stopped_word"] and last["stopped_word"]
        assert answer["stopping_word"] in stop
        assert "".join(chunk["content"] for chunk in chunks) == answer["content"]
        assert "States" not in answer["content"]
        assert answer["generation_settings"]["stop"] == ([stop] if isinstance(stop, str) else stop)


def test_seeds_repeat(tiny):
    texts = {
        tiny.post("/completion", prompt="the", n_predict=8, seed=seed, ignore_eos=True)["content"] for seed in (7, 7)
    }
    assert len(texts) == 1


def test_a_grammar(tiny):
    answer = tiny.post("/completion", prompt="the", grammar='root ::= "hello " ("world" | "day")', n_predict=40)
    assert answer["content"] in ("hello world", "hello day")
    assert answer["stopped_eos"]


def test_biases(smollm2):
    paris, banned = 7042, [[7042, False]]
    assert smollm2.post("/tokenize", content=" Paris") == {"tokens": [paris]}
    assert not smollm2.post("/completion", **FRANCE, logit_bias=banned)["content"].startswith(" Paris")
    answer = smollm2.post("/completion", **{**FRANCE, "n_predict": 3}, logit_bias={str(paris): 100}, repeat_penalty=1)
    assert answer["content"] == " Paris Paris Paris"
    assert answer["generation_settings"]["logit_bias"] == [[paris, 100.0]]
    assert smollm2.post("/completion", **FRANCE, logit_bias=banned)["generation_settings"]["logit_bias"] == banned


def test_every_option_is_repeated_in_the_settings(tiny):
    options = {
        "top_k": 3, "top_p": 0.5, "min_p": 0.1, "n_keep": 1, "tfs_z": 0.9, "typical_p": 0.8, "repeat_penalty": 1.2,
        "repeat_last_n": -1, "penalize_nl": False, "presence_penalty": 0.25, "frequency_penalty": 0.5, "mirostat": 2,
        "mirostat_tau": 4.0, "mirostat_eta": 0.2, "seed": 5, "ignore_eos": True, "n_probs": 1, "n_predict": 2,
    }  # fmt: skip
    more = {"temperature": 0.5, "penalty_prompt": "a", "slot_id": 2, "cache_prompt": True, "image_data": [], "what": {}}
    answer = tiny.post("/completion", prompt="hello", **options, **more)
    assert {name: answer["generation_settings"][name] for name in options} == options
    assert answer["generation_settings"]["temp"] == 0.5
    assert answer["slot_id"] == 2
    assert tiny.post("/completion", prompt="hello", penalty_prompt=[1, 2], n_predict=1, top_k=40.0, seed=None)
    assert tiny.post("/completion", prompt="hello", n_keep=-1, n_predict=1)


def test_more_tokens_than_the_context_holds(tiny_path):
    with ServerProcess("-m", tiny_path, "-c", "64") as server:
        answer = server.post("/completion", prompt="the day", n_predict=150, ignore_eos=True)
        assert (answer["tokens_predicted"], answer["truncated"]) == (150, True)
        long = server.post("/completion", prompt="the day " * 100, n_predict=2, ignore_eos=True)
        assert (long["tokens_predicted"], long["truncated"]) == (2, True)
        chat = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "day"}], ignore_eos=True)
        assert chat["usage"]["total_tokens"] == 64  # without a limit the context is the limit
        chat = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "day " * 100}], ignore_eos=True)
        assert chat["usage"]["completion_tokens"] == 32  # half of it, where the prompt alone would be too long


# ---- the other endpoints of llama.cpp's server -----------------------------------------------------------------------


def test_tokens_and_back(smollm2):
    assert smollm2.post("/tokenize", content="Hello world") == {"tokens": [19556, 905]}
    assert smollm2.post("/detokenize", tokens=[19556, 905]) == {"content": "Hello world"}
    for text in ("", "naïve 🙂 \n\t x", "<|im_start|>user"):
        tokens = smollm2.post("/tokenize", content=text)["tokens"]
        assert smollm2.post("/detokenize", tokens=tokens) == {"content": text}


def test_lone_surrogates_survive(tiny):
    status, answer = tiny.json("POST", "/completion", b'{"prompt": "\\ud800", "n_predict": 1}')
    assert (status, answer["prompt"]) == (200, "\ud800")


def test_embeddings(smollm2):
    hi, again, other = (np.array(smollm2.post("/embedding", content=text)["embedding"]) for text in ("hi", "hi", "bye"))
    assert hi.shape == (576,)
    assert np.allclose(hi, again, atol=1e-3) and not np.allclose(hi, other, atol=1e-1)


def test_embeddings_are_off_without_the_flag(tiny_path):
    with ServerProcess("-m", tiny_path) as server:
        assert "--embedding" in server.refused("/embedding", {"content": "hi"}, 501)
        assert "--embedding" in server.refused("/v1/embeddings", {"input": "hi"}, 501)


def test_several_embeddings(smollm2):
    one, two = (smollm2.post("/embedding", content=text)["embedding"] for text in ("hi", "bye"))
    answers = smollm2.post("/embedding", content=["hi", "bye"])
    assert [answer["index"] for answer in answers] == [0, 1]
    assert np.allclose([answer["embedding"] for answer in answers], [one, two], atol=1e-3)
    assert np.allclose(smollm2.post("/embeddings", content="hi")["embedding"], one, atol=1e-3)
    assert smollm2.post("/embeddings", input="hi")["object"] == "list"


def test_the_small_ones(tiny, smollm2):
    assert tiny.json("GET", "/health")[1]["status"] == "ok"
    assert tiny.json("GET", "/props") == (200, {"assistant_name": "", "user_name": ""})
    status, settings = smollm2.json("GET", "/model.json")
    assert (status, settings) == (200, {**SETTINGS, "n_predict": -1, "temp": 0.8})
    status, models = smollm2.json("GET", "/v1/models")
    (model,) = models["data"]
    assert (status, models["object"], model["id"], model["object"]) == (200, "list", "smollm2", "model")
    assert smollm2.json("GET", "/models") == (200, models)
    assert smollm2.json("GET", "/v1/models/smollm2") == (200, model)
    assert smollm2.json("GET", "/v1/models/gpt-4")[0] == 404
    (model,) = tiny.json("GET", "/v1/models")[1]["data"]
    assert tiny.json("GET", "/v1/models/" + quote(model["id"], safe="")) == (200, model)  # a path


def test_paths_without_v1(tiny):
    options = {"max_tokens": 3, "seed": 1, "messages": GREETING}
    texts = [tiny.post(path, **options)["choices"][0]["message"] for path in ("/v1/chat/completions", "/chat/completions")]
    assert texts[0] == texts[1]
    assert tiny.post("/completions", prompt="a", n_predict=1)["tokens_predicted"] == 1


def test_roles_and_parts_of_messages(tmp_path):
    """As far as the template permits: the newer name of the system's role is known to few, parts of texts are joined."""
    path = tmp_path / "roles.gguf"
    make_llama(path)
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    with ServerProcess("-m", path, "--chat-template", template) as server:
        parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "day"}]
        messages = [{"role": "developer", "content": parts}, {"role": "tool", "content": "x"}, {"role": "assistant"}]
        n = server.post("/v1/chat/completions", messages=messages, max_tokens=1)["usage"]["prompt_tokens"]
        expected = server.post("/tokenize", content="system:the day;tool:x;assistant:;")["tokens"]
        assert n == len(expected)
        assert server.post("/completion", prompt=expected, n_predict=0)["timings"]["prompt_n"] == 1  # they were the same


def test_a_system_prompt_stands_before_every_prompt(tiny_path):
    with ServerProcess("-m", tiny_path, "-np", "2") as server:
        n_alone = server.post("/completion", prompt="hello", n_predict=0)["tokens_evaluated"]
        system = {"prompt": "the day will be there ", "anti_prompt": "User:", "assistant_name": "Bot:"}
        n_system = len(server.post("/tokenize", content=system["prompt"])["tokens"])
        first = server.post("/completion", prompt="hello", n_predict=1, system_prompt=system)
        assert first["tokens_evaluated"] == n_alone + n_system
        assert server.json("GET", "/props")[1] == {"assistant_name": "Bot:", "user_name": "User:"}
        second = server.post("/completion", prompt="world", n_predict=1)
        assert second["timings"]["prompt_n"] <= second["tokens_evaluated"] - n_system + 1
        assert server.post("/completion", prompt=[5, 6], n_predict=1)["tokens_evaluated"] == n_system + 2
        longer = {"prompt": "hello", "system_prompt": {"prompt": "the day " * 1000}}
        assert "the context 512" in server.refused("/completion", longer)
        assert server.json("GET", "/props")[1] == {"assistant_name": "Bot:", "user_name": "User:"}


def test_the_system_prompt_of_a_file(tiny_path, tmp_path):
    file = tmp_path / "system.json"
    file.write_text('{"prompt": "hello", "anti_prompt": "U:", "assistant_name": "A:"}')
    with ServerProcess("-m", tiny_path, "-spf", file) as server:
        assert server.json("GET", "/props")[1] == {"assistant_name": "A:", "user_name": "U:"}


# ---- OpenAI's endpoints ----------------------------------------------------------------------------------------------

GREETING = [{"role": "user", "content": "Say hello."}]


@pytest.fixture(scope="module")
def client(smollm2):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{smollm2.url}/v1", api_key="none", max_retries=0)


def test_a_chat(client):
    chat = client.chat.completions.create(model="x", messages=GREETING, max_tokens=60, temperature=0)
    (choice,) = chat.choices
    assert "Hello" in choice.message.content
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert chat.id.startswith("chatcmpl-") and chat.object == "chat.completion" and chat.model == "smollm2"
    usage = chat.usage
    assert usage.prompt_tokens + usage.completion_tokens == usage.total_tokens


def test_a_streamed_chat_is_the_same(client):
    options = {"model": "x", "messages": GREETING, "temperature": 0}
    for limit, reason in (({"max_completion_tokens": 3}, "length"), ({"max_tokens": 60}, "stop")):
        whole = client.chat.completions.create(**options, **limit)
        usage = {"include_usage": True}
        chunks = list(client.chat.completions.create(**options, **limit, stream=True, stream_options=usage))
        first, *middle, last, end = chunks
        assert len({chunk.id for chunk in chunks}) == 1
        assert first.choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content
        assert last.choices[0].finish_reason == whole.choices[0].finish_reason == reason
        assert end.choices == [] and end.usage.completion_tokens == whole.usage.completion_tokens


def test_the_stream_of_a_chat_ends_with_done(smollm2):
    first, *_, last, done = smollm2.stream("/v1/chat/completions", messages=GREETING, max_tokens=2)
    assert first["choices"][0]["delta"] == {"role": "assistant"}
    assert last["choices"][0]["delta"] == {}
    assert last["timings"]["predicted_n"] == 2 and last["timings"]["prompt_ms"] >= 0
    assert done == "[DONE]"


def test_a_chat_uses_the_models_template(smollm2):
    messages = [{"role": "system", "content": "Be short."}, *GREETING]
    turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    plain = smollm2.post("/completion", prompt=f"{turns}<|im_start|>assistant\n", n_predict=5, temperature=0)
    chat = smollm2.post("/v1/chat/completions", messages=messages, max_tokens=5, temperature=0)
    assert chat["choices"][0]["message"]["content"] == plain["content"]
    assert chat["usage"]["prompt_tokens"] == plain["tokens_evaluated"]


def test_a_template_that_writes_bos(tmp_path):
    path = tmp_path / "gemma.gguf"
    make_gemma3(path)
    with ServerProcess("-m", path) as server:
        chat = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=1)
        text = "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
        assert chat["usage"]["prompt_tokens"] == 1 + len(server.post("/tokenize", content=text)["tokens"])


def test_several_choices(client):
    chat = client.chat.completions.create(model="x", messages=GREETING, max_tokens=4, n=3, seed=1)
    again = client.chat.completions.create(model="x", messages=GREETING, max_tokens=4, n=3, seed=1)
    texts = [choice.message.content for choice in chat.choices]
    assert [choice.index for choice in chat.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert chat.usage.completion_tokens == 12
    chunks = client.chat.completions.create(model="x", messages=GREETING, max_tokens=4, n=3, seed=1, stream=True)
    streamed = ["", "", ""]
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_logarithms_of_probabilities(client):
    options = {"model": "x", "messages": GREETING, "max_tokens": 3, "temperature": 0, "logprobs": True}
    chat = client.chat.completions.create(**options, top_logprobs=2)
    entries = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == chat.choices[0].message.content
    for entry in entries:
        assert bytes(entry.bytes).decode() == entry.token
        assert len(entry.top_logprobs) == 2 and entry.logprob <= entry.top_logprobs[0].logprob <= 0
    assert client.chat.completions.create(**options).choices[0].logprobs.content[0].top_logprobs == []
    chunks = client.chat.completions.create(**options, stream=True)
    assert sum(len(chunk.choices[0].logprobs.content) for chunk in chunks if chunk.choices[0].logprobs) == 3


def test_options_of_both_kinds_in_a_chat(client):
    more = {"grammar": 'root ::= "yes" | "no"', "mirostat": 2}
    bias = {"7042": -100}
    chat = client.chat.completions.create(
        model="x", messages=GREETING, stop=["\n"], logit_bias=bias, presence_penalty=0.1, frequency_penalty=0.1,
        top_p=0.9, seed=3, max_tokens=5, extra_body=more,
    )  # fmt: skip
    assert chat.choices[0].message.content in ("yes", "no")


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 130}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_answers_in_json(client, smollm2):
    options = {"model": "x", "messages": [{"role": "user", "content": "Invent a person, in JSON."}], "max_tokens": 100, "seed": 1}
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    texts = [client.chat.completions.create(**options, response_format=form).choices[0].message.content]
    object_form = {"type": "json_object", "schema": PERSON}
    texts.append(client.chat.completions.create(**options, response_format=object_form).choices[0].message.content)
    texts.append(smollm2.post("/completion", prompt="A person:", json_schema=PERSON, n_predict=100)["content"])
    chunks = client.chat.completions.create(**options, response_format=form, stream=True)
    texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    whole = client.chat.completions.create(**{**options, "max_tokens": 400}, response_format={"type": "json_object"})
    text = whole.choices[0].message.content
    assert text.startswith("{")
    assert whole.choices[0].finish_reason == "length" or isinstance(json.loads(text), dict)
    plain = client.chat.completions.create(**{**options, "max_tokens": 4}, response_format={"type": "text"})
    assert plain.choices[0].message.content


def test_answers_parsed_by_the_client(client):
    from pydantic import BaseModel, Field

    class Person(BaseModel):
        name: str = Field(max_length=12)
        age: int = Field(ge=0, le=130)

    parsed = client.beta.chat.completions.parse(model="x", messages=GREETING, response_format=Person, max_tokens=60, seed=2)
    assert isinstance(parsed.choices[0].message.parsed, Person)


def test_text_completions(client):
    options = {"model": "x", "max_tokens": 3, "temperature": 0}
    one = client.completions.create(prompt="The capital of France is", **options, echo=True, best_of=1)
    assert one.choices[0].text.startswith("The capital of France is Paris")
    for stream in (False, True):
        told = client.completions.create(prompt="The capital of France is", **options, logprobs=2, stream=stream)
        parts = [chunk.choices[0] for chunk in told][:-1] if stream else told.choices
        tokens = [token for part in parts for token in part.logprobs.tokens]
        assert tokens[0] == " Paris" and "The capital of France is" + "".join(tokens) == one.choices[0].text
        ends = [offset for part in parts for offset in part.logprobs.text_offset]
        assert ends == [0, len(tokens[0]), len(tokens[0]) + len(tokens[1])]
        assert len(parts[0].logprobs.top_logprobs[0]) == 2
    two = client.completions.create(prompt=["The capital of France is", "1 2 3 4"], n=2, **options)
    assert len(two.choices) == 4 and two.choices[0].text == two.choices[1].text != two.choices[2].text
    assert two.usage.prompt_tokens == one.usage.prompt_tokens + 7
    for prompt in ([19556, 905], [[19556, 905]]):
        assert client.completions.create(prompt=prompt, **options).usage.prompt_tokens == 2
    chunks = list(client.completions.create(prompt="The capital of France is", **options, stream=True, echo=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == one.choices[0].text


def test_how_likely_a_prompt_was(client):
    """With echo, logprobs tell of the prompt's tokens too, as programs that compare models ask."""
    text = "The capital of France is Paris. The capital of Italy is"
    options = {"model": "x", "temperature": 0, "logprobs": 2, "echo": True}
    told = client.completions.create(prompt=text, max_tokens=2, **options).choices[0]
    scores = told.logprobs
    assert "".join(scores.tokens) == told.text and told.text.startswith(text)
    assert scores.text_offset == [sum(map(len, scores.tokens[:i])) for i in range(len(scores.tokens))]
    assert scores.token_logprobs[0] is scores.top_logprobs[0] is None
    assert all(logprob <= max(top.values()) <= 0 for logprob, top in zip(scores.token_logprobs[1:], scores.top_logprobs[1:]))
    for i in (1, 5, 8):  # what follows the prompt up to there, by its own
        before = "".join(scores.tokens[:i])
        alone = client.completions.create(prompt=before, max_tokens=1, model="x", temperature=0, logprobs=2).choices[0].logprobs
        for one, other in ((alone.top_logprobs[0], scores.top_logprobs[i]), (scores.top_logprobs[i], alone.top_logprobs[0])):
            best = next(iter(one))
            assert one[best] == pytest.approx(other[best], abs=0.2)
    nothing = client.completions.create(prompt=text, max_tokens=0, **options).choices[0]
    assert nothing.text == text
    assert nothing.logprobs.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:-2], abs=0.1)
    chunks = [chunk.choices[0] for chunk in client.completions.create(prompt=text, max_tokens=2, stream=True, **options)]
    assert "".join(chunk.text for chunk in chunks) == told.text
    assert [t for chunk in chunks if chunk.logprobs for t in chunk.logprobs.tokens] == scores.tokens
    assert [at for chunk in chunks if chunk.logprobs for at in chunk.logprobs.text_offset] == scores.text_offset


def test_openai_embeddings(client, smollm2):
    answer = client.embeddings.create(model="x", input=["hi", "bye"])  # this client asks for base64
    assert [item.index for item in answer.data] == [0, 1]
    assert np.linalg.norm(answer.data[0].embedding) == pytest.approx(1, abs=1e-4)
    plain = smollm2.post("/v1/embeddings", input="hi")["data"][0]["embedding"]
    assert np.allclose(plain, answer.data[0].embedding, atol=1e-3)
    packed = smollm2.post("/v1/embeddings", input="hi", encoding_format="base64")["data"][0]["embedding"]
    assert len(base64.b64decode(packed)) == 4 * 576


def test_errors_as_the_client_sees_them(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="x", messages=GREETING, temperature="hot")
    with pytest.raises(openai.NotFoundError):
        client.files.list()


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, body, complaint",
    [
        ("/completion", b"", "empty"),
        ("/completion", b"{", "not valid JSON"),
        ("/completion", b'{"prompt": "\xff"}', "not valid JSON"),
        ("/completion", b'{"prompt": "x", "temperature": NaN}', "NaN is not a number"),
        ("/completion", b'{"prompt": "x", "temperature": 1e999}', "1e999 is too large"),
        ("/completion", b'{"prompt": "x", "temperature": -Infinity}', "Infinity is not a number"),
        ("/completion", b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not valid JSON"),
        ("/completion", b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        ("/completion", b'{"a":' * 100_000, "nested too deeply"),
        ("/completion", [], "must be a JSON object, not an array"),
        ("/completion", "x", "must be a JSON object"),
        ("/completion", None, "must be a JSON object"),
        ("/completion", {}, "prompt is missing"),
        ("/completion", {"prompt": None}, "prompt is missing"),
        ("/completion", {"prompt": {}}, "prompt must be"),
        ("/completion", {"prompt": [None]}, r"prompt[0] must be a token"),
        ("/completion", {"prompt": ["x", 1.5]}, "prompt[1] must be a token"),
        ("/completion", {"prompt": [-1]}, "prompt[0] must be a token between 0 and"),
        ("/completion", {"prompt": [10**9]}, "prompt[0] must be a token between 0 and"),
        ("/completion", {"prompt": "x", "stream": "yes"}, "stream must be true or false"),
        ("/completion", {"prompt": "x", "n_predict": -2}, "n_predict must be at least -1"),
        ("/completion", {"prompt": "x", "n_predict": 10**30}, "n_predict must be an integer"),
        ("/completion", {"prompt": "x", "n_predict": True}, "n_predict must be an integer, not true"),
        ("/completion", {"prompt": "x", "n_keep": "all"}, 'n_keep must be an integer, not "all"'),
        ("/completion", {"prompt": "x", "stop": [1]}, "stop must be a string or an array of strings"),
        ("/completion", {"prompt": "x", "stop": ["x"] * 1000}, "stop has 1000 strings"),
        ("/completion", {"prompt": "x", "temperature": "hot"}, "temperature must be a number"),
        ("/completion", {"prompt": "x", "temperature": 1e300}, "temperature must be a number"),
        ("/completion", {"prompt": "x", "top_k": 1.5}, "top_k must be an integer"),
        ("/completion", {"prompt": "x", "min_p": 2}, "min_p must be between 0 and 1"),
        ("/completion", {"prompt": "x", "mirostat": 3}, "mirostat must be 0, 1 or 2"),
        ("/completion", {"prompt": "x", "repeat_penalty": 0}, "repeat_penalty must be greater than 0"),
        ("/completion", {"prompt": "x", "penalize_nl": 1}, "penalize_nl must be true or false"),
        ("/completion", {"prompt": "x", "n_probs": 10**6}, "n_probs must be between 0 and 1000"),
        ("/completion", {"prompt": "x", "penalty_prompt": 1}, "penalty_prompt must be"),
        ("/completion", {"prompt": "x", "penalty_prompt": ["x"]}, "penalty_prompt[0] must be a token"),
        ("/completion", {"prompt": "x", "logit_bias": "x"}, "logit_bias must be an array"),
        ("/completion", {"prompt": "x", "logit_bias": [1]}, "logit_bias[0] must be a pair"),
        ("/completion", {"prompt": "x", "logit_bias": [["x", 1]]}, "logit_bias[0] must begin with a token"),
        ("/completion", {"prompt": "x", "logit_bias": [[1, True]]}, "logit_bias[0] must end with a number or false"),
        ("/completion", {"prompt": "x", "logit_bias": {"x": 1}}, "logit_bias[0] must begin with a token"),
        ("/completion", {"prompt": "x", "grammar": 1}, "grammar must be a string"),
        ("/completion", {"prompt": "x", "grammar": "root ::= nothing"}, "grammar, line 1"),
        ("/completion", {"prompt": "x", "slot_id": 99}, "slot_id must be between -1 and 2, not 99"),
        ("/completion", {"prompt": "x", "cache_prompt": "x"}, "cache_prompt must be"),
        ("/completion", {"prompt": "x", "system_prompt": 5}, "system_prompt must be an object or a string"),
        ("/completion", {"prompt": "x", "system_prompt": {"prompt": 1}}, "system_prompt.prompt must be a string"),
        ("/tokenize", {}, "content is missing"),
        ("/tokenize", {"content": 1}, "content must be a string"),
        ("/detokenize", {}, "tokens is missing"),
        ("/detokenize", {"tokens": "x"}, "tokens must be an array"),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens[1] must be a token"),
        ("/embedding", {}, "content is missing"),
        ("/v1/chat/completions", {}, "messages is missing"),
        ("/v1/chat/completions", {"messages": "x"}, "messages must be an array"),
        ("/v1/chat/completions", {"messages": []}, "messages must not be empty"),
        ("/v1/chat/completions", {"messages": [{"role": 1}]}, "messages[0].role must be a string"),
        ("/v1/chat/completions", {"messages": GREETING, "n": 0}, "n must be between 1 and"),
        ("/v1/chat/completions", {"messages": GREETING, "max_tokens": "x"}, "max_tokens must be an integer"),
        ("/v1/chat/completions", {"messages": GREETING, "top_logprobs": 50, "logprobs": True}, "top_logprobs must be"),
        ("/v1/chat/completions", {"messages": GREETING, "stream_options": 1}, "stream_options must be an object"),
        ("/completion", {"prompt": "x", "json_schema": {"type": "thing"}}, "json_schema: "),
        ("/completion", {"prompt": "x", "json_schema": {"not": {"type": "string"}}, "grammar": "root ::= [a]"}, "json_schema: "),
        ("/completion", {"prompt": "x", "json_schema": {}, "grammar": "root ::= [a]"}, "grammar and json_schema cannot"),
        ("/completion", {"prompt": "x", "json_schema": 5}, "json_schema: "),
        ("/v1/chat/completions", {"messages": GREETING, "response_format": "json"}, "response_format must be an object"),
        ("/v1/chat/completions", {"messages": GREETING, "response_format": {"type": "xml"}}, "response_format.type must be text"),
        ("/v1/chat/completions", {"messages": GREETING, "response_format": {"type": "json_schema"}},
         "response_format.json_schema.schema is missing"),
        ("/v1/chat/completions", {"messages": GREETING, "response_format": {"type": "json_schema",
         "json_schema": {"schema": {"type": 1}}}}, "response_format.json_schema.schema: "),
        ("/v1/chat/completions", {"messages": GREETING, "response_format": {"type": "json_object"}, "grammar": "root ::= [a]"},
         "grammar and response_format cannot"),
        ("/v1/chat/completions", {"messages": GREETING, "stream_options": {"include_usage": 1}},
         "stream_options.include_usage must be"),
        ("/v1/completions", {"prompt": []}, "prompt is empty"),
        ("/v1/completions", {"prompt": ["x", 10**9]}, "prompt[1] must be a token"),
        ("/v1/completions", {"prompt": [["x"], 1]}, "prompt[1] must be a string or an array"),
        ("/completion", {"prompt": [[1], [1, []]]}, "prompt[1][1] must be a token"),
        ("/completion", {"prompt": ["x"] * 129}, "prompt has 129 elements; at most 128"),
        ("/infill", {"prompt": "x"}, "input_prefix is missing"),
        ("/infill", {"input_prefix": 1}, "input_prefix must be a string"),
        ("/tokenize", {"content": "x", "with_pieces": 1}, "with_pieces must be true or false"),
        ("/v1/completions", {"prompt": [1], "suffix": "x"}, "prompt must be a string"),
        ("/v1/completions", {"prompt": "x", "suffix": 1}, "suffix must be a string"),
        ("/v1/chat/completions", {"messages": GREETING, "top_logprobs": 1}, "top_logprobs needs logprobs"),
        ("/v1/embeddings", {"input": "x", "dimensions": 5}, "dimensions must be 64"),
        ("/v1/embeddings", {"input": "the day " * 9000}, "is too long for its embedding; 8191 are possible"),
        ("/v1/completions", {"prompt": ["x"] * 2, "n": 100}, "n asks for 200 answers"),
        ("/v1/embeddings", {"input": {}}, "input must be"),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}, "encoding_format must be"),
    ],
)  # fmt: skip
def test_wrong_requests(tiny, path, body, complaint):
    assert complaint in tiny.refused(path, b"null" if body is None else body)


def test_what_is_not_possible(tiny):
    assert "image" in tiny.refused("/completion", {"prompt": "x", "image_data": [{"data": "", "id": 1}]}, 501)
    for name in ("tools", "functions"):
        body = {"messages": GREETING, name: [{"type": "function"}]}
        assert f"{name}: function calling" in tiny.refused("/v1/chat/completions", body, 501)
    assert tiny.post("/v1/chat/completions", messages=GREETING, tools=[{}], tool_choice="none", max_tokens=1)
    picture = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}
    message = tiny.refused("/v1/chat/completions", {"messages": [picture]}, 501)
    assert message.startswith("messages[0].content[1]: image_url needs a model that takes more than text")
    assert "best_of" in tiny.refused("/v1/completions", {"prompt": "x", "best_of": 3, "n": 2}, 501)
    for path, body in (("/infill", {"input_prefix": "x"}), ("/v1/completions", {"prompt": "x", "suffix": "y"})):
        message = tiny.refused(path, body, 501)
        assert all(f"fim_{name}_token_id" in message for name in ("pre", "suf", "mid"))


def test_paths_and_methods(tiny):
    for method, path, code in (
        ("POST", "/nothing", 404),
        ("GET", "/nothing", 404),
        ("GET", "/completion", 405),
        ("DELETE", "/completion", 405),
        ("POST", "/health", 405),
        ("BREW", "/coffee", 404),
        ("GET", "/a%0ab", 404),
        ("GET", "/%ffx", 404),
        ("GET", "/%00", 404),
    ):
        status, answer = tiny.json(method, path)
        assert (status, answer["error"]["code"]) == (code, code)
    assert tiny.send("GET", "/completion").headers["Allow"] == "POST"
    assert tiny.send("HEAD", "/health").status == 200


def test_the_key(tiny_path):
    with ServerProcess("-m", tiny_path, "--api-key", "other,sésame") as server:
        key = "Bearer sésame".encode().decode("latin-1")
        for header in ({}, {"Authorization": "Bearer x"}, {"Authorization": "sesame"}, {"Authorization": "Bearer"},
                       {"Authorization": "Bearer other,sesame"}, {"Authorization": "Basic other"}):  # fmt: skip
            status, answer = server.json("POST", "/tokenize", {"content": "x"}, header)
            assert (status, answer["error"]["code"]) == (401, 401)
        for right in (key, "bearer other"):
            assert server.json("POST", "/tokenize", {"content": "x"}, {"Authorization": right})[0] == 200
        assert server.json("GET", "/health")[0] == 200
        assert server.send("OPTIONS", "/tokenize").status == 200


# ---- pages of other origins, files -----------------------------------------------------------------------------------


def test_other_origins_may_ask(tiny):
    for method, path in (
        ("OPTIONS", "/completion"),
        ("OPTIONS", "/anything/at/all"),
        ("GET", "/health"),
        ("GET", "/no"),
    ):
        headers = tiny.send(method, path, headers={"Origin": "http://there"}).headers
        assert headers["Access-Control-Allow-Origin"] == "http://there"
        assert headers["Access-Control-Allow-Credentials"] == "true"
        assert "POST" in headers["Access-Control-Allow-Methods"]
        assert headers["Access-Control-Allow-Headers"]
    assert tiny.send("OPTIONS", "/completion").headers["Access-Control-Allow-Origin"] == "*"
    asked = {"Access-Control-Request-Headers": "content-type,x-y"}
    assert (
        tiny.send("OPTIONS", "/completion", headers=asked).headers["Access-Control-Allow-Headers"] == "content-type,x-y"
    )


def test_files_of_a_folder_come_first(tiny):
    assert tiny.send("GET", "/mine.html").read() == b"<p>mine</p>"
    assert tiny.send("GET", "/inside.html").read() == b"<p>mine</p>"  # a link within
    module = tiny.send("GET", "/deep/module.mjs")
    assert module.headers["Content-Type"].startswith("text/javascript")
    for path in ("/", "/completion.js"):
        assert tiny.send("GET", path).status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt", "/%2e%2e/secret.txt", "/%252e%252e/secret.txt", "/%252e%252e%252fsecret.txt", "/..%2fsecret.txt",
        "/deep/../../secret.txt", "/deep/%2e%2e/%2e%2e/secret.txt", "/..%5csecret.txt", "/../pages-2/secret.txt",
        "//etc/passwd", "/%2fetc/passwd", "/deep", "/out.txt", "/outside/secret.txt", "/outside/pages-2/secret.txt",
        "/circle", "/" + "x" * 5000, "/mine.html%00.png",
    ],  # fmt: skip
)
def test_files_elsewhere_are_not_sent(tiny, path):
    assert tiny.json("GET", path)[0] == 404


# ---- clients that behave badly ---------------------------------------------------------------------------------------

ENDLESS = {"prompt": "hello", "n_predict": -1, "ignore_eos": True}


def test_a_client_that_leaves_frees_its_slot(tiny):
    for fields in (ENDLESS, {**ENDLESS, "stream": True}):
        connections = [http.client.HTTPConnection("127.0.0.1", tiny.port) for _ in range(5)]
        for connection in connections:  # two of them have to wait
            connection.request("POST", "/completion", json.dumps(fields))
        wait_until(lambda: tiny.json("GET", "/health")[1]["requests_waiting"] == 2)
        for connection in connections:
            connection.close()
        wait_until(tiny.is_idle, 3)


def test_a_client_that_leaves_a_stream_in_the_middle(tiny):
    response = tiny.send("POST", "/completion", {**ENDLESS, "stream": True})
    events = read_events(response)
    assert [next(events)["stop"] for _ in range(3)] == [False] * 3
    response.connection.close()
    response.close()
    wait_until(tiny.is_idle, 3)


def test_health_answers_while_all_slots_are_busy(tiny):
    streams = [tiny.stream("/completion", **ENDLESS) for _ in range(8)]
    threads = [threading.Thread(target=next, args=[stream]) for stream in streams]
    for thread in threads[:3]:
        thread.start()
    for thread in threads[:3]:
        thread.join()
    began = time.monotonic()
    assert tiny.json("GET", "/health")[1]["slots_idle"] == 0
    assert tiny.post("/tokenize", content="hello")
    assert time.monotonic() - began < 2
    for stream in streams:
        stream.close()
    wait_until(tiny.is_idle)


def test_text_comes_when_it_is_made(tiny):
    """Nothing waits in buffers: an endless stream delivers its first events at once."""
    began = time.monotonic()
    with contextlib.closing(tiny.stream("/completion", **ENDLESS)) as stream:
        next(stream)
    assert time.monotonic() - began < 2


def test_too_many_requests(tiny_path):
    with ServerProcess("-m", tiny_path, "--queue", "1") as server, contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", server.port)
            stack.callback(connection.close)
            connection.request("POST", "/completion", json.dumps(ENDLESS))
        wait_until(lambda: server.json("GET", "/health")[1]["requests_waiting"] == 1)
        assert "try again" in server.refused("/completion", {"prompt": "x"}, 429)
        assert server.send("POST", "/completion", {"prompt": "x"}).headers["Retry-After"] == "1"


def test_bodies_that_are_too_large(tiny):
    with socket.create_connection(("127.0.0.1", tiny.port), timeout=10) as connection:
        connection.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n{")
        with http.client.HTTPResponse(connection, method="POST") as answer:
            answer.begin()
            assert (answer.status, json.loads(answer.read())["error"]["code"]) == (413, 413)
    assert tiny.refused("/completion", b" " * (17 << 20), 413)
    assert len(tiny.post("/tokenize", content="xy" * (4 << 20))["tokens"]) >= 4 << 20


def test_fields_of_any_type_and_size(tiny):
    """Whatever stands in the fields, the answer is a result or an error that is the client's."""
    rng = random.Random(1)
    names = [
        *SETTINGS,
        "prompt",
        "temperature",
        "penalty_prompt",
        "system_prompt",
        "content",
        "tokens",
        "messages",
        "input",
    ]
    names += ["max_tokens", "n", "logprobs", "top_logprobs", "stream_options", "echo", "slot_id", "cache_prompt"]
    leaves = [None, True, False, 0, -1, 2**31, 10**40, 0.5, 1e-300, -1e38, 1e300, "", "x", "\0", "\ud800", "é" * 99]

    def value(depth: int = 0) -> object:
        kind = rng.randrange(8) if depth < 4 else 2
        if kind == 0:
            return [value(depth + 1) for _ in range(rng.randrange(4))]
        if kind == 1:
            return {rng.choice(["role", "content", "prompt", "5"]): value(depth + 1) for _ in range(rng.randrange(3))}
        return rng.choice(leaves)

    paths = [
        "/completion",
        "/tokenize",
        "/detokenize",
        "/embedding",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
    ]
    statuses = set()
    for _ in range(400):
        body = {"prompt": "hello", "content": "hi", "tokens": [1], "messages": GREETING, "input": "a"}
        body |= {rng.choice(names): value() for _ in range(rng.randrange(4))}
        body |= {"n_predict": 2, "max_tokens": 2, "system_prompt": rng.choice([None, 1])}
        response = tiny.send("POST", rng.choice(paths), body)
        assert b"server_error" not in response.read(), body
        statuses.add(response.status)
    assert statuses == {200, 400}
    assert tiny.is_idle()


def test_half_a_request_hurts_nobody(tiny):
    halves = [socket.create_connection(("127.0.0.1", tiny.port)) for _ in range(20)]
    for half in halves:
        half.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n{")
    assert tiny.post("/completion", prompt="hello", n_predict=2)
    for half in halves:
        half.close()
    assert tiny.post("/completion", prompt="hello", n_predict=2)


# ---- starting and stopping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_its_streams(tiny_path, number):
    with ServerProcess("-m", tiny_path, "-np", "2", "-cb", "-c", "8192") as server:
        streams = [server.stream("/completion", **ENDLESS) for _ in range(2)]
        for stream in streams:
            next(stream)
        began = time.monotonic()
        server.process.send_signal(number)
        for stream in streams:
            *_, last = stream
            assert last["error"]["code"] == 503
        assert server.process.wait(timeout=10) == 0
        assert time.monotonic() - began < 5
    assert not [line for line in server.log if "Traceback" in line]


def test_a_model_that_cannot_be_loaded(tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(AssertionError, match="the server ended"), ServerProcess("-m", path):
        pass


def test_one_line_for_each_request(tiny):
    tiny.post("/completion", prompt="hello", n_predict=2, ignore_eos=True)
    wait_until(lambda: any("POST /completion 200" in line and "generated 2" in line for line in tiny.log))


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_as_the_document_has_it(smollm2):
    command = [
        "curl", "--silent", "--request", "POST", "--url", f"{smollm2.url}/completion",
        "--header", "Content-Type: application/json",
        "--data", '{"prompt": "Building a website can be done in 10 simple steps:","n_predict": 16}',
    ]  # fmt: skip
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)
    assert answer["content"] and answer["tokens_predicted"] == 16


def test_many_streams_give_what_they_give_alone(smollm2):
    prompts = [
        f"{word} is a word that" for word in ("Tree", "House", "Water", "Stone", "Light", "Bread", "Music", "Cloud")
    ]
    alone = [smollm2.post("/completion", prompt=prompt, n_predict=12, temperature=0)["content"] for prompt in prompts]
    together = [""] * len(prompts)

    def ask(i: int) -> None:
        events = smollm2.stream("/completion", prompt=prompts[i], n_predict=12, temperature=0, cache_prompt=False)
        together[i] = "".join(event["content"] for event in events)

    threads = [threading.Thread(target=ask, args=[i]) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
