r"""Regular languages: the patterns and formats of JSON Schema, alone or combined, and how to write them in a grammar.

A pattern is read into an expression over the characters of a string (not of its JSON). Where it can be written as it
is, it is; where something else is wanted of the same string, a length, another pattern, not to be one of some names,
the languages are followed side by side by one automaton (the product construction), whose states become rules.

Patterns are those of ECMA-262 with the `u` flag, except what no automaton can do (back references). Where ECMA's and
Python's understanding differ (is é a \w?), a string is in a pattern's language only if both say so; and where a string
is not to match, only if neither does.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import NamedTuple, NoReturn

from .gbnf import (
    EMPTY,
    NEVER,
    Chars,
    Choice,
    Expression,
    Ranges,
    Repeat,
    Rule,
    Rules,
    Sequence,
    choice,
    complement,
    merged,
    optional,
    repeat,
    sequence,
    text,
)  # fmt: skip

__all__ = ["FORMATS", "UNKNOWN_LANGUAGES", "Language", "PatternError", "format_language", "names_language",
           "pattern_language", "written"]  # fmt: skip

MAX_STATES = 10_000
"""Of an automaton."""
MAX_STEPS = 500_000
"""That are tried to build one."""
MAX_DEPTH = 50
"""Of groups in groups."""


class PatternError(ValueError):
    """The pattern is none, or nothing that an automaton of a bearable size can follow."""


# ---- characters ----------------------------------------------------------------------------------

DIGIT: Ranges = ((0x30, 0x39),)
WORD = merged([(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)])
BLANK = merged([(9, 13), (0x20, 0x20), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029),
                (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)])  # fmt: skip
NEWLINE: Ranges = ((0x0A, 0x0A),)
LINE_END = merged([(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)])
EMOJI = (0x1F300, 0x1FAFF)
NOT_DIGIT = merged([(0, 0x2F), (0x3A, 0x65F), (0x3000, 0xA61F), (0xAC00, 0xD7A3), EMOJI])
NOT_WORD = merged([(0, 0x2F), (0x3A, 0x40), (0x5B, 0x5E), (0x60, 0x60), (0x7B, 0x7F), (0x2010, 0x2027),
                   (0x2030, 0x205E), EMOJI])  # fmt: skip
NOT_BLANK = complement([*BLANK, (0x1C, 0x1F), (0x85, 0x85), (0xFEFF, 0xFEFF)])
CLASSES: dict[str, Ranges] = {"d": DIGIT, "D": NOT_DIGIT, "w": WORD, "W": NOT_WORD, "s": BLANK, "S": NOT_BLANK}
"""What everybody agrees is in a class."""
OPPOSITE = {"d": "D", "D": "d", "w": "W", "W": "w", "s": "S", "S": "s"}
CONTROLS = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13}
ALL: Ranges = complement([])


class Anchor(NamedTuple):
    """Matches nothing, but only at the string's start, or at its end."""

    at_end: bool


START, END = Anchor(False), Anchor(True)

Pattern = Expression | Anchor
"""An expression that may hold anchors."""


# ---- reading patterns ----------------------------------------------------------------------------

_BOUNDS = re.compile(r"\{([0-9]+)(,?)([0-9]*)\}")
_GROUP_NAME = re.compile(r"\?<[A-Za-z_$][A-Za-z0-9_$]*>")
_HEX = {"x": re.compile("x([0-9A-Fa-f]{2})"), "u": re.compile(r"u(?:([0-9A-Fa-f]{4})|\{([0-9A-Fa-f]{1,8})\})")}


