"""The library's front door: :class:`Llama`, with the names and result shapes that users of llama-cpp-python know.

Everything goes through one engine, so that any number of threads may call the same object at a time. This module knows no
HTTP.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pyllama import pull
from pyllama.chat import ChatTemplate
from pyllama.core import lib
from pyllama.draft import DraftModel
from pyllama.engine import Done, Engine, Request, Stream, Token
from pyllama.grammar import Grammar
from pyllama.json_schema import JSON_OBJECT, to_gbnf
from pyllama.models import RopeOptions, load
from pyllama.sampling import Sample, SamplingParams
from pyllama.tokenizer import Tokenizer

__all__ = ["Llama", "LlamaGrammar"]

_GUESSED_TOKENS = 8
"""Most tokens of a guess."""


class LlamaGrammar(str):
    """A grammar's text, for programs written for llama-cpp-python; plain strings do as well."""

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """Raises ``GrammarError`` if it is not GBNF."""
        Grammar.parse(grammar)
        return cls(grammar)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> LlamaGrammar:
        """Raises ``OSError``, or ``GrammarError`` if it is not GBNF."""
        return cls.from_string(Path(file).read_text(encoding="utf-8"))

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        """From a JSON Schema's text. Raises ``SchemaError`` if it is none or cannot be expressed, or ``ValueError`` if it
        is not JSON."""
        return cls(to_gbnf(json.loads(json_schema)))


