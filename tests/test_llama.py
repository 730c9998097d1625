"""The library's front door, over a tiny model: names, defaults and shapes that users of llama-cpp-python know."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pyllama import Llama, LlamaGrammar
from pyllama.chat import CHATML, ChatTemplateError
from pyllama.engine import EngineClosed
from pyllama.grammar import GrammarError
from pyllama.json_schema import SchemaError
from tests.tiny_models import make_gemma3, make_llama

PROMPT = "hello world, this is the time"
GREEDY = {"temperature": 0.0}
TALK = [{"role": "system", "content": "one"}, {"role": "user", "content": "what time?"}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Llama:
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    make_llama(path)
    with Llama(path, n_ctx=256, n_threads=1, seed=7) as llm:
        yield llm


def text_of(chunks) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def test_a_completion_has_the_known_shape(llm: Llama) -> None:
    answer = llm(PROMPT, max_tokens=12, **GREEDY)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == llm.model_path
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice.keys() == {"text", "index", "logprobs", "finish_reason"}
    assert choice["logprobs"] is None
    n_prompt = len(llm.tokenize(PROMPT))
    n = answer["usage"]["completion_tokens"]
    assert answer["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}
    assert (n, choice["finish_reason"]) == (12, "length") or (n < 12 and choice["finish_reason"] == "stop")


def test_streams_join_to_the_same_text(llm: Llama) -> None:
    whole = llm.create_completion(PROMPT, max_tokens=12, **GREEDY)
    chunks = list(llm.create_completion(PROMPT, max_tokens=12, stream=True, **GREEDY))
    assert text_of(chunks) == whole["choices"][0]["text"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(chunks) - 1)
    assert reasons[-1] == whole["choices"][0]["finish_reason"]


def test_tokens_as_a_prompt_and_positional_arguments(llm: Llama) -> None:
    by_text = llm(PROMPT, None, 5, 0.0)
    by_tokens = llm(llm.tokenize(PROMPT), None, 5, 0.0)
    assert by_text["choices"] == by_tokens["choices"]
    names = list(inspect.signature(Llama.create_completion).parameters)
    assert names[1:6] == ["prompt", "suffix", "max_tokens", "temperature", "top_p"]


def test_the_default_is_sixteen_tokens(llm: Llama) -> None:
    bias = {token: -100.0 for token in llm.model.tokenizer.eog_ids}
    assert llm(PROMPT, logit_bias=bias)["usage"]["completion_tokens"] == 16
    n_prompt = len(llm.tokenize(PROMPT))
    for most in (None, -1, 10_000):
        answer = llm(PROMPT, max_tokens=most, logit_bias=bias)
        assert answer["usage"]["total_tokens"] == 256
        assert answer["choices"][0]["finish_reason"] == "length"
    assert n_prompt < 200


def test_echo_and_stop(llm: Llama) -> None:
    text = llm(PROMPT, max_tokens=12, **GREEDY)["choices"][0]["text"]
    assert llm(PROMPT, max_tokens=12, echo=True, **GREEDY)["choices"][0]["text"] == PROMPT + text
    assert text_of(llm(PROMPT, max_tokens=12, echo=True, stream=True, **GREEDY)) == PROMPT + text
    for stop in (text[4:6], [text[4:6], "never"]):
        (choice,) = llm(PROMPT, max_tokens=12, stop=stop, **GREEDY)["choices"]
        assert choice["text"] == text[: text.index(text[4:6])]
        assert choice["finish_reason"] == "stop"


def test_seeds(llm: Llama) -> None:
    def answer(**options) -> str:
        return llm(PROMPT, max_tokens=20, temperature=1.5, **options)["choices"][0]["text"]

    assert answer(seed=1) == answer(seed=1) != answer(seed=2)
    assert answer() == answer()  # the object's own seed
    assert answer(seed=-1) != answer(seed=-1)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_logprobs_of_completions(llm: Llama, n: int) -> None:
    (choice,) = llm(PROMPT, max_tokens=6, logprobs=n, echo=True, **GREEDY)["choices"]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == len(told["top_logprobs"])
    assert all(value <= 0 for value in told["token_logprobs"])
    assert told["text_offset"][0] == len(PROMPT)
    for token, logprob, best in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert len(best) <= n
        if n:
            assert max(best.values()) == pytest.approx(logprob)
            assert token in best
    chunks = list(llm(PROMPT, max_tokens=6, logprobs=n, echo=True, stream=True, **GREEDY))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    for key in told:
        assert [value for part in streamed for value in part[key]] == told[key]


def test_a_grammar(llm: Llama) -> None:
    (choice,) = llm(PROMPT, max_tokens=30, grammar='root ::= ("yes" | "no") "!"', seed=3)["choices"]
    assert choice["text"] in ("yes!", "no!")
    assert choice["finish_reason"] == "stop"
    with pytest.raises(GrammarError):
        llm(PROMPT, grammar="root ::= (")


def test_response_formats(llm: Llama) -> None:
    def answer(form, **options):
        ends = dict.fromkeys(llm.tokenize('"}', add_bos=False), 6.0)
        answer = llm.create_chat_completion(TALK, response_format=form, logit_bias=ends, seed=4, **options)
        return answer["choices"][0]["message"]["content"]

    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    for form in (
        {"type": "json_object", "schema": schema},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    ):
        assert json.loads(answer(form))["a"] in (1, 2)
    assert isinstance(json.loads(answer({"type": "json_object"})), dict)
    assert answer({"type": "text"}, max_tokens=5) == answer(None, max_tokens=5)
    with pytest.raises(SchemaError, match="#/type"):
        answer({"type": "json_object", "schema": {"type": 1}})
    for form in ({"type": "xml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}):
        with pytest.raises(ValueError, match="response_format"):
            answer(form)
    with pytest.raises(ValueError, match="both"):
        answer({"type": "json_object"}, grammar="root ::= [a-z]")


def test_grammar_objects(llm: Llama, tmp_path: Path) -> None:
    path = tmp_path / "x.gbnf"
    path.write_text('root ::= "yes" | "no"')
    for grammar in (LlamaGrammar.from_file(path), LlamaGrammar.from_json_schema('{"enum": [1, 2]}')):
        assert llm(PROMPT, grammar=grammar)["choices"][0]["text"] in ("yes", "no", "1", "2")
    with pytest.raises(GrammarError):
        LlamaGrammar.from_string("root ::= (")
    with pytest.raises(SchemaError):
        LlamaGrammar.from_json_schema('{"not": {}}')


def test_biases(llm: Llama) -> None:
    (token,) = llm.tokenize("z", add_bos=False)
    assert llm(PROMPT, max_tokens=4, logit_bias={token: 1000.0})["choices"][0]["text"] == "zzzz"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperatur": 1.0}, TypeError),
        ({"temperature": float("nan")}, ValueError),
        ({"mirostat_mode": 3}, ValueError),
        ({"suffix": "end"}, ValueError),
    ],
)
def test_wrong_options_are_refused(llm: Llama, options: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        llm(PROMPT, **options)


def test_a_prompt_that_does_not_fit_is_refused(llm: Llama) -> None:
    with pytest.raises(ValueError, match="the prompt has 256 tokens, the context 256"):
        llm([5] * 256)


def test_an_empty_prompt_begins_a_text(llm: Llama) -> None:
    assert llm("", max_tokens=3)["usage"]["prompt_tokens"] == 1


def test_filling_in(llm: Llama, monkeypatch) -> None:
    tokenizer = llm.model.tokenizer
    with pytest.raises(ValueError, match="fim_pre_token_id, .*fim_suf_token_id, .*fim_mid_token_id"):
        llm("a", suffix="b")
    for name, token in (("fim_pre_id", 10), ("fim_suf_id", 11), ("fim_mid_id", 12)):
        monkeypatch.setattr(tokenizer, name, token)
    before, after = tokenizer.encode("hello"), tokenizer.encode("<|im_end|> world", parse_special=False)
    expected = [10, *before, 11, *after, 12]
    assert llm.infill_tokens("hello", "<|im_end|> world") == tuple(expected)
    answer = llm("hello", suffix="<|im_end|> world", max_tokens=4, **GREEDY)
    assert answer["choices"] == llm(expected, max_tokens=4, **GREEDY)["choices"]


def test_a_chat_has_the_known_shape(llm: Llama) -> None:
    answer = llm.create_chat_completion(TALK, max_tokens=8, **GREEDY)
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant"
    prompt = "<|im_start|>system\none<|im_end|>\n<|im_start|>user\nwhat time?<|im_end|>\n<|im_start|>assistant\n"
    assert list(llm.chat_tokens(TALK)) == llm.tokenize(prompt, special=True)
    plain = llm(llm.tokenize(prompt, special=True), max_tokens=8, **GREEDY)
    assert choice["message"]["content"] == plain["choices"][0]["text"]


def test_a_streamed_chat(llm: Llama) -> None:
    whole = llm.create_chat_completion(TALK, max_tokens=8, **GREEDY)["choices"][0]
    chunks = list(llm.create_chat_completion(TALK, max_tokens=8, stream=True, **GREEDY))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == whole["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_logprobs_of_chats(llm: Llama) -> None:
    answer = llm.create_chat_completion(TALK, max_tokens=5, logprobs=True, top_logprobs=2, **GREEDY)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for entry in content:
        assert entry["logprob"] == pytest.approx(entry["top_logprobs"][0]["logprob"])
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
        assert len(entry["top_logprobs"]) == 2


def test_chatml_ends_answers_of_models_that_have_no_token_for_it(tmp_path) -> None:
    path = tmp_path / "tiny.gguf"
    make_gemma3(path)
    with Llama(path, n_threads=1, chat_template=CHATML) as llm:
        grammar = 'root ::= "so it is" "<|im_end|>" [a-z]{9}'
        (choice,) = llm.create_chat_completion(TALK, max_tokens=60, grammar=grammar)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("so it is", "stop")


def test_messages_that_are_none(llm: Llama) -> None:
    with pytest.raises(ChatTemplateError):
        llm.create_chat_completion([{"content": "no role"}])


def test_another_template(llm: Llama) -> None:
    with Llama(llm.model_path, n_ctx=64, n_threads=1, chat_template="{{ messages[0].content }}>") as other:
        assert list(other.chat_tokens(TALK)) == other.tokenize("one>")
    with pytest.raises(ChatTemplateError):
        Llama(llm.model_path, n_ctx=64, chat_template="{% if %}")


def test_tokens_one_by_one(llm: Llama) -> None:
    tokens = []
    for token in llm.generate(llm.tokenize(PROMPT), temp=0.0):
        tokens.append(token)
        if len(tokens) == 5:
            break
    text = llm(PROMPT, max_tokens=5, **GREEDY)["choices"][0]["text"]
    assert llm.detokenize(tokens).decode("utf-8", "replace") == text


def test_tokenizing(llm: Llama) -> None:
    assert llm.tokenize(b"hello world") == llm.tokenize("hello world")
    assert llm.detokenize(llm.tokenize("hello world")) == b"hello world"
    assert len(llm.tokenize("<|im_end|>")) > 1
    assert llm.tokenize("<|im_end|>", special=True) == [2]
    assert llm.detokenize([2]) == b""
    assert llm.detokenize([2], special=True) == b"<|im_end|>"
    assert llm.detokenize(llm.tokenize(b"\xff")) == "\ufffd".encode()


def test_facts(llm: Llama) -> None:
    assert (llm.n_ctx(), llm.n_embd()) == (256, 64)
    assert llm.n_vocab() == llm.model.tokenizer.n_vocab
    assert (llm.token_bos(), llm.token_eos()) == (1, 2)
    assert llm.detokenize([llm.token_nl()]) == b"\n"
    assert llm.metadata["general.architecture"] == "llama"


def test_embeddings(llm: Llama) -> None:
    one = llm.embed("hello world")
    several = llm.embed(["hello world", "the time"])
    assert len(one) == 64
    assert several[0] == pytest.approx(one, abs=1e-4)
    assert not np.allclose(several[1], one, atol=1e-2)
    assert np.linalg.norm(llm.embed("hello world", normalize=True)) == pytest.approx(1.0)
    answer = llm.create_embedding(["hello world", "the time"], model="me")
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    assert answer["data"][0]["embedding"] == pytest.approx(one, abs=1e-4)
    n = len(llm.tokenize("hello world")) + len(llm.tokenize("the time"))
    assert answer["usage"] == {"prompt_tokens": n, "total_tokens": n}
    assert answer["model"] == "me"
    with pytest.raises(ValueError, match="the context 256"):
        llm.embed("hello " * 300, truncate=False)
    assert len(llm.embed("hello " * 300)) == 64


def test_a_reader_that_stops_frees_its_place(llm: Llama) -> None:
    for _ in range(3 * llm.engine.n_slots):
        stream = llm(PROMPT, max_tokens=None, stream=True, logit_bias={2: -100.0})
        next(stream)
        stream.close()
    assert llm(PROMPT, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_threads_share_one_object(llm: Llama) -> None:
    prompts = [f"{word} time" for word in ("the", "one", "that", "this", "what", "her", "all", "not")]
    alone = [llm(prompt, max_tokens=10, **GREEDY)["choices"][0]["text"] for prompt in prompts]
    together: dict[int, str] = {}

    def ask(i: int) -> None:
        options = {"max_tokens": 10, **GREEDY}
        stream = i % 2
        together[i] = (
            text_of(llm(prompts[i], stream=True, **options))
            if stream
            else llm(prompts[i], **options)["choices"][0]["text"]
        )

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(len(prompts))] == alone


def test_types_of_keys_and_values(tmp_path: Path) -> None:
    """By name or by GGUF's number."""
    path = tmp_path / "wide.gguf"
    make_llama(path, n_head=2, n_head_kv=1)
    options = {"n_ctx": 64, "n_threads": 1, "n_parallel": 1}
    texts = []
    for types in ({}, {"type_k": 1, "type_v": 1}, {"type_k": 8, "type_v": "q4_0"}, {"type_k": "q8_0", "type_v": 2}):
        with Llama(path, **options, **types) as model:
            texts.append(model.create_completion(PROMPT, max_tokens=1, temperature=0, logprobs=5)["choices"][0]["logprobs"])
    assert texts[0] == texts[1] != texts[2] == texts[3]
    with pytest.raises(ValueError, match="keys or values as '12'"):
        Llama(path, type_k=12)