class _Reader:
    """Reads a pattern; `generously`: with all that anybody may hold to match."""

    def __init__(self, source: str, generously: bool = False) -> None:
        self.source, self.generously = source, generously
        self.at, self.depth = 0, 0

    def fail(self, message: str) -> NoReturn:
        raise PatternError(f"{message} (at character {self.at + 1})")

    def peek(self, n: int = 1) -> str:
        return self.source[self.at : self.at + n]

    def take(self, wanted: str) -> bool:
        found = self.source.startswith(wanted, self.at)
        self.at += len(wanted) * found
        return found

    def read(self) -> Pattern:
        result = self.alternatives()
        if self.peek():
            self.fail("this ')' closes nothing")
        return result

    def alternatives(self) -> Pattern:
        parts = [self.terms()]
        while self.take("|"):
            parts.append(self.terms())
        return choice(*parts)

    def terms(self) -> Pattern:
        parts = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.quantified())
        return sequence(*parts)

    def quantified(self) -> Pattern:
        start = self.at
        part = self.atom()
        if self.take("*"):
            low, high = 0, None
        elif self.take("+"):
            low, high = 1, None
        elif self.take("?"):
            low, high = 0, 1
        elif self.peek() == "{":
            low, high = self.bounds()
        else:
            return part
        if self.source[start] in "^$":
            self.fail("an anchor cannot be repeated")
        self.take("?")  # whether it prefers few or many does not change what it matches
        return repeat(part, low, high)

    def bounds(self) -> tuple[int, int | None]:
        match = _BOUNDS.match(self.source, self.at)
        if match is None:
            self.fail("a '{' that begins no quantifier must be escaped")
        low = int(match[1][:9])
        high = low if not match[2] else int(match[3][:9]) if match[3] else None
        if max(low, high or 0) > MAX_STATES:
            self.fail("so many repetitions cannot be expressed")
        if high is not None and high < low:
            self.fail("a quantifier ends before it begins")
        self.at = match.end()
        return low, high

    def atom(self) -> Pattern:
        if self.take("("):
            return self.group()
        if self.take("["):
            return self.char_class()
        if self.take("."):
            return Chars(complement(NEWLINE if self.generously else LINE_END))
        if self.take("^"):
            return START
        if self.take("$"):  # which Python finds before a last newline, too
            return sequence(optional(Chars(NEWLINE)), END) if self.generously else END
        if self.take("\\"):
            return self.escape()
        c = self.peek()
        if c in "*+?":
            self.fail(f"nothing stands before {c!r} to be repeated")
        if c == "{":
            self.fail("a '{' that begins no quantifier must be escaped")
        self.at += 1
        return self.character(ord(c))

    def character(self, code: int) -> Expression:
        ranges = merged([(code, code)])
        if not ranges:
            self.fail("half of a surrogate pair is no character")
        return Chars(ranges)

    def group(self) -> Pattern:
        if self.peek() == "?" and not self.take("?:"):
            for start, name in (("?=", "ahead"), ("?!", "ahead"), ("?<=", "behind"), ("?<!", "behind")):
                if self.source.startswith(start, self.at):
                    self.fail(f"looking {name}, ({start}…), cannot be expressed")
            match = _GROUP_NAME.match(self.source, self.at)
            if match is None:
                self.fail(f"this kind of group, ({self.peek(2)}…), cannot be expressed")
            self.at = match.end()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail("groups are nested too deeply")
        result = self.alternatives()
        if not self.take(")"):
            self.fail("a '(' is never closed")
        self.depth -= 1
        return result

    def escape(self) -> Expression:
        c = self.peek()
        if c in CLASSES:
            self.at += 1
            return Chars(complement(CLASSES[OPPOSITE[c]]) if self.generously else CLASSES[c])
        if c in ("b", "B"):
            self.fail(f"word boundaries, \\{c}, cannot be expressed")
        if c in ("k", *"123456789"):
            self.fail(f"back references, \\{c}, cannot be expressed")
        return self.character(self.escaped())

    def escaped(self) -> int:
        """The code point that an escape stands for, after its backslash."""
        c = self.peek()
        if not c:
            self.fail("a '\\' stands at the end")
        if c in ("p", "P"):
            self.fail(f"Unicode properties, \\{c}, cannot be expressed")
        if c in _HEX:
            return self.escaped_hex(c)
        self.at += 1
        if c in CONTROLS:
            return CONTROLS[c]
        if c == "0" and not ("0" <= self.peek() <= "9"):
            return 0
        if c == "c" and re.fullmatch("[A-Za-z]", self.peek()):
            self.at += 1
            return ord(self.source[self.at - 1]) % 32
        if re.fullmatch("[A-Za-z0-9]", c):
            self.at -= 1
            self.fail(f"unknown escape \\{c}")
        return ord(c)

    def escaped_hex(self, kind: str) -> int:
        match = _HEX[kind].match(self.source, self.at)
        if match is None:
            self.fail(f"\\{kind} wants hexadecimal digits")
        self.at = match.end()
        code = int(match[match.lastindex], 16)
        if code > 0x10FFFF:
            self.fail(f"\\{kind} wants a code point")
        if 0xD800 <= code < 0xDC00 and self.peek(2) == "\\u":
            low = _HEX["u"].match(self.source, self.at + 1)
            if low and low[1] and 0xDC00 <= int(low[1], 16) < 0xE000:
                self.at = low.end()
                return 0x10000 + ((code - 0xD800) << 10) + int(low[1], 16) - 0xDC00
        return code

    def char_class(self) -> Expression:
        negated = self.take("^")
        inside: list[tuple[int, int]] = []
        perhaps: list[tuple[int, int]] = []
        """What somebody may hold to be inside."""
        if self.peek() == "]":
            self.fail("an empty class cannot be expressed")
        while not self.take("]"):
            low = self.class_member(inside, perhaps)
            if low is None:
                continue
            high = low
            if self.peek() == "-" and self.peek(2) not in ("-", "-]"):
                self.at += 1
                end = self.class_member(inside, perhaps)
                if end is None:  # [a-\d]: the dash stands for itself
                    inside += [(low, low), (0x2D, 0x2D)]
                    continue
                high = end
                if high < low:
                    self.fail("a range ends before it begins")
            inside.append((low, high))
        ranges = merged(inside if negated == self.generously else [*inside, *perhaps])
        ranges = complement(ranges) if negated else ranges
        if not ranges:
            self.fail("a class matches nothing")
        return Chars(ranges)

    def class_member(self, inside: list[tuple[int, int]], perhaps: list[tuple[int, int]]) -> int | None:
        """A code point; or None, and a class such as \\d has been added."""
        c = self.peek()
        if not c:
            self.fail("a '[' is never closed")
        self.at += 1
        if c != "\\":
            return ord(c)
        c = self.peek()
        if c in CLASSES:
            self.at += 1
            inside += CLASSES[c]
            perhaps += complement(CLASSES[OPPOSITE[c]])
            return None
        if c == "b":
            self.at += 1
            return 8
        return self.escaped()


