"""Grammars by themselves: bounds of schemas, masks, calls of tools."""

from __future__ import annotations

import json
import pickle
import random
from typing import Any

import jsonschema_rs
import pytest
import torch

from neounify.errors import RequestError
from neounify.grammar import Grammar, Vocabulary, calls_grammar, check_schema, json_grammar
from neounify.text import Tokenizer, byte_tokenizer
from neounify.text.tokens import IM_END, THINK_CLOSE
from neounify.text.tools import Tool, ToolCall, ToolCallReader
from support.golden import golden_path, needs_golden

BYTES = byte_tokenizer()
VOCABULARY = Vocabulary.of(BYTES)
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"enum": ["C", "F"]}},
}
TOOLS = [Tool(name="get_weather", parameters=PARAMETERS), Tool(name="f")]


def allowed(mask: torch.Tensor) -> list[int]:
    if mask.dtype != torch.bool:
        mask = ((mask[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).bool().flatten()
    return mask.nonzero().flatten().tolist()


def babble(tokenizer: Tokenizer, grammar: Grammar, seed: int, *, thought: int = 0) -> str | None:
    """Any of the allowed tokens, until the end; None where that takes too long."""
    constraint, draw = grammar.start(), random.Random(seed)
    ids: list[int] = []
    for index in range(400):
        choices = allowed(constraint.mask())
        if index < thought:
            assert tokenizer.id(IM_END) not in choices
        token = tokenizer.id(THINK_CLOSE) if thought == index + 1 else draw.choice(choices)
        if token == tokenizer.id(IM_END):
            return tokenizer.decode(ids, skip_special=False)
        ids.append(token)
        constraint.accept(token)
    return None


@pytest.fixture(
    scope="module",
    params=["bytes", pytest.param("published", marks=needs_golden)],
)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    if request.param == "bytes":
        return VOCABULARY
    return Vocabulary.of(Tokenizer.from_folder(golden_path("tokenizer-qwen3")))


def test_json_by_a_schema(vocabulary: Vocabulary) -> None:
    grammar = json_grammar(vocabulary, PARAMETERS, what="response_format")
    texts = [babble(vocabulary.tokenizer, grammar, seed) for seed in range(8)]
    values = [json.loads(text) for text in texts if text is not None]
    assert len(values) > 4
    for value in values:
        jsonschema_rs.validate(PARAMETERS, value)


def test_calls_of_tools(vocabulary: Vocabulary) -> None:
    grammar = calls_grammar(vocabulary, TOOLS, parallel=False)
    texts = [babble(vocabulary.tokenizer, grammar, seed) for seed in range(8)]
    names = set()
    for text in filter(None, texts):
        reader = ToolCallReader()
        [call] = reader.put(text) + reader.flush()
        assert isinstance(call, ToolCall)
        names.add(call.name)
        if call.name == "get_weather":
            jsonschema_rs.validate(PARAMETERS, json.loads(call.arguments))
    assert names == {"get_weather", "f"}


def test_calls_after_a_thought(vocabulary: Vocabulary) -> None:
    tools = [Tool(name="f", parameters={"type": "object", "maxProperties": 0})]
    grammar = calls_grammar(vocabulary, tools, parallel=False, thinks=True)
    text = babble(vocabulary.tokenizer, grammar, 1, thought=5)
    assert text is not None
    assert THINK_CLOSE in text
    reader = ToolCallReader()
    assert reader.put(text.partition(THINK_CLOSE)[2].strip())[-1] == ToolCall("f", "{}")


def test_no_special_token_is_text(vocabulary: Vocabulary) -> None:
    constraint = json_grammar(vocabulary, {"type": "string"}, what="x").start()
    constraint.accept(vocabulary.tokenizer.encode('"')[0])
    assert not vocabulary.tokenizer.added_ids & set(allowed(constraint.mask()))


def test_a_grammar_travels_as_data() -> None:
    grammar = json_grammar(VOCABULARY, {"const": 1}, what="x")
    copy = pickle.loads(pickle.dumps(grammar))
    assert copy == grammar
    assert babble(BYTES, copy, 0) == "1"
    with pytest.raises(RequestError, match="another tokenizer"):
        Grammar(lark=grammar.lark, vocabulary="of nobody").start()


def test_equal_tokenizers_share_a_vocabulary() -> None:
    assert Vocabulary.of(byte_tokenizer()) is VOCABULARY
    other = byte_tokenizer(["some words of text"] * 3, 280)
    assert Vocabulary.of(other) is not VOCABULARY


def test_a_token_out_of_place_allows_nothing_more() -> None:
    constraint = json_grammar(VOCABULARY, {"const": 1}, what="x").start()
    constraint.accept(BYTES.encode("x")[0])
    assert allowed(constraint.mask()) == []


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ([1], "not list"),
        ("{}", "not str"),
        (nested(100_000), "deeper than 64"),
        ({"properties": {str(n): {} for n in range(1001)}}, "1000 properties"),
        ({"patternProperties": {"a" * 1001: {}}}, "1001 characters"),
        ({"enum": [[]] * 20_000}, "20000 values"),
        ({"const": "ü" * 70_000}, "bytes"),
        ({"const": float("nan")}, "not JSON"),
        ({"anyOf": [{"$ref": "#/$defs/a"}] * 501}, "500 times"),
        ({"multipleOf": 999_983}, "multipleOf"),
        ({"multipleOf": 10**400}, "multipleOf"),
        ({"multipleOf": 3.141592653}, "multipleOf"),
        ({"allOf": [{"multipleOf": n} for n in (7, 11, 13, 17, 19, 23, 29)]}, "multipleOf"),
        ({"const": object()}, "not JSON"),
    ],
)
def test_bounds(schema: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as error:
        check_schema(schema, "response_format")
    assert str(error.value).startswith("response_format: ")


@pytest.mark.parametrize("value", [0.01, 5, 250.0, 1e-300, 10_000, True, "x", None, 0])
def test_multiples_within_the_bound(value: Any) -> None:
    assert "multipleOf" in check_schema({"properties": {"a": {"multipleOf": value}}}, "x")


def test_as_many_optional_properties_as_the_bound_allows() -> None:
    schema = {"type": "object", "properties": {f"p{n}": {"const": n} for n in range(1000)}}
    constraint = json_grammar(VOCABULARY, schema, what="x").start()
    for token in BYTES.encode('{"p7":7,'):
        assert token in allowed(constraint.mask())
        constraint.accept(token)
    assert allowed(constraint.mask())


def test_the_callers_own_options_do_not_count() -> None:
    text = check_schema({"x-guidance": {"lenient": True}}, "x")
    assert "lenient" not in text


def test_the_tool_at_fault_is_named() -> None:
    tools = [TOOLS[0], Tool(name="g", parameters={"not": {}})]
    with pytest.raises(RequestError, match=r"tools: the parameters of 'g': .*\"not\""):
        calls_grammar(VOCABULARY, tools)
