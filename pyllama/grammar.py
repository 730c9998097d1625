r"""GBNF, the grammar notation of llama.cpp: from text to a compiled grammar, and matchers that follow it by tokens.

Here the text is read and turned, rule by rule, into a network of nodes (Thompson's construction: a node consumes a
character, enters a rule, forks, or ends its rule). The core walks the network. Notation::

    root  ::= "yes" | "no" (" because " word+)?     # a rule ends with its line
    word  ::= [a-z]{1,12} [^\n] . name              # classes, any character, other rules
    name  ::= (                                     # inside parentheses, and after ::= and |, lines may be broken
        "\x41" | "\u00e9" | "\U0001F600" | [\n\r\t\\\]\-]
    )*

This module knows nothing of requests or logits' meaning; tokens are bytes here.
"""

from __future__ import annotations

import itertools
import re
import threading
import weakref
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple, NoReturn, Protocol

import numpy as np

from .core import CoreError, call, create, ffi, lib

__all__ = ["Grammar", "GrammarError", "Matcher", "TokenTrie", "token_trie"]

MAX_CHARACTERS = 1_000_000
"""Of a grammar's text."""
MAX_NODES = 500_000
"""Nodes of a network before its last repetition, which takes one or two for every time."""
MAX_CODE_POINT = 0x10FFFF


class GrammarError(ValueError):
    """The text is not a grammar.

    Attributes:
        line, column: where, counted from 1.
    """

    def __init__(self, message: str, text: str, position: int) -> None:
        self.line = text.count("\n", 0, position) + 1
        self.column = position - text.rfind("\n", 0, position)
        super().__init__(f"grammar, line {self.line}, column {self.column}: {message}")


# ---- the network ---------------------------------------------------------------------------------


class Fragment(NamedTuple):
    """A part of the network with one way in and one way out, the `next` of its exit node."""

    entry: int
    exit: int


NONE = -1
"""No such node."""


class Network:
    """Nodes of all rules: what a node does (`kind`), with what (`argument`), and which node comes next."""

    def __init__(self) -> None:
        self.kind: list[int] = []
        self.argument: list[int] = []
        self.next: list[int] = []
        self.starts: list[int] = []
        """First node of each rule."""
        self.sets: dict[tuple[tuple[int, int], ...], int] = {}
        """Numbers of the sets of characters: sorted, disjoint, closed ranges of code points."""

    def _node(self, kind: int, argument: int) -> Fragment:
        self.kind.append(kind)
        self.argument.append(argument)
        self.next.append(NONE)
        return Fragment(len(self.kind) - 1, len(self.kind) - 1)

    def _then(self, first: Fragment, second: Fragment) -> None:
        self.next[first.exit] = second.entry

    def characters(self, ranges: list[tuple[int, int]]) -> Fragment:
        """One character of these ranges."""
        return self._node(lib.PL_GRAMMAR_CHARS, self.sets.setdefault(_merged(ranges), len(self.sets)))

    def call(self, rule: int) -> Fragment:
        """Whatever the rule matches."""
        return self._node(lib.PL_GRAMMAR_CALL, rule)

    def _fork(self, other: int = NONE) -> Fragment:
        """Goes on to its `next`, and to another node if one is given."""
        return self._node(lib.PL_GRAMMAR_FORK, other)

    def sequence(self, parts: list[Fragment]) -> Fragment:
        """One part after the other."""
        if not parts:
            return self._fork()
        for first, second in itertools.pairwise(parts):
            self._then(first, second)
        return Fragment(parts[0].entry, parts[-1].exit)

    def alternatives(self, parts: list[Fragment]) -> Fragment:
        """One of the parts."""
        if len(parts) == 1:
            return parts[0]
        join = self._fork()
        entry = parts[-1].entry
        for part in parts:
            self._then(part, join)
        for part in reversed(parts[:-1]):
            fork = self._fork(part.entry)
            self.next[fork.exit] = entry
            entry = fork.entry
        return Fragment(entry, join.exit)

    def add_rule(self) -> int:
        """A new rule, whose number is returned; :meth:`define` gives it a body."""
        self.starts.append(NONE)
        return len(self.starts) - 1

    def define(self, rule: int, body: Fragment) -> None:
        """Makes `body` what the rule matches."""
        self._then(body, self._node(lib.PL_GRAMMAR_END, NONE))
        self.starts[rule] = body.entry

    def is_single(self, part: Fragment) -> bool:
        """Whether the part is one node that can be copied."""
        return part.entry == part.exit and self.kind[part.entry] != lib.PL_GRAMMAR_FORK

    def repeated(self, part: Fragment, low: int, high: int | None) -> Fragment:
        """A part that :meth:`is_single`, `low` to `high` times (None: any number)."""
        kind, argument = self.kind[part.entry], self.argument[part.entry]
        parts = [self._node(kind, argument) for _ in range(low)]
        if high is None:
            parts.append(self._loop(self._node(kind, argument)))
        elif high > low:
            join = self._fork()
            optional = []
            for _ in range(high - low):  # each one of the optional copies may be the last
                copy = self._node(kind, argument)
                fork = self._fork(join.entry)
                self._then(fork, copy)
                optional.append(Fragment(fork.entry, copy.exit))
            parts += [*optional, join]
        return self.sequence(parts)

    def _loop(self, part: Fragment) -> Fragment:
        fork = self._fork(part.entry)
        self.next[part.exit] = fork.entry
        return fork

    def star(self, part: Fragment) -> Fragment:
        """Any number of times."""
        return self._loop(part)

    def plus(self, part: Fragment) -> Fragment:
        """At least once."""
        return Fragment(part.entry, self._loop(part).exit)

    def optional(self, part: Fragment) -> Fragment:
        """Once or not at all."""
        return self.alternatives([part, self._fork()])