# ---- formats -------------------------------------------------------------------------------------

_YEAR = r"(?:[1-9]\d{3}|0[1-9]\d\d|00[1-9]\d|000[1-9])"
_LEAP_YEAR = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
    rf"|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_GROUP = "[0-9A-Fa-f]{1,4}"
_IPV6 = "|".join(
    [f"(?:{_GROUP}:){{7}}{_GROUP}", f"(?:{_GROUP}:){{1,7}}:"]
    + [f"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{1,{n}}}" for n in range(1, 7)]
    + [f":(?:(?::{_GROUP}){{1,7}}|:)"]
)
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,28}[A-Za-z0-9])?"
_HOST = rf"(?:{_LABEL}\.){{0,5}}[A-Za-z](?:[A-Za-z0-9-]{{0,28}}[A-Za-z0-9])?"
_ATEXT = "[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
_EMAIL = rf"{_ATEXT}{{1,30}}(?:\.{_ATEXT}{{1,30}})?@{_HOST}"
_UNRESERVED = r"A-Za-z0-9._~!$&'()*+,;=@-"
_HEX_BYTE = "%[0-9A-Fa-f]{2}"
_PART = f"(?:[{_UNRESERVED}]|{_HEX_BYTE}){{1,64}}"
_SEGMENT = f"(?:[:{_UNRESERVED}]|{_HEX_BYTE}){{1,64}}"
_SEGMENTS = f"(?:/(?:{_SEGMENT})?){{0,8}}"
_QUERY = rf"(?:\?(?:[:/?{_UNRESERVED}]|{_HEX_BYTE}){{0,32}})?(?:#(?:[:/?{_UNRESERVED}]|{_HEX_BYTE}){{0,32}})?"
_URI = f"[A-Za-z][A-Za-z0-9+.-]{{0,31}}:(?://{_HOST}(?::[0-9]{{1,5}})?{_SEGMENTS}|{_SEGMENT}{_SEGMENTS}){_QUERY}"
_RELATIVE = f"(?:{_PART}{_SEGMENTS}|/(?:{_SEGMENT}{_SEGMENTS})?)?"
_POINTER = "(?:/(?:[^/~]|~[01])*)*"
_TIMED = r"T(?:\d{1,9}H(?:\d{1,9}M(?:\d{1,9}S)?)?|\d{1,9}M(?:\d{1,9}S)?|\d{1,9}S)"
_DAYS = r"(?:\d{1,9}D|\d{1,9}M(?:\d{1,9}D)?|\d{1,9}Y(?:\d{1,9}M(?:\d{1,9}D)?)?)"

FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": rf"P(?:{_DAYS}(?:{_TIMED})?|{_TIMED}|\d{{1,9}}W)",
    "email": _EMAIL,
    "idn-email": _EMAIL,
    "hostname": _HOST,
    "ipv4": rf"{_OCTET}(?:\.{_OCTET}){{3}}",
    "ipv6": _IPV6,
    "uri": _URI,
    "iri": _URI,
    "uri-reference": f"{_URI}|{_RELATIVE}{_QUERY}",
    "iri-reference": f"{_URI}|{_RELATIVE}{_QUERY}",
    "uuid": "[0-9A-Fa-f]{8}-(?:[0-9A-Fa-f]{4}-){3}[0-9A-Fa-f]{12}",
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(?:0|[1-9]{{1,9}})(?:#|{_POINTER})",
}
"""Patterns of whole strings. Mail addresses and URIs are short enough for the limits that schemas usually set."""
_SHORT_URI = r"https?://(?:[a-z0-9]{1,15}\.){1,3}[a-z]{2,6}(?:/[A-Za-z0-9._~-]{0,15}){0,2}"
_SIMPLE_HOST = r"(?:[A-Za-z0-9]+(?:-[A-Za-z0-9]+)*\.)*[A-Za-z]+(?:-[A-Za-z0-9]+)*"
_SIMPLE_URI = rf"[A-Za-z]+://{_SIMPLE_HOST}(?::[0-9]+)?(?:/[A-Za-z0-9._~-]*)*(?:\?[A-Za-z0-9=&._~-]*)?"
_SHORT_EMAIL = r"[A-Za-z0-9]{1,20}(?:[._+-][A-Za-z0-9]{1,20})?@(?:[A-Za-z0-9]{1,15}\.){1,2}[A-Za-z]{2,6}"
_SIMPLE_EMAIL = f"[A-Za-z0-9]+(?:[._+-][A-Za-z0-9]+)*@{_SIMPLE_HOST}"
SIMPLER_FORMATS = {
    "email": (_SHORT_EMAIL, _SIMPLE_EMAIL),
    "idn-email": (_SHORT_EMAIL, _SIMPLE_EMAIL),
    "hostname": (r"(?:[a-z0-9]{1,9}\.){0,3}[a-z]{1,9}",),
    "uri": (_SHORT_URI, _SIMPLE_URI),
    "iri": (_SHORT_URI, _SIMPLE_URI),
    "uri-reference": (_SHORT_URI, _SIMPLE_URI),
    "iri-reference": (_SHORT_URI, _SIMPLE_URI),
}
"""Some strings of formats that would take too many states to be combined with anything; the last one takes few."""
UNKNOWN_LANGUAGES = ("regex", "idn-hostname", "uri-template")
"""Formats that mean something which no pattern here says."""