def test_closing(llm: Llama) -> None:
    other = Llama(llm.model_path, n_ctx=20_000, n_threads=1, n_parallel=1, embedding=True, n_batch=16)
    stream = other(PROMPT, max_tokens=None, stream=True, logit_bias={0: -100.0, 2: -100.0})
    next(stream)
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        list(stream)
    with pytest.raises(EngineClosed):
        other(PROMPT)


def test_what_is_left_open_is_closed(llm: Llama) -> None:
    n_threads = threading.active_count()
    other = Llama(llm.model_path, n_ctx=64, n_threads=1)
    assert threading.active_count() == n_threads + 1
    del other
    assert threading.active_count() == n_threads


def test_a_program_may_end_in_the_middle(llm: Llama) -> None:
    program = f"""if True:
        from pyllama import Llama, LlamaGrammar
        llm = Llama({llm.model_path!r}, n_ctx=20_000, n_threads=2)
        streams = [llm("hello", max_tokens=None, stream=True, logit_bias={{2: -100.0}}) for _ in range(3)]
        for stream in streams:
            next(stream)
        """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_verbose_tells_what_happens(llm: Llama, capfd) -> None:
    with Llama(llm.model_path, n_ctx=64, n_threads=1, verbose=True) as other:
        other("hello", max_tokens=2)
    told = capfd.readouterr().err
    assert "tiny llama: llama" in told
    assert "answer: 2 tokens" in told


