"""The endpoints of OpenAI's API: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models.

They also understand the options of /completion. https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import base64
import math
import secrets
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from bottle import Bottle

from pyllama.chat import ChatTemplate, ChatTemplateError
from pyllama.engine import Done, Request, Token
from pyllama.sampling import RANDOM_SEED, Sample
from pyllama.server.errors import ApiError, dump
from pyllama.server.fields import Fields
from pyllama.server.http import Client
from pyllama.server.native import MAX_INPUTS, embed, infill_tokens, llama_embeddings, note_usage, printable, timings
from pyllama.server.options import MAX_PROMPTS, read_prompts, read_request, read_system_prompt
from pyllama.server.request import client, json_fields, notes
from pyllama.server.service import Service, SystemPrompt, events
from pyllama.server.sse import DONE, send_events
from pyllama.tokenizer import Tokenizer

__all__ = ["add_routes"]

MAX_CHOICES = MAX_PROMPTS
MAX_TOP_LOGPROBS = 20
_MEDIA = ("image_url", "image", "input_image", "input_audio", "file", "video_url")
"""Parts of messages that are no text."""
_LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of nothing, which JSON cannot write."""


def add_routes(app: Bottle, service: Service) -> None:
    """Adds the endpoints to an application."""

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions")
    def chat_completions() -> bytes:
        fields = json_fields(service)
        _refuse_tools(fields)
        n_logprobs = _read_top_logprobs(fields)
        system = read_system_prompt(fields, service)
        template = service.chat_template
        try:
            chat = template.encode(service.model.tokenizer, _read_messages(fields, template))
        except ChatTemplateError as error:
            raise ApiError(400, str(error)) from None
        requests = _read_requests(
            fields, service, [service.after_system_prompt(chat, system)], n_logprobs, stop=template.stop
        )
        choices = [_Chat(service.model.tokenizer, n_logprobs) for _ in requests]
        return _answer(choices, requests, fields, service, system)

    @app.post("/v1/completions")
    def completions() -> bytes:
        fields = json_fields(service)
        n_logprobs = fields.integer("logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
        echo = fields.boolean("echo", False)
        system = read_system_prompt(fields, service)
        before = service.system_tokens(system)
        prompts = _read_text_prompts(fields, service, system)
        requests = _read_requests(fields, service, prompts, n_logprobs)
        if echo and n_logprobs is not None:
            requests = [replace(request, score_prompt=len(request.prompt) > len(before)) for request in requests]
        if fields.integer("best_of", None) not in (None, len(requests) // len(prompts)):
            raise ApiError(501, "best_of must be the same as n: answers are not compared")
        tokenizer = service.model.tokenizer
        choices = []
        for request in requests:
            own = request.prompt[len(before) :] if echo else ()
            choices.append(_Text(tokenizer, n_logprobs, own, begins=not before))
        return _answer(choices, requests, fields, service, system)

    @app.post("/v1/embeddings")
    def embeddings() -> bytes:
        return _embeddings(json_fields(service), service)

    @app.post("/embeddings")
    def embeddings_of_either_kind() -> bytes:
        fields = json_fields(service)
        if fields.get("input") is None:
            return llama_embeddings(fields, service)
        return _embeddings(fields, service)

    @app.get("/v1/models")
    @app.get("/models")
    def models() -> bytes:
        return dump({"data": [_model(service)], "object": "list"})

    @app.get("/v1/models/<name:path>")
    def model(name: str) -> bytes:
        if name != service.defaults.name:
            raise ApiError(404, f"there is no model {name}; this server has {service.defaults.name}")
        return dump(_model(service))


def _model(service: Service) -> dict[str, Any]:
    service.engine  # noqa: B018 - refuses while there is no model
    return {"created": service.created, "id": service.defaults.name, "object": "model", "owned_by": "pyllama"}


def _embeddings(fields: Fields, service: Service) -> bytes:
    form = fields.string("encoding_format", "float")
    if form not in ("float", "base64"):
        fields.fail("encoding_format", "must be 'float' or 'base64'")
    width = service.model.hp.n_embd
    if fields.integer("dimensions", width) != width:
        fields.fail("dimensions", f"must be {width}: this model's embeddings cannot be shortened")
    prompts = read_prompts(fields, service, "input", most=MAX_INPUTS)
    done = embed(service, prompts, client(), notes())
    data = [
        {"embedding": _unit_vector(item.embedding, form), "index": i, "object": "embedding"}
        for i, item in enumerate(done)
    ]
    n_tokens = sum(item.n_prompt for item in done)
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return dump({"data": data, "model": service.defaults.name, "object": "list", "usage": usage})


# ---- requests --------------------------------------------------------------------------------------------------------


def _refuse_tools(fields: Fields) -> None:
    for name, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if fields.array(name, []) and fields.get(choice) != "none":
            raise ApiError(501, f"{name}: function calling is not supported")


def _read_messages(fields: Fields, template: ChatTemplate) -> list[Any]:
    """The messages, which the template checks in detail."""
    fields.require("messages")
    messages = []
    for i, message in enumerate(fields.array("messages")):
        if isinstance(message, dict):
            parts = message.get("content")
            for j, part in enumerate(parts if isinstance(parts, list) else []):
                kind = part.get("type") if isinstance(part, dict) else None
                if kind in _MEDIA:
                    raise ApiError(501, f"messages[{i}].content[{j}]: {kind} needs a model that takes more than text")
            # The newer name of the system's role, for which few templates have been made.
            if message.get("role") == "developer" and "developer" not in template.source:
                message = {**message, "role": "system"}
        messages.append(message)
    return messages


def _read_top_logprobs(fields: Fields) -> int | None:
    """How many of the best tokens to report beside each token; None: report nothing."""
    n = fields.integer("top_logprobs", None, low=0, high=MAX_TOP_LOGPROBS)
    if fields.boolean("logprobs", False):
        return n or 0
    if n:
        fields.fail("top_logprobs", "needs logprobs to be true")
    return None


def _read_text_prompts(fields: Fields, service: Service, system: SystemPrompt | None) -> list[tuple[int, ...]]:
    """The prompts of a text completion; with a ``suffix``, the one that asks for what stands between."""
    if fields.get("prompt") == []:
        fields.fail("prompt", "is empty")
    suffix = fields.string("suffix", "")
    if not suffix:
        return read_prompts(fields, service, system=service.system_tokens(system))
    fields.require("prompt")
    return [service.after_system_prompt(infill_tokens(service, fields.string("prompt"), suffix), system)]


def _read_requests(
    fields: Fields,
    service: Service,
    prompts: list[tuple[int, ...]],
    n_logprobs: int | None,
    stop: tuple[str, ...] = (),
) -> list[Request]:
    """``n`` requests for each prompt, with seeds that follow one another where there is one.

    Where no limit is given the context is the limit: clients of this API do not expect answers without end.
    """
    replaced: dict[str, Any] = {}
    if n_logprobs is not None:
        # The sampler reports the chosen token's probability only when it reports any.
        replaced["n_probs"] = max(n_logprobs, 1)
    request = read_request(fields, service, prompts[0], **replaced)
    request = replace(request, stop=(*request.stop, *stop))
    for name in ("max_tokens", "max_completion_tokens"):
        request = replace(request, n_predict=fields.integer(name, request.n_predict, low=-1))
    n = fields.integer("n", 1, low=1, high=MAX_CHOICES)
    if n * len(prompts) > MAX_CHOICES:
        fields.fail("n", f"asks for {n * len(prompts)} answers; at most {MAX_CHOICES} are possible")
    seed = request.sampling.seed & RANDOM_SEED
    requests = []
    for prompt in prompts:
        limit = request.n_predict if request.n_predict >= 0 else _room(service, prompt)
        for i in range(n):
            own = request.sampling if seed == RANDOM_SEED else replace(request.sampling, seed=(seed + i) % RANDOM_SEED)
            requests.append(replace(request, prompt=prompt, sampling=own, n_predict=limit))
    return requests


def _room(service: Service, prompt: tuple[int, ...]) -> int:
    """Tokens of an answer up to the end of the context; half of one, after a prompt that is too long and loses its middle."""
    n_ctx = service.model.n_ctx
    return n_ctx - len(prompt) if len(prompt) < n_ctx else n_ctx // 2


# ---- answers ---------------------------------------------------------------------------------------------------------


def _answer(
    choices: Sequence[_Choice],
    requests: list[Request],
    fields: Fields,
    service: Service,
    system_prompt: SystemPrompt | None,
) -> bytes:
    usage = fields.object("stream_options").boolean("include_usage", False)
    head = {
        "created": int(time.time()),
        "id": f"{choices[0].id_prefix}-{secrets.token_urlsafe(18)}",
        "model": service.defaults.name,
    }
    answer = _Answer(choices, head, requests, service, system_prompt, client(), notes())
    if fields.boolean("stream", False):
        return send_events(answer.chunks(usage), client())
    return dump(answer.whole())


@dataclass
class _Answer:
    """The choices of one request, streamed or as a whole."""

    choices: Sequence[_Choice]
    head: dict[str, Any]
    requests: list[Request]
    """One for each choice."""
    service: Service
    system_prompt: SystemPrompt | None
    client: Client
    notes: dict[str, Any]

    def chunks(self, with_usage: bool) -> Generator[object, None, None]:
        """What a stream sends, the choices side by side. None, as the first one: there is nothing yet."""
        head = {**self.head, "object": self.choices[0].chunk_kind}
        if with_usage:
            head["usage"] = None

        def chunk(index: int, content: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
            return {"choices": [{"finish_reason": finish_reason, "index": index, **content}], **head}

        done: dict[int, Done] = {}
        with self.service.submit(self.requests, self.system_prompt) as streams:
            yield None
            unopened = set()  # until there are scores
            for index, choice in enumerate(self.choices):
                if self.requests[index].score_prompt:
                    unopened.add(index)
                elif (opening := choice.opening()) is not None:
                    yield chunk(index, opening)
            for index, event in events(streams, self.client):
                if event is None:
                    yield None
                    continue
                choice = self.choices[index]
                if index in unopened:
                    unopened.remove(index)
                    yield chunk(index, choice.opening(streams[index].prompt_samples))
                if isinstance(event, Done):
                    done[index] = event
                    note_usage(self.notes, event)
                    yield {**chunk(index, choice.closing(), _finish_reason(event)), "timings": timings(event)}
                elif event.text or choice.n_logprobs is not None:
                    yield chunk(index, choice.delta(event))
        if with_usage:
            yield {"choices": [], **head, "usage": _usage(done, self.requests)}
        yield DONE

    def whole(self) -> dict[str, Any]:
        """What a request that is not streamed gets."""
        pieces: list[list[Token]] = [[] for _ in self.requests]
        done: dict[int, Done] = {}
        with self.service.submit(self.requests, self.system_prompt) as streams:
            for index, event in events(streams, self.client, whole=True):
                if isinstance(event, Done):
                    done[index] = event
                    note_usage(self.notes, event)
                else:
                    pieces[index].append(event)
        told = []
        for index, (choice, tokens) in enumerate(zip(self.choices, pieces)):
            text = "".join(token.text for token in tokens)
            samples = [sample for token in tokens for sample in token.samples]
            whole = choice.whole(text, samples, streams[index].prompt_samples)
            told.append({"finish_reason": _finish_reason(done[index]), "index": index, **whole})
        return {"choices": told, **self.head, "object": self.choices[0].kind, "usage": _usage(done, self.requests)}


def _finish_reason(done: Done) -> str:
    return "length" if done.reason == "limit" else "stop"


def _usage(done: dict[int, Done], requests: list[Request]) -> dict[str, Any]:
    # Each prompt counts once, however many answers it gets.
    prompts = {id(requests[index].prompt): done[index] for index in sorted(done, reverse=True)}.values()
    n_prompt, n_completion = sum(item.n_prompt for item in prompts), sum(item.n_predicted for item in done.values())
    return {
        "completion_tokens": n_completion,
        "prompt_tokens": n_prompt,
        "prompt_tokens_details": {"cached_tokens": sum(item.n_reused for item in prompts)},
        "total_tokens": n_prompt + n_completion,
    }


# ---- the two forms of choices ----------------------------------------------------------------------------------------


class _Chat:
    """A choice with a message."""

    id_prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, n_logprobs: int | None) -> None:
        self.tokenizer, self.n_logprobs = tokenizer, n_logprobs

    def whole(self, text: str, samples: Sequence[Sample], scores: Sequence[Sample] = ()) -> dict[str, Any]:
        return {"message": {"content": text, "role": "assistant"}, **self._logprobs(samples)}

    def opening(self, scores: Sequence[Sample] = ()) -> dict[str, Any]:
        return {"delta": {"role": "assistant"}}

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
    """A choice with plain text.

    Args:
        echoed: the prompt's tokens, to be repeated before the text; none: it is not to be repeated.
        begins: the prompt is the beginning of a text, rather than behind a system prompt.
    """

    id_prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, tokenizer: Tokenizer, n_logprobs: int | None, echoed: Sequence[int] = (), *, begins: bool = True
    ) -> None:
        self.tokenizer, self.n_logprobs = tokenizer, n_logprobs
        self._echoed = echoed
        self._echo = tokenizer.decode(echoed, space_prefix=begins)
        # Where the next token begins in the text, of which a first space may have been left out.
        self._at = len(self._echo) - len(tokenizer.decode(echoed, space_prefix=False))
        self._decoder = tokenizer.stream_decoder()

    def whole(self, text: str, samples: Sequence[Sample], scores: Sequence[Sample] = ()) -> dict[str, Any]:
        samples = [*scores[-len(self._echoed) :], *samples] if scores else samples
        return {"text": self._echo + text, "logprobs": self._logprobs(samples)}

    def opening(self, scores: Sequence[Sample] = ()) -> dict[str, Any] | None:
        """The prompt, with what is known of its tokens."""
        if not self._echoed:
            return None
        own = scores[-len(self._echoed) :]
        return {"text": self._echo, "logprobs": self._logprobs(own) if own else None}

    def delta(self, event: Token) -> dict[str, Any]:
        return {"text": event.text, "logprobs": self._logprobs(event.samples)}

    def closing(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def _logprobs(self, samples: Sequence[Sample]) -> dict[str, Any] | None:
        if self.n_logprobs is None:
            return None
        return {
            "text_offset": [self._offset(sample.token) for sample in samples],
            "token_logprobs": [None if sample.logprob is None else _finite(sample.logprob) for sample in samples],
            "tokens": [printable(self.tokenizer, sample.token) for sample in samples],
            "top_logprobs": [None if sample.logprob is None else self._top(sample) for sample in samples],
        }

    def _top(self, sample: Sample) -> dict[str, float]:
        best = sample.top_logprobs[: self.n_logprobs]
        return {printable(self.tokenizer, token): _finite(logprob) for token, logprob in best}

    def _offset(self, token: int) -> int:
        """Where the next token begins in the text; a token within a character, where that does."""
        at = max(0, self._at)
        self._at += len(self._decoder.push(token))
        return at


_Choice = _Chat | _Text


def _finite(logprob: float | None) -> float:
    return _LEAST_LOGPROB if logprob is None or not math.isfinite(logprob) else logprob


def _unit_vector(state: np.ndarray, form: str) -> list[float] | str:
    """An embedding of length 1, in the encoding that was asked for."""
    length = float(np.linalg.norm(state))
    vector = (state / length if length > 0 else state).astype("<f4")
    return base64.b64encode(vector.tobytes()).decode() if form == "base64" else vector.tolist()
