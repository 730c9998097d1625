"""The endpoints of OpenAI's API: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models.

They also understand the options of /completion. https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import base64
import itertools
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from bottle import Bottle

from pyllama.chat import ChatTemplateError
from pyllama.engine import Done, Request, Token
from pyllama.sampling import RANDOM_SEED, Sample
from pyllama.server.errors import ApiError, dump
from pyllama.server.fields import Fields, describe
from pyllama.server.native import embed, note_usage, printable, timings
from pyllama.server.options import join_prompt, read_request
from pyllama.server.request import client_is_gone, json_fields, notes
from pyllama.server.service import Service, events
from pyllama.server.sse import DONE, send_events
from pyllama.tokenizer import Tokenizer

__all__ = ["add_routes"]

MAX_CHOICES = 128
MAX_INPUTS = 2048
MAX_TOP_LOGPROBS = 20
_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of nothing, which JSON cannot write."""


def add_routes(app: Bottle, service: Service) -> None:
    """Adds the endpoints to an application."""

    @app.post("/v1/chat/completions")
    def chat_completions() -> Iterator[bytes] | bytes:
        fields = json_fields(service)
        fields.require("messages")
        if fields.object("response_format").string("type", "text") != "text":
            raise ApiError(501, "response_format: only 'text' is possible")
        try:
            prompt = service.chat_template.encode(service.model.tokenizer, fields.array("messages"))
        except ChatTemplateError as error:
            raise ApiError(400, str(error)) from None
        n_logprobs = None
        if fields.boolean("logprobs", False):
            n_logprobs = fields.integer("top_logprobs", 0, low=0, high=MAX_TOP_LOGPROBS)
        form = _Chat(service.model.tokenizer, n_logprobs, service.chat_template.stop)
        return _answer(form, fields, service, [tuple(prompt)])

    @app.post("/v1/completions")
    def completions() -> Iterator[bytes] | bytes:
        fields = json_fields(service)
        n_logprobs = fields.integer("logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
        form = _Text(service.model.tokenizer, n_logprobs, fields.boolean("echo", False))
        return _answer(form, fields, service, _read_prompts(fields, service, "prompt", MAX_CHOICES))

    @app.post("/v1/embeddings")
    def embeddings() -> bytes:
        fields = json_fields(service)
        form = fields.string("encoding_format", "float")
        if form not in ("float", "base64"):
            fields.fail("encoding_format", "must be 'float' or 'base64'")
        done = embed(service, _read_prompts(fields, service, "input", MAX_INPUTS), client_is_gone(), notes())
        data = [
            {"embedding": _unit_vector(item.embedding, form), "index": i, "object": "embedding"}
            for i, item in enumerate(done)
        ]
        n_tokens = sum(item.n_prompt for item in done)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return dump({"data": data, "model": service.defaults.name, "object": "list", "usage": usage})

    @app.get("/v1/models")
    def models() -> bytes:
        service.engine  # noqa: B018 - refuses while there is no model
        model = {"created": service.created, "id": service.defaults.name, "object": "model", "owned_by": "pyllama"}
        return dump({"data": [model], "object": "list"})


# ---- requests --------------------------------------------------------------------------------------------------------


def _read_prompts(fields: Fields, service: Service, name: str, most: int) -> list[tuple[int, ...]]:
    """One or several prompts: a string, an array of strings, an array of tokens, or an array of arrays of tokens."""
    value = fields.require(name)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        fields.fail(name, f"must be a string or an array, not {describe(value)}")
    if not value:
        fields.fail(name, "is empty")
    if not isinstance(value[0], (str, list)):
        return [join_prompt(fields, service, value, name)]
    if len(value) > most:
        fields.fail(name, f"has {len(value)} elements; at most {most} are possible")
    prompts = []
    for i, item in enumerate(value):
        if not isinstance(item, (str, list)):
            fields.fail(f"{name}[{i}]", f"must be a string or an array of tokens, not {describe(item)}")
        prompts.append(join_prompt(fields, service, item if isinstance(item, list) else [item], f"{name}[{i}]"))
    return prompts


def _read_requests(form: _Form, fields: Fields, service: Service, prompts: list[tuple[int, ...]]) -> list[Request]:
    """``n`` requests for each prompt, with seeds that follow one another where there is one.

    Where no limit is given the context is the limit: clients of this API do not expect answers without end.
    """
    sampling: dict[str, Any] = {}
    if form.n_logprobs is not None:
        # The sampler reports the chosen token's probability only when it reports any.
        sampling["n_probs"] = max(form.n_logprobs, 1)
    request = read_request(fields, service, prompts[0], **sampling)
    request = replace(request, stop=(*request.stop, *form.stop))
    for name in ("max_tokens", "max_completion_tokens"):
        request = replace(request, n_predict=fields.integer(name, request.n_predict, low=-1))
    n = fields.integer("n", 1, low=1, high=MAX_CHOICES)
    if n * len(prompts) > MAX_CHOICES:
        fields.fail("n", f"asks for {n * len(prompts)} answers; at most {MAX_CHOICES} are possible")
    seed = request.sampling.seed & RANDOM_SEED
    requests = []
    for prompt in prompts:
        for i in range(n):
            own = request.sampling if seed == RANDOM_SEED else replace(request.sampling, seed=(seed + i) % RANDOM_SEED)
            limit = request.n_predict if request.n_predict >= 0 else max(1, service.model.n_ctx - len(prompt))
            requests.append(replace(request, prompt=prompt, sampling=own, n_predict=limit))
    return requests


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answer(form: _Form, fields: Fields, service: Service, prompts: list[tuple[int, ...]]) -> Iterator[bytes] | bytes:
    requests = _read_requests(form, fields, service, prompts)
    usage = fields.object("stream_options").boolean("include_usage", False)
    head = {
        "created": int(time.time()),
        "id": f"{form.id_prefix}-{secrets.token_urlsafe(18)}",
        "model": service.defaults.name,
    }
    answer = _Answer(form, head, requests, service, client_is_gone(), notes())
    if fields.boolean("stream", False):
        return send_events(answer.chunks(usage))
    return dump(answer.whole())


@dataclass
class _Answer:
    """The choices of one request, streamed or as a whole."""

    form: _Form
    head: dict[str, Any]
    requests: list[Request]
    service: Service
    is_gone: Callable[[], bool]
    notes: dict[str, Any]

    def chunks(self, with_usage: bool) -> Iterator[object]:
        """What a stream sends. The choices are worked on side by side, but told one after the other."""
        form = self.form
        head = {**self.head, "object": form.chunk_kind}
        if with_usage:
            head["usage"] = None
        usage: list[Done] = []
        with self.service.submit(self.requests) as streams:
            for index, stream in enumerate(streams):
                for choice in form.opening(stream.request.prompt):
                    yield {"choices": [{"finish_reason": None, "index": index, **choice}], **head}
                for event in events(stream, self.is_gone):
                    if isinstance(event, Done):
                        self._note(event, usage)
                        choice = {"finish_reason": _finish_reason(event), "index": index, **form.closing()}
                        yield {"choices": [choice], **head, "timings": timings(event)}
                    elif event.text or form.n_logprobs is not None:
                        choice = {"finish_reason": None, "index": index, **form.delta(event)}
                        yield {"choices": [choice], **head}
        if with_usage:
            yield {"choices": [], **head, "usage": _usage(usage, self.requests)}
        yield DONE

    def whole(self) -> dict[str, Any]:
        """What a request that is not streamed gets."""
        choices = []
        usage: list[Done] = []
        with self.service.submit(self.requests) as streams:
            for index, stream in enumerate(streams):
                *tokens, done = events(stream, self.is_gone)
                assert isinstance(done, Done)
                self._note(done, usage)
                text = "".join(token.text for token in tokens)
                samples = [sample for token in tokens for sample in token.samples]
                choice = self.form.whole(stream.request.prompt, text, samples)
                choices.append({"finish_reason": _finish_reason(done), "index": index, **choice})
        return {"choices": choices, **self.head, "object": self.form.kind, "usage": _usage(usage, self.requests)}

    def _note(self, done: Done, usage: list[Done]) -> None:
        usage.append(done)
        note_usage(self.notes, done)


def _finish_reason(done: Done) -> str:
    return "length" if done.reason == "limit" else "stop"


def _usage(done: list[Done], requests: list[Request]) -> dict[str, Any]:
    # Each prompt counts once, however many answers it gets.
    prompts = {id(request.prompt): item for request, item in zip(reversed(requests), reversed(done))}.values()
    n_prompt, n_completion = sum(item.n_prompt for item in prompts), sum(item.n_predicted for item in done)
    return {
        "completion_tokens": n_completion,
        "prompt_tokens": n_prompt,
        "prompt_tokens_details": {"cached_tokens": sum(item.n_reused for item in prompts)},
        "total_tokens": n_prompt + n_completion,
    }


# ---- the two forms of choices ----------------------------------------------------------------------------------------


class _Chat:
    """Choices with messages."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, n_logprobs: int | None, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.n_logprobs, self.stop = tokenizer, n_logprobs, stop

    def whole(self, prompt: tuple[int, ...], text: str, samples: list[Sample]) -> dict[str, Any]:
        return {"message": {"content": text, "role": "assistant"}, **self._logprobs(samples)}

    def opening(self, prompt: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"delta": {"role": "assistant"}}]

    def delta(self, event: Token) -> dict[str, Any]:
        return {"delta": {"content": event.text}, **self._logprobs(event.samples)}

    def closing(self) -> dict[str, Any]:
        return {"delta": {}}

    def _logprobs(self, samples: Sequence[Sample]) -> dict[str, Any]:
        if self.n_logprobs is None:
            return {}
        content = []
        for sample in samples:
            top = [self._entry(token, logprob) for token, logprob in sample.top_logprobs[: self.n_logprobs]]
            content.append({**self._entry(sample.token, sample.logprob), "top_logprobs": top})
        return {"logprobs": {"content": content}}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token, special=True)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}


class _Text:
    """Choices with plain text."""

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, n_logprobs: int | None, echo: bool) -> None:
        self.tokenizer, self.n_logprobs, self.echo = tokenizer, n_logprobs, echo
        self.stop: tuple[str, ...] = ()

    def whole(self, prompt: tuple[int, ...], text: str, samples: list[Sample]) -> dict[str, Any]:
        return {
            "text": (self.tokenizer.decode(prompt) if self.echo else "") + text,
            "logprobs": self._logprobs(samples),
        }

    def opening(self, prompt: tuple[int, ...]) -> list[dict[str, Any]]:
        return [{"text": self.tokenizer.decode(prompt), "logprobs": None}] if self.echo else []

    def delta(self, event: Token) -> dict[str, Any]:
        return {"text": event.text, "logprobs": self._logprobs(event.samples)}

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, samples: Sequence[Sample]) -> dict[str, Any] | None:
        if self.n_logprobs is None:
            return None
        texts = [printable(self.tokenizer, sample.token) for sample in samples]
        starts = [0, *itertools.accumulate(len(text) for text in texts)]
        return {
            "text_offset": starts[:-1],
            "token_logprobs": [_finite(sample.logprob) for sample in samples],
            "tokens": texts,
            "top_logprobs": [
                {
                    printable(self.tokenizer, token): _finite(value)
                    for token, value in sample.top_logprobs[: self.n_logprobs]
                }
                for sample in samples
            ],
        }


_Form = _Chat | _Text


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None or not math.isfinite(logprob) else logprob


def _unit_vector(state: np.ndarray, form: str) -> list[float] | str:
    """An embedding of length 1, in the encoding that was asked for."""
    length = float(np.linalg.norm(state))
    vector = (state / length if length > 0 else state).astype("<f4")
    return base64.b64encode(vector.tobytes()).decode() if form == "base64" else vector.tolist()
