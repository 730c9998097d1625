"""The options of /completion, which OpenAI's endpoints understand as well: from JSON to a request for the engine."""

from __future__ import annotations

import math
from typing import Any

from pyllama.engine import Request
from pyllama.json_schema import JSON_OBJECT, SchemaError, to_gbnf
from pyllama.sampling import RANDOM_SEED, SamplingParams
from pyllama.server.errors import ApiError
from pyllama.server.fields import Fields, as_integer, as_number, describe
from pyllama.server.service import Service, SystemPrompt
from pyllama.tokenizer import Tokenizer

__all__ = ["MAX_PROMPTS", "generation_settings", "read_prompts", "read_request", "read_system_prompt"]

MAX_PROBS = 1000
"""Candidates that are reported with a token; they are kept until the answer is sent."""
MAX_PROMPTS = 128
"""Prompts of one request."""
MAX_STOPS = 256
"""Strings that end a generation; all of them are looked for with every token."""

_NUMBERS = (
    "temperature", "top_p", "min_p", "tfs_z", "typical_p", "repeat_penalty", "presence_penalty", "frequency_penalty",
    "mirostat_tau", "mirostat_eta",
)  # fmt: skip
_INTEGERS = ("top_k", "repeat_last_n", "mirostat")
_BOOLEANS = ("penalize_nl", "ignore_eos")


def read_request(fields: Fields, service: Service, prompt: tuple[int, ...], **sampling: Any) -> Request:
    """A request for the engine. ``sampling`` replaces what the fields say of it."""
    if fields.array("image_data", []):
        raise ApiError(501, "image_data needs a model that sees images; this one does not")
    return Request(
        prompt=prompt,
        sampling=_read_sampling(fields, service, **sampling),
        n_predict=fields.integer("n_predict", service.defaults.n_predict, low=-1),
        n_keep=fields.integer("n_keep", 0, low=-1),
        stop=_read_stop(fields),
        cache_prompt=fields.boolean("cache_prompt", True),
        slot_id=fields.integer("slot_id", -1, low=-1, high=service.engine.n_slots - 1),
    )


def _read_stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.strings("stop")
    if len(stop) > MAX_STOPS:
        fields.fail("stop", f"has {len(stop)} strings; at most {MAX_STOPS} are possible")
    return stop


def _read_sampling(fields: Fields, service: Service, **replaced: Any) -> SamplingParams:
    """How to sample. ``replaced`` has precedence over the fields."""
    values: dict[str, Any] = {name: fields.number(name) for name in _NUMBERS}
    values |= {name: fields.integer(name) for name in _INTEGERS}
    values["seed"] = fields.integer("seed", service.defaults.seed)
    values["n_probs"] = fields.integer("n_probs", 0, low=0, high=MAX_PROBS)
    values |= {name: fields.boolean(name) for name in _BOOLEANS}
    values["grammar"] = _read_grammar(fields)
    values["logit_bias"] = _read_logit_bias(fields)
    values["penalty_prompt"] = _read_penalty_prompt(fields, service.model.tokenizer)
    values |= replaced
    try:
        return SamplingParams(**{name: value for name, value in values.items() if value is not None})
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def _read_grammar(fields: Fields) -> str:
    """The grammar, or the one of a JSON schema: llama.cpp's ``json_schema``, or OpenAI's ``response_format``."""
    found = {"grammar": fields.string("grammar", "")}
    schema = fields.get("json_schema")
    if schema is not None:
        found["json_schema"] = _grammar_of(schema, "json_schema")
    form = fields.object("response_format")
    kind = form.string("type", "text")
    if kind == "json_object":
        schema = form.get("schema")
        found["response_format"] = JSON_OBJECT if schema is None else _grammar_of(schema, "response_format.schema")
    elif kind == "json_schema":
        schema = form.object("json_schema").require("schema")
        found["response_format"] = _grammar_of(schema, "response_format.json_schema.schema")
    elif kind != "text":
        form.fail("type", f"must be text, json_object or json_schema, not {describe(kind)}")
    given = [name for name, grammar in found.items() if grammar]
    if len(given) > 1:
        fields.fail(given[0], f"and {given[1]} cannot be given both")
    return found[given[0]] if given else ""


def _grammar_of(schema: object, name: str) -> str:
    try:
        return to_gbnf(schema)
    except SchemaError as error:
        raise ApiError(400, f"{name}: {error}") from None