# ---- languages -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Language:
    """A set of strings: those in which the pattern is found."""

    pattern: Pattern
    generous: Pattern
    """The same pattern with all that anybody may hold to match."""
    simpler: tuple[Pattern, ...] = ()
    """What finds some of the strings only; the last one in few states."""

    def generously(self) -> Language:
        """All strings of which anybody may hold that they belong to it."""
        return Language(self.generous, self.generous)

    def parts(self) -> list[Language]:
        """The whole, and parts of it that are simpler."""
        return [self, *(Language(pattern, pattern) for pattern in self.simpler)]

    def automaton(self) -> _Automaton:
        return _automaton_of(self.pattern)

    def matches(self, string: str) -> bool:
        """Whether the string belongs to it."""
        automaton = self.automaton()
        states = automaton.start
        for c in string:
            states = automaton.step(states, ord(c))
        return automaton.accepts(states)

    def lengths(self) -> tuple[int, int | None]:
        """Fewest and most characters, where the pattern is anchored; otherwise 0 and None."""
        parts = [_without_anchors(part) for part in _alternatives(self.pattern)]
        if not all(part is not None and part[0] and part[2] for part in parts):
            return 0, None
        return _lengths(choice(*(part[1] for part in parts if part)))


def pattern_language(source: str) -> Language:
    """The strings in which a pattern is found.

    Raises:
        PatternError: it is no pattern, or cannot be expressed.
    """
    return Language(_Reader(source).read(), _Reader(source, generously=True).read())


@cache
def format_language(name: str) -> Language:
    """The strings of one of :data:`FORMATS`, or most of them."""
    pattern, *simpler = (
        sequence(START, _Reader(source).read(), END) for source in (FORMATS[name], *SIMPLER_FORMATS.get(name, ()))
    )
    return Language(pattern, pattern, tuple(simpler))


def names_language(names: Seq[str]) -> Language:
    """These strings."""
    pattern = sequence(START, choice(*map(_spelled, names)), END)
    return Language(pattern, pattern)


def _spelled(string: str) -> Expression:
    return sequence(*(Chars(((ord(c), ord(c)),)) for c in string))


def _alternatives(pattern: Pattern) -> tuple[Pattern, ...]:
    return pattern.parts if isinstance(pattern, Choice) else (pattern,)


def _without_anchors(pattern: Pattern) -> tuple[bool, Expression, bool] | None:
    """Whether it is anchored at the start; what stands between; whether at the end. None where anchors stand elsewhere."""
    parts = list(pattern.parts) if isinstance(pattern, Sequence) else [pattern]
    at_start = bool(parts) and parts[0] == START
    at_end = len(parts) > at_start and parts[-1] == END
    between = sequence(*parts[at_start : len(parts) - at_end])
    return None if _has_anchor(between) else (at_start, between, at_end)


def _has_anchor(pattern: Pattern) -> bool:
    if isinstance(pattern, Repeat):
        return _has_anchor(pattern.part)
    return isinstance(pattern, Anchor) or (
        isinstance(pattern, Sequence | Choice) and any(map(_has_anchor, pattern.parts))
    )


def _lengths(e: Expression) -> tuple[int, int | None]:
    if isinstance(e, Repeat):
        low, high = _lengths(e.part)
        return low * e.low, None if high is None or e.high is None else high * e.high
    if not isinstance(e, Sequence | Choice):
        return 1, 1
    lengths = [_lengths(part) for part in e.parts]
    lows, highs = [low for low, _ in lengths], [high for _, high in lengths]
    if isinstance(e, Choice):
        return min(lows), None if None in highs else max(highs)
    return sum(lows), None if None in highs else sum(highs)


