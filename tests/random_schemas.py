"""JSON Schemas at random, of all that can be expressed as a grammar and some that cannot."""

from __future__ import annotations

import random

NAMES = ["a", "b", "ab", "name", "1", "0", "é", "a b", '"q', "back\\slash"]
VALUES = [1, "a", None, True, False, 1.5, "é\n", [1, "x"], {"a": 1}, "", -3, 1e-7, 2.5e30, [], {}, "\u2028"]
PATTERNS = [
    "^[a-z]+$", "a", "^a|b$", "^(ab?c)*$", "[0-9]{2,4}$", r"^\d+(\.\d{2})?$", r"^[^\s\d]*$", r"\S\W\w\D", "^.{3}$",
    '^[\\[\\]\\\\"-]+$', "(^x|y)z$", "^$", "^\\u00e9", "^(?:a|bc){1,3}?$", "^[^a-c]{2}", r"[\n\t]", "^[A-Z]{2}-[0-9]{3}$",
]  # fmt: skip
FORMATS = ["date", "date-time", "time", "duration", "uuid", "ipv4", "ipv6", "email", "hostname", "uri", "uri-reference",
           "json-pointer", "int64", "password"]  # fmt: skip


def random_schema(rng: random.Random) -> object:
    """A schema; every now and then with definitions, which may be recursive."""
    defs = rng.choice([(), ("x", "y~/z")])
    schema = _schema(rng, 0, defs)
    if defs and isinstance(schema, dict):
        schema["$defs"] = {name: _schema(rng, 1, defs) for name in defs}
    return schema


def _schema(rng, depth, defs):
    kinds = [_simple, _values, _number, _number, _string, _string, _reference]
    if depth < 4:
        kinds += [_array, _array, _object, _object, _object, _combined]
    schema = rng.choice(kinds)(rng, depth, defs)
    if isinstance(schema, dict) and rng.random() < 0.1:
        schema[rng.choice(["title", "description", "x-note"])] = "…"
    return schema


def _simple(rng, depth, defs):
    return rng.choice([True, {}, {"type": "null"}, {"type": "boolean"}, {"type": ["string", "null", "integer"]}])


def _values(rng, depth, defs):
    if rng.random() < 0.3:
        return {"const": rng.choice(VALUES)}
    return {"enum": rng.sample(VALUES, rng.randint(1, 4))}


def _reference(rng, depth, defs):
    name = rng.choice(defs).replace("~", "~0").replace("/", "~1") if defs else None
    return {"$ref": f"#/$defs/{name}"} if name else {}


def _limit(rng):
    return rng.choice(
        [rng.randint(-300, 300), rng.randint(-5, 5), round(rng.uniform(-3, 3), rng.randint(1, 4)), 0.1, 1e-3, 2**63, 99.0]
    )


def _number(rng, depth, defs):
    schema = {"type": rng.choice(["integer", "number"])}
    for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if rng.random() < 0.3:
            schema[keyword] = _limit(rng)
    return schema


def _string(rng, depth, defs):
    schema = {"type": "string"}
    _maybe(rng, schema, 0.3, "minLength", rng.randint(0, 5))
    _maybe(rng, schema, 0.3, "maxLength", rng.randint(0, 9))
    _maybe(rng, schema, 0.3, "pattern", rng.choice(PATTERNS))
    _maybe(rng, schema, 0.2, "format", rng.choice(FORMATS))
    return schema


def _array(rng, depth, defs):
    schema = {"type": "array"} if rng.random() < 0.8 else {}
    _maybe(rng, schema, 0.7, "items", _schema(rng, depth + 1, defs))
    if rng.random() < 0.3:
        schema["prefixItems"] = [_schema(rng, depth + 1, defs) for _ in range(rng.randint(1, 3))]
    _maybe(rng, schema, 0.4, "minItems", rng.randint(0, 3))
    _maybe(rng, schema, 0.4, "maxItems", rng.randint(0, 4))
    _maybe(rng, schema, 0.1, "uniqueItems", True)
    _maybe(rng, schema, 0.1, "unevaluatedItems", False)
    return schema


def _object(rng, depth, defs):
    schema = {"type": "object"} if rng.random() < 0.9 else {}
    if rng.random() < 0.9:
        schema["properties"] = {name: _schema(rng, depth + 1, defs) for name in rng.sample(NAMES, rng.randint(0, 4))}
    _maybe(rng, schema, 0.5, "required", rng.sample(NAMES, rng.randint(0, 2)))
    _maybe(rng, schema, 0.5, "additionalProperties", rng.choice([True, False, _schema(rng, depth + 1, defs)]))
    if rng.random() < 0.2:
        patterns = ["^a", "b", "^[0-9]+$", *rng.sample(PATTERNS, 2)]
        schema["patternProperties"] = {p: _schema(rng, depth + 1, defs) for p in rng.sample(patterns, rng.randint(1, 2))}
    _maybe(rng, schema, 0.1, "propertyNames", rng.choice([{"maxLength": 3}, {"pattern": "^[a-z]"}, {"enum": ["a", "z"]}]))
    _maybe(rng, schema, 0.15, "minProperties", rng.randint(0, 3))
    _maybe(rng, schema, 0.15, "maxProperties", rng.randint(0, 4))
    _maybe(rng, schema, 0.1, "dependentRequired", {rng.choice(NAMES): [rng.choice(NAMES)]})
    _maybe(rng, schema, 0.05, "dependentSchemas", {rng.choice(NAMES): _schema(rng, depth + 1, defs)})
    _maybe(rng, schema, 0.1, "unevaluatedProperties", False)
    return schema


def _combined(rng, depth, defs):
    keyword = rng.choice(["anyOf", "anyOf", "allOf", "oneOf"])
    schema = {keyword: [_schema(rng, depth + 1, defs) for _ in range(rng.randint(1, 3))]}
    if rng.random() < 0.3:
        beside = _schema(rng, depth + 1, defs)
        schema.update(beside if isinstance(beside, dict) else {})
    return schema


def _maybe(rng, schema, probability, keyword, value):
    if rng.random() < probability:
        schema[keyword] = value
