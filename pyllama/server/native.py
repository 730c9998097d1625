"""The endpoints of llama.cpp's server: /completion, /infill, /tokenize, /detokenize, /embedding, /props, /model.json."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from typing import Any

from bottle import Bottle

from pyllama.engine import Done, Request, Token
from pyllama.server.errors import ApiError, dump
from pyllama.server.fields import Fields
from pyllama.server.http import Client
from pyllama.server.options import generation_settings, read_prompts, read_request, read_system_prompt
from pyllama.server.request import client, json_fields, notes
from pyllama.server.service import Service, SystemPrompt, events
from pyllama.server.sse import send_events
from pyllama.tokenizer import Tokenizer

__all__ = [
    "MAX_INPUTS",
    "add_routes",
    "embed",
    "infill_tokens",
    "llama_embeddings",
    "note_usage",
    "printable",
    "timings",
]

MAX_INPUTS = 2048
"""Texts of one request for embeddings."""


def add_routes(app: Bottle, service: Service) -> None:
    """Adds the endpoints to an application."""

    @app.post("/completion")
    @app.post("/completions")
    def completion() -> bytes:
        fields = json_fields(service)
        system = read_system_prompt(fields, service)
        prompts = read_prompts(fields, service, system=service.system_tokens(system))
        request = read_request(fields, service, prompts[0])
        given = fields.get("prompt")
        job = _Job(
            [replace(request, prompt=prompt) for prompt in prompts],
            given if len(prompts) > 1 else [given],
            system,
            fields.boolean("stream", False),
        )
        chunks = _complete(service, job, client(), notes())
        return send_events(chunks, client()) if job.stream else dump(_join(chunks))

    @app.post("/infill")
    def infill() -> bytes:
        fields = json_fields(service)
        if fields.get("input_prefix") is None and fields.get("input_suffix") is None:
            fields.fail("input_prefix", "is missing")
        prefix, suffix = fields.string("input_prefix", ""), fields.string("input_suffix", "")
        system = read_system_prompt(fields, service)
        prompt = service.after_system_prompt(infill_tokens(service, prefix, suffix), system)
        job = _Job([read_request(fields, service, prompt)], [""], system, stream=True)
        return send_events(_complete(service, job, client(), notes()), client())

    @app.post("/tokenize")
    def tokenize() -> bytes:
        fields = json_fields(service)
        fields.require("content")
        tokenizer, text = service.model.tokenizer, fields.string("content")
        tokens = tokenizer.opening if fields.boolean("add_special", False) else []
        tokens += tokenizer.encode(text, space_prefix=False)
        if fields.boolean("with_pieces", False):
            return dump({"tokens": [{"id": token, "piece": _piece(tokenizer, token)} for token in tokens]})
        return dump({"tokens": tokens})

    @app.post("/detokenize")
    def detokenize() -> bytes:
        fields = json_fields(service)
        fields.require("tokens")
        tokenizer = service.model.tokenizer
        tokens = fields.tokens("tokens", tokenizer.n_vocab)
        return dump({"content": tokenizer.decode(tokens, special=True, space_prefix=False)})

    @app.post("/embedding")
    def embedding() -> bytes:
        return llama_embeddings(json_fields(service), service)

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


@dataclass(frozen=True)
class _Job:
    """What one client wants completed."""

    requests: list[Request]
    prompts: list[object]
    """As the client gave them; answers repeat them."""
    system_prompt: SystemPrompt | None
    stream: bool


def infill_tokens(service: Service, prefix: str, suffix: str) -> list[int]:
    """The prompt for what stands between two texts. Raises ``ApiError`` 501 when the model has no tokens for that."""
    try:
        return service.model.tokenizer.infill(prefix, suffix)
    except ValueError as error:
        raise ApiError(501, str(error)) from None


def _complete(
    service: Service, job: _Job, client: Client, notes: dict[str, Any]
) -> Generator[dict[str, Any] | None, None, None]:
    """One object for each piece of text, and a last one with everything else. Several prompts are worked on side by side, and
    each object tells the ``index`` of its own. None, as the first one: there is nothing yet."""
    n_probs = job.requests[0].sampling.n_probs
    tokenizer = service.model.tokenizer
    with service.submit(job.requests, job.system_prompt) as streams:
        yield None
        for index, event in events(streams, client, whole=not job.stream):
            if event is None:
                yield None
                continue
            which = {"index": index} if len(streams) > 1 else {}
            if isinstance(event, Done):
                note_usage(notes, event)
                settings = generation_settings(service, job.requests[index], stream=job.stream)
                yield {**which, **_result(event, settings, job.prompts[index])}
            elif event.text or n_probs:
                chunk = {"content": event.text, "multimodal": False, "slot_id": streams[index].slot_id, "stop": False}
                if n_probs:
                    chunk["completion_probabilities"] = _probabilities(event, tokenizer)
                yield {**which, **chunk}


def _join(chunks: Iterable[dict[str, Any] | None]) -> dict[str, Any] | list[dict[str, Any]]:
    """The answer to a request that is not streamed, from the chunks of one that is; an array for several prompts."""
    pieces: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for chunk in filter(None, chunks):
        pieces[chunk.get("index", 0)].append(chunk)
    results = []
    for index in sorted(pieces):
        *parts, result = pieces[index]
        result["content"] = "".join(part["content"] for part in parts)
        if result["generation_settings"]["n_probs"]:
            entries = [entry for part in parts for entry in part["completion_probabilities"]]
            result["completion_probabilities"] = entries
        results.append(result)
    return results if len(results) > 1 else results[0]


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
    if done.timings.draft_n:
        numbers |= {"draft_n": done.timings.draft_n, "draft_n_accepted": done.timings.draft_n_accepted}
    return numbers


def _probabilities(event: Token, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [
        {
            "content": printable(tokenizer, sample.token),
            "probs": [{"prob": prob, "tok_str": printable(tokenizer, token)} for token, prob in sample.probs],
        }
        for sample in event.samples
    ]


def _piece(tokenizer: Tokenizer, token: int) -> str | list[int]:
    """A token's text, or its bytes where these are no text."""
    data = tokenizer.token_bytes(token, special=True)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def printable(tokenizer: Tokenizer, token: int) -> str:
    """A token's text, or the bytes that it stands for where these are no text."""
    piece = _piece(tokenizer, token)
    return piece if isinstance(piece, str) else "byte: " + "".join(f"\\x{byte:02x}" for byte in piece)


