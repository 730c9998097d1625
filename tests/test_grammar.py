"""Grammars: what the notation means, an independent matcher, errors, masks against single answers, odd sizes."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyllama.core import CoreError, create, ffi, lib
from pyllama.grammar import Grammar, GrammarError, TokenTrie, token_trie
from tests.vocabulary import Vocabulary

JSON = r"""
# A JSON document
root   ::= value
value  ::= (object | array | string | number | "true" | "false" | "null") space
object ::= "{" space (member ("," space member)*)? "}"
member ::= string space ":" space value
array  ::= "[" space (value ("," space value)*)? "]"
string ::= "\"" ([^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
space  ::= [ \t\n\r]*
"""
ARITHMETIC = r"""
root  ::= (line "\n")+
line  ::= sum " = " sum
sum   ::= term ([-+] term)*
term  ::= atom ([*/] atom)*
atom  ::= [a-z] [a-z0-9_]* | [0-9]+ | "(" sum ")"
"""
LIST = r"""
root ::= item+
item ::= "- " [^\r\n\x0b\x0c\x85\u2028\u2029]+ "\n"   # one line each
"""
CHESS = r"""
root   ::= turn{1,3}
turn   ::= [1-9] [0-9]? ". " move " " move "\n"
move   ::= (pawn | piece | castle) [+#]?
piece  ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn   ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?
"""


def complete(grammar, text):
    """Whether a grammar (or its text) matches all of a text (str or bytes)."""
    grammar = Grammar(grammar) if isinstance(grammar, str) else grammar
    matcher = grammar.matcher()
    return matcher.accept(text.encode() if isinstance(text, str) else text) and matcher.can_end


# ---- the notation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "matching", "others"),
    [
        ('"abc"', ["abc"], ["", "ab", "abcd", "Abc"]),
        ('""', [""], ["a"]),
        ("", [""], ["a"]),
        ('"a" | "b" |', ["a", "b", ""], ["ab"]),
        ('"a" "b"', ["ab"], ["a", "b", "a b"]),
        ('"ab"*', ["", "ab", "abab"], ["a", "aba", "abb"]),
        ('"a"+', ["a", "aaa"], ["", "b"]),
        ('"ab"?', ["", "ab"], ["a", "abab"]),
        ('"a"{3}', ["aaa"], ["aa", "aaaa", ""]),
        ('"ab"{2,}', ["abab", "ababab"], ["ab", ""]),
        ('"a"{1,3}', ["a", "aa", "aaa"], ["", "aaaa"]),
        ('"ab"{,2}', ["", "ab", "abab"], ["ababab", "a"]),
        ('"a"{0,0} "b"', ["b"], ["ab"]),
        ('"a"{0} "b"', ["b"], ["ab"]),
        ('"a"{1} "b"{1,1}', ["ab"], ["a", "aabb"]),
        ('"a"{ 1 , 2 }', ["a", "aa"], ["", "aaa"]),
        ('("a" | "b" "c"){2,3}', ["aa", "abc", "bca", "bcbcbc"], ["a", "bc", "aaaa"]),
        ('("a"?){3} "b"', ["b", "ab", "aaab"], ["aaaab"]),
        ('"a"**', ["", "aaaa"], ["b"]),
        ('"a"?+', ["", "a", "aa"], ["b"]),
        ('("a"{2}){2} "b"', ["aaaab"], ["aab", "aaab", "aaaaab"]),
        ('("a"*)*', ["", "a", "aa"], ["b"]),
        ('("" | "a"*)* "b"', ["b", "aab"], ["a"]),
        ("[abc]", ["a", "b", "c"], ["", "d", "ab"]),
        ("[a-cx]", ["a", "b", "c", "x"], ["d", "-"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[-a]", ["a", "-"], ["b"]),
        ("[+-/]", ["+", ",", "-", ".", "/"], ["*", "0"]),
        (r"[+\-/]", ["+", "-", "/"], ["."]),
        ("[^abc]", ["d", "é", "\n", "\U0010ffff", "\0"], ["a", "b", ""]),
        (r"[\^a]", ["^", "a"], ["b"]),
        ("[a^]", ["^", "a"], ["b"]),
        (r"[\]\[\\\"]", ["]", "[", "\\", '"'], ["a"]),
        (r"[\n\r\t]", ["\n", "\r", "\t"], ["n", "r", " "]),
        (r"[\x41-\x43]", ["A", "B", "C"], ["D", "x"]),
        ("[à-ï]", ["à", "é", "ï"], ["a", "ð"]),
        ("[あ-ん]", ["あ", "の"], ["ア", "a"]),
        ("[😀-😂]", ["😀", "😁", "😂"], ["😃", "a"]),
        (r"[\uD800-\uDFFFa]", ["a"], ["b"]),
        (".", ["a", "\n", "é", "😀", "\U0010ffff"], ["", "ab"]),
        (".*", ["", "any\nthing"], []),
        (r'"\x41\u00e9\U0001F600"', ["Aé😀"], ["Aé"]),
        (r'"\n\r\t\\\"\[\]"', ['\n\r\t\\"[]'], []),
        ('"a\nb"', ["a\nb"], ["ab"]),
        ('"a" # comment "b"', ["a"], ["ab"]),
        ('"a#b"', ["a#b"], ["a"]),
        ("[#]", ["#"], []),
        ('"héllo" "wörld"', ["héllowörld"], ["hello"]),
        ('(\n"a" # one\n\n| "b"\n"c"\n)', ["a", "bc"], ["b"]),
        ('"a" |\n "b" | # more\n\n "c"', ["a", "b", "c"], [""]),
        ('\n\n "a"', ["a"], []),
        ('("a" (\n"b" ("c")*)\n?)+', ["a", "abcc", "abab"], ["b"]),
    ],
)
def test_notation(body, matching, others):
    grammar = Grammar("root ::= " + body)
    for text in matching:
        assert complete(grammar, text), text
    for text in others:
        assert not complete(grammar, text), text


def test_rules():
    text = '# first\r\n\r\nroot ::= a-1 b_2?\r\na-1 ::= X\n\n  \n\nX ::= "x"#end\nb_2 ::= "y" | "z"'
    for match in ("x", "xy", "xz"):
        assert complete(text, match)
    assert not complete(text, "y")
    assert complete('root::="a"', "a")
    assert complete('start ::= "s"\nroot ::= "r"', "r")
    assert Grammar('start ::= "s"\nroot ::= "r"', "start").matcher().accept(b"s")
    assert complete('\n\n  root ::= \t b \n b ::= "x"\n\n', "x")


def test_recursion():
    nested = Grammar('root ::= "(" root ")" | "x"')
    assert complete(nested, "((x))")
    assert not complete(nested, "((x)")
    palindromes = Grammar('root ::= "a" root "a" | "b" root "b" | "c"')
    assert complete(palindromes, "abbacabba")
    assert not complete(palindromes, "abbacabab")
    assert complete('root ::= "a" root |', "a" * 1000)
    mutual = Grammar('root ::= "a" b | "c"\nb ::= "b" root')
    assert complete(mutual, "ababc")


def test_matching_goes_on_step_by_step():
    matcher = Grammar('root ::= "ab" "c"?').matcher()
    assert not matcher.can_end
    assert matcher.allows(b"ab")
    assert not matcher.allows(b"b")
    assert not matcher.accept(b"ax")
    assert matcher.accept(b"")
    assert matcher.accept(b"ab")
    assert matcher.can_end
    assert not matcher.must_end
    assert matcher.accept(b"c")
    assert matcher.must_end
    assert not matcher.allows(b"c")
    assert matcher.allows(b"")


@pytest.mark.parametrize(
    ("grammar", "matching", "others"),
    [
        (
            JSON,
            ['{"a": [1, -2.5e10, {"é😀": "\\u00e9\\n"}], "b": null}', "[]", "0", '"x"', "[[[]]]"],
            ["{", '{"a" 1}', "[1,]", "01", '"\n"', "nul", '{"a": 1}}', '"\\x"'],
        ),
        (ARITHMETIC, ["x = (1+2)*y_1\n", "a+b-c = 3\n1 = 1\n"], ["x = (1+2\n", "x=1\n", "= 1\n", "x = 1"]),
        (LIST, ["- one\n", "- one\n- zwei: ä\n"], ["one\n", "- \n", "- one", "- a\u2028b\n"]),
        (
            CHESS,
            ["1. e4 e5\n2. Nf3 Nc6\n", "1. O-O-O exd5+\n12. e8=Q# Rad1\n"],
            ["1. e9 e5\n", "e4 e5\n", "1. e4 e5\n" * 4],
        ),
    ],
    ids=["json", "arithmetic", "list", "chess"],
)
def test_well_known_kinds_of_grammars(grammar, matching, others):
    for text in matching:
        assert complete(grammar, text), text
    for text in others:
        assert not complete(grammar, text), text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(json_values, st.booleans(), st.sampled_from([None, 0, 2]))
@settings(max_examples=100, deadline=None)
def test_json_that_python_writes_is_accepted(value, ascii_only, indent):
    try:
        text = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode()
    except UnicodeEncodeError:
        return  # a lone surrogate is no UTF-8
    assert complete(Grammar.parse(JSON), text)


@given(st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_random_walks_through_the_json_grammar_are_json(rng):
    matcher = Grammar.parse(JSON).matcher()
    text = b""
    alphabet = ['"', "\\", "{", "}", "[", "]", ",", ":", " ", "\n", "é", "😀", *"0123456789aeflnrstu.-+E"]
    while len(text) < 200 and not matcher.must_end:
        choices = [c for c in (c.encode() for c in alphabet) if matcher.allows(c)]
        assert choices
        text += (chosen := rng.choice(choices))
        assert matcher.accept(chosen)
        if matcher.can_end:
            json.loads(text)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("", 1, 1, "no rule 'root'"),
        ('start ::= "a"', 1, 1, "no rule 'root'"),
        ("root ::= other", 1, 10, "no rule 'other'"),
        ('root ::= "a"\n  b ::= c |\n d e', 2, 9, "no rule 'c'"),
        ('root ::= "abc', 1, 10, "never closed"),
        ('root ::= "a\\', 1, 12, "unknown escape"),
        ('root ::= ["', 1, 10, "never closed"),
        ("root ::= [a-", 1, 10, "never closed"),
        ('root ::= ("a" ("b")\n\nx ::= "c"', 3, 3, "expected ')'"),
        ('root ::= (("a")', 1, 10, "never closed"),
        ('root ::= "a")', 1, 13, "expected the end of the line"),
        ('root ::= "a" }', 1, 14, "expected the end of the line"),
        ('root ::= "a"\n | "b"', 2, 2, "expected the name of a rule"),
        ('root := "a"', 1, 6, "expected ::="),
        ("root", 1, 5, "expected ::="),
        ('root ::= "a"\nroot ::= "b"', 2, 1, "defined twice"),
        ("root ::= *", 1, 10, "nothing stands before '*'"),
        ('root ::= "a" | +', 1, 16, "nothing stands before '+'"),
        ("root ::= (?)", 1, 11, "nothing stands before '?'"),
        ("root ::= {2}", 1, 10, "nothing stands before '{'"),
        ('root ::= "a"{', 1, 13, "expected {m}"),
        ('root ::= "a"{}', 1, 13, "expected {m}"),
        ('root ::= "a"{,}', 1, 13, "expected {m}"),
        ('root ::= "a"{x}', 1, 13, "expected {m}"),
        ('root ::= "a"{1,2,3}', 1, 13, "expected {m}"),
        ('root ::= "a"{-1}', 1, 13, "expected {m}"),
        ('root ::= "a"{3,2}', 1, 13, "ends before it begins"),
        ('root ::= "a"{1000000}', 1, 13, "too many repetitions"),
        ('root ::= "a"{,99999999999999999999}', 1, 13, "too many repetitions"),
        ("root ::= [z-a]", 1, 11, "range ends before it begins"),
        ("root ::= []", 1, 10, "empty class"),
        ("root ::= [^]", 1, 10, "empty class"),
        (r'root ::= "\q"', 1, 11, "unknown escape"),
        (r'root ::= "\x4"', 1, 11, "2 hexadecimal digits"),
        (r'root ::= "\u12g4"', 1, 11, "4 hexadecimal digits"),
        (r"root ::= [\U0011]", 1, 11, "8 hexadecimal digits"),
        (r'root ::= "\U00110000"', 1, 11, "beyond Unicode"),
        (r'root ::= "\uD800"', 1, 11, "surrogate"),
        ('root ::= root "a"', 1, 1, "'root' is left-recursive"),
        ('root ::= "x" a\na ::= b\nb ::= c "x"\nc ::= a | "y"', None, None, "is left-recursive"),
        ('root ::= "x" a\na ::= b? [x]* a\nb ::= "b"', 2, 1, "'a' is left-recursive"),
        ('root ::= "x" a\na ::= ("" | "y"*){0,3} a\nb ::= "b"', None, None, "left-recursive"),
        ('root ::= "x"\na ::= (a "x"){2,3}', 2, 1, "'a' is left-recursive"),
        ("root ::= root*", 1, 1, "left-recursive"),
        ("root ::= é", 1, 10, "expected the end of the line"),
        ("$", 1, 1, "expected the name"),
        ('root ::= "a" \x00', 1, 14, "expected the end of the line"),
    ],
)
def test_errors(text, line, column, message):
    with pytest.raises(GrammarError, match=re.escape(message)) as caught:
        Grammar(text)
    if line is not None:
        assert (caught.value.line, caught.value.column) == (line, column)
        assert f"line {line}, column {column}" in str(caught.value)


def test_right_recursion_behind_something_that_cannot_be_empty_is_fine():
    assert complete('root ::= "x"+ root | "y"', "xxy")
    assert complete('root ::= a* "x"\na ::= "a" a?', "aaax")


@given(st.text(alphabet='rot ::="a[]^-(){}|*+?.,0123456789\\nxuU#\n\r\tb', max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_grammar_or_a_clear_error(text):
    for source in (text, "root ::= " + text):
        try:
            matcher = Grammar(source).matcher()
        except GrammarError:
            continue
        matcher.accept(b"ab")


# ---- against an independent matcher --------------------------------------------------------------
# A grammar is a dictionary of trees. The reference follows a tree from one position of a text to the set of positions
# where it can end, and notes whether it wanted more at the text's end.

ALPHABET = "abcé…😀"


def render(tree):
    kind, *rest = tree
    if kind == "literal":
        return '"' + rest[0] + '"'
    if kind == "class":
        ranges, negated = rest
        return "[" + "^" * negated + "".join(a if a == b else f"{a}-{b}" for a, b in ranges) + "]"
    if kind == "any":
        return "."
    if kind == "rule":
        return rest[0]
    if kind == "sequence":
        return "(" + " ".join(map(render, rest[0])) + ")"
    if kind == "either":
        return "(" + " | ".join(map(render, rest[0])) + ")"
    inner, low, high = rest
    bounds = f"{{{low},{'' if high is None else high}}}"
    return f"({render(inner)})" + {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((low, high), bounds)


class Reference:
    def __init__(self, rules, text):
        self.rules, self.text = rules, text
        self.wanted_more = False
        self.ends = lru_cache(maxsize=None)(self._ends)

    def _ends(self, tree, start):
        kind, *rest = tree
        if kind == "literal":
            ends = {start}
            for character in rest[0]:
                ends = self._after(ends, lambda c, wanted=character: c == wanted)
            return frozenset(ends)
        if kind == "class":
            ranges, negated = rest
            return frozenset(self._after({start}, lambda c: any(a <= c <= b for a, b in ranges) != negated))
        if kind == "any":
            return frozenset(self._after({start}, lambda c: True))
        if kind == "rule":
            return self.ends(self.rules[rest[0]], start)
        if kind == "either":
            return frozenset().union(*(self.ends(part, start) for part in rest[0]))
        if kind == "sequence":
            ends = {start}
            for part in rest[0]:
                ends = {end for at in ends for end in self.ends(part, at)}
            return frozenset(ends)
        inner, low, high = rest
        ends, result, seen, count = frozenset({start}), set(), set(), 0
        while count < low or ends not in seen:
            if count >= low:
                seen.add(ends)
                result |= ends
            if count == high:
                break
            ends = frozenset(end for at in ends for end in self.ends(inner, at))
            count += 1
        return frozenset(result)

    def _after(self, positions, wanted):
        self.wanted_more |= len(self.text) in positions
        return {at + 1 for at in positions if at < len(self.text) and wanted(self.text[at])}

    def answer(self):
        """(may the text end here, may anything come of it)"""
        can_end = len(self.text) in self.ends(("rule", "root"), 0)
        return can_end, can_end or self.wanted_more


def is_left_recursive(rules):
    nullable = set()

    def can_be_empty(tree):
        kind, *rest = tree
        if kind == "literal":
            return not rest[0]
        if kind == "rule":
            return rest[0] in nullable
        if kind == "sequence":
            return all(map(can_be_empty, rest[0]))
        if kind == "either":
            return any(map(can_be_empty, rest[0]))
        if kind == "repeat":
            return rest[1] == 0 or can_be_empty(rest[0])
        return False

    def begins_with(tree):
        kind, *rest = tree
        if kind == "rule":
            return {rest[0]}
        if kind == "either":
            return set().union(*map(begins_with, rest[0]))
        if kind == "repeat":
            return begins_with(rest[0]) if rest[2] != 0 else set()
        found = set()
        for part in rest[0] if kind == "sequence" else ():
            found |= begins_with(part)
            if not can_be_empty(part):
                break
        return found

    for _ in rules:
        nullable |= {name for name, tree in rules.items() if can_be_empty(tree)}
    reach = {name: begins_with(tree) for name, tree in rules.items()}
    for _ in rules:
        reach = {name: names.union(*(reach[n] for n in names)) for name, names in reach.items()}
    return any(name in names for name, names in reach.items())


characters = st.sampled_from(ALPHABET)
ranges = st.tuples(characters, characters).map(lambda pair: tuple(sorted(pair)))
trees = st.recursive(
    st.one_of(
        st.tuples(st.just("literal"), st.text(characters, max_size=3)),
        st.tuples(
            st.just("class"),
            st.lists(ranges, min_size=1, max_size=3).map(tuple),
            st.booleans(),
        ),
        st.tuples(st.just("any")),
        st.tuples(st.just("rule"), st.sampled_from(["root", "x", "y"])),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("sequence"), st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.tuples(st.just("either"), st.lists(inner, min_size=1, max_size=3).map(tuple)),
        st.tuples(
            st.just("repeat"),
            inner,
            st.integers(0, 3),
            st.one_of(st.none(), st.integers(0, 3)),
        ).map(lambda t: (*t[:3], None if t[3] is None else t[2] + t[3])),
    ),
    max_leaves=8,
)
grammars = st.fixed_dictionaries({"root": trees, "x": trees, "y": trees})


def gbnf(rules):
    return "\n".join(f"{name} ::= {render(tree)}" for name, tree in rules.items())


@given(grammars, st.lists(st.text(characters, max_size=7), min_size=1, max_size=8))
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_random_grammars_against_the_reference(rules, texts):
    if is_left_recursive(rules):
        with pytest.raises(GrammarError, match="left-recursive"):
            Grammar(gbnf(rules))
        return
    grammar = Grammar(gbnf(rules))
    for text in texts:
        matcher = grammar.matcher()
        for n in range(len(text) + 1):
            can_end, alive = Reference(rules, text[:n]).answer()
            if n > 0:
                assert matcher.allows(text[n - 1].encode()) == alive
                if not alive:
                    assert not matcher.accept(text[n - 1].encode())
                    break
                assert matcher.accept(text[n - 1].encode())
            assert matcher.can_end == can_end
        assert grammar.matcher().allows(text.encode()) == Reference(rules, text).answer()[1]


def ranges_of(tree):
    if tree[0] == "literal":
        return [(c, c) for c in tree[1]]
    if tree[0] == "class":
        return list(tree[1])
    inner = tree[1] if tree[0] in ("sequence", "either") else [tree[1]] if tree[0] == "repeat" else []
    return [r for part in inner for r in ranges_of(part)]


def characters_that_begin_with(part, bounds):
    """Of the characters that begin so: the first, the last, and those next to the bounds of the grammar's ranges."""
    size = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}[part[0] >> 4]
    edges = [part]
    while len(edges[0]) < size:  # where the second byte is limited, it is so at one of these
        edges = [edge + bytes([byte]) for edge in edges for byte in (0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF)]
    valid = sorted(edge.decode(errors="ignore") for edge in edges)
    valid = [c for c in valid if len(c) == 1]
    near = {chr(min(max(b + d, 0), 0x10FFFF)) for b in bounds for d in (-1, 0, 1)}
    return {valid[0], valid[-1], *(c for c in near if c.encode(errors="replace").startswith(part))}


@given(grammars, st.text(characters, max_size=3), st.sampled_from("éè…\u0800\ufffd😀\U0010ffff"), st.integers(1, 3))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_part_of_a_character_may_come_when_some_character_may(rules, text, last, size):
    if is_left_recursive(rules):
        return
    matcher = Grammar(gbnf(rules)).matcher()
    part = last.encode()[: min(size, len(last.encode()) - 1)]
    if not matcher.accept(text.encode()):
        return
    bounds = {ord(c) for tree in rules.values() for pair in ranges_of(tree) for c in pair}
    candidates = characters_that_begin_with(part, bounds)
    assert matcher.allows(part) == any(Reference(rules, text + c).answer()[1] for c in candidates)


# ---- UTF-8 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    ["80", "ff", "c080", "c1bf", "e080", "e09f", "eda0", "f08f", "f490", "f5", "c361", "e28261", "e2c3", "61bf"],
)
def test_what_is_not_utf8_is_refused(data):
    assert not Grammar.parse("root ::= .*").matcher().allows(bytes.fromhex(data))


def test_every_length_and_edge_of_utf8_is_accepted():
    matcher = Grammar.parse("root ::= .*").matcher()
    for c in (0, 0x7F, 0x80, 0x7FF, 0x800, 0xD7FF, 0xE000, 0xFFFF, 0x10000, 0x10FFFF):
        for byte in chr(c).encode():
            assert not matcher.can_end or byte < 0x80 or byte >= 0xC2
            assert matcher.accept(bytes([byte]))
        assert matcher.can_end
    assert matcher.accept(b"\xf0\x9f")
    assert not matcher.can_end
    assert not matcher.must_end
    assert not matcher.accept(b"\xf0")
    assert matcher.accept(b"\x98\x80!")


def test_a_partial_character_narrows_what_may_come():
    matcher = Grammar('root ::= [À-ÿ] "x" | "€"').matcher()
    assert matcher.allows(b"\xc3")
    assert matcher.allows(b"\xe2\x82")
    assert not matcher.allows(b"\xc4")
    assert not matcher.allows(b"\xe2\x83")
    assert not matcher.allows(b"\xf0")
    assert matcher.accept(b"\xc3")
    assert not matcher.allows(b"\x78")
    assert matcher.accept(b"\xbfx")
    assert matcher.must_end


# ---- masks ---------------------------------------------------------------------------------------


def tokens_for_masks():
    rng = random.Random(3)
    pieces = [*'abcé…😀 "{}[],:12x\n\\è', "true"]
    tokens = {bytes([b]) for b in range(256)}
    while len(tokens) < 3000:
        text = "".join(rng.choices(pieces, k=rng.randint(1, 8))).encode()
        start = rng.randint(0, min(2, len(text) - 1))
        tokens.add(text[start : len(text) - rng.randint(0, min(3, len(text) - start - 1))])
    ordered = sorted(tokens)
    rng.shuffle(ordered)
    return [b"", *ordered, b"", b"a", b"\xc3"]  # tokens without bytes, and two with the same bytes as others


MASK_TOKENS = tokens_for_masks()
MASK_TRIE = TokenTrie(*Vocabulary(MASK_TOKENS).token_table())


def allowed_by_mask(matcher, trie=MASK_TRIE):
    logits = np.arange(trie.n_vocab, dtype=np.float32)
    matcher.mask(trie, logits)
    kept = np.isfinite(logits)
    assert (logits[kept] == np.arange(trie.n_vocab)[kept]).all()
    return set(np.flatnonzero(kept).tolist())


def allowed_one_by_one(matcher, tokens=MASK_TOKENS):
    return {i for i, token in enumerate(tokens) if token and matcher.allows(token)}


MASKED = {
    "json": (JSON, '{"aé": [12, true, "x\\'),
    "anything": ("root ::= .*", "aé"),
    "nothing but letters": ("root ::= [a-c]*", "abc"),
    "a bounded string": (r'root ::= "\"" [^"\\]{1,6} "\""', '"ab😀c'),
    "all but ascii letters": ("root ::= [^a-z]+", "é1"),
    "groups of few": ('root ::= [^ac]{0,3} "a" | [éè]+', "bb"),
    "words": ("root ::= " + " | ".join(f'"{a}{b}{c}"' for a in "abcé" for b in "é…1" for c in "x2😀"), "a…"),
    "many meanings": ('root ::= ("a" | "ab" | "b" | "ba" | "é" "…"?)* "x"', "abab"),
    "complete": ('root ::= "a"', "a"),
}


@pytest.mark.parametrize("name", MASKED)
def test_mask_equals_single_answers(name):
    text, walk = MASKED[name]
    matcher = Grammar(text).matcher()
    for byte in walk.encode():
        expected = allowed_one_by_one(matcher)
        assert allowed_by_mask(matcher) == expected
        assert allowed_by_mask(matcher) == expected  # remembered
        assert matcher.accept(bytes([byte]))
    assert allowed_by_mask(matcher) == allowed_one_by_one(matcher)


@given(grammars, st.text(characters, max_size=4), st.integers(0, 2))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_masks_of_random_grammars(rules, text, cut):
    if is_left_recursive(rules):
        return
    matcher = Grammar(gbnf(rules)).matcher()
    data = text.encode()
    for byte in data[: max(len(data) - cut, 0)]:
        matcher.accept(bytes([byte]))
    assert allowed_by_mask(matcher) == allowed_one_by_one(matcher)


def random_tokens(pieces, n, longest, seed):
    rng = random.Random(seed)
    return sorted({"".join(rng.choices(pieces, k=rng.randint(1, longest))).encode() for _ in range(n)})


def test_masks_deep_in_brackets():
    """One mask serves many depths; tokens that close more brackets than it knows of are tried each time."""
    tokens = random_tokens(['"', "a", "1", ",", ":", " ", "[", "{", *"]]]}}}", '"a":', '":[', '"}'], 2500, 9, 1)
    trie = TokenTrie(*Vocabulary(tokens).token_table())
    text = '{"a":[[{"a":{"a":[1,{"a":[["1",[{"a":1}]]]}]}}]],"a":{"a":{}}}'
    for grammar in (JSON, JSON + 'more ::= "x" value | value "y"'):
        matcher = Grammar(grammar).matcher()
        for byte in text.encode():
            assert allowed_by_mask(matcher, trie) == allowed_one_by_one(matcher, tokens)
            assert matcher.accept(bytes([byte]))
        assert matcher.can_end


def test_masks_where_many_rules_call_one():
    """More callers than an outline keeps, and ways that differ below them."""
    rules = [f'r{i} ::= "(" leaf "{chr(97 + i)}" | "(" r{(i + 1) % 12} "{chr(97 + i)}"' for i in range(12)]
    grammar = "\n".join(['root ::= "<" (' + " | ".join(f"r{i}" for i in range(12)) + ') ">"', 'leaf ::= "x"{1,3} ","?', *rules])
    tokens = random_tokens(["(", "x", ",", ">", *"abcdefghijkl", "abcd", "lkji", "dcba"], 2500, 7, 2)
    trie = TokenTrie(*Vocabulary(tokens).token_table())
    matcher = Grammar(grammar).matcher()
    for byte in b"<(((((((((((((xx,":
        assert matcher.accept(bytes([byte]))
        assert allowed_by_mask(matcher, trie) == allowed_one_by_one(matcher, tokens)
    for _ in range(13):
        byte = next(bytes([c]) for c in b"lkjihgfedcba" if matcher.allows(bytes([c])))
        assert matcher.accept(byte)
        assert allowed_by_mask(matcher, trie) == allowed_one_by_one(matcher, tokens)


@pytest.mark.parametrize("bounds", ["{1,3}", "{2,12}", "{,33}", "{30,40}", "{1,270}", "{253,256}", "+"])
def test_masks_where_characters_are_counted(bounds):
    tokens = [("aé…😀b"[i % 5] * n).encode() for n in range(1, 70) for i in range(5)]
    tokens += [b"a" * n for n in (252, 253, 254, 255, 256, 257, 269, 270, 271, 300)]
    tokens += random_tokens([*"aé…😀b ", '"', "x"], 2000, 14, 3)
    tokens += [token + b"\xc3" for token in tokens[::7]] + [b"\xa9" + token for token in tokens[::9]]
    trie = TokenTrie(*Vocabulary(tokens).token_table())
    for body in ('[^x"]', '("\\"" | [^x"])'):
        matcher = Grammar(f'root ::= "<" {body}{bounds} ">"').matcher()
        for piece in ["<", "a", "\u2026", "é" * 9, "ab" * 9, "a" * 12, *"ab", "b" * 220, *"abcd", "a" * 13, *"abcd"]:
            if not matcher.allows(piece.encode()):
                break
            for part in (piece.encode()[:-1], piece.encode()[-1:]):
                assert matcher.accept(part)
                assert allowed_by_mask(matcher, trie) == allowed_one_by_one(matcher, tokens)


def test_masks_where_looking_ahead_would_take_much_memory():
    """Each of 40 characters narrows 800 ways in a way of its own: what may come is not looked at as far as it could be."""
    rng = random.Random(5)
    ways = ("".join(rng.sample("0123456789!#$%&*+,./:;<=>?@_|~", 15)) for _ in range(800))
    matcher = Grammar("root ::= [a-z]* (" + " | ".join(f"[a-zA-Z{way}]{{40}}" for way in ways) + ') "!end"').matcher()
    tokens = random_tokens([*"abXYZ01?!", "abc", "aZaZaZaZ"], 150, 12, 4)
    trie = TokenTrie(*Vocabulary(tokens).token_table())
    for piece in (b"", b"aZ?", b"0!" + 30 * b"b"):
        assert matcher.accept(piece)
        assert allowed_by_mask(matcher, trie) == allowed_one_by_one(matcher, tokens)


def test_many_masks_are_remembered_and_forgotten():
    matcher = Grammar('root ::= "("{,200} [a-c]* ")"*').matcher()
    tokens = [b"a", b"(", b"x", b"((", b"c)"]
    trie = TokenTrie(*Vocabulary(tokens).token_table())
    for depth in range(200):
        assert allowed_by_mask(matcher, trie) == ({0, 1, 3, 4} if depth < 199 else {0, 1, 4})
        assert matcher.accept(b"(")
    other = TokenTrie(*Vocabulary([b"(", b"b", b""]).token_table())
    for _ in range(3):
        assert allowed_by_mask(matcher, other) == {1}
        assert allowed_by_mask(matcher, trie) == {0, 4}


def test_a_trie_is_built_once_for_a_tokenizer():
    words = Vocabulary([b"a", b"b"])
    assert token_trie(words) is token_trie(words)
    assert token_trie(words) is not token_trie(Vocabulary([b"a", b"b"]))


def test_masks_check_their_sizes():
    with pytest.raises(CoreError, match="2 logits for a vocabulary of 3"):
        Grammar("root ::= .").matcher().mask(TokenTrie(b"abc", np.arange(4)), np.zeros(2, np.float32))
    for offsets in ([0, 4], [1, 0], [-1, 2], [0, 2, 1]):
        with pytest.raises(CoreError):
            TokenTrie(b"abc", np.array(offsets))
    empty = TokenTrie(b"", np.zeros(1))
    Grammar("root ::= .").matcher().mask(empty, np.zeros(0, np.float32))


@given(st.lists(st.binary(max_size=12), max_size=40))
@settings(max_examples=200, deadline=None)
def test_tries_of_any_tokens(tokens):
    trie = TokenTrie(*Vocabulary(tokens).token_table())
    for text in ("root ::= .*", 'root ::= [^a-z]* "x"?', "root ::= [\\x00-\\x40é]{0,3}"):
        matcher = Grammar.parse(text).matcher()
        assert allowed_by_mask(matcher, trie) == allowed_one_by_one(matcher, tokens)


# ---- odd sizes -----------------------------------------------------------------------------------


def test_deep_nesting_of_groups():
    depth = 50_000
    assert complete("root ::= " + "(" * depth + '"a"' + ")" * depth, "a")
    assert complete("root ::= " + "(" * depth + '"a"' + ")*" * depth, "aaa")
    assert complete("root ::= " + "(" * 2000 + '"a"' + "){1,2}" * 2000, "a" * 50)
    with pytest.raises(GrammarError, match="never closed"):
        Grammar("root ::= " + "(" * depth)


def test_long_chains_of_rules():
    n = 20_000
    chain = "\n".join(f"r{i} ::= r{i + 1}" for i in range(n))
    assert complete(f'root ::= r0\n{chain}\nr{n} ::= "a" | ""', "a")
    with pytest.raises(GrammarError, match="left-recursive"):
        Grammar(f"root ::= r0\n{chain}\nr{n} ::= r0")


def test_repetitions_multiply_without_cost():
    grammar = Grammar('root ::= (("a"{1000}){1000}){1000}')
    assert grammar.matcher().allows(b"a" * 10_000)
    assert complete('root ::= ("ab"{2}){3}', "ab" * 6)


def test_texts_that_are_too_long():
    with pytest.raises(GrammarError, match="too long"):
        Grammar("#" * 2_000_000)
    with pytest.raises(GrammarError, match="too"):
        Grammar('root ::= "a"{400000} "a"{400000} "a"{400000}')


def test_deeply_nested_texts():
    depth = 300_000
    assert complete('root ::= "(" root ")" | "x"', "(" * depth + "x" + ")" * depth)


def test_ambiguity_does_not_explode():
    """Each of these has a number of explanations that is exponential in the text's length."""
    start = time.monotonic()
    n = 2000
    assert complete('root ::= "x" root "y" | "x" root "z" | "w"', "x" * n + "w" + "yz" * (n // 2))
    assert complete('root ::= ("a" | "aa" | "aaa" | "a"*)*', "a" * n)
    assert complete('root ::= "a" root root? | "a"', "a" * 300)
    assert complete('root ::= a a a a a a\na ::= ("b"? "b"?)*', "b" * n)
    assert time.monotonic() - start < 60


def test_automata_with_too_many_states_to_keep():
    """The states of this one are the subsets of 18 places: they must be forgotten again and again."""
    matcher = Grammar('root ::= [ab]* "a" [ab]{17}').matcher()
    text = "".join(random.Random(5).choices("ab", k=150_000))
    for start in range(0, len(text), 15_000):
        assert matcher.accept(text[start : start + 15_000].encode())
        assert matcher.can_end == (text[start + 15_000 - 18] == "a")
    assert allowed_by_mask(matcher) == {i for i, token in enumerate(MASK_TOKENS) if token and not token.strip(b"ab")}


def test_grammars_with_many_characters():
    characters = [chr(c) for c in range(0x4E00, 0x4E00 + 3000)]
    random.Random(1).shuffle(characters)
    words = [a + b for a, b in zip(characters[::2], characters[1::2])]
    grammar = Grammar("root ::= " + " | ".join(f'"{word}"' for word in words))
    assert complete(grammar, characters[10] + characters[11])
    assert not complete(grammar, characters[10] + characters[10])


def test_matchers_of_one_grammar_in_many_threads():
    grammar = Grammar.parse(JSON)
    errors = []

    def follow(seed):
        try:
            text = json.dumps({"n": list(range(seed)), "t": "é" * seed}, ensure_ascii=False)
            for _ in range(20):
                assert complete(grammar, text)
            matcher = grammar.matcher()
            assert allowed_by_mask(matcher) == allowed_one_by_one(matcher)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=follow, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- the core checks what it is given ------------------------------------------------------------


def compile_nodes(nodes, starts=(0,), root=0, ranges=(97, 97), ends=(0, 1)):
    return create(
        lib.pl_grammar_new,
        lib.pl_grammar_free,
        ffi.new("pl_grammar_node[]", nodes),
        len(nodes),
        ffi.new("int32_t[]", list(starts)),
        len(starts),
        root,
        ffi.new("int32_t[]", list(ranges)),
        ffi.new("int32_t[]", list(ends)),
        len(ends) - 1,
        ffi.new("int32_t *"),
    )


CHARS, CALL, FORK, END = lib.PL_GRAMMAR_CHARS, lib.PL_GRAMMAR_CALL, lib.PL_GRAMMAR_FORK, lib.PL_GRAMMAR_END


@pytest.mark.parametrize(
    "arguments",
    [
        {"nodes": [(9, 0, 0)]},
        {"nodes": [(CHARS, 0, 5)]},
        {"nodes": [(CHARS, 0, -1)]},
        {"nodes": [(CHARS, 1, 1), (END, -1, -1)]},
        {"nodes": [(CHARS, -1, 1), (END, -1, -1)]},
        {"nodes": [(CALL, 1, 1), (END, -1, -1)]},
        {"nodes": [(FORK, 7, 1), (END, -1, -1)]},
        {"nodes": [(FORK, -2, 1), (END, -1, -1)]},
        {"nodes": [(END, -1, -1)], "starts": (1,)},
        {"nodes": [(END, -1, -1)], "starts": (-1,)},
        {"nodes": [(END, -1, -1)], "starts": (0, 0)},
        {"nodes": [(CHARS, 0, 1), (END, -1, -1)], "starts": (0, 1)},
        {"nodes": [(FORK, 2, 1), (END, -1, -1), (FORK, 1, 1)], "starts": (2, 0)},
        {"nodes": [(END, -1, -1)], "root": 1},
        {"nodes": [(END, -1, -1)], "root": -1},
        {"nodes": [(END, -1, -1)], "starts": ()},
        {"nodes": [(END, -1, -1)], "ranges": (98, 97)},
        {"nodes": [(END, -1, -1)], "ranges": (97, 0x110000)},
        {"nodes": [(END, -1, -1)], "ranges": (-1, 97)},
        {"nodes": [(END, -1, -1)], "ranges": (97, 99, 99, 100), "ends": (0, 2)},
        {"nodes": [(END, -1, -1)], "ends": (1, 1)},
        {"nodes": [(END, -1, -1)], "ends": (0, 1, 0)},
        {"nodes": [(CALL, 0, 1), (END, -1, -1)]},
        {"nodes": [(FORK, 0, 0)], "ends": (0, -1)},
    ],
    ids=str,
)
def test_wrong_networks_are_refused(arguments):
    with pytest.raises(CoreError):
        compile_nodes(**arguments)


def test_a_network_that_goes_in_circles_without_characters():
    grammar = compile_nodes([(FORK, 0, 0)])
    matcher = create(lib.pl_matcher_new, lib.pl_matcher_free, grammar)
    assert not lib.pl_matcher_can_end(matcher)
