"""Limits of untrusted JSON schemas, checked before compilation."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from neounify.errors import RequestError

MAX_BYTES = 128 * 1024
MAX_DEPTH = 64
"""Nested JSON values; a property of a property is four deep."""
MAX_PROPERTIES = 1000
"""Named properties over the whole schema."""
MAX_VALUES = 20_000
"""JSON values of any kind over the whole schema, names of properties not counted."""
MAX_REFS = 500
"""Uses of `$ref`: many that refer to one another take long to compile."""
MAX_PATTERN = 1000
"""Characters of a regular expression."""
MAX_MULTIPLE = 10_000
"""The least common multiple of all `multipleOf`: compiling takes time and memory in proportion."""

_OPTIONS = "x-guidance"
WHITESPACE = r"\n? {0,16}"
"""Between the tokens of JSON: none, a space, or a line with its indentation, but not for ever."""


def check_schema(schema: object, what: str) -> str:
    """The text of a schema within all bounds, with options for the compiler.

    `what` begins the message of the RequestError for a schema that is none or out of bounds.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{what}: a schema is a JSON object, not {type(schema).__name__}")
    _check_shape(schema, what)
    options = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    try:
        # The caller's own options could loosen what the schema promises.
        text = json.dumps({**schema, _OPTIONS: options}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{what}: the schema is not JSON ({error})") from error
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise RequestError(f"{what}: the schema has {size} bytes; at most {MAX_BYTES} are read")
    return text


def _check_shape(schema: Mapping[str, Any], what: str) -> None:
    """Walk the schema level by level, so that no nesting can exhaust the stack."""
    level: list[Any] = [schema]
    depth = values = properties = refs = 0
    multiple = 1
    while level:
        depth += 1
        values += len(level)
        if depth > MAX_DEPTH:
            raise RequestError(f"{what}: the schema is nested deeper than {MAX_DEPTH} values")
        if values > MAX_VALUES:
            raise RequestError(f"{what}: the schema has more than {MAX_VALUES} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                properties += _count_properties(value)
                _check_patterns(value, what)
                refs += "$ref" in value
                multiple = math.lcm(multiple, _multiple(value.get("multipleOf"), what))
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
        if properties > MAX_PROPERTIES:
            raise RequestError(f"{what}: the schema has more than {MAX_PROPERTIES} properties")
        if refs > MAX_REFS:
            raise RequestError(f"{what}: the schema uses $ref more than {MAX_REFS} times")
        if multiple > MAX_MULTIPLE:
            raise RequestError(
                f"{what}: multipleOf is followed up to {MAX_MULTIPLE} over the whole schema"
            )
        level = below


def _multiple(value: object, what: str) -> int:
    """A `multipleOf` without its decimal point; 1 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return 1
    if not -MAX_MULTIPLE <= value <= MAX_MULTIPLE or not math.isfinite(value):
        raise RequestError(
            f"{what}: multipleOf is followed up to {MAX_MULTIPLE}, got {str(value)[:20]}"
        )
    digits = Decimal(str(value)).normalize().as_tuple()
    coefficient = int("".join(map(str, digits.digits)))
    exponent = digits.exponent
    assert isinstance(exponent, int)
    return coefficient * 10 ** max(0, exponent)


def _count_properties(schema: Mapping[str, Any]) -> int:
    named = (schema.get("properties"), schema.get("patternProperties"))
    return sum(len(names) for names in named if isinstance(names, Mapping))


def _check_patterns(schema: Mapping[str, Any], what: str) -> None:
    patterns = schema.get("patternProperties")
    names = list(patterns) if isinstance(patterns, Mapping) else []
    for pattern in (*names, schema.get("pattern")):
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
            raise RequestError(
                f"{what}: a pattern has {len(pattern)} characters; at most {MAX_PATTERN} are read"
            )
