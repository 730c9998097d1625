"""JSON Schema to grammars: what the grammars produce validates, what they should refuse they refuse, and errors; the
same in JavaScript."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from pyllama import Llama
from pyllama.grammar import Grammar
from pyllama.json_schema import JSON_OBJECT, JSON_VALUE, SchemaError, to_gbnf
from pyllama.patterns import FORMATS
from tests.gbnf_reader import Gbnf
from tests.random_schemas import random_schema
from tests.tiny_models import make_llama

FORMAT_CHECKER = Draft202012Validator.FORMAT_CHECKER


def matches(grammar, text):
    matcher = Grammar.parse(grammar).matcher()
    return matcher.accept(text.encode()) and matcher.can_end


# ---- soundness -----------------------------------------------------------------------------------


def test_random_schemas_have_grammars_of_valid_instances():
    n_schemas = n_texts = 0
    for seed in range(500):
        rng = random.Random(seed)
        schema = random_schema(rng)
        try:
            grammar = to_gbnf(schema)
        except SchemaError:
            continue
        n_schemas += 1
        validator = Draft202012Validator(schema, format_checker=FORMAT_CHECKER)
        reader = Gbnf(grammar)
        for _ in range(8):
            text = reader.draw(rng)
            n_texts += 1
            assert matches(grammar, text), (seed, text)
            assert not list(validator.iter_errors(json.loads(text))), (seed, schema, text)
    assert n_schemas > 300
    assert n_texts > 2400


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("schema") / "tiny.gguf"
    make_llama(path, n_layer=1)
    with Llama(path, n_ctx=8 * 512, n_threads=1, n_parallel=8) as llm:
        yield llm


def generated(llm, schema, seed, **options):
    """What a model says to a schema; None if it did not come to an end."""
    answer = llm.create_chat_completion(
        [{"role": "user", "content": "Say something about the time, as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"schema": schema}}, seed=seed, **options,
    )  # fmt: skip
    (choice,) = answer["choices"]
    return choice["message"]["content"] if choice["finish_reason"] == "stop" else None


def test_a_tiny_model_says_what_random_schemas_validate(llm):
    """Through the engine: a model that says anything at all, with some preference for what ends a text."""
    ends = dict.fromkeys(llm.tokenize('"]}', add_bos=False), 3.0)

    def answers(seed):
        schema = random_schema(random.Random(seed))
        try:
            to_gbnf(schema)
        except SchemaError:
            return []
        validator = Draft202012Validator(schema, format_checker=FORMAT_CHECKER)
        texts = [
            generated(llm, schema, n, max_tokens=300, temperature=t, top_k=0, top_p=1.0, min_p=0.0, logit_bias=ends)
            for n, t in ((1, 0.7), (2, 1.5))
        ]
        for text in texts:
            assert text is None or not list(validator.iter_errors(json.loads(text))), (seed, schema, text)
        return texts

    with ThreadPoolExecutor(8) as pool:
        texts = [text for texts in pool.map(answers, range(2000, 2150)) for text in texts]
    assert len(texts) > 180
    assert sum(text is not None for text in texts) > 0.8 * len(texts)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]+( [A-Z][a-z]+)?$", "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "born": {"type": "string", "format": "date"},
        "mail": {"type": "string", "format": "email", "maxLength": 40},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 1, "maxItems": 3},
        "height": {"type": "number", "exclusiveMinimum": 0.3, "maximum": 2.5},
        "role": {"enum": ["admin", "user", None]},
    },
    "required": ["name", "age", "born", "tags", "role"],
    "additionalProperties": False,
}
SHAPE = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": kind}, **sizes}, "required": ["kind", *sizes]}
        for kind, sizes in (("circle", {"radius": {"type": "number", "minimum": 0, "maximum": 99}}),
                            ("box", {"w": {"type": "integer"}, "h": {"type": "integer"}}))
    ]
}  # fmt: skip
TREE = {
    "$defs": {"tree": {"type": "object", "properties": {
        "v": {"type": "integer", "minimum": 1, "maximum": 9},
        "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "required": ["v", "children"], "additionalProperties": False}},
    "$ref": "#/$defs/tree",
}  # fmt: skip


def test_a_real_model_says_what_schemas_validate(smollm2_path):
    with Llama(smollm2_path, n_ctx=2048, n_parallel=2) as llm, ThreadPoolExecutor(2) as pool:

        def answer(case):
            schema, seed = case
            text = generated(llm, schema, seed, max_tokens=120, temperature=0.8)
            if text is not None:
                Draft202012Validator(schema, format_checker=FORMAT_CHECKER).validate(json.loads(text))
            return text

        texts = list(pool.map(answer, [(schema, seed) for schema in (PERSON, SHAPE, TREE) for seed in range(2)]))
    assert sum(text is not None for text in texts) >= 4


# ---- single schemas ------------------------------------------------------------------------------
# (schema, what matches, what does not). Of the latter, what is valid JSON all the same is not meant to validate, unless it
# stands behind a None: grammars may permit less than schemas.

CASES = [
    ({"type": "integer", "minimum": -5, "maximum": 120}, ["-5", "-1", "0", "9", "10", "99", "120"],
     ["-6", "121", "200", "1000", "-10", "1.5", None, "-0", "1e1", "5.0"]),
    ({"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12.5}, ["10", "11", "12"], ["9", "13", "1"]),
    ({"type": "integer", "maximum": -100}, ["-100", "-999", "-1000"], ["-99", "0", "100"]),
    ({"type": "integer", "maximum": 2**63 - 1, "minimum": -(2**63)},
     ["9223372036854775807", "-9223372036854775808", "0"], ["9223372036854775808", "-9223372036854775809"]),
    ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "1", "0.5", "0.125", "1.0"][:4], ["-1", "1.1", "2", "-0.1"]),
    ({"type": "number", "exclusiveMinimum": 0.25, "exclusiveMaximum": 10}, ["0.26", "0.251", "9.99", "1"],
     ["0.25", "0.2", "0.2499", "10", "10.0", "11"]),
    ({"type": "number", "minimum": -1.5, "maximum": -0.5}, ["-1.5", "-1", "-0.5", "-1.49"], ["-1.51", "-0.4", "0", "1"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"abc"', '"\\u00e9\\n"', '"😀é"', '"\\ud83d\\ude00x"'],
     ['"a"', '"abcd"', '"\\ud83d\\ude00"', '"😀"', '""', "null"]),
    ({"type": "string", "pattern": "^[a-z]{2}\\d*$"}, ['"ab"', '"ab12"'], ['"a"', '"abc"', '"ab12x"', '" ab"']),
    ({"type": "string", "pattern": "b"}, ['"b"', '"abc"', '"\\u0041b"'], ['"a"', '""', '"a\\n"']),
    ({"type": "string", "pattern": "^[^a]$"}, ['"b"', '"\\n"', '"\\""', '"\\u0001"', '"é"'], ['"a"', '"bb"', '""']),
    ({"type": "string", "pattern": "^\\w+$", "maxLength": 3}, ['"a"', '"a_1"'], ['"abcd"', '""', '"a-b"']),
    ({"type": "string", "pattern": "^a", "allOf": [{"pattern": "b$"}, {"minLength": 3}]}, ['"axb"', '"aabb"'],
     ['"ab"', '"a"', '"xab"', '"axbx"']),
    ({"type": "string", "format": "date"}, ['"2024-02-29"', '"1999-12-31"', '"2000-02-29"'],
     ['"2023-02-29"', '"1900-02-29"', '"2024-13-01"', '"2024-04-31"', '"0000-01-01"', '"2024-1-1"', '"2024-01-00"']),
    ({"type": "string", "format": "ipv4"}, ['"0.0.0.0"', '"255.255.255.255"', '"10.1.20.199"'],
     ['"256.0.0.0"', '"1.2.3"', '"01.2.3.4"', '"1.2.3.4.5"']),
    ({"type": "string", "format": "ipv6"}, ['"::"', '"::1"', '"1::"', '"1:2:3:4:5:6:7:8"', '"fe80::1:2"', '"1::8"'],
     ['"1:2"', '":::"', '"1:2:3:4:5:6:7:8:9"', '"12345::"', '"1::2::3"']),
    ({"type": "string", "format": "uuid"}, ['"123e4567-e89b-12d3-a456-426614174000"'],
     ['"123e4567e89b12d3a456426614174000"', '"123e4567-e89b-12d3-a456-42661417400g"']),
    ({"type": "string", "format": "time"}, ['"23:59:59Z"', '"00:00:00.5+01:30"'], ['"24:00:00Z"', '"12:00:00"']),
    ({"enum": ["a", 1, None, [1, {"b": 2}], 1.5, "é\n\u2028"]},
     ['"a"', "1", "null", '[1,{"b":2}]', "1.5", '"é\\n\u2028"'], ['"b"', "2", "true", "[]", None, "1.0"]),
    ({"const": {"a": [True]}}, ['{"a":[true]}'], ["{}", '{"a":[false]}']),
    ({"enum": [1, 2, 3, "x", "yy"], "type": "string", "maxLength": 1}, ['"x"'], ["1", '"yy"']),
    ({"type": ["string", "null"]}, ['"a"', "null"], ["1", "{}"]),
    ({"type": "boolean"}, ["true", "false"], ["null", "0", '"true"']),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3}, ["[1]", "[1,2]", "[1, 2, 3]"],
     ["[]", "[1,2,3,4]", '["a"]', "[1,]", None, "[ 1]", "[1 ,2]", "[1,  2]"]),
    ({"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": {"type": "boolean"}},
     ["[]", "[1]", '[1,"a"]', '[1,"a",true,false]'], ['["a"]', "[1,2]", '[1,"a",1]']),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 1, "maxItems": 1}, ["[1]"], ["[]", "[1,1]"]),
    ({"type": "array", "items": False}, ["[]"], ["[1]"]),
    ({"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 1},
     ['["a"]', '["a","c"]', '["a","b","c"]', '["b"]'], ["[]", '["a","a"]', None, '["b","a"]']),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "null"}}, "required": ["b"],
      "additionalProperties": False},
     ['{"b":null}', '{"a":1,"b":null}', '{"a": 1, "b": null}'],
     ["{}", '{"a":1}', '{"b":null,"c":1}', '{"b":1}', '{"a":"x","b":null}', None, '{"b":null,"a":1}', '{ "b":null}']),
    ({"type": "object", "properties": {n: {"type": "null"} for n in "abc"}},
     ["{}", '{"a":null}', '{"b":null}', '{"a":null,"c":null}', '{"a":null,"b":null,"c":null}'],
     ['{"a":1}', None, '{"x":null}', '{"b":null,"a":null}']),
    ({"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
     ["{}", '{"a":1}', '{"a":1,"b":"x"}', '{"b":"x"}', '{"":"x"}', '{"ab":"x"}'],
     ['{"a":"x"}', '{"b":1}', '{"\\u0061":"x"}']),
    ({"type": "object", "patternProperties": {"^n_": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
     ['{"n_x":1}', '{"x":null,"n_":2}', "{}"], ['{"n_x":null}', '{"x":1}', '{"n_":"1"}']),
    # Whether these names match is a question of the language: neither schema may be left out.
    ({"type": "object", "patternProperties": {"^\\d$": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
     ['{"1":2,"x":null,"11":null}'], ['{"1":null}', '{"x":1}', None, '{"٣":null}', '{"٣":1}', '{"1\\n":null}']),
    ({"type": "object", "properties": {"é": True}, "patternProperties": {"^\\w$": {"type": ["null", "string"]}},
      "additionalProperties": {"type": ["null", "integer"]}},
     ['{"é":null}', '{"é":"x"}', '{"a":"x","aa":1}'], [None, '{"é":1}', '{"è":null}']),
    ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": {"type": "integer"}},
     ['{"a":1}', "{}"], ['{"A":1}', '{"a":"x"}', '{"":1}']),
    ({"type": "object", "properties": {n: {"type": "null"} for n in "abc"}, "minProperties": 1, "maxProperties": 2,
      "additionalProperties": False},
     ['{"a":null}', '{"c":null}', '{"a":null,"b":null}', '{"b":null,"c":null}'],
     ["{}", '{"a":null,"b":null,"c":null}', '{"d":null}']),
    ({"type": "object", "required": ["a"], "minProperties": 2}, ['{"a":1,"b":2}', '{"a":1,"b":2,"c":[]}'],
     ['{"a":1}', '{"b":1}', "{}"]),
    ({"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}, "dependentRequired": {"a": ["b"]}},
     ["{}", '{"b":null}', '{"a":null,"b":null}'], ['{"a":null}']),
    ({"anyOf": [{"type": "integer"}, {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"]}]},
     ["1", '{"x":null}'], ["{}", "1.5", "null"]),
    ({"oneOf": [{"type": "object", "properties": {"k": {"const": k}, k: {"type": "integer"}}, "required": ["k", k]}
                for k in ("a", "b")]},
     ['{"k":"a","a":1}', '{"k":"b","b":1}'], ['{"k":"a","b":1}', '{"k":"c"}', "{}"]),
    ({"allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"properties": {"a": {"minimum": 3}, "b": {"type": "null"}}}], "type": "object"},
     ['{"a":3}', '{"a":10,"b":null}'], ['{"a":2}', '{"b":null}', '{"a":"x"}']),
    ({"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {
        "v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["v", "next"]}}},
     ['{"v":1,"next":null}', '{"v":1,"next":{"v":2,"next":null}}'], ['{"v":1}', '{"v":1,"next":{}}']),
    ({"type": "object", "properties": {"c": {"type": "array", "items": {"$ref": "#"}}}, "additionalProperties": False},
     ["{}", '{"c":[]}', '{"c":[{},{"c":[{}]}]}'], ['{"c":[1]}', '{"c":{}}']),
    ({"definitions": {"a/b%c": {"type": "null"}}, "$ref": "#/definitions/a~1b%25c"}, ["null"], ["1"]),
    ({"$id": "http://example.com/x", "properties": {"a": {"$id": "y", "$defs": {"t": {"type": "null"}},
      "properties": {"b": {"$ref": "#/$defs/t"}}, "required": ["b"]}}, "required": ["a"]},
     ['{"a":{"b":null}}'], ['{"a":{"b":1}}', '{"a":{}}']),
    ({"properties": {"a": {"type": "null"}}, "unevaluatedProperties": False,
      "allOf": [{"properties": {"b": {"type": "null"}}}], "type": "object"},
     ["{}", '{"a":null,"b":null}'], ['{"c":1}', '{"a":1}']),
    ({"type": "object", "properties": {"a": False, "b": True}}, ["{}", '{"b":[1,{"x":"y"}]}'], ['{"a":1}']),
    ({"type": "object", "properties": {}}, ["{}"], [None, '{"a":1}']),
    ({"type": "object"}, ["{}", '{"a":{"b":[]}}'], ["[]", "1"]),
    ({"type": "array"}, ["[]", '[1,"a",{}]'], ["{}"]),
    ({"minimum": 5}, ["5", "6.5"], ["4", None, '"a"']),
    ({"type": "integer", "multipleOf": 1, "minimum": 7, "maximum": 7}, ["7"], ["8"]),
    ({"description": "x", "title": "y", "default": 1, "x-unknown": {"not": {}}, "format": "int32"}, ["1", '"a"'], ["x"]),
    (True, ["1", "{}"], ["x", ""]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "matching", "others"), CASES, ids=lambda v: json.dumps(v)[:60])
def test_what_matches(schema, matching, others):
    grammar = to_gbnf(schema)
    validator = Draft202012Validator(schema, format_checker=FORMAT_CHECKER)
    for text in matching:
        assert matches(grammar, text), text
        assert validator.is_valid(json.loads(text)), text
    where = others.index(None) if None in others else len(others)
    for text in others[:where]:
        assert not matches(grammar, text), text
        assert text in ("x", "", "[1,]") or "format" in schema or not validator.is_valid(json.loads(text)), text
    for text in others[where + 1 :]:
        assert not matches(grammar, text), text


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("limits", [{}, {"minLength": 1, "maxLength": 2083}, {"maxLength": 60}, {"pattern": "[1-9a]"}], ids=str)
def test_formats(name, limits):
    """What grammars make of formats, alone and combined, the format's own checker takes for one."""
    assert name in FORMAT_CHECKER.checkers
    schema = {"type": "string", "format": name, **limits}
    if "pointer" in name and "minLength" in limits:
        schema["maxLength"] = 99  # they have no bound of their own: each length takes states
    grammar = to_gbnf(schema)
    validator = Draft202012Validator(schema, format_checker=FORMAT_CHECKER)
    reader, rng = Gbnf(grammar), random.Random(1)
    texts = {reader.draw(rng, budget) for budget in (10, 100) for _ in range(20)}
    assert len(texts) > 5
    for text in texts:
        validator.validate(json.loads(text))


