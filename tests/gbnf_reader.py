"""A second reading of GBNF, which shares nothing with the library's: texts are drawn from a grammar, and judged by it.

The grammar's text becomes a tree by a small recursive parser; the recognizer is Earley's, run on the tree's productions.
"""

from __future__ import annotations

import random
import re

TOKEN = re.compile(
    r"""\s*(?:\#[^\n]*\s*)*(?:
    (?P<define>[A-Za-z0-9_-]+\s*::=) | (?P<name>[A-Za-z0-9_-]+) | "(?P<text>(?:[^"\\]|\\.)*)"
    | \[(?P<class>(?:[^\]\\]|\\.)*)\] | (?P<bounds>\{[^}]*\}) | (?P<sign>[().|*+?]) | (?P<end>$))""",
    re.VERBOSE | re.DOTALL,
)
CHARACTER = re.compile(r"\\x([0-9A-Fa-f]{2})|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\(.)|(.)", re.DOTALL)


def _characters(text):
    """Of each: its code point, and whether it was escaped."""
    for match in CHARACTER.finditer(text):
        digits = match[1] or match[2] or match[3]
        if digits:
            yield int(digits, 16), True
        elif match[4]:
            yield ord({"n": "\n", "r": "\r", "t": "\t"}.get(match[4], match[4])), True
        else:
            yield ord(match[5]), False


def _class(text):
    negated = text.startswith("^")
    members = list(_characters(text[negated:]))
    ranges, i = [], 0
    while i < len(members):
        low = high = members[i][0]
        if i + 2 < len(members) and members[i + 1] == (ord("-"), False):
            high = members[i + 2][0]
            i += 2
        ranges.append((low, high))
        i += 1
    return ("class", tuple(ranges), negated)