# ---- automata ------------------------------------------------------------------------------------

NO_CONDITION, AT_START, AT_END = range(3)


class _Automaton:
    """A nondeterministic one (Thompson's construction) that looks for a pattern in a string.

    A set of states is a sorted tuple of 2 * state, plus 1 once it has been claimed that the string ends here.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.moves: list[list[tuple[Ranges, int]]] = []
        self.jumps: list[list[tuple[int, int]]] = []
        """(condition, state): what is reached without a character."""
        before, self.final = self.state(), self.state()
        self.moves[before].append((ALL, before))
        self.moves[self.final].append((ALL, self.final))
        self.add(pattern, before, self.final)
        self.useful = self._useful()
        """States from which the pattern can still be found, the string's start being past."""
        self.start = self.closure([2 * before], at_start=True)

    def state(self) -> int:
        if len(self.moves) >= MAX_STATES:
            raise PatternError("it needs too large an automaton")
        self.moves.append([])
        self.jumps.append([])
        return len(self.moves) - 1

    def add(self, pattern: Pattern, entry: int, exit: int) -> None:
        """Leads from one state to another over the pattern."""
        if isinstance(pattern, Anchor):
            self.jumps[entry].append((AT_END if pattern.at_end else AT_START, exit))
        elif isinstance(pattern, Chars):
            self.moves[entry].append((pattern.ranges, exit))
        elif isinstance(pattern, Choice):
            for part in pattern.parts:
                self.add(part, entry, exit)
        elif isinstance(pattern, Sequence):
            for part in pattern.parts:
                following = self.state()
                self.add(part, entry, following)
                entry = following
            self.jumps[entry].append((NO_CONDITION, exit))
        elif isinstance(pattern, Repeat):
            self.add_repeat(pattern, entry, exit)

    def add_repeat(self, pattern: Repeat, entry: int, exit: int) -> None:
        for _ in range(pattern.low):
            following = self.state()
            self.add(pattern.part, entry, following)
            entry = following
        if pattern.high is None:
            loop = self.state()
            self.jumps[entry].append((NO_CONDITION, loop))
            self.add(pattern.part, loop, loop)
            self.jumps[loop].append((NO_CONDITION, exit))
            return
        for _ in range(pattern.high - pattern.low):
            self.jumps[entry].append((NO_CONDITION, exit))
            following = self.state()
            self.add(pattern.part, entry, following)
            entry = following
        self.jumps[entry].append((NO_CONDITION, exit))

    def _useful(self) -> set[int]:
        sources: list[list[int]] = [[] for _ in self.moves]
        for state, (moves, jumps) in enumerate(zip(self.moves, self.jumps)):
            for target in [t for _, t in moves] + [t for condition, t in jumps if condition != AT_START]:
                sources[target].append(state)
        found, todo = {self.final}, [self.final]
        while todo:
            new = [state for state in sources[todo.pop()] if state not in found]
            found.update(new)
            todo += new
        return found

    def closure(self, states: list[int], at_start: bool = False) -> tuple[int, ...]:
        found, todo = set(states), list(states)
        while todo:
            state = todo.pop()
            for condition, target in self.jumps[state >> 1]:
                if condition == AT_START and not at_start:
                    continue
                reached = 2 * target + (1 if condition == AT_END else state & 1)
                if reached not in found:
                    found.add(reached)
                    todo.append(reached)
        if 2 * self.final in found:  # it has been found, whatever follows
            return (2 * self.final,)
        return tuple(
            sorted(s for s in found if (s >> 1 == self.final if s & 1 else s >> 1 in self.useful))
        )

    def step(self, states: tuple[int, ...], code: int) -> tuple[int, ...]:
        """The states after a character."""
        reached = []
        for state in states:
            if not state & 1:
                reached += [2 * target for ranges, target in self.moves[state >> 1] if _holds(ranges, code)]
        return self.closure(list(dict.fromkeys(reached)))

    def accepts(self, states: tuple[int, ...]) -> bool:
        """Whether the string may end here."""
        return any(state >> 1 == self.final for state in states)