def test_older_drafts():
    assert matches(to_gbnf({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}), "4")
    assert not matches(to_gbnf({"minimum": 3, "exclusiveMinimum": True, "type": "integer"}), "3")
    pair = to_gbnf({"type": "array", "items": [{"type": "integer"}, {"type": "null"}], "additionalItems": False})
    assert matches(pair, "[1,null]")
    assert not matches(pair, "[1,null,1]")
    nullable = to_gbnf({"type": "string", "nullable": True})
    assert matches(nullable, "null")
    assert matches(nullable, '"a"')


def test_json_mode():
    for text in ('{"a":[1,-2.5e10,{"é":"\\u00e9\\n"}],"b": null}', "{}"):
        assert matches(JSON_OBJECT, text)
        assert matches(JSON_VALUE, text)
    for text in ("[]", "0", '"x"'):
        assert not matches(JSON_OBJECT, text)
        assert matches(JSON_VALUE, text)
    for text in ("{", '{"a" 1}', "[1,]", "01", '"\n"', "nul", '{"a": 1}}', '"\\x"', '"\\ud800"', "[1,  2]"):
        assert not matches(JSON_VALUE, text)


# ---- errors --------------------------------------------------------------------------------------

REFUSED = [
    ({"properties": {"a": {"multipleOf": 3}}}, "#/properties/a/multipleOf: 'multipleOf' cannot be expressed"),
    ({"not": {}}, "#/not: 'not' cannot be expressed"),
    ({"if": {}, "then": {}}, "#/if: 'if' cannot"),
    ({"contains": {"type": "integer"}}, "#/contains: 'contains' cannot"),
    ({"$dynamicRef": "#x"}, "#/$dynamicRef: "),
    ({"type": "array", "uniqueItems": True}, "#/uniqueItems: 'uniqueItems' can be expressed for enumerated values only"),
    ({"unevaluatedProperties": {"type": "null"}}, "#/unevaluatedProperties: "),
    ({"format": "regex"}, '#/format: the format "regex" cannot'),
    ({"pattern": r"(a)\1"}, r"#/pattern: pattern "),
    ({"pattern": "(?=a)"}, '#/pattern: pattern "(?=a)": looking ahead, (?=…), cannot be expressed (at character 2)'),
    ({"pattern": "(?<!a)"}, '#/pattern: pattern "(?<!a)": looking behind'),
    ({"pattern": "\\bx"}, '#/pattern: pattern "\\\\bx": word boundaries'),
    ({"pattern": "\\p{L}"}, '#/pattern: pattern "\\\\p{L}": Unicode properties'),
    ({"pattern": "(a"}, "#/pattern: pattern \"(a\": a '(' is never closed"),
    ({"pattern": "a)"}, "#/pattern: pattern \"a)\": this ')' closes nothing"),
    ({"pattern": "[a"}, "#/pattern: "),
    ({"pattern": "*"}, "#/pattern: "),
    ({"pattern": "a**"}, "#/pattern: "),
    ({"pattern": "a{2,1}"}, "#/pattern: "),
    ({"pattern": "a{x}"}, "#/pattern: "),
    ({"pattern": "[]"}, "#/pattern: "),
    ({"pattern": "[z-a]"}, "#/pattern: "),
    ({"pattern": "\\"}, "#/pattern: "),
    ({"pattern": "\\q"}, "#/pattern: "),
    ({"pattern": "\\u12"}, "#/pattern: "),
    ({"pattern": "\\ud800"}, "#/pattern: "),
    ({"pattern": "^*"}, "#/pattern: "),
    ({"pattern": "(?i)a"}, "#/pattern: "),
    ({"pattern": "a{99999}"}, "#/pattern: "),
    ({"pattern": "(" * 60 + ")" * 60}, "#/pattern: "),
    ({"pattern": "(a{500}){500}", "maxLength": 9}, "#: "),
    ({"pattern": "a.{20}$", "maxLength": 500}, '#: pattern '),
    ({"patternProperties": {"(": {}}}, "#/patternProperties/(: pattern"),
    ({"patternProperties": {str(i): {} for i in range(7)}}, "#: at most 6 'patternProperties'"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf: 'oneOf' can be expressed where no two alternatives"),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, "#/oneOf: "),
    ({"oneOf": [{"minimum": 3}, {"maximum": 2}]}, "#/oneOf: "),
    ({"oneOf": [{"type": "string", "pattern": "^\\W$"}, {"const": "é"}]}, "#/oneOf: "),
    ({"oneOf": [{"type": "string", "format": "date"}, {"const": "x"}]}, "#/oneOf: "),
    ({"$ref": "#/$defs/x"}, '#/$ref: there is nothing at "#/$defs/x"'),
    ({"$ref": "http://example.com/"}, "#/$ref: only references into the schema itself"),
    ({"$ref": 1}, "#/$ref: must be a string, not 1"),
    ({"$ref": "#"}, "#: references lead to references without end"),
    ({"allOf": [{"$ref": "#"}]}, "#: the schema refers to itself with nothing in between"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "#: nothing satisfies the schema"),
    (False, "#: nothing satisfies the schema"),
    ({"enum": []}, "#: nothing satisfies"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "#: nothing satisfies"),
    ({"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 4}, "#: nothing satisfies"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#: nothing satisfies"),
    ({"type": "string", "pattern": "^a$", "minLength": 2}, "#: nothing satisfies"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "#: nothing satisfies"),
    ({"type": "array", "minItems": 1, "items": False}, "#: nothing satisfies"),
    ({"required": ["a"], "additionalProperties": False}, "#: nothing satisfies"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, "#: nothing satisfies"),
    ({"type": "object", "minProperties": 3}, "#: so many members, at least 3,"),
    ({"type": "string", "minLength": 100_000}, "#: lengths of more than 50000 cannot be expressed"),
    ({"type": "strong"}, '#/type: must be one or several of null, boolean, integer, number, string, array, object, not "strong"'),
    ({"type": 1}, "#/type: "),
    ({"items": 3}, "#/items: a schema must be an object or a boolean, not 3"),
    ({"properties": []}, "#/properties: must be an object, not []"),
    ({"properties": {"a~/b": {"type": 0}}}, "#/properties/a~0~1b/type: "),
    ({"required": "a"}, '#/required: must be a list of strings, not "a"'),
    ({"required": [1]}, "#/required: must be a list of strings, not [1]"),
    ({"enum": 1}, "#/enum: must be a list, not 1"),
    ({"anyOf": []}, "#/anyOf: must be a list of schemas, not []"),
    ({"allOf": {}}, "#/allOf: must be a list of schemas, not {}"),
    ({"minLength": -1}, "#/minLength: must be an integer, not negative, but is -1"),
    ({"maxLength": 1.5}, "#/maxLength: must be an integer, not negative, but is 1.5"),
    ({"maxItems": None}, "#/maxItems: must be an integer"),
    ({"minimum": "1"}, '#/minimum: must be a number, not "1"'),
    ({"maximum": True}, "#/maximum: must be a number, not true"),
    ({"minimum": 1e308}, "#/minimum: leaves only numbers that are too large"),
    ({"type": "integer", "exclusiveMaximum": -(10**41)}, "#/exclusiveMaximum: leaves only numbers that are too large"),
    ({"uniqueItems": 1}, "#/uniqueItems: must be a boolean, not 1"),
    ({"pattern": 1}, "#/pattern: must be a string, not 1"),
    ({"format": ["x"]}, '#/format: must be a string, not ["x"]'),
    (3, "#: a schema must be an object or a boolean, not 3"),
    ([], "#: a schema must be"),
    ({"anyOf": [{"anyOf": [{"const": i} for i in range(40)]}], "allOf": [{"anyOf": [{"minLength": i} for i in range(40)]}]},
     "#: there are too many alternatives"),
    ({"const": "x" * 50_001}, "#/const: a string is too long"),
    ({"enum": [0] * 50_001}, "#: the schema is too large"),
    ({"anyOf": [{"type": "string", "maxLength": 20_000 + i} for i in range(20)]}, "#: the grammar becomes too large"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=lambda v: json.dumps(v)[:60])
def test_what_cannot_be_expressed_is_named(schema, message):
    with pytest.raises(SchemaError) as caught:
        to_gbnf(schema)
    assert str(caught.value).startswith(message)


def test_deep_schemas():
    deep = {}
    for _ in range(20_000):
        deep = {"items": deep}
    with pytest.raises(SchemaError, match="nested too deeply"):
        to_gbnf(deep)


def test_what_is_no_json():
    for schema, message in [
        ({"minimum": float("nan")}, "#/minimum: a number is not finite"),
        ({"const": {1, 2}}, "#/const: this is no JSON: set"),
        ({1: 2}, "#: this is no JSON: dict"),
    ]:
        with pytest.raises(SchemaError, match=message):
            to_gbnf(schema)


# ---- JavaScript ----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_javascript_writes_the_same_grammars():
    schemas = [random_schema(random.Random(seed)) for seed in range(1000, 1600)]
    schemas += [schema for schema, *_ in CASES + REFUSED]
    schemas = [json.loads(json.dumps(schema)) for schema in schemas]
    done = subprocess.run(
        ["node", Path(__file__).with_name("json_schema_grammars.mjs")],
        input="\n".join(map(json.dumps, schemas)), capture_output=True, encoding="utf-8", timeout=120, check=True,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.split("\n") if line]
    assert len(answers) == len(schemas)
    for schema, answer in zip(schemas, answers):
        try:
            expected = {"grammar": to_gbnf(schema)}
        except SchemaError as error:
            expected = {"error": str(error)}
        assert answer == expected, schema
