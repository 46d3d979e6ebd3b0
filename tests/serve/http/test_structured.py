"""Answers by a schema: whatever the model babbles, they parse and follow it."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel, Field

import neounify
from neounify.bundled import bundled_model
from neounify.grammar import Vocabulary
from neounify.text import Tokenizer

MODEL = "neounify"
ASK: Any = [{"role": "user", "content": "What colour is the star?"}]
SHAPE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["circle", "square", "star"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 20},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 1},
        "place": {"$ref": "#/$defs/place"},
    },
    "required": ["kind", "count", "tags", "place"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "anyOf": [
                {"type": "null"},
                {"type": "string", "pattern": "^(top|bottom) (left|right)$"},
            ]
        }
    },
}


def by_schema(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema}}


def test_answers_follow_the_schema(bundled_client: openai.OpenAI) -> None:
    def ask(seed: int) -> Any:
        answer = bundled_client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            response_format=by_schema(SHAPE),
            temperature=1.0,
            seed=seed,
            max_tokens=400,
        )
        return answer.choices[0]

    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(ask, range(4)))
    for choice in together:
        assert choice.finish_reason == "stop"
        jsonschema_rs.validate(SHAPE, json.loads(choice.message.content))
    assert len({choice.message.content for choice in together}) > 1
    assert ask(3).message.content == together[3].message.content


def test_any_object(bundled_client: openai.OpenAI) -> None:
    whole = 0
    for seed in range(4):
        answer = bundled_client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            response_format={"type": "json_object"},
            temperature=1.0,
            seed=seed,
            max_tokens=150,
        )
        choice = answer.choices[0]
        assert choice.message.content is not None
        if choice.finish_reason == "stop":
            whole += 1
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.finish_reason == "length"
    assert whole


def test_an_answer_cut_off_by_the_limit_says_so(bundled_client: openai.OpenAI) -> None:
    answer = bundled_client.chat.completions.create(
        model=MODEL, messages=ASK, response_format=by_schema(SHAPE), max_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"
    assert (answer.choices[0].message.content or "").startswith("{")


class Shape(BaseModel):
    kind: Literal["circle", "square"]
    size: float = Field(ge=0)
    notes: list[Literal["red", "blue"]] = Field(max_length=2)


def test_the_parse_method_of_the_client(bundled_client: openai.OpenAI) -> None:
    answer = bundled_client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Shape, temperature=1.0, seed=1, max_tokens=400
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)


def test_streamed_and_after_a_thought(bundled_client: openai.OpenAI) -> None:
    small = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    finished = 0
    for seed in range(3):
        stream = bundled_client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            response_format=by_schema(small),
            temperature=1.0,
            seed=seed,
            max_tokens=200,
            stream=True,
            extra_body={"think": True},
        )
        chunks: list[Any] = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        if chunks[-1].choices[0].finish_reason == "stop":
            finished += 1
            assert json.loads(text) in ({"a": 1}, {"a": 2})
        else:
            assert text == ""  # all of it was thought
    assert finished


def test_rows_without_a_schema_are_as_alone(
    bundled_client: openai.OpenAI, bundled: neounify.Pipeline
) -> None:
    def ask(number: int) -> Any:
        format = {"response_format": by_schema(SHAPE)} if number % 2 else {}
        return bundled_client.chat.completions.create(
            model=MODEL, messages=ASK, temperature=1.0, seed=number, max_tokens=30, **format
        )

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    for number in range(0, 6, 2):
        alone = bundled.chat(
            "What colour is the star?", temperature=1.0, seed=number, max_new_tokens=30
        )
        assert answers[number].choices[0].message.content == alone.text
    for number in range(1, 6, 2):
        alone = bundled.chat(
            "What colour is the star?",
            temperature=1.0,
            seed=number,
            max_new_tokens=30,
            response_format=SHAPE,
        )
        assert answers[number].choices[0].message.content == alone.text


def doubled(times: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for number in range(times):
        one: dict[str, Any] = {"properties": {f"a{number}": {}}}
        other: dict[str, Any] = {"properties": {f"b{number}": {}}}
        schema = {"allOf": [{"anyOf": [schema, one]}, {"anyOf": [schema, other]}]}
    return schema


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "unknown keyword": ({"type": "object", "dependentRequired": {}}, "dependentRequired"),
    "negation": ({"not": {"type": "string"}}, "not"),
    "unknown format": ({"type": "string", "format": "nonsense"}, "nonsense"),
    "unknown type": ({"type": "thing"}, "thing"),
    "look-ahead": ({"type": "string", "pattern": "^(?=a)b$"}, "look-around"),
    "open pattern": ({"type": "string", "pattern": "("}, "regex"),
    "long pattern": ({"type": "string", "pattern": "a" * 2000}, "2000 characters"),
    "remote": ({"$ref": "http://127.0.0.1:1/x"}, "127.0.0.1"),
    "nowhere": ({"$ref": "#/$defs/none"}, "none"),
    "impossible": (
        {"type": "object", "required": ["a"], "additionalProperties": False},
        "unsatisfiable",
    ),
    "many properties": (
        {"type": "object", "properties": {f"p{n}": {} for n in range(2000)}},
        "1000 properties",
    ),
    "large": ({"description": "x" * 200_000}, "bytes"),
    "doubling": (doubled(7), "schema"),
    "itself": ({"$ref": "#"}, "schema"),
    "options of the compiler": ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_schemas_that_cannot_be_followed(bundled_client: openai.OpenAI, name: str) -> None:
    schema, word = HOSTILE[name]
    started = time.process_time()
    with pytest.raises(openai.BadRequestError) as error:
        bundled_client.chat.completions.create(
            model=MODEL, messages=ASK, response_format=by_schema(schema), max_tokens=4
        )
    assert time.process_time() - started < 5
    assert error.value.param == "response_format"
    assert word in str(error.value)
    assert "start:" not in str(error.value)


def test_an_answer_that_was_begun_cannot_be_held_to_a_form(
    bundled_client: openai.OpenAI,
) -> None:
    begun: Any = [*ASK, {"role": "assistant", "content": '{"a"'}]
    with pytest.raises(openai.BadRequestError, match="last message begins") as error:
        bundled_client.chat.completions.create(
            model=MODEL, messages=begun, response_format={"type": "json_object"}
        )
    assert error.value.param == "response_format"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    vocabulary = Vocabulary(Tokenizer.from_folder(bundled_model()), "another")
    with pytest.raises(neounify.NeounifyError, match=r"extra 'grammar'"):
        vocabulary.compile("start: %json {}\n")