def _read_logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    """``[[token, bias], …]``, or OpenAI's ``{"token": bias}``; false for a bias bans the token."""
    value = fields.get("logit_bias")
    if value is None:
        return ()
    if isinstance(value, dict):
        pairs: list[Any] = [
            [int(token) if token.isascii() and token.isdigit() else token, bias] for token, bias in value.items()
        ]
    else:
        pairs = fields.array("logit_bias", [])
    biases = []
    for i, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            fields.fail(f"logit_bias[{i}]", "must be a pair of a token and a bias")
        token, bias = as_integer(pair[0]), -math.inf if pair[1] is False else as_number(pair[1])
        if token is None:
            fields.fail(f"logit_bias[{i}]", f"must begin with a token (an integer), not {describe(pair[0])}")
        if bias is None:
            fields.fail(f"logit_bias[{i}]", f"must end with a number or false, not {describe(pair[1])}")
        biases.append((token, bias))
    return tuple(biases)


def _read_penalty_prompt(fields: Fields, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    value = fields.get("penalty_prompt")
    if value is None:
        return None
    if isinstance(value, str):
        return tuple(tokenizer.encode(value))
    if not isinstance(value, list):
        fields.fail("penalty_prompt", "must be a string or an array of tokens")
    return fields.tokens("penalty_prompt", tokenizer.n_vocab)


def read_prompts(
    fields: Fields, service: Service, name: str = "prompt", *, system: tuple[int, ...] = (), most: int = MAX_PROMPTS
) -> list[tuple[int, ...]]:
    """One prompt or several, as tokens.

    A string is a prompt, and so is an array of strings and tokens that follow one another. An array of several strings, or
    one with arrays in it, is several prompts. BOS comes first where the model wants one and the prompt does not begin with a
    token of its own.

    Args:
        system: stands before each.
        most: how many prompts are possible.
    """
    value = fields.require(name)
    if not isinstance(value, (str, list)):
        fields.fail(name, f"must be a string or an array of strings and tokens, not {describe(value)}")
    if not is_several(value):
        return [_join(fields, service, value, name, system)]
    if len(value) > most:
        fields.fail(name, f"has {len(value)} elements; at most {most} are possible")
    for i, item in enumerate(value):
        if not isinstance(item, (str, list)):
            fields.fail(f"{name}[{i}]", f"must be a string or an array of strings and tokens, not {describe(item)}")
    return [_join(fields, service, item, f"{name}[{i}]", system) for i, item in enumerate(value)]


def is_several(prompt: str | list[Any]) -> bool:
    """Is it an array of prompts, rather than the parts of one?"""
    if isinstance(prompt, str):
        return False
    return any(isinstance(part, list) for part in prompt) or (
        len(prompt) > 1 and all(isinstance(part, str) for part in prompt)
    )


def _join(
    fields: Fields, service: Service, prompt: str | list[Any], name: str, system: tuple[int, ...]
) -> tuple[int, ...]:
    """The tokens of the parts of a prompt, called ``name``."""
    tokenizer = service.model.tokenizer
    tokens = list(system)
    for i, part in enumerate([prompt] if isinstance(prompt, str) else prompt):
        if isinstance(part, str):
            begins = not tokens and i == 0
            tokens += tokenizer.opening if begins else []
            tokens += tokenizer.encode(part, space_prefix=begins)
        else:
            tokens.append(fields.token(f"{name}[{i}]", part, tokenizer.n_vocab))
    if not tokens:
        # Models without BOS begin a text after the end of another.
        first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if first is None:
            fields.fail(name, "is empty")
        tokens.append(first)
    return tuple(tokens)


def read_system_prompt(fields: Fields, service: Service) -> SystemPrompt | None:
    """The system prompt that a request brings; None when it brings none."""
    value = fields.get("system_prompt")
    if value is None:
        return None
    try:
        return SystemPrompt.read(value)
    except ValueError as error:
        raise ApiError(400, str(error)) from None


def generation_settings(service: Service, request: Request, *, stream: bool) -> dict[str, Any]:
    """The options of a request as answers repeat them."""
    sampling = request.sampling
    return {
        "frequency_penalty": sampling.frequency_penalty,
        "grammar": sampling.grammar,
        "ignore_eos": sampling.ignore_eos,
        "logit_bias": [[token, False if bias == -math.inf else bias] for token, bias in sampling.logit_bias],
        "min_p": sampling.min_p,
        "mirostat": sampling.mirostat,
        "mirostat_eta": sampling.mirostat_eta,
        "mirostat_tau": sampling.mirostat_tau,
        "model": service.defaults.name,
        "n_ctx": service.model.n_ctx,
        "n_keep": request.n_keep,
        "n_predict": request.n_predict,
        "n_probs": sampling.n_probs,
        "penalize_nl": sampling.penalize_nl,
        "presence_penalty": sampling.presence_penalty,
        "repeat_last_n": sampling.repeat_last_n,
        "repeat_penalty": sampling.repeat_penalty,
        "seed": sampling.seed & RANDOM_SEED,
        "stop": list(request.stop),
        "stream": stream,
        "temp": sampling.temperature,
        "tfs_z": sampling.tfs_z,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "typical_p": sampling.typical_p,
    }