def _merged(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The same code points as sorted ranges that neither overlap nor touch."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    return tuple(merged)


def _complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """All other code points."""
    others, start = [], 0
    for low, high in _merged(ranges):
        if start < low:
            others.append((start, low - 1))
        start = high + 1
    if start <= MAX_CODE_POINT:
        others.append((start, MAX_CODE_POINT))
    return others


# ---- reading the text ----------------------------------------------------------------------------

_BLANKS = re.compile(r"(?:[ \t]+|#[^\r\n]*)*")
_BLANKS_AND_LINES = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_NEWLINE = re.compile(r"\r\n?|\n")
_BOUNDS = re.compile(r"\{\s*([0-9]*)\s*(,?)\s*([0-9]*)\s*\}")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{c: c for c in '\\"[]-^'}}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}


@dataclass(slots=True)
class _Group:
    """What has been read of a group, or of a rule's body: finished alternatives, and parts of the one being read."""

    position: int
    alternatives: list[Fragment] = field(default_factory=list)
    parts: list[Fragment] = field(default_factory=list)


class _Reader:
    """Reads a grammar from left to right. Open groups are on a list of their own, so that any depth is fine."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.network = Network()
        self.rules: dict[str, int] = {}
        self.mentioned: dict[str, int] = {}
        """Where each rule is named first."""
        self.defined: dict[str, int] = {}
        """Where each rule begins."""
        self.parents: dict[int, int] = {}
        """The rules that repeated groups became, and the rules they are part of."""

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        raise GrammarError(message, self.text, self.at if position is None else position)

    def read(self) -> None:
        if len(self.text) > MAX_CHARACTERS:
            self.fail(f"the grammar is too long: {len(self.text)} characters, at most {MAX_CHARACTERS} are read")
        self.skip(_BLANKS_AND_LINES)
        while self.at < len(self.text):
            self.read_rule()
            self.skip(_BLANKS_AND_LINES)
        for name, position in self.mentioned.items():
            if name not in self.defined:
                self.fail(f"there is no rule {name!r}", position)

    def skip(self, pattern: re.Pattern[str]) -> bool:
        match = pattern.match(self.text, self.at)
        if match is None:
            return False
        self.at = match.end()
        return True

    def peek(self) -> str:
        """The character that comes next, or nothing."""
        return self.text[self.at : self.at + 1]

    def rule(self, name: str) -> int:
        """The number of a rule, which may be defined later."""
        if name not in self.rules:
            self.rules[name] = self.network.add_rule()
        return self.rules[name]

    def read_rule(self) -> None:
        start = self.at
        if not self.skip(_NAME):
            self.fail(f"expected the name of a rule, not {self.peek()!r}")
        name = self.text[start : self.at]
        if name in self.defined:
            self.fail(f"rule {name!r} is defined twice", start)
        self.skip(_BLANKS)
        if not self.text.startswith("::=", self.at):
            self.fail(f"expected ::= after the name {name!r}")
        self.at += 3
        self.skip(_BLANKS_AND_LINES)
        self.defined[name] = start
        number = self.rule(name)
        self.network.define(number, self.read_body(number))
        if self.at < len(self.text) and not self.skip(_NEWLINE):
            self.fail(f"expected the end of the line, not {self.peek()!r}")

    def read_body(self, rule: int) -> Fragment:
        """Reads alternatives up to the end of the rule."""
        groups = [_Group(self.at)]
        while True:
            character, group = self.peek(), groups[-1]
            if len(self.network.kind) > MAX_NODES:
                self.fail("the grammar is too large")
            if character == "(":
                groups.append(_Group(self.at))
                self.at += 1
                self.skip(_BLANKS_AND_LINES)
                continue
            if character == "|":
                group.alternatives.append(self.network.sequence(group.parts))
                group.parts = []
                self.at += 1
                self.skip(_BLANKS_AND_LINES)
                continue
            if character == '"':
                group.parts.append(self.read_literal())
            elif character == "[":
                group.parts.append(self.read_class())
            elif character == ".":
                self.at += 1
                group.parts.append(self.network.characters([(0, MAX_CODE_POINT)]))
            elif character in ("*", "+", "?", "{"):
                if not group.parts:
                    self.fail(f"nothing stands before {character!r} to be repeated")
                group.parts[-1] = self.read_repetition(group.parts[-1], rule)
            elif _NAME.match(character):
                group.parts.append(self.read_reference())
            elif character == ")" and len(groups) > 1:
                self.at += 1
                groups.pop()
                groups[-1].parts.append(self.close(group))
            elif len(groups) > 1:
                if character:
                    self.fail(f"expected ')' or more of the group, not {character!r}")
                self.fail("this '(' is never closed", group.position)
            else:
                return self.close(group)
            self.skip(_BLANKS_AND_LINES if len(groups) > 1 else _BLANKS)

    def close(self, group: _Group) -> Fragment:
        return self.network.alternatives([*group.alternatives, self.network.sequence(group.parts)])

    def read_reference(self) -> Fragment:
        start = self.at
        self.skip(_NAME)
        name = self.text[start : self.at]
        self.mentioned.setdefault(name, start)
        return self.network.call(self.rule(name))

    def read_literal(self) -> Fragment:
        start = self.at
        self.at += 1
        parts = []
        while self.peek() != '"':
            if not self.peek():
                self.fail("this '\"' is never closed", start)
            position = self.at
            code = self.read_character()
            if 0xD800 <= code <= 0xDFFF:
                self.fail(f"U+{code:04X} is half of a surrogate pair, not a character", position)
            parts.append(self.network.characters([(code, code)]))
        self.at += 1
        return self.network.sequence(parts)

    def read_class(self) -> Fragment:
        start = self.at
        self.at += 1
        negated = self.peek() == "^"
        self.at += negated
        ranges = []
        while self.peek() != "]":
            if not self.peek():
                self.fail("this '[' is never closed", start)
            position = self.at
            low = high = self.read_character()
            if self.peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", ""):
                self.at += 1
                high = self.read_character()
                if high < low:
                    self.fail("this range ends before it begins", position)
            ranges.append((low, high))
        self.at += 1
        if not ranges:
            self.fail("an empty class matches nothing", start)
        return self.network.characters(_complement(ranges) if negated else ranges)

    def read_character(self) -> int:
        """A code point, plain or escaped."""
        start, character = self.at, self.peek()
        self.at += 1
        if character != "\\":
            return ord(character)
        character = self.peek()
        self.at += 1
        if character in _ESCAPES:
            return ord(_ESCAPES[character])
        if character not in _HEX_DIGITS:
            self.fail(f"unknown escape \\{character}", start)
        size = _HEX_DIGITS[character]
        digits = self.text[self.at : self.at + size]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{size}}}", digits):
            self.fail(f"\\{character} wants {size} hexadecimal digits", start)
        code = int(digits, 16)
        if code > MAX_CODE_POINT:
            self.fail(f"\\{character}{digits} is beyond Unicode's last code point, U+10FFFF", start)
        self.at += size
        return code

    def read_repetition(self, part: Fragment, rule: int) -> Fragment:
        start, operator = self.at, self.peek()
        if operator != "{":
            self.at += 1
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[operator]
        else:
            low, high = self.read_bounds()
        if high is not None and high < low:
            self.fail(f"{{{low},{high}}} ends before it begins", start)
        if max(low, high or 0) > MAX_NODES - len(self.network.kind):
            self.fail("too many repetitions", start)
        network = self.network
        match low, high:
            case 0, None:
                return network.star(part)
            case 1, None:
                return network.plus(part)
            case 0, 1:
                return network.optional(part)
            case 1, 1:
                return part
        if not network.is_single(part):
            self.parents[len(network.starts)] = rule
            copied = network.add_rule()
            network.define(copied, part)
            part = network.call(copied)
        return network.repeated(part, low, high)

    def read_bounds(self) -> tuple[int, int | None]:
        """{m}, {m,}, {m,n} or {,n}."""
        match = _BOUNDS.match(self.text, self.at)
        if match is None or not (match[1] or match[3]):
            self.fail("expected {m}, {m,}, {m,n} or {,n}")
        if max(len(match[1]), len(match[3])) > 9:
            self.fail("too many repetitions")
        self.at = match.end()
        low = int(match[1] or 0)
        if not match[2]:
            return low, low
        return low, int(match[3]) if match[3] else None


# ---- the compiled grammar ------------------------------------------------------------------------


class Grammar:
    """A compiled grammar. Immutable: any number of matchers, in any threads, may follow it."""

    def __init__(self, text: str, root: str = "root") -> None:
        reader = _Reader(text)
        reader.read()
        if root not in reader.defined:
            raise GrammarError(f"there is no rule {root!r} to begin with", text, 0)
        network = reader.network
        nodes = np.array([network.kind, network.argument, network.next], np.int32).T.copy()
        starts = np.array(network.starts, np.int32)
        ranges = np.array([r for ranges in network.sets for r in ranges], np.int32).reshape(-1, 2)
        ends = np.cumsum([0, *(len(ranges) for ranges in network.sets)], dtype=np.int32)
        left_recursive = ffi.new("int32_t *", NONE)
        try:
            self._handle = create(
                lib.pl_grammar_new,
                lib.pl_grammar_free,
                ffi.from_buffer("pl_grammar_node[]", nodes),
                len(nodes),
                ffi.from_buffer("int32_t[]", starts),
                len(starts),
                reader.rules[root],
                ffi.from_buffer("int32_t[]", ranges),
                ffi.from_buffer("int32_t[]", ends),
                len(network.sets),
                left_recursive,
            )
        except CoreError as error:
            rule = left_recursive[0]
            if rule == NONE:
                raise GrammarError(str(error), text, 0) from None
            while rule in reader.parents:
                rule = reader.parents[rule]
            name = next(name for name, number in reader.rules.items() if number == rule)
            message = f"rule {name!r} is left-recursive: it can come to itself without a character in between"
            raise GrammarError(message, text, reader.defined[name]) from None

    @staticmethod
    def parse(text: str, root: str = "root") -> Grammar:
        """Compiles a grammar; the last ones are remembered.

        Args:
            text: GBNF.
            root: the rule to begin with.

        Raises:
            GrammarError: with the line and column.
        """
        return _compiled(text, root)

    def matcher(self) -> Matcher:
        """A matcher at the beginning."""
        return Matcher(self)


@lru_cache(maxsize=16)
def _compiled(text: str, root: str) -> Grammar:
    return Grammar(text, root)


# ---- following it --------------------------------------------------------------------------------


class _HasTokenTable(Protocol):
    def token_table(self) -> tuple[bytes, np.ndarray]: ...


class TokenTrie:
    """The bytes of all tokens of a vocabulary, as a tree that shares prefixes. Immutable."""

    def __init__(self, blob: bytes, offsets: np.ndarray) -> None:
        """Token i is blob[offsets[i]:offsets[i + 1]]; offsets: int32 [n_vocab + 1]."""
        offsets = np.ascontiguousarray(offsets, np.int32)
        self.n_vocab = len(offsets) - 1
        self._handle = create(
            lib.pl_trie_new,
            lib.pl_trie_free,
            ffi.from_buffer("uint8_t[]", blob),
            len(blob),
            ffi.from_buffer("int32_t[]", offsets),
            self.n_vocab,
        )


_tries: weakref.WeakKeyDictionary[_HasTokenTable, TokenTrie] = weakref.WeakKeyDictionary()
_tries_lock = threading.Lock()


def token_trie(tokenizer: _HasTokenTable) -> TokenTrie:
    """The trie of a tokenizer's vocabulary, built when it is first asked for."""
    with _tries_lock:
        trie = _tries.get(tokenizer)
        if trie is None:
            trie = _tries[tokenizer] = TokenTrie(*tokenizer.token_table())
        return trie


