"""Writing GBNF: expressions, rules, and their text. (What reads GBNF is :mod:`pyllama.grammar`.)

Expressions are simplified while they are put together: what can never match disappears, so that a text that has begun
can always be ended. This module knows nothing of JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "EMPTY", "NEVER", "Chars", "Choice", "Expression", "Repeat", "Rule", "Rules", "Sequence", "Text",
    "choice", "complement", "merged", "optional", "repeat", "sequence", "text",
]  # fmt: skip

Ranges = tuple[tuple[int, int], ...]
"""Sorted, closed ranges of code points that neither overlap nor touch. Halves of surrogate pairs count for nothing."""

LAST_CODE_POINT = 0x10FFFF
LAST_BEFORE_SURROGATES, FIRST_AFTER_SURROGATES = 0xD7FF, 0xE000


@dataclass(frozen=True, slots=True)
class Text:
    """This text."""

    value: str


@dataclass(frozen=True, slots=True)
class Chars:
    """One of these characters."""

    ranges: Ranges


@dataclass(frozen=True, slots=True)
class Rule:
    """What the rule of this name matches."""

    name: str


@dataclass(frozen=True, slots=True)
class Sequence:
    """One part after the other."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the parts."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """The part, `low` to `high` times (None: any number)."""

    part: Expression
    low: int
    high: int | None


Expression = Text | Chars | Rule | Sequence | Choice | Repeat

EMPTY = Sequence(())
NEVER = Choice(())


def text(value: str) -> Expression:
    """A text, which may be empty."""
    return Text(value) if value else EMPTY


def sequence(*parts: Expression) -> Expression:
    """One part after the other; texts that are neighbours become one."""
    flat: list[Expression] = []
    for part in parts:
        for p in part.parts if isinstance(part, Sequence) else (part,):
            if p == NEVER:
                return NEVER
            if isinstance(p, Text) and flat and isinstance(flat[-1], Text):
                flat[-1] = Text(flat[-1].value + p.value)
            else:
                flat.append(p)
    return flat[0] if len(flat) == 1 else Sequence(tuple(flat))


def choice(*parts: Expression) -> Expression:
    """One of the parts; each is named once."""
    flat: dict[Expression, None] = {}
    for part in parts:
        flat.update(dict.fromkeys(part.parts if isinstance(part, Choice) else (part,)))
    return next(iter(flat)) if len(flat) == 1 else Choice(tuple(flat))


def repeat(part: Expression, low: int, high: int | None) -> Expression:
    """The part, `low` to `high` times (None: any number)."""
    if high is not None and high < low:
        return NEVER
    if part == NEVER:
        return NEVER if low > 0 else EMPTY
    if part == EMPTY or high == 0:
        return EMPTY
    return part if low == high == 1 else Repeat(part, low, high)


def optional(part: Expression) -> Expression:
    """The part, or nothing."""
    return repeat(part, 0, 1)


def merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """The same characters as sorted ranges that neither overlap nor touch."""
    result: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        low = FIRST_AFTER_SURROGATES if LAST_BEFORE_SURROGATES < first < FIRST_AFTER_SURROGATES else first
        high = LAST_BEFORE_SURROGATES if LAST_BEFORE_SURROGATES < last < FIRST_AFTER_SURROGATES else last
        if high < low:
            continue
        if result and (
            low <= result[-1][1] + 1 or (result[-1][1] == LAST_BEFORE_SURROGATES and low == FIRST_AFTER_SURROGATES)
        ):
            result[-1] = result[-1][0], max(result[-1][1], high)
        else:
            result.append((low, high))
    return tuple(result)


