"""JSON Schema to grammars: what the grammars produce validates, what they should refuse they refuse, and errors."""

from __future__ import annotations

import json
import random

import pytest
from jsonschema import Draft202012Validator

from pyllama.grammar import Grammar
from pyllama.json_schema import JSON_OBJECT, JSON_VALUE, SchemaError, to_gbnf
from tests.gbnf_reader import Gbnf
from tests.random_schemas import random_schema

MORE_FORMATS = Draft202012Validator.FORMAT_CHECKER


def matches(grammar, text):
    matcher = Grammar.parse(grammar).matcher()
    return matcher.accept(text.encode()) and matcher.can_end


def test_random_schemas_have_grammars_of_valid_instances():
    n_schemas = n_texts = 0
    for seed in range(400):
        rng = random.Random(seed)
        schema = random_schema(rng)
        try:
            grammar = to_gbnf(schema)
        except SchemaError:
            continue
        n_schemas += 1
        validator = Draft202012Validator(schema, format_checker=MORE_FORMATS)
        reader = Gbnf(grammar)
        for _ in range(8):
            text = reader.draw(rng)
            n_texts += 1
            assert matches(grammar, text), (seed, text)
            assert not list(validator.iter_errors(json.loads(text))), (seed, schema, text)
    assert n_schemas > 250
    assert n_texts > 2000


def test_json_mode():
    for text in ('{"a":[1,-2.5e10,{"é":"\\u00e9\\n"}],"b": null}', "{}"):
        assert matches(JSON_OBJECT, text)
        assert matches(JSON_VALUE, text)
    for text in ("[]", "0", '"x"'):
        assert not matches(JSON_OBJECT, text)
        assert matches(JSON_VALUE, text)
    for text in ("{", '{"a" 1}', "[1,]", "01", '"\n"', "nul", '{"a": 1}}', '"\\x"', '"\\ud800"', "[1,  2]"):
        assert not matches(JSON_VALUE, text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"multipleOf": 3}}}, "#/properties/a/multipleOf: 'multipleOf' cannot be expressed"),
        ({"not": {}}, "#/not: 'not' cannot be expressed"),
        ({"pattern": r"(a)\1"}, r"#/pattern: pattern "),
    ],
)
def test_what_cannot_be_expressed_is_named(schema, message):
    with pytest.raises(SchemaError) as caught:
        to_gbnf(schema)
    assert str(caught.value).startswith(message)
