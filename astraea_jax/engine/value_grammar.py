"""Writes grammars of values by JSON schemas in notations that are not JSON, such as Python's literals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from astraea_jax.engine.lark_text import LarkText
from astraea_jax.errors import RequestError, shown

TEXT_LIMITS = frozenset({"pattern", "format", "minLength", "maxLength"})
NUMBER_LIMITS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_UNSERVED = frozenset({"prefixItems", "uniqueItems", "contains", "patternProperties", "minProperties", "maxProperties"})
_UNSERVED_WITH = frozenset({"allOf", "not", "if", "dependentSchemas", "dependentRequired", "propertyNames"})
MAX_ITEMS = 256
"""Bound of a list's length that can be enforced."""
MAX_CHOICE_DEPTH = 8
"""References and unions within each other that are looked through."""
LARGEST = 2**53 - 1
"""Integers beyond are not read in every notation."""
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,16})?([eE][+-]?[0-9]{1,2})?/"
TYPES = ("string", "integer", "number", "boolean", "null", "array", "object")


@dataclass(frozen=True)
class Notation:
    """A way to write values, which differs from JSON in what stands around strings and names.

    Args:
        quotes: before and after a string.
        constants: how true, false and null may be written.
        comma: between items.
        colon: between a key and its value.
        bare_keys: keys that are words have no quotes.
        escapes: strings have JSON's escapes; otherwise they are as they are.
    """

    quotes: tuple[str, str]
    constants: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    comma: str
    colon: str
    bare_keys: bool = False
    escapes: bool = False


def choices_of(schema: Any, definitions: Mapping[str, Any], depth: int = MAX_CHOICE_DEPTH) -> Iterator[dict[str, Any]]:
    """The schemas of which a value satisfies one: references and unions at the top are resolved.

    Args:
        schema: what a value satisfies.
        definitions: the schema that references are looked up in.
        depth: references and unions that may be within each other.
    """
    if not isinstance(schema, dict) or depth == 0:
        yield {}
        return
    if isinstance(reference := schema.get("$ref"), str):
        yield from choices_of(_referred(reference, definitions), definitions, depth - 1)
        return
    for union in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(union), list) and options:
            for option in options:
                yield from choices_of(option, definitions, depth - 1)
            return
    if isinstance(only := schema.get("allOf"), list) and len(only) == 1:
        yield from choices_of(only[0], definitions, depth - 1)
        return
    if isinstance(types := schema.get("type"), list) and "enum" not in schema and "const" not in schema:
        yield from ({**schema, "type": type} for type in types)
        return
    yield schema


def enumerated(schema: Mapping[str, Any]) -> list[Any] | None:
    """The only values that a schema allows, if it lists them."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return values if isinstance(values, list) and values else None


def _referred(reference: str, definitions: Mapping[str, Any]) -> Any:
    found: Any = definitions
    for key in reference.removeprefix("#").strip("/").split("/") if reference.startswith("#") else ["\0"]:
        key = key.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or (key and key not in found):
            raise RequestError(f"the JSON schema refers to {shown(reference)}, which is not in it")
        found = found[key] if key else found
    return found


def _length(bound: Any) -> int | None:
    """A bound of a list's length, if it can be enforced."""
    return bound if isinstance(bound, int) and 0 <= bound <= MAX_ITEMS else None


