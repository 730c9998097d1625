"""Server-sent events: each a line ``data: …`` and an empty one."""

from __future__ import annotations

from collections.abc import Iterator

from bottle import response

from pyllama.server.errors import ApiError, dump, error_body

__all__ = ["DONE", "send_events"]

DONE = "[DONE]"
"""The last event of OpenAI's streams, as it is and not as JSON."""


def send_events(values: Iterator[object]) -> Iterator[bytes]:
    """The body of a response that sends each value as soon as it is there.

    An ``ApiError`` before the first value becomes an ordinary error response, a later one the last event.
    """
    response.content_type = "text/event-stream"
    response.set_header("Cache-Control", "no-cache")
    return _encode(values)


def _encode(values: Iterator[object]) -> Iterator[bytes]:
    begun = False
    try:
        for value in values:
            yield b"data: " + (value.encode() if value is DONE else dump(value)) + b"\n\n"
            begun = True
    except ApiError as error:
        if not begun:
            raise
        yield b"data: " + error_body(error.status_code, error.message) + b"\n\n"
