"""What the server says on the standard error stream: one line for each request, for people or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from pyllama.server.http import RequestRecord

__all__ = ["log", "log_request", "progress_line", "set_up"]

log = logging.getLogger("pyllama.server")


def set_up(*, as_json: bool = False, verbose: bool = False) -> None:
    """Sends the server's lines to the standard error stream."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    # Waitress tells of exceptions that got past the application, and at this level of little else.
    for name, level in (("pyllama", logging.INFO), ("waitress", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(logging.DEBUG if verbose else level)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {"time": round(record.created, 3), "level": record.levelname.lower()}
        request = getattr(record, "request", None)
        if request is None:
            line["message"] = record.getMessage()
        else:
            line |= {**request._asdict(), "seconds": round(request.seconds, 4)}
            line |= line.pop("notes")
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_request(record: RequestRecord) -> None:
    """Logs one line about an answered request."""
    # A path is whatever a client sent: no line breaks, no escape sequences for terminals.
    path = record.path.encode("unicode_escape").decode("ascii")[:200]
    notes = ", ".join(f"{name} {value}" for name, value in record.notes.items())
    text = f"{record.client} {record.method} {path} {record.status} {1e3 * record.seconds:.0f} ms"
    log.info("%s", f"{text} ({notes})" if notes else text, extra={"request": record})


def progress_line(what: str) -> Callable[[float], None] | None:
    """A callback that shows a fraction done; None where the standard error stream is no terminal."""
    if not sys.stderr.isatty():
        return None
    last = 0.0

    def show(fraction: float) -> None:
        nonlocal last
        if fraction >= 1:
            print(f"\r{what}: done ", file=sys.stderr)
        elif time.monotonic() - last > 0.1:
            last = time.monotonic()
            print(f"\r{what}: {fraction:4.0%} ", end="", file=sys.stderr, flush=True)

    return show
