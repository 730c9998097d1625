"""JSON Schema to GBNF: a grammar whose texts are JSON that the schema validates.

The grammar never permits what the schema forbids. It may permit less: members stand in the schema's order (names that
are array indices come first, as in JavaScript), white space is one blank at most after a comma or a colon, numbers
within bounds have no exponents, and an object whose schema names properties has no others unless the schema speaks of
them. What cannot be expressed is refused by name.

A schema is first turned into alternatives (:class:`_Term`), each a conjunction of what is wanted of every type of
value; then every alternative is written. Schemas of parts are kept as they are until their turn comes, so that
recursive schemas are fine. ``public/json-schema-to-grammar.mjs`` does the same in JavaScript, to the same text.
"""

from __future__ import annotations

import decimal
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

from .gbnf import (
    EMPTY,
    NEVER,
    Chars,
    Expression,
    Rule,
    Rules,
    Text,
    choice,
    merged,
    optional,
    repeat,
    sequence,
    text,
)  # fmt: skip
from .patterns import (
    FORMATS,
    UNKNOWN_LANGUAGES,
    Language,
    PatternError,
    format_language,
    names_language,
    pattern_language,
    written,
)  # fmt: skip

__all__ = ["JSON_OBJECT", "JSON_VALUE", "SchemaError", "to_gbnf"]

MAX_DEPTH = 100
"""Of lists and objects in a schema, and of references that lead to references."""
MAX_VALUES = 50_000
"""Numbers, strings, lists … in a schema."""
MAX_SIZE = 300_000
"""Nodes of a grammar's network, more or less; its parser takes some more."""
MAX_ALTERNATIVES = 1_000
"""Of one schema."""
MAX_MEETINGS = 200_000
"""Of two alternatives."""
MAX_STRING = 50_000
"""Characters of a string."""
MAX_PATTERNS = 6
"""Of property names in one object: each may or may not be found in a name."""
MAX_COUNT = 50_000
"""Of characters, elements or members. Higher upper bounds are lowered to this."""
MAX_COMBINATIONS = 4_000
"""Of members that have come and how many there were."""
MAX_DIGITS = 16
"""Of numbers that the schema does not bound, and of their fractions."""
LARGEST = 10**40
"""Numbers go no further, whatever their bounds; bounds that leave only larger ones are refused."""
EXACT_DIGITS = 15
"""Decimal numbers of so many digits are different numbers for floating point, too."""


class SchemaError(ValueError):
    """The schema is not one, or cannot be expressed as a grammar. The message begins with the place: a JSON pointer."""


def to_gbnf(schema: object) -> str:
    """A grammar of the JSON texts that a schema validates, or of most of them.

    Args:
        schema: a JSON Schema as ``json.loads`` returns it, of any draft from 4 to 2020-12.

    Raises:
        SchemaError: the schema is not one, cannot be expressed, or nothing satisfies it.
    """
    return _Converter(schema).convert()


# ---- values --------------------------------------------------------------------------------------
# Floats with no fraction are integers, as they are for JSON Schema.

_ARRAY_INDEX = re.compile("0|[1-9][0-9]{0,9}")


def _plain(schema: object) -> Any:
    """A copy that holds nothing but JSON, bounded in depth and number."""
    n = 0

    def copied(value: object, pointer: str, depth: int) -> Any:
        nonlocal n
        n += 1
        if n > MAX_VALUES:
            _fail("#", f"the schema is too large: at most {MAX_VALUES} values are read")
        if depth > MAX_DEPTH:
            _fail("#", f"the schema is nested too deeply: at most {MAX_DEPTH} levels are read")
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            if value - value != 0:
                _fail(pointer, "a number is not finite")
            return int(value) if value.is_integer() else value
        if isinstance(value, str):
            if len(value) > MAX_STRING:
                _fail(pointer, f"a string is too long: at most {MAX_STRING} characters are read")
            return _whole(value)
        if isinstance(value, list | tuple):
            return [copied(v, f"{pointer}/{i}", depth + 1) for i, v in enumerate(value)]
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            pairs = [(copied(key, pointer, depth), v) for key, v in value.items()]
            return {key: copied(v, _below(pointer, key), depth + 1) for key, v in sorted(pairs, key=_place)}
        _fail(pointer, f"this is no JSON: {type(value).__name__}")

    return copied(schema, "#", 0)


def _whole(string: str) -> str:
    """With pairs of surrogates put together."""
    return string.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _place(pair: tuple[str, object]) -> int:
    """Array indices first, and in order: JavaScript knows no other."""
    key = pair[0]
    return int(key) if _ARRAY_INDEX.fullmatch(key) and int(key) < 2**32 - 1 else 2**32


def _json(value: Any) -> str:
    """The canonical text of a value: that of JavaScript's ``JSON.stringify``, except for large integers."""
    if isinstance(value, str):
        return _json_string(value)
    if isinstance(value, float):
        return _json_fraction(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_json, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{_json_string(k)}:{_json(v)}" for k, v in value.items()) + "}"
    return {True: "true", False: "false", None: "null"}[value] if not _is_integer(value) else _digits(value)


_ESCAPED = {"\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_TO_ESCAPE = re.compile(r'["\\\x00-\x1f\ud800-\udfff]')


def _json_string(value: str) -> str:
    return '"' + _TO_ESCAPE.sub(lambda c: _ESCAPED.get(c[0]) or f"\\u{ord(c[0]):04x}", value) + '"'


def _digits(value: int) -> str:
    """An integer's digits, however many (``str`` refuses some)."""
    return format(decimal.Decimal(value), "f") if abs(value) >= LARGEST else str(value)


def _json_fraction(value: float) -> str:
    """The shortest digits that mean this float, as JavaScript writes them."""
    sign, digits, exponent = decimal.Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)
    s, point = "".join(map(str, digits)).rstrip("0"), len(digits) + exponent
    if 0 < point <= 21:
        number = f"{s[:point]}.{s[point:]}"
    elif -6 < point <= 0:
        number = "0." + "0" * -point + s
    else:
        number = f"{s[0]}{'.' * (len(s) > 1)}{s[1:]}e{point - 1:+d}"
    return "-" * sign + number


