"""Reading a request's JSON: every wrong field is refused with 400 and its name; null counts as absent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeVar

from pyllama.server.errors import ApiError

__all__ = ["Fields", "as_integer", "as_number", "describe", "parse_json"]

T = TypeVar("T")
LARGEST_INTEGER = 2**63 - 1
"""No field has a use for integers beyond."""


class Fields:
    """A JSON object whose members are asked for by name and type; members that nobody asks for are ignored.

    Every method raises ``ApiError`` 400, naming the field, when the member has another type or is out of range.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, name: str) -> Any:
        """The member as it came; None when it is absent."""
        return self._values.get(name)

    def require(self, name: str) -> Any:
        """The member as it came."""
        value = self.get(name)
        if value is None:
            self.fail(name, "is missing")
        return value

    def fail(self, name: str, complaint: str) -> NoReturn:
        """Refuses the request because of a field."""
        raise ApiError(400, f"{self._prefix}{name} {complaint}")

    def string(self, name: str, default: T | None = None) -> str | T | None:
        return self._typed(name, "a string", default, lambda value: value if isinstance(value, str) else None)

    def boolean(self, name: str, default: T | None = None) -> bool | T | None:
        return self._typed(name, "true or false", default, lambda value: value if isinstance(value, bool) else None)

    def integer(
        self, name: str, default: T | None = None, *, low: int = -LARGEST_INTEGER, high: int = LARGEST_INTEGER
    ) -> int | T | None:
        """A whole number; 3.0 is one, too, as many clients know only one kind of number."""
        value = self._typed(name, "an integer", default, as_integer)
        if value is not None and value is not default and not low <= value <= high:
            bounds = f"at least {low}" if high == LARGEST_INTEGER else f"between {low} and {high}"
            self.fail(name, f"must be {bounds}, not {value}")
        return value

    def number(self, name: str, default: T | None = None) -> float | T | None:
        return self._typed(name, "a number", default, as_number)

    def array(self, name: str, default: T | None = None) -> list[Any] | T | None:
        return self._typed(name, "an array", default, lambda value: value if isinstance(value, list) else None)

    def object(self, name: str) -> Fields:
        """A member that is an object; empty when it is absent."""
        value = self._typed(name, "an object", {}, lambda value: value if isinstance(value, dict) else None)
        return Fields(value, f"{self._prefix}{name}.")

    def strings(self, name: str) -> tuple[str, ...]:
        """A string or an array of strings; empty strings are left out."""
        value = self.get(name)
        items = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            self.fail(name, f"must be a string or an array of strings, not {describe(value)}")
        return tuple(item for item in items if item)

    def tokens(self, name: str, n_vocab: int) -> tuple[int, ...]:
        """An array of tokens of a vocabulary."""
        return tuple(self.token(f"{name}[{i}]", value, n_vocab) for i, value in enumerate(self.array(name, [])))

    def token(self, name: str, value: object, n_vocab: int) -> int:
        """A value, called ``name``, as a token of a vocabulary."""
        token = as_integer(value)
        if token is None:
            self.fail(name, f"must be a token (an integer), not {describe(value)}")
        if not 0 <= token < n_vocab:
            self.fail(name, f"must be a token between 0 and {n_vocab - 1}, not {token}")
        return token

    def _typed(self, name: str, kind: str, default: Any, convert: Callable[[object], Any]) -> Any:
        value = self.get(name)
        if value is None:
            return default
        converted = convert(value)
        if converted is None:
            self.fail(name, f"must be {kind}, not {describe(value)}")
        return converted


def parse_json(body: bytes) -> Fields:
    """The fields of a request. Raises ``ApiError`` 400 for what is not a JSON object."""
    if not body:
        raise ApiError(400, "the body is empty; a JSON object is expected")
    try:
        value = json.loads(body, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ApiError(400, "the body is not acceptable JSON: it is nested too deeply") from None
    except ValueError as error:  # of json, or of a wrong encoding, or of an integer with thousands of digits
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, not {describe(value)}")
    return Fields(value)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:40]} is too large for a number")
    return value


def as_integer(value: object) -> int | None:
    """A whole number of a size that anything has a use for, else None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if abs(value) <= LARGEST_INTEGER else None


def as_number(value: object) -> float | None:
    """A number that is not absurdly large, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > LARGEST_INTEGER:
        return None
    return float(value)


def describe(value: object) -> str:
    """A value in an error message: short, whatever a client has sent."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