class Llama:
    """A model, loaded and ready.

    Args:
        model_path: a GGUF file; None for the default model, which is fetched if it is not there yet.
        n_ctx: tokens of context, shared by all calls that run at a time; 0: as many as the model was trained with.
        n_batch: most tokens of one step.
        n_threads: threads that generate; None: one per core.
        n_threads_batch: threads that read prompts; None: the same.
        n_parallel: calls that are worked on at a time; more wait.
        seed: of the calls that name none; -1: a new one each time.
        use_mmap: map the metadata of the file instead of reading them; weights are always read.
        use_mlock: keep the weights in memory.
        type_k: what keys are kept as: ``f32``, ``f16``, ``q8_0`` or ``q4_0``, or GGUF's number of one of these types; None: f16.
        type_v: the same for values.
        rope_scaling_type: ``none``, ``linear`` or ``yarn`` (or their numbers, 0 to 2): how rotary positions are stretched; -1:
            as the file says.
        rope_freq_base, rope_freq_scale: of rotary positions; 0: as the file says.
        yarn_ext_factor, yarn_attn_factor, yarn_beta_fast, yarn_beta_slow: YaRN's parameters; -1: as the file says.
        yarn_orig_ctx: tokens of context before YaRN stretches it; 0: as the file says.
        chat_template: Jinja2 source that replaces the model's own.
        draft_model: ``lookup`` guesses tokens from what followed the same ones before, and checks several in a step; answers
            do not change. Or the path of a smaller model of the same vocabulary, which makes the guesses.
        embedding: for programs written for llama-cpp-python; embeddings need no preparation here.
        verbose: tell on standard error what was loaded, and what each call took.

    Raises:
        ChatTemplateError: the template is none.
        GGUFError, ModelError: the file is damaged, or not a model that pyllama runs, or memory for it was refused.
        CoreError: threads were refused, or the kernels that ``PYLLAMA_CPU`` names.
        PullError: the default model cannot be fetched.
        OSError: the file cannot be read.
        ValueError: an argument is out of range, or the draft model has another vocabulary.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        n_parallel: int = 4,
        seed: int = -1,
        use_mmap: bool = True,
        use_mlock: bool = False,
        type_k: str | int | None = None,
        type_v: str | int | None = None,
        rope_scaling_type: int | str = -1,
        rope_freq_base: float = 0.0,
        rope_freq_scale: float = 0.0,
        yarn_ext_factor: float = -1.0,
        yarn_attn_factor: float = -1.0,
        yarn_beta_fast: float = -1.0,
        yarn_beta_slow: float = -1.0,
        yarn_orig_ctx: int = 0,
        chat_template: str | None = None,
        draft_model: str | os.PathLike[str] | None = None,
        embedding: bool = False,
        verbose: bool = False,
    ) -> None:
        n_guess = _GUESSED_TOKENS if draft_model is not None else 0
        path = pull.path_of() if model_path is None else model_path
        self.model_path = os.fspath(path)
        self.model = load(
            path,
            n_ctx=n_ctx,
            n_batch=n_batch,
            n_threads=n_threads,
            n_threads_batch=n_threads_batch,
            max_sequences=n_parallel,
            kv_type=(_kv_type(type_k), _kv_type(type_v)),
            mmap=use_mmap,
            mlock=use_mlock,
            rope=RopeOptions(
                scaling=_scaling_name(rope_scaling_type),
                freq_base=rope_freq_base or None,
                freq_scale=rope_freq_scale or None,
                yarn_ext_factor=None if yarn_ext_factor == -1 else yarn_ext_factor,
                yarn_attn_factor=None if yarn_attn_factor == -1 else yarn_attn_factor,
                yarn_beta_fast=None if yarn_beta_fast == -1 else yarn_beta_fast,
                yarn_beta_slow=None if yarn_beta_slow == -1 else yarn_beta_slow,
                yarn_orig_ctx=yarn_orig_ctx or None,
            ),
        )
        self._template: ChatTemplate | None = None
        if chat_template is not None:
            self._template = ChatTemplate.of(self.model.tokenizer, chat_template)
        lookup = draft_model == "lookup"
        draft = None if lookup or draft_model is None else DraftModel.load(draft_model, self.model, n_parallel, n_guess)
        self.engine = Engine(self.model, n_parallel, n_lookup=n_guess if lookup else 0, draft=draft)
        self._seed = seed
        self._verbose = verbose
        if verbose:
            m = self.model
            print(
                f"{m.name}: {m.architecture}, {m.n_params / 1e6:.1f} M parameters, {m.n_bytes / 2**20:.1f} MiB; "
                f"context {m.n_ctx} tokens, {m.n_threads} threads",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Ends running calls and gives the memory back."""
        self.engine.close()
        if self.engine.draft is not None:
            self.engine.draft.model.close()
        self.model.close()

    def __del__(self) -> None:
        if "engine" in self.__dict__:  # otherwise it was never loaded
            self.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- facts --------------------------------------------------------------------------------------------------------

    def n_ctx(self) -> int:
        """Tokens of context."""
        return self.model.n_ctx

    def n_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return self.model.tokenizer.n_vocab

    def n_embd(self) -> int:
        """Elements of an embedding."""
        return self.model.hp.n_embd

    def token_bos(self) -> int:
        """The token that begins a text; -1 if there is none."""
        return _or_minus_one(self.model.tokenizer.bos_id)

    def token_eos(self) -> int:
        """The token that ends a text; -1 if there is none."""
        return _or_minus_one(self.model.tokenizer.eos_id)

    def token_nl(self) -> int:
        """The newline's token; -1 if there is none."""
        return _or_minus_one(self.model.tokenizer.nl_id)

    @property
    def metadata(self) -> dict[str, Any]:
        """The file's metadata, arrays left out."""
        return self.model.metadata

    # -- text and tokens ----------------------------------------------------------------------------------------------

    def tokenize(self, text: bytes | str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Tokens of a text.

        Args:
            add_bos: begin (and end) with the tokens that the model wants there.
            special: read control tokens that are spelled out in the text as such.
        """
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self.model.tokenizer.encode(text, add_special=add_bos, parse_special=special)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        """The text of tokens, UTF-8. ``special``: spell control tokens out."""
        return self.model.tokenizer.decode(tokens, special=special).encode("utf-8")

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def embed(
        self, input: str | Sequence[str], normalize: bool = False, truncate: bool = True
    ) -> list[float] | list[list[float]]:
        """The last token's state after the last layer's norm, for each text; one list for a single string.

        Args:
            normalize: scale to length 1.
            truncate: leave out the end of a text that is longer than the context.

        Raises:
            ValueError: a text is longer than the context, and not to be truncated.
        """
        rows, _ = self._embed([input] if isinstance(input, str) else input, normalize, truncate)
        return rows[0] if isinstance(input, str) else rows

    def create_embedding(self, input: str | Sequence[str], model: str | None = None) -> dict[str, Any]:
        """The same in the shape of OpenAI's API."""
        rows, n_tokens = self._embed([input] if isinstance(input, str) else input, normalize=False, truncate=True)
        return {
            "object": "list",
            "data": [{"object": "embedding", "embedding": row, "index": i} for i, row in enumerate(rows)],
            "model": model or self.model_path,
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        }

    def _embed(self, texts: Sequence[str], normalize: bool, truncate: bool) -> tuple[list[list[float]], int]:
        prompts = [self._prompt_tokens(text) for text in texts]
        most = self.model.n_ctx - 1
        if truncate:
            prompts = [prompt[:most] for prompt in prompts]
        for prompt in prompts:
            if len(prompt) > most:
                raise ValueError(f"a text has {len(prompt)} tokens, the context {self.model.n_ctx}")
        streams = [self.engine.submit(Request(prompt=prompt, embedding=True)) for prompt in prompts]
        rows = []
        try:
            for stream in streams:
                row = self._finished(stream)[2].embedding
                length = float((row * row).sum()) ** 0.5
                rows.append((row / length if normalize and length else row).tolist())
        finally:
            for stream in streams:
                stream.cancel()
        return rows, sum(map(len, prompts))

    # -- completions --------------------------------------------------------------------------------------------------

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = None,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        grammar: str | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Continues a prompt. Calling the object does the same.

        Args:
            prompt: text, or tokens.
            suffix: what stands after the answer, for models that can fill in a middle.
            max_tokens: most tokens to generate; None or less than 1: as many as the context holds, which is the most anyway.
            logprobs: how many of the best tokens' log-probabilities to report with each token; None: none at all.
            echo: put the prompt before the answer.
            stop: texts that end the answer.
            stream: give an iterator of chunks instead of the whole.
            seed: of the random numbers; None: the object's.
            model: what to call the model in the result.
            grammar: GBNF that the answer must follow.
            logit_bias: token → what is added to its logit.

        Returns:
            OpenAI's ``text_completion`` object, or an iterator of such with parts of the text.

        Raises:
            ValueError: an option is out of range, the prompt does not fit into the context, or the model has no tokens for
                filling in.
            GrammarError: the grammar is not one.
            RuntimeError: the model failed, or was closed.
        """
        params = self._params(
            grammar, logit_bias, seed, 0 if logprobs is None else max(1, logprobs),
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, tfs_z=tfs_z, typical_p=typical_p,
            repeat_penalty=repeat_penalty, frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
            mirostat=mirostat_mode, mirostat_tau=mirostat_tau, mirostat_eta=mirostat_eta,
        )  # fmt: skip
        tokens = self._prompt_tokens(prompt) if suffix is None else self.infill_tokens(prompt, suffix)
        answer = self._submit(tokens, params, max_tokens, stop)
        echoed = (prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)) if echo else ""
        base = _base("cmpl", "text_completion", model or self.model_path)
        if stream:
            return self._stream_completion(answer, base, echoed, logprobs)
        text, samples, done = self._finished(answer)
        offsets = _Offsets(self.model.tokenizer, len(echoed))
        return {
            **base,
            "choices": [
                {
                    "text": echoed + text,
                    "index": 0,
                    "logprobs": self._logprobs(samples, offsets, logprobs) if logprobs is not None else None,
                    "finish_reason": _finish_reason(done),
                }
            ],
            "usage": _usage(done),
        }

    __call__ = create_completion

    def _stream_completion(
        self, answer: Stream, base: dict[str, Any], echoed: str, logprobs: int | None
    ) -> Iterator[dict[str, Any]]:
        def chunk(text: str, samples: Sequence[Sample], finish_reason: str | None) -> dict[str, Any]:
            told = self._logprobs(samples, offsets, logprobs) if logprobs is not None and samples else None
            return {**base, "choices": [{"text": text, "index": 0, "logprobs": told, "finish_reason": finish_reason}]}

        offsets = _Offsets(self.model.tokenizer, len(echoed))
        if echoed:
            yield chunk(echoed, (), None)
        for event in self._events(answer):
            if isinstance(event, Token):
                yield chunk(event.text, event.samples, None)
            else:
                yield chunk("", (), _finish_reason(event))

    # -- chat ---------------------------------------------------------------------------------------------------------

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        grammar: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> dict[str, Any] | Iterator[dict[str, Any]]:
        """Answers a conversation, by the model's own chat template.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": …}``, the oldest first.
            response_format: ``{"type": "text" | "json_object" | "json_schema"}``, the first being the default. The schema
                that the answer satisfies is ``["schema"]`` of ``json_object``, which may lack it, and
                ``["json_schema"]["schema"]`` of ``json_schema``.
            logprobs, top_logprobs: report each token's log-probability, and those of so many best tokens.

        The other arguments, and what is raised, are as in :meth:`create_completion`; a ``ChatTemplateError`` (a
        ``ValueError``) says that the template refuses the messages, and a ``SchemaError`` (another one) that the schema
        is none or cannot be expressed as a grammar.

        Returns:
            OpenAI's ``chat.completion`` object, or an iterator of ``chat.completion.chunk`` objects.
        """
        if response_format is not None and (form := _grammar_of(response_format)) is not None:
            if grammar:
                raise ValueError("a grammar and a response_format cannot be given both")
            grammar = form
        params = self._params(
            grammar, logit_bias, seed, max(1, top_logprobs or 0) if logprobs else 0,
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, tfs_z=tfs_z, typical_p=typical_p,
            repeat_penalty=repeat_penalty, frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
            mirostat=mirostat_mode, mirostat_tau=mirostat_tau, mirostat_eta=mirostat_eta,
        )  # fmt: skip
        stop = (*([stop] if isinstance(stop, str) else stop or ()), *self._chat_template().stop)
        answer = self._submit(self.chat_tokens(messages), params, max_tokens, stop)
        n_top = top_logprobs or 0
        if stream:
            base = _base("chatcmpl", "chat.completion.chunk", model or self.model_path)
            return self._stream_chat(answer, base, n_top if logprobs else None)
        text, samples, done = self._finished(answer)
        return {
            **_base("chatcmpl", "chat.completion", model or self.model_path),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "logprobs": self._chat_logprobs(samples, n_top) if logprobs else None,
                    "finish_reason": _finish_reason(done),
                }
            ],
            "usage": _usage(done),
        }

    def _stream_chat(self, answer: Stream, base: dict[str, Any], n_top: int | None) -> Iterator[dict[str, Any]]:
        def chunk(delta: dict[str, str], samples: Sequence[Sample], finish_reason: str | None) -> dict[str, Any]:
            told = self._chat_logprobs(samples, n_top) if n_top is not None and samples else None
            return {**base, "choices": [{"index": 0, "delta": delta, "logprobs": told, "finish_reason": finish_reason}]}

        yield chunk({"role": "assistant"}, (), None)
        for event in self._events(answer):
            if isinstance(event, Token):
                yield chunk({"content": event.text}, event.samples, None)
            else:
                yield chunk({}, (), _finish_reason(event))

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The prompt of a conversation, by the model's chat template.

        Raises:
            ChatTemplateError: the template refuses the messages, or is broken.
        """
        return tuple(self._chat_template().encode(self.model.tokenizer, messages))

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate.of(self.model.tokenizer)
        return self._template

    # -- tokens one by one --------------------------------------------------------------------------------------------

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.8,
        repeat_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        penalize_nl: bool = True,
        grammar: str | None = None,
        seed: int | None = None,
    ) -> Iterator[int]:
        """The tokens that follow ``tokens``, until the model ends, the context is full, or nobody asks for more.

        Raises:
            ValueError, GrammarError, RuntimeError: as :meth:`create_completion`.
        """
        params = self._params(
            grammar, None, seed, 0,
            temperature=temp, top_k=top_k, top_p=top_p, min_p=min_p, tfs_z=tfs_z, typical_p=typical_p,
            repeat_penalty=repeat_penalty, frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
            mirostat=mirostat_mode, mirostat_tau=mirostat_tau, mirostat_eta=mirostat_eta, penalize_nl=penalize_nl,
        )  # fmt: skip
        answer = self._submit(self._prompt_tokens(tokens), params, None, None)
        return (token for event in self._events(answer) if isinstance(event, Token) for token in event.tokens)

    # -- the way through the engine -----------------------------------------------------------------------------------

    def _params(
        self,
        grammar: str | None,
        logit_bias: Mapping[int, float] | None,
        seed: int | None,
        n_probs: int,
        **others: Any,
    ) -> SamplingParams:
        return SamplingParams(
            grammar=grammar or "",
            logit_bias=tuple((logit_bias or {}).items()),
            seed=self._seed if seed is None else seed,
            n_probs=n_probs,
            **others,
        )

    def _prompt_tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        tokenizer = self.model.tokenizer
        tokens = tokenizer.encode(prompt, add_special=True) if isinstance(prompt, str) else prompt
        if not tokens:  # an empty text: begin from nothing, as far as the model knows how
            tokens = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token is not None][:1]
        return tuple(tokens)

    def infill_tokens(self, prefix: str | Sequence[int], suffix: str) -> tuple[int, ...]:
        """The prompt for what stands between two texts.

        Raises:
            ValueError: the model has no tokens for that.
        """
        return tuple(self.model.tokenizer.infill(prefix, suffix))

    def _submit(
        self, tokens: tuple[int, ...], params: SamplingParams, max_tokens: int | None, stop: str | Sequence[str] | None
    ) -> Stream:
        room = self.model.n_ctx - len(tokens)
        if room < 1:
            raise ValueError(f"the prompt has {len(tokens)} tokens, the context {self.model.n_ctx}")
        stop = (stop,) if isinstance(stop, str) else tuple(stop or ())
        n_predict = room if max_tokens is None or max_tokens < 1 else min(max_tokens, room)
        return self.engine.submit(Request(prompt=tokens, sampling=params, n_predict=n_predict, stop=stop))

    def _events(self, answer: Stream) -> Iterator[Token | Done]:
        """The stream's events; a reader that stops early cancels the request."""
        try:
            for event in answer:
                if isinstance(event, Done):
                    self._check(event)
                yield event
        finally:
            answer.cancel()

    def _finished(self, answer: Stream) -> tuple[str, list[Sample], Done]:
        try:
            text, samples, done = answer.result()
        finally:  # KeyboardInterrupt above all: the engine should not go on for nobody
            answer.cancel()
        self._check(done)
        return text, samples, done

    def _check(self, done: Done) -> None:
        """Raises ``RuntimeError`` for an end that is no answer."""
        if done.error:
            raise RuntimeError(done.error)
        if done.reason == "cancelled":
            raise RuntimeError("the model was closed")
        if self._verbose:
            t = done.timings
            print(
                f"prompt: {t.prompt_n} tokens in {t.prompt_ms:.0f} ms, {done.n_reused} known before; "
                f"answer: {t.predicted_n} tokens in {t.predicted_ms:.0f} ms",
                file=sys.stderr,
            )

    def _text_of(self, token: int) -> str:
        return self.model.tokenizer.token_bytes(token, special=True).decode("utf-8", "replace")

    def _logprobs(self, samples: Sequence[Sample], offsets: _Offsets, n_top: int) -> dict[str, Any]:
        """OpenAI's ``logprobs`` object of text completions."""
        return {
            "tokens": [self._text_of(sample.token) for sample in samples],
            "text_offset": [offsets.next(sample.token) for sample in samples],
            "token_logprobs": [sample.logprob for sample in samples],
            "top_logprobs": [
                {self._text_of(token): logprob for token, logprob in sample.top_logprobs[:n_top]} for sample in samples
            ],
        }

    def _chat_logprobs(self, samples: Sequence[Sample], n_top: int) -> dict[str, Any]:
        """OpenAI's ``logprobs`` object of chat completions."""

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            raw = self.model.tokenizer.token_bytes(token, special=True)
            return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}

        return {
            "content": [
                {
                    **entry(sample.token, sample.logprob),
                    "top_logprobs": [entry(token, logprob) for token, logprob in sample.top_logprobs[:n_top]],
                }
                for sample in samples
            ]
        }