class ValueGrammar:
    """Writes the rules of values in a notation.

    Args:
        notation: how values are written.
        text: knows the model's control tokens.
        definitions: the schema that references are looked up in.
        rule: name for rules of its own, which begin with it.
        strict: refuse what cannot be enforced; otherwise it is left out.
    """

    def __init__(self, notation: Notation, text: LarkText, definitions: Mapping[str, Any], rule: str, *, strict: bool):
        self._notation, self._text, self._definitions = notation, text, definitions
        self._rule, self._strict = rule, strict
        self.rules: list[str] = []
        """Definitions that the values need."""
        self._known: dict[str, str] = {}
        """JSON of a schema -> its rule, which may be used before it is complete: schemas may refer to themselves."""

    def value(self, schema: Any) -> str:
        """Lark of a value."""
        key = json.dumps(schema, sort_keys=False)
        if key not in self._known:
            rule = self._known[key] = f"{self._rule}_v{len(self._known)}"
            written = [self._choice(choice) for choice in choices_of(schema, self._definitions)]
            self.rules.append(f"{rule}: {' | '.join(dict.fromkeys(written))}\n")
        return self._known[key]

    def literal(self, value: Any) -> str:
        """Lark of one value."""
        if isinstance(value, str):
            begin, end = map(self._text.literal, self._notation.quotes)
            if self._notation.escapes:
                return json.dumps(json.dumps(value, ensure_ascii=False))
            if self._notation.quotes[1] in value:
                raise RequestError(f"the value {shown(value)} cannot be written in this model's call format")
            return " ".join(filter(None, [begin, json.dumps(value) if value else "", end]))
        if isinstance(value, list):
            return self._enclosed("[", [self.literal(item) for item in value], "]")
        if isinstance(value, dict):
            pairs = [f"{self.key(key)} {json.dumps(self._notation.colon)} {self.literal(value[key])}" for key in value]
            return self._enclosed("{", pairs, "}")
        constants = dict(zip(("true", "false", "null"), self._constants(), strict=True))
        written = json.dumps(value)
        return constants.get(written, json.dumps(written))

    def key(self, key: str) -> str:
        """Lark of the key of an object."""
        if self._notation.bare_keys and re.fullmatch(r"[\w.$-]+", key):
            return json.dumps(key)
        return self.literal(key)

    def object_of(self, schema: Mapping[str, Any]) -> str:
        """Lark of an object."""
        properties = schema.get("properties")
        if not isinstance(properties, dict) or not properties:
            return self._free_object(schema)
        colon = json.dumps(self._notation.colon)
        pairs = [(name, f"{self.key(name)} {colon} {self.value(inner)}") for name, inner in properties.items()]
        return f'"{{" {self.sequence(pairs, schema.get("required"))} "}}"'

    def sequence(self, pairs: list[tuple[str, str]], required: Any) -> str:
        """Lark of named parts in their order, of which those that are not ``required`` may be missing."""
        needed = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        if self._strict and (missing := needed - {name for name, _ in pairs}):
            raise self._unenforced(f"required {sorted(missing)[0]}")
        stem, comma = f"{self._rule}_s{len(self.rules)}", json.dumps(self._notation.comma)
        for i, (name, part) in enumerate(pairs):
            last = i + 1 == len(pairs)
            after = "" if last else f" {stem}_then{i + 1}"
            skip_first, skip_then = ("", "") if last else (f"{stem}_first{i + 1}", f"{stem}_then{i + 1}")
            skipped = name not in needed
            self.rules.append(f"{stem}_first{i}: {part}{after}{f' | {skip_first}' if skipped else ''}\n")
            self.rules.append(f"{stem}_then{i}: {comma} {part}{after}{f' | {skip_then}' if skipped else ''}\n")
        return f"{stem}_first0" if pairs else ""

    def _choice(self, schema: dict[str, Any]) -> str:
        if self._strict and (beyond := schema.keys() & (_UNSERVED | _UNSERVED_WITH | TEXT_LIMITS)):
            raise self._unenforced(sorted(beyond)[0])
        if (values := enumerated(schema)) is not None:
            return " | ".join(self.literal(value) for value in values)
        implied = "object" if "properties" in schema else "array" if "items" in schema else None
        kind = schema.get("type", implied)
        if kind is None:
            return " | ".join(self._of_type(each, {}) for each in TYPES)
        return self._of_type(kind, schema)

    def _of_type(self, kind: Any, schema: Mapping[str, Any]) -> str:
        true, false, null = self._constants()
        match kind:
            case "string":
                return self._string()
            case "integer" | "number":
                return self._number(kind, schema)
            case "boolean":
                return f"{true} | {false}"
            case "null":
                return null
            case "array":
                return self._array(schema)
            case "object":
                return self.object_of(schema)
        raise RequestError(f"the JSON schema has the type {shown(kind)}; it must be one of {', '.join(TYPES)}")

    def _constants(self) -> list[str]:
        return [f"({' | '.join(map(json.dumps, ways))})" for ways in self._notation.constants]

    def _string(self) -> str:
        if self._notation.escapes:
            return r"""/"([^"\\\x00-\x1f\x7f]|\\["\\\/bfnrt])*"/ | /'([^'\\\x00-\x1f\x7f]|\\['\\\/bfnrt])*'/"""
        rule = f"{self._rule}_text"
        rest, definitions = self._text.until(rule, self._notation.quotes[1])
        if definitions and definitions not in self.rules:
            self.rules.append(definitions)
        return f"{self._text.literal(self._notation.quotes[0])} {rest}"

    def _number(self, kind: str, schema: Mapping[str, Any]) -> str:
        limits = {key: value for key, value in schema.items() if key in NUMBER_LIMITS}
        if kind == "number" and not limits:
            return NUMBER
        low = {} if "exclusiveMinimum" in limits else {"minimum": -LARGEST}
        high = {} if "exclusiveMaximum" in limits else {"maximum": LARGEST}
        return (
            f"%json {json.dumps({'type': kind, **low, **high, **limits, 'x-guidance': {'lenient': not self._strict}})}"
        )

    def _array(self, schema: Mapping[str, Any]) -> str:
        item, comma = self.value(schema.get("items", {})), json.dumps(self._notation.comma)
        least, most = _length(schema.get("minItems")) or 0, _length(schema.get("maxItems"))
        if self._strict and (schema.get("minItems", 0), schema.get("maxItems")) != (least, most):
            raise self._unenforced("minItems and maxItems")
        if most is not None and most < max(least, 1):
            return '"[" "]"'
        more = "" if most == 1 else f"({comma} {item}){{{max(0, least - 1)},{'' if most is None else most - 1}}}"
        return f'"[" {item} {more} "]"' if least else f'"[" ({item} {more})? "]"'

    def _free_object(self, schema: Mapping[str, Any]) -> str:
        further = schema.get("additionalProperties", True)
        if further is False or ("properties" in schema and "additionalProperties" not in schema):
            return '"{" "}"'
        key = "/[A-Za-z_][A-Za-z0-9_]{0,63}/" if self._notation.bare_keys else r"/\"[A-Za-z0-9_ .-]{1,64}\"/"
        pair = f"{key} {json.dumps(self._notation.colon)} {self.value(further if further is not True else {})}"
        return f'"{{" ({pair} ({json.dumps(self._notation.comma)} {pair})*)? "}}"'

    def _enclosed(self, begin: str, items: list[str], end: str) -> str:
        return f"{json.dumps(begin)} {f' {json.dumps(self._notation.comma)} '.join(items)} {json.dumps(end)}"

    def _unenforced(self, what: str) -> RequestError:
        return RequestError(f"{what} in a strict tool cannot be enforced in this model's call format; leave out strict")