def complement(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """All other characters."""
    others, start = [], 0
    for low, high in merged(ranges):
        others.append((start, low - 1))
        start = high + 1
    return merged([(low, high) for low, high in [*others, (start, LAST_CODE_POINT)] if low <= high])


# ---- rules ---------------------------------------------------------------------------------------


class Rules:
    """Rules under names of their own."""

    def __init__(self) -> None:
        self.bodies: dict[str, Expression] = {}
        self._taken: set[str] = set()
        self._shared: dict[str, Rule] = {}
        self.size = 0
        """How many nodes a network of all rules has, more or less."""

    def reserve(self, hint: str) -> Rule:
        """A name that is like the hint, for a rule that is defined later."""
        name = base = re.sub("[^A-Za-z0-9]+", "-", hint).strip("-")[:40].strip("-") or "rule"
        n = 1
        while name in self._taken:
            n += 1
            name = f"{base}-{n}"
        self._taken.add(name)
        return Rule(name)

    def define(self, rule: Rule, body: Expression) -> None:
        """Makes `body` what the rule matches."""
        self.bodies[rule.name] = body
        self.size += _size(body)

    def share(self, hint: str, body: Expression) -> Expression:
        """A rule for something that is needed in several places; the same one for the same body."""
        if body in (EMPTY, NEVER) or isinstance(body, Text | Chars | Rule):
            return body
        key = _written(body)
        if key not in self._shared:
            self._shared[key] = self.reserve(hint)
            self.define(self._shared[key], body)
        return self._shared[key]

    def text(self, root: Rule) -> str | None:
        """GBNF of the rules that `root` needs, itself first; None where it matches nothing."""
        bodies = self._productive()
        if root.name not in bodies:
            return None
        short = {name: body for name, body in bodies.items() if body == EMPTY or isinstance(body, Text | Chars | Rule)}
        bodies = {name: _replaced(body, short) for name, body in bodies.items()}
        lines, wanted, seen = [], [root.name], {root.name}
        while wanted:
            name = wanted.pop()
            lines.append(f"{name} ::= {_written(bodies[name])}")
            new = [n for n in dict.fromkeys(_rules_in(bodies[name])) if n not in seen]
            seen.update(new)
            wanted += reversed(new)
        return "\n".join(lines) + "\n"

    def _productive(self) -> dict[str, Expression]:
        """The rules that match anything, without those parts that never do."""
        users: dict[str, list[str]] = {}
        for name, body in self.bodies.items():
            for other in dict.fromkeys(_rules_in(body)):
                users.setdefault(other, []).append(name)
        found: set[str] = set()
        todo = list(self.bodies)
        while todo:
            name = todo.pop()
            if name not in found and _can_match(self.bodies[name], found):
                found.add(name)
                todo += users.get(name, ())
        never: dict[str, Expression] = {name: NEVER for name in self.bodies if name not in found}
        return {name: _replaced(body, never) for name, body in self.bodies.items() if name in found}


def _size(e: Expression) -> int:
    if isinstance(e, Text):
        return len(e.value)
    if isinstance(e, Chars | Rule):
        return 1
    if isinstance(e, Repeat):
        return _size(e.part) + 2 * max(e.low, e.high or 0)
    return 1 + sum(map(_size, e.parts))


def _rules_in(e: Expression) -> list[str]:
    if isinstance(e, Rule):
        return [e.name]
    if isinstance(e, Repeat):
        return _rules_in(e.part)
    return [name for part in e.parts for name in _rules_in(part)] if isinstance(e, Sequence | Choice) else []


def _can_match(e: Expression, found: set[str]) -> bool:
    if isinstance(e, Rule):
        return e.name in found
    if isinstance(e, Repeat):
        return e.low == 0 or _can_match(e.part, found)
    if isinstance(e, Sequence):
        return all(_can_match(part, found) for part in e.parts)
    return any(_can_match(part, found) for part in e.parts) if isinstance(e, Choice) else True


def _replaced(e: Expression, by: dict[str, Expression]) -> Expression:
    """The expression with other things in the place of some rules."""
    if isinstance(e, Rule):
        while isinstance(e, Rule) and e.name in by:
            e = by[e.name]
        return e
    if isinstance(e, Repeat):
        return repeat(_replaced(e.part, by), e.low, e.high)
    if isinstance(e, Sequence | Choice):
        return (sequence if isinstance(e, Sequence) else choice)(*(_replaced(part, by) for part in e.parts))
    return e


# ---- text ----------------------------------------------------------------------------------------

_IN_TEXT = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _written(e: Expression) -> str:
    if isinstance(e, Text):
        return '"' + re.sub(r'["\\\x00-\x1f\x7f]', lambda c: _IN_TEXT.get(c[0]) or f"\\x{ord(c[0]):02X}", e.value) + '"'
    if isinstance(e, Chars):
        return _written_class(e.ranges)
    if isinstance(e, Rule):
        return e.name
    if isinstance(e, Sequence):
        return " ".join(map(_written_part, e.parts)) or '""'
    if isinstance(e, Choice):
        return " | ".join(map(_written, e.parts))
    part = f"({_written(e.part)})" if isinstance(e.part, Repeat) else _written_part(e.part)
    match e.low, e.high:
        case 0, None:
            return part + "*"
        case 1, None:
            return part + "+"
        case 0, 1:
            return part + "?"
    return f"{part}{{{e.low}{'' if e.high == e.low else ',' if e.high is None else f',{e.high}'}}}"


def _written_part(e: Expression) -> str:
    return f"({_written(e)})" if isinstance(e, Sequence | Choice) else _written(e)


def _written_class(ranges: Ranges) -> str:
    negated = ranges[-1][1] == LAST_CODE_POINT and ranges != ((0, LAST_CODE_POINT),)
    return f"[{'^' * negated}" + "".join(map(_written_range, complement(ranges) if negated else ranges)) + "]"


def _written_range(bounds: tuple[int, int]) -> str:
    low, high = map(_written_character, bounds)
    return low if low == high else low + high if bounds[0] + 1 == bounds[1] else f"{low}-{high}"


def _written_character(code: int) -> str:
    c = chr(code)
    if c in '\\"[]':
        return "\\" + c
    if 0x20 <= code < 0x7F and c not in "^-":
        return c
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
