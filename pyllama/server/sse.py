"""Server-sent events: each a line ``data: …`` and an empty one."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from bottle import response

from pyllama.server.errors import ApiError, dump, error_body
from pyllama.server.http import Client

__all__ = ["DONE", "send_events"]

DONE = "[DONE]"
"""The last event of OpenAI's streams, as it is and not as JSON."""


def send_events(values: Generator[object, None, None], client: Client) -> bytes:
    """Answers with a stream that sends each value as soon as it is there; None says that none is.

    Args:
        values: the first is None and comes when the request is under way. Until then, an ``ApiError`` becomes an ordinary
            error response in the handler's thread, and after that until the first event; a later one the last event.

    Returns:
        What the handler is to return.
    """
    body = _encode(values)
    next(body)
    response.content_type = "text/event-stream"
    response.set_header("Cache-Control", "no-cache")
    client.stream(body)
    return b""


def _encode(values: Generator[object, None, None]) -> Iterator[bytes]:
    has_begun = False
    try:
        for value in values:
            if value is None:
                yield b""
                continue
            has_begun = True
            yield b"data: " + (value.encode() if value is DONE else dump(value)) + b"\n\n"
    except ApiError as error:
        if not has_begun:
            raise
        yield b"data: " + error_body(error.status_code, error.message) + b"\n\n"
    finally:
        values.close()