def _key(value: Any) -> str:
    """The same for values that are equal, whatever the order of their members."""
    if isinstance(value, list):
        return "[" + ",".join(map(_key, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{_json_string(k)}:{_key(v)}" for k, v in value.items())) + "}"
    return _json(value)


def _shown(value: Any) -> str:
    """A value for a message."""
    shown = _json(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _below(pointer: str, key: str) -> str:
    return f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}"


def _fail(pointer: str, message: str) -> NoReturn:
    raise SchemaError(f"{pointer}: {message}")


# ---- numbers -------------------------------------------------------------------------------------


class _Bound(NamedTuple):
    """digits / 10 ** scale; `strict`: which itself is out of bounds."""

    digits: int
    scale: int
    strict: bool


def _bound(value: int | float, strict: bool) -> _Bound:
    if isinstance(value, int):
        return _Bound(max(min(value, LARGEST), -LARGEST), 0, strict)
    sign, digits, exponent = decimal.Decimal(repr(value)).as_tuple()
    assert isinstance(exponent, int)
    n = int("".join(map(str, digits)))
    return _Bound(-n if sign else n, -exponent, strict)


def _compare(a: _Bound, b: _Bound) -> int:
    x, y = a.digits * 10**b.scale, b.digits * 10**a.scale
    return (x > y) - (x < y)


def _tighter(a: _Bound | None, b: _Bound | None, sign: int) -> _Bound | None:
    """Of two lower bounds (sign 1) or upper bounds (-1) the one that leaves less."""
    if a is None or b is None:
        return a or b
    order = sign * _compare(a, b)
    return a if order > 0 or (order == 0 and a.strict) else b


def _is_between(value: _Bound, low: _Bound | None, high: _Bound | None) -> bool:
    above = low is None or _compare(value, low) > 0 or (_compare(value, low) == 0 and not low.strict)
    return above and (high is None or _compare(value, high) < 0 or (_compare(value, high) == 0 and not high.strict))


def _integer_bounds(low: _Bound | None, high: _Bound | None) -> tuple[int | None, int | None]:
    """The least and the greatest integer within bounds."""
    least = most = None
    if low is not None:
        unit = 10**low.scale
        least = low.digits // unit + 1 if low.strict else -(-low.digits // unit)
    if high is not None:
        unit = 10**high.scale
        most = -(-high.digits // unit) - 1 if high.strict else high.digits // unit
    return least, most


_DIGIT = Chars(((0x30, 0x39),))


def _digit(low: int, high: int) -> Expression:
    return text(str(low)) if low == high else Chars(((0x30 + low, 0x30 + high),))


def _any_digits(low: int, high: int) -> Expression:
    return repeat(_DIGIT, low, high)


def _outermost(bound: int | None) -> int:
    """How far the numbers go on the side that has no bound, when the other side has this one."""
    digits = max(MAX_DIGITS, len(str(abs(bound or 0))) + 1)
    return 10**digits - 1


def _integers(low: int | None, high: int | None) -> Expression:
    """The integers from low to high."""
    low, high = -_outermost(high) if low is None else low, _outermost(low) if high is None else high
    negative = sequence(text("-"), _naturals(max(1, -high), -low)) if low < 0 else NEVER
    return choice(negative, _naturals(max(low, 0), high))


def _naturals(low: int, high: int) -> Expression:
    """The integers from low to high, which are not negative and have no leading zeros."""
    if high < low:
        return NEVER
    parts, start = [], low
    for n in range(len(str(low)), len(str(high)) + 1):
        end = min(high, 10**n - 1)
        parts.append(_of_equal_length(str(start).rjust(n, "0"), str(end)))
        start = end + 1
    return choice(*parts)


def _of_equal_length(low: str, high: str) -> Expression:
    """The strings of digits from low to high."""
    if low == high:
        return text(low)
    rest = len(low) - 1
    a, b = int(low[0]), int(high[0])
    if a == b:
        return sequence(text(low[0]), _of_equal_length(low[1:], high[1:]))
    parts = []
    if low[1:].strip("0"):
        parts.append(sequence(text(low[0]), _of_equal_length(low[1:], "9" * rest)))
        a += 1
    whole = b - 1 if high[1:].strip("9") else b
    if a <= whole:
        parts.append(sequence(_digit(a, whole), _any_digits(rest, rest)))
    if whole < b:
        parts.append(sequence(text(high[0]), _of_equal_length("0" * rest, high[1:])))
    return choice(*parts)


def _decimals(low: _Bound | None, high: _Bound | None) -> Expression:
    """Numbers within bounds, without exponents."""
    zero = _Bound(0, 0, False)
    parts = []
    if low is None or low.digits < 0:
        nearest = zero if high is None or high.digits > 0 else high._replace(digits=-high.digits)
        farthest = None if low is None else low._replace(digits=-low.digits)
        parts.append(sequence(text("-"), _magnitudes(nearest, farthest)))
    if high is None or high.digits >= 0:
        parts.append(_magnitudes(low if low is not None and low.digits >= 0 else zero, high))
    return choice(*parts)


def _magnitudes(low: _Bound, high: _Bound | None) -> Expression:
    """Numbers within bounds that are not negative."""
    first, first_fraction = _split(low)
    last, last_fraction = (_outermost(first), "") if high is None else _split(high)
    if high is None:
        high = _Bound(last, 0, False)
        most = EXACT_DIGITS - len(str(first))
    else:
        most = EXACT_DIGITS - len(str(last))
    if _compare(low, high) > 0:
        return NEVER
    at_low = _Fractions(first_fraction, low.strict, None, False, most)
    at_high = _Fractions(None, False, last_fraction, high.strict, most)
    if first == last:
        both = _Fractions(first_fraction, low.strict, last_fraction, high.strict, most)
        return sequence(text(str(first)), both.written())
    free = _Fractions(None, False, None, False, most).written()
    return choice(
        sequence(text(str(first)), at_low.written()),
        sequence(_naturals(first + 1, last - 1), free),
        sequence(text(str(last)), at_high.written()),
    )


def _split(bound: _Bound) -> tuple[int, str]:
    """The integer part, and the digits of the fraction."""
    whole, rest = divmod(bound.digits, 10**bound.scale)
    return whole, str(rest).rjust(bound.scale, "0").rstrip("0") if rest else ""


@dataclass(frozen=True, slots=True)
class _Fractions:
    """What may follow the integer part, where the fraction is bounded by `low` and `high` (digits; None: not at all)."""

    low: str | None
    low_strict: bool
    high: str | None
    high_strict: bool
    most: int

    def written(self) -> Expression:
        digits = self._digits_from(0, self.low is not None, self.high is not None, may_end=False)
        point = sequence(text("."), digits)
        return optional(point) if self._may_end(0, self.low is not None, self.high is not None) else point

    def _may_end(self, i: int, at_low: bool, at_high: bool) -> bool:
        """Whether the fraction is within bounds if it ends after i digits, all those of the bounds so far."""
        above = not at_low or (i >= len(self.low or "") and not self.low_strict)
        return above and (not at_high or i < len(self.high or "") or not self.high_strict)

    def _digits_from(self, i: int, at_low: bool, at_high: bool, may_end: bool = True) -> Expression:
        at_low = at_low and not (i >= len(self.low or "") and not self.low_strict)
        if not at_low and not at_high:
            return _any_digits(0 if may_end else 1, self.most - i)
        parts = [EMPTY] if may_end and self._may_end(i, at_low, at_high) else []
        if i < self.most and (not at_high or i < len(self.high or "")):
            a = int((self.low or "")[i : i + 1] or "0") if at_low else 0
            b = int((self.high or "")[i : i + 1]) if at_high else 9
            if at_low and at_high and a == b:
                parts.insert(0, sequence(text(str(a)), self._digits_from(i + 1, True, True)))
            else:
                if at_low:
                    parts.insert(0, sequence(text(str(a)), self._digits_from(i + 1, True, False)))
                first, last = a + at_low, b - at_high
                if first <= last:
                    parts.insert(0, sequence(_digit(first, last), _any_digits(0, self.most - i - 1)))
                if at_high:
                    parts.insert(0, sequence(text(str(b)), self._digits_from(i + 1, False, True)))
        return choice(*parts)


# ---- schemas -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Node:
    """A schema at its place."""

    schema: Any
    pointer: str
    base: _Node | None
    """The schema with an $id of its own that this is part of; None: the whole."""

    def below(self, *keys: str) -> _Node:
        """The schema under these keys."""
        schema, pointer = self.schema, self.pointer
        for key in keys:
            schema = schema[int(key)] if isinstance(schema, list) else schema[key]
            pointer = _below(pointer, key)
        return _Node(schema, pointer, self if self.has_id() else self.base)

    def has_id(self) -> bool:
        return isinstance(self.schema, dict) and not str(self.schema.get("$id", "#")).startswith("#")

    def fail(self, message: str) -> NoReturn:
        _fail(self.pointer, message)


_All = tuple[_Node, ...]
"""Schemas that are all to be satisfied; of none of them, anything goes."""


class _ObjectPart(NamedTuple):
    """What one schema says of members."""

    properties: dict[str, _Node] = {}
    patterns: tuple[tuple[str, Language, _Node], ...] = ()
    additional: _Node | None = None

    def of(self, name: str) -> _All:
        """Of the member of this name."""
        found = [self.properties[name]] if name in self.properties else []
        is_additional = not found and not any(language.matches(name) for _, language, _ in self.patterns)
        found += [node for _, language, node in self.patterns if language.generously().matches(name)]
        return (*found, self.additional) if is_additional and self.additional is not None else tuple(found)


class _ArrayPart(NamedTuple):
    """What one schema says of elements."""

    prefix: tuple[_Node, ...] = ()
    items: _Node | None = None

    def of(self, i: int) -> _All:
        if i < len(self.prefix):
            return (self.prefix[i],)
        return () if self.items is None else (self.items,)


_TYPES = {
    "null": {"null"}, "boolean": {"boolean"}, "integer": {"integer"}, "number": {"integer", "fraction"},
    "string": {"string"}, "array": {"array"}, "object": {"object"},
}  # fmt: skip
"""Of JSON Schema, in ours: a number is an integer or a fraction."""


@dataclass(frozen=True, slots=True)
class _Term:
    """One alternative: all of this is wanted."""

    types: frozenset[str] | None = None
    """None: not said."""
    values: tuple[Any, ...] | None = None
    low: _Bound | None = None
    high: _Bound | None = None
    shortest: int = 0
    longest: int | None = None
    languages: tuple[tuple[str, Language], ...] = ()
    """(pattern or format, its strings)"""
    arrays: tuple[_ArrayPart, ...] = ()
    fewest_items: int = 0
    most_items: int | None = None
    unique: str | None = None
    """Where it is said that elements are unique."""
    objects: tuple[_ObjectPart, ...] = ()
    required: tuple[str, ...] = ()
    fewest_members: int = 0
    most_members: int | None = None
    names: _All = ()
    """What is wanted of members' names."""
    names_members: bool = False
    """Some schema has said which members there are."""
    is_open: bool = False
    """Some schema has spoken of members that it does not name."""
    where: str = "#"

    def meet(self, other: _Term) -> _Term:
        """Both."""
        values = self.values
        if values is None:
            values = other.values
        elif other.values is not None:
            keys = set(map(_key, other.values))
            values = tuple(value for value in values if _key(value) in keys)
        return _Term(
            types=_both(self.types, other.types, frozenset.intersection),
            values=values,
            low=_tighter(self.low, other.low, 1),
            high=_tighter(self.high, other.high, -1),
            shortest=max(self.shortest, other.shortest),
            longest=_both(self.longest, other.longest, min),
            languages=tuple(dict((*self.languages, *other.languages)).items()),
            arrays=self.arrays + other.arrays,
            fewest_items=max(self.fewest_items, other.fewest_items),
            most_items=_both(self.most_items, other.most_items, min),
            unique=self.unique or other.unique,
            objects=self.objects + other.objects,
            required=tuple(dict.fromkeys(self.required + other.required)),
            fewest_members=max(self.fewest_members, other.fewest_members),
            most_members=_both(self.most_members, other.most_members, min),
            names=_together(self.names + other.names),
            names_members=self.names_members or other.names_members,
            is_open=self.is_open or other.is_open,
            where=self.where if self.where != "#" else other.where,
        )

    def is_nothing(self) -> bool:
        """Whether it can be seen at once that nothing satisfies this."""
        return self.types == frozenset() or self.values == ()

    def speaks_of(self) -> frozenset[str]:
        """The types of values that it restricts."""
        numbers = self.low is not None or self.high is not None
        strings = self.shortest > 0 or self.longest is not None or self.languages
        arrays = self.arrays or self.fewest_items > 0 or self.most_items is not None or self.unique
        objects = self.objects or self.required or self.fewest_members > 0 or self.names
        objects = objects or self.most_members is not None
        found = [_TYPES["number"]] * bool(numbers) + [{"string"}] * bool(strings)
        found += [{"array"}] * bool(arrays) + [{"object"}] * bool(objects)
        return frozenset().union(*found)

    def element(self, i: int) -> _All:
        """What is wanted of an element."""
        return _together(node for part in self.arrays for node in part.of(i))

    def n_prefix(self) -> int:
        """How many elements have schemas of their own."""
        return max((len(part.prefix) for part in self.arrays), default=0)

    def member(self, name: str) -> _All:
        """What is wanted of a member."""
        return _together(node for part in self.objects for node in part.of(name))


def _both(a: Any, b: Any, meet: Callable[[Any, Any], Any]) -> Any:
    return b if a is None else a if b is None else meet(a, b)


def _together(nodes: Iterable[_Node]) -> _All:
    """Each once."""
    return tuple({node.pointer: node for node in nodes}.values())


ANNOTATIONS = frozenset(
    "$schema $id id $comment $anchor $vocabulary $defs definitions title description default example examples deprecated "
    "readOnly writeOnly contentEncoding contentMediaType contentSchema discriminator xml externalDocs".split()
)
INEXPRESSIBLE = (
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "multipleOf", "divisibleBy", "extends",
    "disallow", "$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor",
)  # fmt: skip


class _Converter:
    """Turns one schema into rules."""

    def __init__(self, schema: object) -> None:
        self.root = _Node(_plain(schema), "#", None)
        self.rules, self.scratch = Rules(), Rules()
        """Those of the grammar, and those that are made only to see whether there are any."""
        self.builtin = {name: self.rules.reserve(name) for name in ["root", *_BUILTIN]}
        self.rule_of: dict[tuple[str, ...], Rule] = {}
        self.todo: list[tuple[Rule, _All]] = []
        """Rules whose bodies are still to be written."""
        self.terms_of: dict[str, list[_Term]] = {}
        self.n_met = 0
        self.active: set[str] = set()
        """Schemas that are being read."""

    def convert(self) -> str:
        for name, body in _BUILTIN.items():
            self.rules.define(Rule(name), body)
        self.todo.append((Rule("root"), self.resolved(self.root)))
        for rule, nodes in self.todo:  # which grows meanwhile
            self.rules.define(rule, self.expression(nodes, rule.name))
            if self.rules.size + self.scratch.size > MAX_SIZE:
                _fail("#", "the grammar becomes too large")
        result = self.rules.text(Rule("root"))
        if result is None:
            _fail("#", "nothing satisfies the schema, or nothing that ends")
        return result

    # -- reading ---------------------------------------------------------------------------------------------------

    def resolved(self, node: _Node) -> _All:
        """A schema as a conjunction: where it is nothing but a reference, what that refers to."""
        for _ in range(MAX_DEPTH):
            schema = node.schema
            if schema is True or (isinstance(schema, dict) and not schema.keys() - ANNOTATIONS):
                return ()
            if not isinstance(schema, dict) or schema.keys() - ANNOTATIONS != {"$ref"}:
                return (node,)
            node = self.referred(node)
        node.fail("references lead to references without end")

    def referred(self, node: _Node) -> _Node:
        """What a schema's $ref refers to."""
        reference = node.schema["$ref"]
        if not isinstance(reference, str):
            node.below("$ref").fail(f"must be a string, not {_shown(reference)}")
        if not re.fullmatch("#(/.*)?", reference, re.DOTALL):
            node.below("$ref").fail(f"only references into the schema itself can be followed, not {_shown(reference)}")
        target = (node if node.has_id() else node.base) or self.root
        for token in reference.split("/")[1:]:
            key = _unescaped(token)
            schema = target.schema
            if isinstance(schema, list):
                found = re.fullmatch("0|[1-9][0-9]{0,8}", key) is not None and int(key) < len(schema)
            else:
                found = isinstance(schema, dict) and key in schema
            if not found:
                node.below("$ref").fail(f"there is nothing at {_shown(reference)}")
            target = target.below(key)
        return target

    def terms(self, nodes: _All) -> list[_Term]:
        """The alternatives of a conjunction."""
        return self.product([self.terms_of_node(node) for node in nodes], nodes[0].pointer if nodes else "#")

    def product(self, factors: list[list[_Term]], pointer: str) -> list[_Term]:
        """One alternative of each, in all combinations."""
        result = [_Term()]
        for terms in factors:
            self.n_met += len(result) * len(terms)
            if len(result) * len(terms) > MAX_ALTERNATIVES or self.n_met > MAX_MEETINGS:
                _fail(pointer, "there are too many alternatives")
            result = [a.meet(b) for a in result for b in terms]
            result = [term for term in result if not term.is_nothing()]
        return result

    def terms_of_node(self, node: _Node) -> list[_Term]:
        if node.pointer not in self.terms_of:
            if node.pointer in self.active:
                node.fail("the schema refers to itself with nothing in between")
            if len(self.active) >= MAX_DEPTH:
                node.fail("references lead to references without end")
            self.active.add(node.pointer)
            self.terms_of[node.pointer] = self.read(node)
            self.active.remove(node.pointer)
        return self.terms_of[node.pointer]

    def read(self, node: _Node) -> list[_Term]:
        schema = node.schema
        if isinstance(schema, bool):
            return [_Term()] if schema else []
        if not isinstance(schema, dict):
            node.fail(f"a schema must be an object or a boolean, not {_shown(schema)}")
        for keyword in INEXPRESSIBLE:
            if keyword in schema and not (keyword == "multipleOf" and schema[keyword] == 1):
                node.below(keyword).fail(f"'{keyword}' cannot be expressed as a grammar")
        factors = [[_Keywords(node).term()]]
        for child in _children(node, "allOf"):
            factors.append(self.terms_of_node(child))
        if "anyOf" in schema:
            factors.append([t for child in _children(node, "anyOf") for t in self.terms_of_node(child)])
        if "oneOf" in schema:
            factors.append([t for child in _children(node, "oneOf") for t in self.terms_of_node(child)])
        if "$ref" in schema:
            factors.append(self.terms_of_node(self.referred(node)))
        factors += self.dependencies(node)
        terms = self.product(factors, node.pointer)
        if len(schema.get("oneOf", ())) > 1:
            self.check_disjoint(node, factors[0])
        return [self.without_unevaluated(node, term) for term in terms]

    def dependencies(self, node: _Node) -> list[list[_Term]]:
        """For each member on which something depends: it is missing, or that is there."""
        factors = []
        for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
            for name, child in _named_children(node, keyword):
                absent = _Node(False, child.pointer + "/absent", None)
                if keyword == "dependentRequired" or (keyword == "dependencies" and isinstance(child.schema, list)):
                    present = [_Term(required=tuple(dict.fromkeys([name, *_strings(child)])))]
                else:
                    present = [_Term(required=(name,)).meet(term) for term in self.terms_of_node(child)]
                factors.append([_Term(objects=(_ObjectPart({name: absent}),)), *present])
        return factors

    def without_unevaluated(self, node: _Node, term: _Term) -> _Term:
        """Applies `unevaluatedItems` and `unevaluatedProperties`, after everything else in their schema."""
        for keyword in ("unevaluatedItems", "unevaluatedProperties"):
            if keyword not in node.schema or node.schema[keyword] is True:
                continue
            child = node.below(keyword)
            if child.schema is not False:
                child.fail(f"'{keyword}' cannot be expressed as a grammar, unless it is a boolean")
            if keyword == "unevaluatedItems":
                if all(part.items is None for part in term.arrays):
                    most = _both(term.most_items, term.n_prefix(), min)
                    term = replace(term, arrays=term.arrays or (_ArrayPart(),), most_items=most)
            elif all(part.additional is None for part in term.objects):
                evaluated = {name: _ANYTHING for part in term.objects for name in part.properties}
                patterns = tuple((s, language, _ANYTHING) for part in term.objects for s, language, _ in part.patterns)
                term = replace(term, objects=(*term.objects, _ObjectPart(evaluated, patterns, child)))
        return term

    def check_disjoint(self, node: _Node, own: list[_Term]) -> None:
        """Where two alternatives of `oneOf` may be satisfied at a time, it is not the same as `anyOf`."""
        children = _children(node, "oneOf")
        for (i, a), (j, b) in itertools.combinations(enumerate(children), 2):
            both = self.product([own, self.terms_of_node(a), self.terms_of_node(b)], node.pointer)
            if any(self.is_possible(term, set()) for term in both):
                node.below("oneOf").fail(
                    f"'oneOf' can be expressed where no two alternatives overlap, but {i} and {j} may; use 'anyOf'"
                )

    def is_possible(self, term: _Term, active: set[tuple[str, ...]]) -> bool:
        """False if nothing satisfies a term for sure. `active`: what is being asked already."""
        if term.values is not None:
            return any(self.fits(value, term, perhaps=True) for value in term.values)
        types = term.types if term.types is not None else frozenset().union(*_TYPES.values())
        return bool(types) and (
            bool(types & {"null", "boolean"})
            or ("fraction" in types and self.has_numbers(term))
            or ("integer" in types and self.has_integers(term))
            or ("string" in types and self.has_strings(term))
            or ("array" in types and self.has_arrays(term, active))
            or ("object" in types and self.has_objects(term, active))
        )

    def has_numbers(self, term: _Term) -> bool:
        low, high = term.low, term.high
        if low is None or high is None:
            return True
        return _compare(low, high) < 0 or (_compare(low, high) == 0 and not low.strict and not high.strict)

    def has_integers(self, term: _Term) -> bool:
        least, most = _integer_bounds(term.low, term.high)
        return least is None or most is None or least <= most

    def has_strings(self, term: _Term) -> bool:
        """Formats are left out: grammars know a part of them only."""
        if term.longest is not None and term.longest < term.shortest:
            return False
        patterns = [language.generously() for source, language in term.languages if source not in FORMATS]
        if not patterns:
            return True
        try:
            start = written(self.scratch, "s", patterns, term.shortest, term.longest, Rule("char"))
        except PatternError:
            return True
        return start != NEVER

    def has_arrays(self, term: _Term, active: set[tuple[str, ...]]) -> bool:
        if term.most_items is not None and term.most_items < term.fewest_items:
            return False
        needed = range(min(term.fewest_items, term.n_prefix() + 1))
        return all(self.are_possible(term.element(i), active) for i in needed)

    def has_objects(self, term: _Term, active: set[tuple[str, ...]]) -> bool:
        if term.most_members is not None and term.most_members < max(term.fewest_members, len(term.required)):
            return False
        return all(self.are_possible(term.member(name), active) for name in term.required)

    def are_possible(self, nodes: _All, active: set[tuple[str, ...]]) -> bool:
        nodes = self.conjunction(nodes)
        key = _pointers(nodes)
        if key in active or len(active) >= MAX_DEPTH:
            return True
        active.add(key)
        result = any(self.is_possible(term, active) for term in self.terms(nodes))
        active.remove(key)
        return result

    # -- judging single values -------------------------------------------------------------------------------------

    def accepts(self, value: Any, nodes: _All, perhaps: bool = False) -> bool:
        """Whether a value satisfies all schemas; ``perhaps``: whether anybody may say so."""
        return any(self.satisfies(value, term, perhaps) for term in self.terms(self.conjunction(nodes)))

    def satisfies(self, value: Any, term: _Term, perhaps: bool = False) -> bool:
        if term.values is not None and _key(value) not in map(_key, term.values):
            return False
        return self.fits(value, term, perhaps)

    def fits(self, value: Any, term: _Term, perhaps: bool = False) -> bool:
        """The same of one of the term's own values."""
        kind = _type_of(value)
        if term.types is not None and kind not in term.types:
            return False
        if kind in ("integer", "fraction"):
            return _is_between(_bound(value, False), term.low, term.high)
        if kind == "string":
            return (
                term.shortest <= len(value) <= (len(value) if term.longest is None else term.longest)
                and all(_belongs(value, source, language, perhaps) for source, language in term.languages)
            )
        if kind == "array":
            return (
                term.fewest_items <= len(value) <= (len(value) if term.most_items is None else term.most_items)
                and (term.unique is None or len(set(map(_key, value))) == len(value))
                and all(self.accepts(element, term.element(i), perhaps) for i, element in enumerate(value))
            )
        if kind == "object":
            return (
                term.fewest_members <= len(value) <= (len(value) if term.most_members is None else term.most_members)
                and all(name in value for name in term.required)
                and all(self.accepts(name, term.names, perhaps) for name in value)
                and all(self.accepts(member, term.member(name), perhaps) for name, member in value.items())
            )
        return True

    # -- writing ---------------------------------------------------------------------------------------------------

    def conjunction(self, nodes: _All) -> _All:
        return _together(resolved for node in nodes for resolved in self.resolved(node))

    def rule(self, nodes: _All, hint: str) -> Rule:
        """The rule of values that satisfy all schemas."""
        nodes = self.conjunction(nodes)
        if not nodes:
            return Rule("value")
        key = _pointers(nodes)
        if key not in self.rule_of:
            self.rule_of[key] = self.rules.reserve(_last(nodes[0].pointer) if "/$defs/" in key[0] else hint)
            self.todo.append((self.rule_of[key], nodes))
        return self.rule_of[key]

    def expression(self, nodes: _All, hint: str) -> Expression:
        if not nodes:
            return Rule("value")
        return choice(*(self.term_expression(term, hint) for term in self.terms(nodes)))

    def term_expression(self, term: _Term, hint: str) -> Expression:
        if term.values is not None:
            return choice(*(text(_json(value)) for value in term.values if self.fits(value, term)))
        types = term.types
        if types is None:
            types = term.speaks_of()
        if not types:
            return Rule("value")
        parts = []
        if "object" in types:
            parts.append(self.object(term, hint))
        if "array" in types:
            parts.append(self.array(term, hint))
        if "string" in types:
            parts.append(self.string(term, hint))
        if "fraction" in types:
            bounded = term.low is not None or term.high is not None
            parts.append(self.rules.share("number", _decimals(term.low, term.high)) if bounded else Rule("number"))
        elif "integer" in types:
            least, most = _integer_bounds(term.low, term.high)
            bounded = least is not None or most is not None
            parts.append(self.rules.share("integer", _integers(least, most)) if bounded else Rule("integer"))
        if "boolean" in types:
            parts += [Text("true"), Text("false")]
        if "null" in types:
            parts.append(Text("null"))
        return choice(*parts)

    def string(self, term: _Term, hint: str) -> Expression:
        if not term.languages and term.shortest == 0 and term.longest is None:
            return Rule("string")
        inside = self.inside_string(term, hint, [], all)
        return self.rules.share("string", sequence(Text('"'), inside, Text('"')))

    def inside_string(
        self, term: _Term, hint: str, others: list[Language], wanted: Callable[[list[bool]], bool]
    ) -> Expression:
        languages = [*others, *(language for _, language in term.languages)]
        low, high = _counts(term.shortest, term.longest, term.where)
        try:
            return written(self.rules, hint + "-text", languages, low, high, Rule("char"), wanted)
        except PatternError as error:
            _fail(term.where, f"{' and '.join(s for s, _ in term.languages) or 'a name'}: {error}")

    def array(self, term: _Term, hint: str) -> Expression:
        n = term.n_prefix()
        low, high = _counts(term.fewest_items, term.most_items, term.where)
        if n > 0 and all(part.items is None for part in term.arrays) and low <= n:
            high = n if high is None else min(high, n)
        if term.unique is not None and (high is None or high > 1):
            return self.unique_array(term, hint, low, high)
        if high is not None and high < low:
            return NEVER
        n = n if high is None else min(n, high)
        inside = NEVER
        for i in range(n, -1, -1):  # from the last element that has a schema of its own
            if i == n:
                item = self.rule(term.element(i), "item") if high is None or high > n else NEVER
                inside = _separated(item, i > 0, max(low - i, 0), None if high is None else high - i)
                continue
            inside = sequence(*[_COMMA] * (i > 0), self.rule(term.element(i), "item"), inside)
            inside = self.rules.share("items", inside if i < low else optional(inside))
        return sequence(Text("["), inside, Text("]"))

    def unique_array(self, term: _Term, hint: str, low: int, high: int | None) -> Expression:
        """Of enumerated values: each at most once, in the order of the schema."""
        terms = self.terms(self.conjunction(term.element(0)))
        if term.n_prefix() > 0 or any(t.values is None for t in terms):
            _fail(str(term.unique), "'uniqueItems' can be expressed for enumerated values only")
        values = {_key(v): v for t in terms for v in t.values or () if self.fits(v, t)}
        members = [(text(_json(value)), False) for value in values.values()]
        return sequence(Text("["), self.chain(members, NEVER, low, high, hint, term.where), Text("]"))

    def object(self, term: _Term, hint: str) -> Expression:
        names = dict.fromkeys(name for part in term.objects for name in part.properties)
        names.update(dict.fromkeys(term.required))
        low, high = _counts(term.fewest_members, term.most_members, term.where)
        is_open = term.is_open or not term.names_members or low > len(names)
        name_terms = self.terms(self.conjunction(term.names))
        for t in name_terms:
            names.update(dict.fromkeys(v for v in t.values or () if isinstance(v, str) and self.fits(v, t)))
        members = []
        for name in names:
            key = text(_json(name) + ":")
            allowed = any(self.satisfies(name, t) for t in name_terms)
            member = sequence(key, _SPACE, self.rule(term.member(name), name)) if allowed else NEVER
            members.append((member, name in term.required))
        extra = NEVER
        if is_open:
            extra = choice(*(e for t in name_terms if t.values is None for e in self.other_members(term, t, list(names))))
            extra = self.rules.share("member", extra)
        return sequence(Text("{"), self.chain(members, extra, low, high, hint, term.where), Text("}"))

    def other_members(self, term: _Term, name_term: _Term, names: list[str]) -> list[Expression]:
        """Members that are not named, by the patterns that their names match."""
        if name_term.types is not None and "string" not in name_term.types:
            return []
        patterns = {source: language for part in term.objects for source, language, _ in part.patterns}
        if len(patterns) > MAX_PATTERNS:
            _fail(term.where, f"at most {MAX_PATTERNS} 'patternProperties' can be expressed")
        members = []
        named = [names_language(names)] * bool(names)
        for found in itertools.product([False, True], repeat=len(patterns)):
            matching = {source for source, is_found in zip(patterns, found) if is_found}
            languages = [language if is_found else language.generously() for language, is_found in zip(patterns.values(), found)]
            others, expected = named + languages, [False] * len(named) + list(found)
            schemas = []
            for part in term.objects:
                of_part = [node for source, _, node in part.patterns if source in matching]
                schemas += of_part or ([] if part.additional is None else [part.additional])
            if any(node.schema is False for node in schemas):
                continue

            def wanted(accepted: list[bool], expected: list[bool] = expected) -> bool:
                return accepted[: len(expected)] == expected and all(accepted[len(expected) :])

            if all(expected):  # which can be followed more easily
                key = self.inside_string(name_term, "name", others, all)
            else:
                key = self.inside_string(name_term, "name", others, wanted)
            value = self.rule(tuple(schemas), "other")
            members.append(sequence(Text('"'), key, Text('":'), _SPACE, value))
        return members

    def chain(
        self, members: list[tuple[Expression, bool]], extra: Expression, low: int, high: int | None, hint: str, where: str
    ) -> Expression:  # fmt: skip
        """Members in their order, those that are not required (the second of each pair) or not; then any number of
        extra ones; altogether `low` to `high`, which are told apart by nothing but their number.

        It is put together from the end. after[n] is what may follow when n members have come; where more make no
        difference, n is the most that does.
        """
        n_required = sum(required for _, required in members)
        first_required = next((i for i, (_, required) in enumerate(members) if required), len(members))
        at_most = len(members) if extra == NEVER else None
        if high is not None and at_most is not None and high >= at_most:
            high = None
        if high is None and low <= n_required:
            low = 0
        if high is not None and high < max(low, n_required):
            return NEVER
        if low > len(members) + 1 or (low > len(members) and extra == NEVER):
            if extra == NEVER:
                return NEVER
            _fail(where, f"so many members, at least {low}, can be expressed only if enough are named")
        enough = max(low, 1) if high is None else high
        if enough > 1 and enough * len(members) > MAX_COMBINATIONS:
            _fail(where, "so many combinations of members cannot be expressed")
        after = []
        for n in range(enough + 1):
            missing = max(low - n, 0)
            more = None if high is None else high - n
            after.append(NEVER if missing > 1 else _separated(extra, n > 0, missing, more))
        for i in range(len(members) - 1, -1, -1):
            member, required = members[i]
            before = []
            for n in range(min(i, enough) + 1):
                if n == 0 and i > first_required:
                    before.append(NEVER)  # one has come for sure
                    continue
                following = after[min(n + 1, enough)] if high is None or n < high else NEVER
                if enough > 1 or (0 < i <= first_required) or i % 64 == 0:
                    following = self.rules.share(hint + "-rest", following)
                member_here = sequence(_COMMA, member) if n > 0 else member
                if not required and n == enough and high is None:
                    before.append(sequence(optional(member_here), following))
                    continue
                taken = sequence(member_here, following)
                otherwise = self.rules.share(hint + "-rest", after[n]) if i % 64 == 0 and i > 0 else after[n]
                before.append(taken if required else choice(taken, otherwise))
            after = before
        return after[0]


def _belongs(string: str, source: str, language: Language, perhaps: bool) -> bool:
    """Whether a string belongs to a pattern's or a format's language. Of formats, the grammars know a part only."""
    return (source in FORMATS or language.generously().matches(string)) if perhaps else language.matches(string)


def _separated(item: Expression, is_after_another: bool, low: int, high: int | None) -> Expression:
    """`low` to `high` of the same, with commas between them."""
    further = sequence(_COMMA, item)
    if is_after_another or (high is not None and high < 1):
        return repeat(further, low, high)
    several = sequence(item, repeat(further, max(low - 1, 0), None if high is None else high - 1))
    return several if low > 0 else optional(several)


def _counts(low: int, high: int | None, where: str) -> tuple[int, int | None]:
    if low > MAX_COUNT:
        _fail(where, f"lengths of more than {MAX_COUNT} cannot be expressed")
    return low, None if high is None else min(high, MAX_COUNT)


def _pointers(nodes: _All) -> tuple[str, ...]:
    return tuple(node.pointer for node in nodes)


def _last(pointer: str) -> str:
    return _unescaped(pointer.rsplit("/", 1)[-1])


def _unescaped(token: str) -> str:
    """A key from a part of a JSON pointer in a URI."""

    def bytes_of(match: re.Match[str]) -> str:
        return bytes.fromhex(match[0].replace("%", "")).decode("utf-8", "replace")

    return re.sub("(?:%[0-9A-Fa-f]{2})+", bytes_of, token).replace("~1", "/").replace("~0", "~")


def _type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {type(None): "null", int: "integer", float: "fraction", str: "string", list: "array", dict: "object"}
    return kinds[type(value)]


# ---- keywords ------------------------------------------------------------------------------------


def _children(node: _Node, keyword: str) -> list[_Node]:
    """The schemas in a list; none where there is no list."""
    if keyword not in node.schema:
        return []
    child = node.below(keyword)
    if not isinstance(child.schema, list) or not child.schema:
        child.fail(f"must be a list of schemas, not {_shown(child.schema)}")
    return [child.below(str(i)) for i in range(len(child.schema))]


def _named_children(node: _Node, keyword: str) -> list[tuple[str, _Node]]:
    if keyword not in node.schema:
        return []
    child = node.below(keyword)
    if not isinstance(child.schema, dict):
        child.fail(f"must be an object, not {_shown(child.schema)}")
    return [(name, child.below(name)) for name in child.schema]


def _strings(node: _Node) -> list[str]:
    if not isinstance(node.schema, list) or not all(isinstance(s, str) for s in node.schema):
        node.fail(f"must be a list of strings, not {_shown(node.schema)}")
    return node.schema


class _Keywords:
    """Reads what a schema says itself, without the schemas that it is put together from."""

    def __init__(self, node: _Node) -> None:
        self.node, self.schema = node, node.schema

    def term(self) -> _Term:
        schema = self.schema
        low, high = self.bounds()
        objects = self.objects()
        return _Term(
            types=self.types(),
            values=self.values(),
            low=low,
            high=high,
            shortest=self.count("minLength", 0),
            longest=self.count("maxLength", None),
            languages=self.languages(),
            arrays=self.arrays(),
            fewest_items=self.count("minItems", 0),
            most_items=self.count("maxItems", None),
            unique=_below(self.node.pointer, "uniqueItems") if self.flag("uniqueItems") else None,
            objects=objects,
            required=self.required(),
            fewest_members=self.count("minProperties", 0),
            most_members=self.count("maxProperties", None),
            names=(self.node.below("propertyNames"),) if "propertyNames" in schema else (),
            names_members="properties" in schema,
            is_open=bool({"patternProperties", "propertyNames"} & schema.keys())
            or schema.get("additionalProperties", False) is not False,
            where=self.node.pointer,
        )

    def flag(self, keyword: str) -> bool:
        value = self.schema.get(keyword, False)
        if not isinstance(value, bool):
            self.node.below(keyword).fail(f"must be a boolean, not {_shown(value)}")
        return value

    def count(self, keyword: str, otherwise: Any) -> Any:
        if keyword not in self.schema:
            return otherwise
        value = self.schema[keyword]
        if not _is_integer(value) or value < 0:
            self.node.below(keyword).fail(f"must be an integer, not negative, but is {_shown(value)}")
        return min(value, LARGEST)

    def types(self) -> frozenset[str] | None:
        if "type" not in self.schema:
            return None
        given = self.schema["type"]
        names = given if isinstance(given, list) else [given]
        if not all(isinstance(name, str) and name in _TYPES for name in names):
            self.node.below("type").fail(f"must be one or several of {', '.join(_TYPES)}, not {_shown(given)}")
        types = set().union(*(_TYPES[name] for name in names))
        return frozenset(types | ({"null"} if self.flag("nullable") else set()))

    def values(self) -> tuple[Any, ...] | None:
        values = None
        if "enum" in self.schema:
            values = self.schema["enum"]
            if not isinstance(values, list):
                self.node.below("enum").fail(f"must be a list, not {_shown(values)}")
        if "const" in self.schema:
            wanted = self.schema["const"]
            values = [wanted] if values is None else [v for v in values if _key(v) == _key(wanted)]
        return None if values is None else tuple({_key(value): value for value in values}.values())

    def number(self, keyword: str) -> Any:
        value = self.schema.get(keyword)
        if keyword in self.schema and (isinstance(value, bool) or not isinstance(value, int | float)):
            self.node.below(keyword).fail(f"must be a number, not {_shown(value)}")
        return value

    def limit(self, keyword: str, sign: int) -> Any:
        value = self.number(keyword)
        if value is not None and sign * value > LARGEST:
            self.node.below(keyword).fail("leaves only numbers that are too large to be expressed as a grammar")
        return value

    def bounds(self) -> tuple[_Bound | None, _Bound | None]:
        found = []
        for inclusive, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
            value, strict = self.limit(inclusive, sign), self.schema.get(exclusive)
            bound = None if value is None else _bound(value, strict is True)
            if not isinstance(strict, bool):
                limit = self.limit(exclusive, sign)
                bound = _tighter(bound, None if limit is None else _bound(limit, True), sign)
            found.append(bound)
        return found[0], found[1]

    def languages(self) -> tuple[tuple[str, Language], ...]:
        found = []
        if "pattern" in self.schema:
            pattern = self.node.below("pattern")
            if not isinstance(pattern.schema, str):
                pattern.fail(f"must be a string, not {_shown(pattern.schema)}")
            found.append((f"pattern {_shown(pattern.schema)}", _language(pattern, pattern.schema)))
        if "format" in self.schema:
            name = self.node.below("format")
            if not isinstance(name.schema, str):
                name.fail(f"must be a string, not {_shown(name.schema)}")
            if name.schema in UNKNOWN_LANGUAGES:
                name.fail(f"the format {_shown(name.schema)} cannot be expressed as a grammar")
            if name.schema in FORMATS:
                found.append((name.schema, format_language(name.schema)))
        return tuple(found)

    def arrays(self) -> tuple[_ArrayPart, ...]:
        prefix, items = (), self.schema.get("items")
        rest = self.node.below("items") if "items" in self.schema else None
        if isinstance(items, list):
            if "prefixItems" in self.schema:
                self.node.below("items").fail("must be a schema beside 'prefixItems', not a list")
            prefix = tuple(_children(self.node, "items")) if items else ()
            rest = self.node.below("additionalItems") if "additionalItems" in self.schema else None
        elif "prefixItems" in self.schema:
            prefix = tuple(_children(self.node, "prefixItems"))
        return (_ArrayPart(prefix, rest),) if prefix or rest is not None else ()

    def objects(self) -> tuple[_ObjectPart, ...]:
        properties = dict(_named_children(self.node, "properties"))
        patterns = tuple(
            (source, _language(node, source), node) for source, node in _named_children(self.node, "patternProperties")
        )
        additional = None
        if "additionalProperties" in self.schema:
            additional = self.node.below("additionalProperties")
        if properties or patterns or additional is not None or "properties" in self.schema:
            return (_ObjectPart(properties, patterns, additional),)
        return ()

    def required(self) -> tuple[str, ...]:
        if "required" not in self.schema or isinstance(self.schema["required"], bool):  # a boolean: draft 3
            return ()
        return tuple(dict.fromkeys(_strings(self.node.below("required"))))


def _language(node: _Node, source: str) -> Language:
    try:
        return pattern_language(source)
    except PatternError as error:
        node.fail(f"pattern {_shown(source)}: {error}")


_ANYTHING = _Node(True, "#", None)
"""A schema that everything satisfies."""
_SPACE, _COMMA = Rule("space"), sequence(Text(","), Rule("space"))


def _builtin_rules() -> dict[str, Expression]:
    def one_of(characters: str) -> Chars:
        return Chars(merged([(ord(c), ord(c)) for c in characters]))

    hex_digit = Chars(merged([(0x30, 0x39), (0x41, 0x46), (0x61, 0x66)]))
    before_d = Chars(merged([(0x30, 0x39), (0x41, 0x43), (0x45, 0x46), (0x61, 0x63), (0x65, 0x66)]))
    pair = [one_of("dD"), one_of("89abAB"), repeat(hex_digit, 2, 2), Text("\\u"), one_of("dD"), one_of("cdefCDEF")]
    unicode = choice(
        sequence(before_d, repeat(hex_digit, 3, 3)),
        sequence(one_of("dD"), one_of("01234567"), repeat(hex_digit, 2, 2)),
        sequence(*pair, repeat(hex_digit, 2, 2)),
    )
    plain = Chars(merged([(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x10FFFF)]))
    escaped = sequence(Text("\\"), choice(one_of('"\\/bfnrt'), sequence(Text("u"), unicode)))
    member = sequence(Rule("string"), Text(":"), _SPACE, Rule("value"))
    whole = choice(Text("0"), sequence(_digit(1, 9), _any_digits(0, MAX_DIGITS - 1)))
    exponent = sequence(one_of("eE"), optional(one_of("-+")), _any_digits(1, 2))
    return {
        "value": choice(*map(Rule, ("object", "array", "string", "number")), *map(Text, ("true", "false", "null"))),
        "object": sequence(Text("{"), _separated(member, False, 0, None), Text("}")),
        "array": sequence(Text("["), _separated(Rule("value"), False, 0, None), Text("]")),
        "string": sequence(Text('"'), repeat(Rule("char"), 0, None), Text('"')),
        "char": choice(plain, escaped),
        "number": sequence(
            optional(Text("-")), whole, optional(sequence(Text("."), _any_digits(1, MAX_DIGITS))), optional(exponent)
        ),
        "integer": sequence(optional(Text("-")), whole),
        "space": optional(Text(" ")),
    }


_BUILTIN = _builtin_rules()

JSON_VALUE = to_gbnf(True)
"""The grammar of all JSON, white space left out."""
JSON_OBJECT = to_gbnf({"type": "object"})
"""The grammar of JSON objects."""