class Gbnf:
    """A grammar: trees of ("class", ranges, negated), ("rule", name), ("sequence", parts), ("choice", parts),
    ("repeat", part, low, high)."""

    def __init__(self, text):
        self.tokens = []
        at = 0
        while True:
            match = TOKEN.match(text, at)
            assert match, f"not GBNF: {text[at : at + 40]!r}"
            self.tokens.append((match.lastgroup, match[match.lastgroup]))
            if match.lastgroup == "end":
                break
            at = match.end()
        self.at = 0
        self.rules = {}
        while self.tokens[self.at][0] != "end":
            kind, value = self.tokens[self.at]
            assert kind == "define", value
            self.at += 1
            self.rules[value.removesuffix("::=").strip()] = self._choice()
        self._shortest()
        self.productions = None

    def _choice(self):
        parts = [self._sequence()]
        while self.tokens[self.at] == ("sign", "|"):
            self.at += 1
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else ("choice", tuple(parts))

    def _sequence(self):
        parts = []
        while True:
            kind, value = self.tokens[self.at]
            if kind in ("define", "end") or (kind == "sign" and value in "|)"):
                return ("sequence", tuple(parts))
            self.at += 1
            if kind == "text":
                codes = [code for code, _ in _characters(value)]
                parts.append(("sequence", tuple(("class", ((code, code),), False) for code in codes)))
            elif kind == "class":
                parts.append(_class(value))
            elif kind == "name":
                parts.append(("rule", value))
            elif value == ".":
                parts.append(("class", (), True))
            elif value == "(":
                parts.append(self._choice())
                assert self.tokens[self.at] == ("sign", ")")
                self.at += 1
            elif kind == "bounds":
                low, comma, high = re.fullmatch(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}", value).groups()
                bounds = (int(low or 0), int(high) if high else None) if comma else (int(low), int(low))
                parts[-1] = ("repeat", parts[-1], *bounds)
            else:
                parts[-1] = ("repeat", parts[-1], *{"*": (0, None), "+": (1, None), "?": (0, 1)}[value])

    # -- drawing -----------------------------------------------------------------------------------

    def _shortest(self):
        """The fewest steps that each rule takes to end."""
        self.cost = dict.fromkeys(self.rules, float("inf"))
        changed = True
        while changed:
            changed = False
            for name, tree in self.rules.items():
                cost = 1 + self._cost(tree)
                if cost < self.cost[name]:
                    self.cost[name], changed = cost, True

    def _cost(self, tree):
        kind, *rest = tree
        if kind == "class":
            return 1
        if kind == "rule":
            return self.cost[rest[0]]
        if kind == "repeat":
            return rest[1] and rest[1] * self._cost(rest[0])
        return (sum if kind == "sequence" else min)(map(self._cost, rest[0]), **({} if kind == "sequence" else {"default": 0}))

    def draw(self, rng: random.Random, budget: int = 60, root: str = "root") -> str:
        """A text of the grammar. After about `budget` characters whatever ends soonest is chosen."""
        out, stack = [], [("rule", root)]
        while stack:
            kind, *rest = stack.pop()
            hurry = len(out) + len(stack) > budget
            if kind == "class":
                out.append(_draw_character(rng, *rest))
            elif kind == "rule":
                stack.append(self.rules[rest[0]])
            elif kind == "sequence":
                stack += reversed(rest[0])
            elif kind == "choice":
                costs = [self._cost(part) for part in rest[0]]
                fine = [p for p, cost in zip(rest[0], costs) if cost == min(costs) or (not hurry and cost < float("inf"))]
                stack.append(rng.choice(fine))
            else:
                part, low, high = rest
                if self._cost(part) == float("inf"):
                    hurry = True
                more = 0 if hurry else min(int(rng.expovariate(0.4)), 10**9 if high is None else high - low)
                if not hurry and high is not None and rng.random() < 0.1 and high < budget:
                    more = high - low
                stack += [part] * (low + more)
        return "".join(out)

    # -- judging -----------------------------------------------------------------------------------

    def _productions(self):
        self.productions, self.names, self.todo = {}, {}, []
        self.start = self._symbol(("rule", "root"))
        for symbol, tree in self.todo:  # which grows meanwhile
            self.productions[symbol] = [tuple(map(self._symbol, body)) for body in self._bodies(tree)]
        self.nullable = set()
        changed = True
        while changed:
            changed = False
            for symbol, bodies in reversed(self.productions.items()):
                if symbol not in self.nullable and any(all(s in self.nullable for s in body) for body in bodies):
                    self.nullable.add(symbol)
                    changed = True

    def _symbol(self, tree):
        """A class stands for itself, everything else is numbered."""
        if tree[0] == "class":
            return tree
        if tree not in self.names:
            self.names[tree] = len(self.names)
            self.todo.append((self.names[tree], tree))
        return self.names[tree]

    def _bodies(self, tree):
        kind, *rest = tree
        if kind == "rule":
            return [[self.rules[rest[0]]]]
        if kind == "sequence":
            return [rest[0]]
        if kind == "choice":
            return [[part] for part in rest[0]]
        part, low, high = rest
        if low:
            return [[part, ("repeat", part, low - 1, None if high is None else high - 1)]]
        if high is None:
            return [[], [part, tree]]
        return [[], [part, ("repeat", part, 0, high - 1)]] if high else [[]]

    def accepts(self, text: str) -> bool:
        """Whether the text is one of the grammar's (Earley 1970, with Aycock and Horspool's treatment of empty rules)."""
        if self.productions is None:
            self._productions()
        first = [(self.start, body, 0, 0) for body in self.productions[self.start]]
        chart = [dict.fromkeys(first)] + [{} for _ in text]
        for i in range(len(text) + 1):
            items = list(chart[i])
            while items:
                item = items.pop()
                symbol, body, dot, origin = item
                new = []
                if dot < len(body):
                    wanted = body[dot]
                    if isinstance(wanted, tuple):
                        if i < len(text) and _holds(ord(text[i]), *wanted[1:]):
                            chart[i + 1][symbol, body, dot + 1, origin] = None
                        continue
                    new = [(wanted, b, 0, i) for b in self.productions[wanted]]
                    if wanted in self.nullable:
                        new.append((symbol, body, dot + 1, origin))
                elif origin < i:
                    new = [(s, b, d + 1, o) for s, b, d, o in chart[origin] if d < len(b) and b[d] == symbol]
                for other in new:
                    if other not in chart[i]:
                        chart[i][other] = None
                        items.append(other)
        return any(s == self.start and dot == len(body) and origin == 0 for s, body, dot, origin in chart[-1])


def _holds(code, ranges, negated):
    return any(low <= code <= high for low, high in ranges) != negated


SAMPLES = [*range(0x20, 0x7F), 0, 9, 10, 13, 0x1F, 0x7F, 0x85, 0xA0, 0xE9, 0x660, 0x2028, 0x4E2D, 0xFEFF, 0x1F600, 0x10FFFF]


def _draw_character(rng, ranges, negated):
    if not negated:
        low, high = rng.choice(ranges)
        code = rng.choice([low, high, rng.randint(low, high)])
        return chr(code) if not 0xD800 <= code < 0xE000 else chr(low if low < 0xD800 else high)
    while True:
        code = rng.choice(SAMPLES) if rng.random() < 0.9 else rng.randint(0, 0x10FFFF)
        if _holds(code, ranges, negated) and not 0xD800 <= code < 0xE000:
            return chr(code)
