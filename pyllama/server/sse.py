"""Server-sent events: each a line ``data: …`` and an empty one."""

from __future__ import annotations

from collections.abc import Iterator

from bottle import response

from pyllama.server.errors import ApiError, dump, error_body
from pyllama.server.http import Client

__all__ = ["DONE", "send_events"]

DONE = "[DONE]"
"""The last event of OpenAI's streams, as it is and not as JSON."""


def send_events(values: Iterator[object], client: Client) -> Iterator[bytes]:
    """The body of a response that sends each value as soon as it is there; None says that none is.

    An ``ApiError`` before the first value becomes an ordinary error response, a later one the last event.
    """
    response.content_type = "text/event-stream"
    response.set_header("Cache-Control", "no-cache")
    return _encode(values, client)


def _encode(values: Iterator[object], client: Client) -> Iterator[bytes]:
    try:
        for value in values:
            if value is None:
                yield b""
                continue
            client.takes_news = True
            yield b"data: " + (value.encode() if value is DONE else dump(value)) + b"\n\n"
    except ApiError as error:
        if not client.takes_news:
            raise
        yield b"data: " + error_body(error.status_code, error.message) + b"\n\n"