class Matcher:
    """Where a text stands in a grammar. Texts come in pieces of UTF-8 that may end inside a character.

    Not to be used from two threads at a time.

    Raises (all methods):
        CoreError: the grammar is so ambiguous that following it takes too much memory.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar  # the core's matcher reads it
        self._trie: TokenTrie | None = None  # the core remembers masks of it, and tells tries apart by address
        self._handle = create(lib.pl_matcher_new, lib.pl_matcher_free, grammar._handle)

    def allows(self, data: bytes) -> bool:
        """Whether the text may go on with `data`, something or the end following it."""
        return bool(call(lib.pl_matcher_allows, self._handle, data, len(data)))

    def accept(self, data: bytes) -> bool:
        """Goes on with `data`; where that is not allowed, False is returned and nothing changes."""
        return bool(call(lib.pl_matcher_accept, self._handle, data, len(data)))

    @property
    def can_end(self) -> bool:
        """Whether the text may end here."""
        return bool(lib.pl_matcher_can_end(self._handle))

    @property
    def must_end(self) -> bool:
        """Whether the text may end here, and cannot go on."""
        return bool(lib.pl_matcher_must_end(self._handle))

    def mask(self, trie: TokenTrie, logits: np.ndarray) -> None:
        """Sets the logits (float32 [n_vocab]) of tokens that are not allowed, and of those without bytes, to -inf."""
        call(lib.pl_matcher_mask, self._handle, trie._handle, ffi.from_buffer("float[]", logits), len(logits))
        self._trie = trie
