"""What handlers want to know of the request that is being answered in this thread."""

from __future__ import annotations

from typing import Any

from bottle import request

from pyllama.server.fields import Fields, parse_json
from pyllama.server.http import CLIENT, NOTES, Client
from pyllama.server.service import Service

__all__ = ["client", "json_fields", "notes"]


def json_fields(service: Service) -> Fields:
    """The request's JSON, whatever content type it claims.

    Raises:
        ApiError: 503 without a model, 400 for what is no JSON object.
    """
    service.engine  # noqa: B018 - refuses while there is no model
    # Not Bottle's request.body, a copy that would live as long as its thread has no other request.
    return parse_json(request.environ["wsgi.input"].read())


def client() -> Client:
    """Whoever waits for the answer. What is told of them stays true when the handler has returned."""
    return request.environ[CLIENT]


def notes() -> dict[str, Any]:
    """What a handler puts here stands in the log line of its request."""
    return request.environ[NOTES]