class _Offsets:
    """Where each token of an answer begins in its text; tokens within a character begin where it does."""

    def __init__(self, tokenizer: Tokenizer, start: int) -> None:
        self._decoder, self._at = tokenizer.stream_decoder(), start

    def next(self, token: int) -> int:
        at = self._at
        self._at += len(self._decoder.push(token))
        return at


def _grammar_of(response_format: Mapping[str, Any]) -> str | None:
    """The grammar of an answer's form, None where there is none."""
    kind = response_format.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = response_format.get("schema")
        return JSON_OBJECT if schema is None else to_gbnf(schema)
    if kind != "json_schema":
        raise ValueError(f"response_format: type must be text, json_object or json_schema, not {kind!r}")
    wrapper = response_format.get("json_schema")
    if not isinstance(wrapper, Mapping) or "schema" not in wrapper:
        raise ValueError("response_format: json_schema must hold a schema")
    return to_gbnf(wrapper["schema"])


def _scaling_name(kind: int | str) -> str | None:
    """The name of a kind of rotary scaling, from that or from llama-cpp-python's number; None for "as the file says"."""
    if isinstance(kind, str):
        return kind
    if not -1 <= kind <= 2:
        raise ValueError(f"rope_scaling_type is {kind}; -1 to 2 is possible")
    return (None, "none", "linear", "yarn")[kind + 1]


def _kv_type(kind: str | int | None) -> str:
    """A name for :func:`load`; one that it does not know is left to it."""
    numbers = {lib.PL_F32: "f32", lib.PL_F16: "f16", lib.PL_Q8_0: "q8_0", lib.PL_Q4_0: "q4_0"}
    return "f16" if kind is None else kind if isinstance(kind, str) else numbers.get(kind, str(kind))


def _or_minus_one(token: int | None) -> int:
    return -1 if token is None else token


def _base(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4()}", "object": kind, "created": int(time.time()), "model": model}


def _finish_reason(done: Done) -> str:
    return "length" if done.reason == "limit" else "stop"


def _usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.n_prompt,
        "completion_tokens": done.n_predicted,
        "total_tokens": done.n_prompt + done.n_predicted,
    }