def test_a_model_that_begins_texts_with_a_token(tmp_path: Path) -> None:
    make_gemma3(tmp_path / "tiny.gguf")
    with Llama(tmp_path / "tiny.gguf", n_ctx=64, n_threads=1) as gemma:
        assert gemma.tokenize("hello")[0] == gemma.token_bos() == 2
        assert gemma.tokenize("hello", add_bos=False)[0] != 2
        assert list(gemma.chat_tokens(TALK[1:])).count(2) == 1
        assert gemma("hello", max_tokens=3)["usage"]["prompt_tokens"] == len(gemma.tokenize("hello"))


def test_lookup_changes_no_answer(tmp_path):
    path = tmp_path / "tiny.gguf"
    make_llama(path)
    prompt, options = "hello world " * 6, {"max_tokens": 60, "temperature": 0.0}
    with Llama(path) as plain, Llama(path, draft_model="lookup") as guessing:
        expected, got = (llama(prompt, **options)["choices"][0]["text"] for llama in (plain, guessing))
        assert got == expected
        assert guessing.engine.n_lookup and not plain.engine.n_lookup


def test_a_draft_model_changes_no_answer(tmp_path):
    path, small = tmp_path / "tiny.gguf", tmp_path / "small.gguf"
    make_llama(path)
    make_llama(small, n_layer=1, seed=1)
    prompt, options = "hello world " * 6, {"max_tokens": 60, "temperature": 0.0}
    with Llama(path) as plain, Llama(path, draft_model=small) as guessing:
        expected, got = (llama(prompt, **options)["choices"][0]["text"] for llama in (plain, guessing))
        assert got == expected
        assert guessing.engine.draft.model.path == small
    with pytest.raises(FileNotFoundError):
        Llama(path, draft_model=str(tmp_path / "x"))
    make_gemma3(tmp_path / "other.gguf")
    with pytest.raises(ValueError, match="another vocabulary"):
        Llama(path, draft_model=tmp_path / "other.gguf")