def note_usage(notes: dict[str, Any], done: Done) -> None:
    """Puts the numbers of a completion into the log line; those of several add up."""
    for name, n in (("prompt", done.n_prompt), ("reused", done.n_reused), ("generated", done.n_predicted)):
        notes[name] = notes.get(name, 0) + n


# ---- embeddings --------------------------------------------------------------------------------------------------------


def llama_embeddings(fields: Fields, service: Service) -> bytes:
    """The embedding of ``content``, or an array where that is several texts."""
    done = embed(service, read_prompts(fields, service, "content", most=MAX_INPUTS), client(), notes())
    vectors = [{"embedding": item.embedding.tolist()} for item in done]
    return dump(vectors[0] if len(done) == 1 else [{"index": i, **item} for i, item in enumerate(vectors)])


def embed(service: Service, prompts: list[tuple[int, ...]], client: Client, notes: dict[str, Any]) -> list[Done]:
    """The last states of some prompts, with EOS in the end where the model wants it there.

    Raises:
        ApiError: 501 when the server was started without ``--embedding``, 400 for a prompt that the context does not hold.
    """
    if not service.defaults.embedding:
        raise ApiError(501, "embeddings are off; start the server with --embedding")
    tokenizer, most = service.model.tokenizer, service.model.n_ctx - 1
    requests = []
    for prompt in prompts:
        tokens = (*prompt, tokenizer.eos_id) if tokenizer.add_eos and prompt[-1] != tokenizer.eos_id else prompt
        if len(tokens) > most:
            raise ApiError(400, f"a text of {len(tokens)} tokens is too long for its embedding; {most} are possible")
        requests.append(Request(prompt=tokens, n_predict=0, embedding=True))
    with service.submit(requests) as streams:
        done = dict(events(streams, client, whole=True))
    for item in done.values():
        note_usage(notes, item)
    return [done[i] for i in range(len(requests))]
