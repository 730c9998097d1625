"""Errors as clients see them: always a status and ``{"error": {"code", "message", "type"}}``, never a traceback."""

from __future__ import annotations

import json
from typing import Any

from bottle import HTTPError

__all__ = ["JSON", "ApiError", "dump", "error_body", "error_object"]

JSON = "application/json; charset=utf-8"
"""The content type of every answer that is no stream."""

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    405: "method_not_allowed_error",
    413: "request_too_large_error",
    429: "rate_limit_error",
    431: "request_too_large_error",
    501: "not_supported_error",
    503: "unavailable_error",
}

_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class ApiError(HTTPError):
    """Raised by a handler to end a request with this status and message."""

    def __init__(self, code: int, message: str, **headers: str) -> None:
        super().__init__(code, message, **headers)
        self.message = message

    def __str__(self) -> str:
        return self.message


def dump(value: object) -> bytes:
    """JSON in UTF-8. Lone surrogates, which UTF-8 has no bytes for, are written as JSON's escapes."""
    return _to_json(value).encode("utf-8", "backslashreplace")


def error_object(code: int, message: str) -> dict[str, Any]:
    """What an error's body says."""
    default = "server_error" if code >= 500 else "invalid_request_error"
    return {"error": {"code": code, "message": message, "type": _TYPES.get(code, default)}}


def error_body(code: int, message: str) -> bytes:
    """The body of an error."""
    return dump(error_object(code, message))