@lru_cache(maxsize=64)
def _automaton_of(pattern: Pattern) -> _Automaton:
    return _Automaton(pattern)


def _holds(ranges: Ranges, code: int) -> bool:
    i = bisect.bisect_right(ranges, (code, 0x110000)) - 1
    return i >= 0 and code <= ranges[i][1]


class _Alphabet:
    """All characters, in sets that none of the automata tells apart."""

    def __init__(self, automata: Seq[_Automaton]) -> None:
        sets = dict.fromkeys(ranges for a in automata for moves in a.moves for ranges, _ in moves)
        bounds = sorted({0, 0x110000, *(b for ranges in sets for low, high in ranges for b in (low, high + 1))})
        if len(sets) * len(bounds) > MAX_STEPS:
            raise PatternError("it tells too many characters apart")
        kinds: dict[tuple[bool, ...], list[tuple[int, int]]] = {}
        for low, end in zip(bounds, bounds[1:]):
            kinds.setdefault(tuple(_holds(ranges, low) for ranges in sets), []).append((low, end - 1))
        self.kinds = [ranges for ranges in map(merged, kinds.values()) if ranges]
        self.rows: list[dict[tuple[int, ...], list[tuple[int, ...]]]] = [{} for _ in automata]
        self.automata = automata
        self.n_steps = 0

    def after(self, i: int, states: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Where each kind of characters leads in automaton i."""
        row = self.rows[i].get(states)
        if row is None:
            self.n_steps += len(self.kinds)
            if self.n_steps > MAX_STEPS:
                raise PatternError("it needs too large an automaton")
            row = self.rows[i][states] = [self.automata[i].step(states, kind[0][0]) for kind in self.kinds]
        return row


# ---- writing -------------------------------------------------------------------------------------


def written(
    rules: Rules, hint: str, languages: Seq[Language], low: int, high: int | None, any_character: Rule,
    wanted: Callable[[list[bool]], bool] = all,
) -> Expression:  # fmt: skip
    """The inside of JSON strings that belong to all languages, or to those that are wanted, and have `low` to `high`
    characters.

    Args:
        any_character: matches any one character of a string's JSON.
        wanted: says from which languages a string belongs to whether it is wanted.

    Raises:
        PatternError: the automaton would be too large.
    """
    if wanted is all:
        if not languages:
            return repeat(any_character, low, high)
        if len(languages) == 1:
            for language in languages[0].parts():
                shortest, longest = language.lengths()
                if low <= shortest and (high is None or (longest is not None and longest <= high)):
                    direct = _written_directly(language.pattern, any_character)
                    if direct is not None:
                        return direct
    simple = [language.parts()[-1] for language in languages]
    return _Product(simple, low, high, wanted).write(rules, hint, any_character)


def _written_directly(pattern: Pattern, any_character: Rule) -> Expression | None:
    """The pattern as it stands, if anchors are where they can be."""
    alternatives = []
    anything = repeat(any_character, 0, None)
    for alternative in _alternatives(pattern):
        parts = _without_anchors(alternative)
        if parts is None:
            return None
        at_start, between, at_end = parts
        alternatives.append(
            sequence(EMPTY if at_start else anything, _encoded(between), EMPTY if at_end else anything)
        )
    return choice(*alternatives)


def _encoded(e: Expression) -> Expression:
    """From characters to their JSON."""
    if isinstance(e, Repeat):
        return repeat(_encoded(e.part), e.low, e.high)
    if isinstance(e, Sequence | Choice):
        return (sequence if isinstance(e, Sequence) else choice)(*map(_encoded, e.parts))
    assert isinstance(e, Chars)
    return _encoded_characters(e.ranges)


_SHORT_ESCAPES = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '"', 0x5C: "\\"}
_MUST_BE_ESCAPED = merged([(0, 0x1F), (0x22, 0x22), (0x5C, 0x5C)])


@lru_cache(maxsize=1024)
def _encoded_characters(ranges: Ranges) -> Expression:
    plain = complement([*complement(ranges), *_MUST_BE_ESCAPED])
    escaped = [code for low, high in _MUST_BE_ESCAPED for code in range(low, high + 1) if _holds(ranges, code)]
    short = [ord(_SHORT_ESCAPES[code]) for code in escaped if code in _SHORT_ESCAPES]
    letters = [_one_of(short)] if short else []
    for sixteen in (0, 1):
        digits = [ord(f"{code % 16:x}") for code in escaped if code // 16 == sixteen and code not in _SHORT_ESCAPES]
        if digits:
            letters.append(sequence(text(f"u00{sixteen}"), _one_of(digits)))
    parts = [] if not plain else [_one_of([plain[0][0]]) if _is_single(plain) else Chars(plain)]
    return choice(*parts, *([sequence(text("\\"), choice(*letters))] if letters else []))


def _is_single(ranges: Ranges) -> bool:
    return len(ranges) == 1 and ranges[0][0] == ranges[0][1]


def _one_of(codes: list[int]) -> Expression:
    return text(chr(codes[0])) if len(codes) == 1 else Chars(merged([(code, code) for code in codes]))


class _Product:
    """A deterministic automaton that follows all languages, and counts characters as far as that matters."""

    def __init__(
        self, languages: Seq[Language], low: int, high: int | None, wanted: Callable[[list[bool]], bool]
    ) -> None:
        automata = [language.automaton() for language in languages]
        alphabet = _Alphabet(automata)
        first = (*(a.start for a in automata), 0)
        numbers = {first: 0}
        states = [first]
        self.accepting: list[bool] = []
        self.targets: list[dict[int, list[tuple[int, int]]]] = []
        """Of each state: the states that follow, and the characters that lead there."""
        for state in states:
            *sets, count = state
            accepted = [a.accepts(s) for a, s in zip(automata, sets)]
            self.accepting.append(count >= low and wanted(accepted))
            targets: dict[int, list[tuple[int, int]]] = {}
            self.targets.append(targets)
            if count == high:
                continue
            following = count + 1 if high is not None or count < low else count
            for kind, *after_sets in zip(alphabet.kinds, *(alphabet.after(i, s) for i, s in enumerate(sets))):
                after = (*after_sets, following)
                if wanted is all and () in after:
                    continue
                if after not in numbers:
                    if len(states) >= MAX_STATES:
                        raise PatternError("it needs too large an automaton")
                    numbers[after] = len(states)
                    states.append(after)
                targets.setdefault(numbers[after], []).extend(kind)

    def write(self, rules: Rules, hint: str, any_character: Rule) -> Expression:
        """The rules of all states; what begins with the first one."""
        alive = self._alive()
        names = {state: rules.reserve(hint) for state in range(len(self.targets)) if state in alive}
        for state, rule in names.items():
            targets = {target: merged(ranges) for target, ranges in self.targets[state].items() if target in alive}
            if targets == {state: ALL} and self.accepting[state]:
                rules.define(rule, repeat(any_character, 0, None))
                continue
            parts = [
                sequence(any_character if ranges == ALL else _encoded_characters(ranges), names[target])
                for target, ranges in targets.items()
            ]
            rules.define(rule, choice(*parts, *([EMPTY] if self.accepting[state] else [])))
        return names.get(0, NEVER)

    def _alive(self) -> set[int]:
        """States from which the string can be ended."""
        sources: dict[int, list[int]] = {}
        for state, targets in enumerate(self.targets):
            for target in targets:
                sources.setdefault(target, []).append(state)
        alive: set[int] = set()
        todo = [state for state, accepting in enumerate(self.accepting) if accepting]
        while todo:
            state = todo.pop()
            if state not in alive:
                alive.add(state)
                todo += sources.get(state, ())
        return alive
