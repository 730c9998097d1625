"""The endpoints of llama.cpp's server: /completion, /tokenize, /detokenize, /embedding, /props, /model.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bottle import Bottle

from pyllama.engine import Done, Request, Token
from pyllama.server.errors import ApiError, dump
from pyllama.server.fields import Fields, describe
from pyllama.server.options import generation_settings, read_prompt, read_request
from pyllama.server.request import client_is_gone, json_fields, notes
from pyllama.server.service import Service, events
from pyllama.server.sse import send_events
from pyllama.tokenizer import Tokenizer

__all__ = ["add_routes", "embed", "note_usage", "printable", "timings"]


def add_routes(app: Bottle, service: Service) -> None:
    """Adds the endpoints to an application."""

    @app.post("/completion")
    def completion() -> Iterator[bytes] | bytes:
        fields = json_fields(service)
        if fields.get("system_prompt") is not None:
            _set_system_prompt(service, fields.get("system_prompt"))
        request = read_request(fields, service, read_prompt(fields, service))
        stream = fields.boolean("stream", False)
        chunks = _complete(service, request, fields.get("prompt"), stream, client_is_gone(), notes())
        return send_events(chunks) if stream else dump(_join(chunks))

    @app.post("/tokenize")
    def tokenize() -> bytes:
        fields = json_fields(service)
        fields.require("content")
        return dump({"tokens": service.model.tokenizer.encode(fields.string("content"))})

    @app.post("/detokenize")
    def detokenize() -> bytes:
        fields = json_fields(service)
        fields.require("tokens")
        tokenizer = service.model.tokenizer
        return dump({"content": tokenizer.decode(fields.tokens("tokens", tokenizer.n_vocab), special=True)})

    @app.post("/embedding")
    def embedding() -> bytes:
        fields = json_fields(service)
        (done,) = embed(service, [read_prompt(fields, service, "content")], client_is_gone(), notes())
        return dump({"embedding": done.embedding.tolist()})

    @app.get("/props")
    def props() -> bytes:
        service.engine  # noqa: B018 - refuses while there is no model
        prompt = service.system_prompt
        return dump({"assistant_name": prompt.assistant_name, "user_name": prompt.anti_prompt})

    @app.get("/model.json")
    def model_json() -> bytes:
        defaults = read_request(Fields({}), service, prompt=())
        return dump(generation_settings(service, defaults, stream=False))


# ---- completions ------------------------------------------------------------------------------------------------------


def _complete(
    service: Service, request: Request, prompt: object, stream: bool, is_gone: Callable[[], bool], notes: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """One object for each piece of text, and a last one with everything else."""
    n_probs = request.sampling.n_probs
    tokenizer = service.model.tokenizer
    with service.submit([request]) as (running,):
        for event in events(running, is_gone):
            if isinstance(event, Done):
                note_usage(notes, event)
                settings = generation_settings(service, request, stream=stream)
                yield _result(event, settings, prompt)
            elif event.text or n_probs:
                chunk = {"content": event.text, "multimodal": False, "slot_id": running.slot_id, "stop": False}
                if n_probs:
                    chunk["completion_probabilities"] = _probabilities(event, tokenizer)
                yield chunk


def _join(chunks: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The answer to a request that is not streamed, from the chunks of one that is."""
    *pieces, result = chunks
    result["content"] = "".join(piece["content"] for piece in pieces)
    probabilities = [entry for piece in pieces for entry in piece.get("completion_probabilities", ())]
    if result["generation_settings"]["n_probs"]:
        result["completion_probabilities"] = probabilities
    return result


def _result(done: Done, settings: dict[str, Any], prompt: object) -> dict[str, Any]:
    return {
        "content": "",
        "generation_settings": settings,
        "model": settings["model"],
        "prompt": prompt,
        "slot_id": done.slot_id,
        "stop": True,
        "stopped_eos": done.reason == "eos",
        "stopped_limit": done.reason == "limit",
        "stopped_word": done.reason == "word",
        "stopping_word": done.stopping_word,
        "timings": timings(done),
        "tokens_cached": done.n_past,
        "tokens_evaluated": done.n_prompt,
        "tokens_predicted": done.n_predicted,
        "truncated": done.truncated,
    }


def timings(done: Done) -> dict[str, float]:
    """How long a prompt and its answer took: milliseconds, tokens, tokens a second, milliseconds a token."""
    numbers: dict[str, float] = {}
    for kind, n, ms in (
        ("predicted", done.timings.predicted_n, done.timings.predicted_ms),
        ("prompt", done.timings.prompt_n, done.timings.prompt_ms),
    ):
        numbers[f"{kind}_ms"] = ms
        numbers[f"{kind}_n"] = n
        numbers[f"{kind}_per_second"] = 1e3 * n / ms if ms else 0.0
        numbers[f"{kind}_per_token_ms"] = ms / n if n else 0.0
    return numbers


def _probabilities(event: Token, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "content": printable(tokenizer, sample.token),
            "probs": [{"prob": prob, "tok_str": printable(tokenizer, token)} for token, prob in sample.probs],
        }
        for sample in event.samples
    ]


def printable(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or the bytes that it stands for where these are no text."""
    data = tokenizer.token_bytes(token, special=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "byte: " + "".join(f"\\x{byte:02x}" for byte in data)


def note_usage(notes: dict[str, Any], done: Done) -> None:
    """Puts the numbers of a completion into the log line; those of several add up."""
    for name, n in (("prompt", done.n_prompt), ("reused", done.n_reused), ("generated", done.n_predicted)):
        notes[name] = notes.get(name, 0) + n


# ---- embeddings and the system prompt ---------------------------------------------------------------------------------


def embed(
    service: Service, prompts: list[tuple[int, ...]], is_gone: Callable[[], bool], notes: dict[str, Any]
) -> list[Done]:
    """The last states of some prompts.

    Raises:
        ApiError: 501 when the server was started without ``--embedding``.
    """
    if not service.defaults.embedding:
        raise ApiError(501, "embeddings are off; start the server with --embedding")
    done = []
    with service.submit([Request(prompt=prompt, n_predict=0, embedding=True) for prompt in prompts]) as streams:
        for stream in streams:
            (last,) = events(stream, is_gone)
            note_usage(notes, last)
            done.append(last)
    return done


def _set_system_prompt(service: Service, values: object) -> None:
    """Raises ``ApiError`` 400 for what is no system prompt."""
    if not isinstance(values, dict):
        raise ApiError(400, f"system_prompt must be an object, not {describe(values)}")
    try:
        service.set_system_prompt(values)
    except ValueError as error:
        raise ApiError(400, str(error)) from None
