"""Tools as OpenAI's own client offers, reads and answers them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel

import neounify
from neounify.serve.build import colocated
from neounify.serve.http import create_app
from neounify.tasks.chat import ChatRequest
from neounify.tasks.program import Finished, PromptPrefilled, TextPiece, ToolCallPiece
from neounify.text import byte_tokenizer
from neounify.text.tokens import IM_END
from neounify.text.tools import Tool
from support.http_server import openai_client, serving
from support.scripted_sampler import script_sampler
from support.scripted_service import Scripted

MODEL = "neounify"
ASK: Any = [{"role": "user", "content": "What is the weather?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather", "parameters": PARAMETERS},
}
TIME: Any = {"type": "function", "function": {"name": "get_time"}}
BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def client(tiny: neounify.Pipeline) -> Iterator[openai.OpenAI]:
    with serving(colocated(tiny)) as client:
        yield client


def says(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the model write a text, byte by byte, and end."""
    ids = iter([*BYTES.encode(text), BYTES.id(IM_END)])
    script_sampler(monkeypatch, lambda row: next(ids))


TWO_CALLS = (
    "Let me see.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"unit": "C", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_time"}\n</tool_call>'
)


def test_calls_come_back(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, TWO_CALLS)
    answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER, TIME])
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    calls: Any = choice.message.tool_calls
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", "get_weather", {"unit": "C", "days": 2}),
        ("function", "get_time", {}),
    ]
    assert len({call.id for call in calls}) == 2


def test_calls_come_back_in_a_stream(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, TWO_CALLS)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=ASK, tools=[WEATHER, TIME], stream=True
        )
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    calls: dict[int, Any] = {}
    for part in [part for delta in deltas for part in delta.tool_calls or ()]:
        function = part.function
        assert function is not None
        call = calls.setdefault(part.index, {"id": part.id, "name": function.name, "text": ""})
        call["text"] += function.arguments or ""
    assert [(call["name"], json.loads(call["text"])) for call in calls.values()] == [
        ("get_weather", {"unit": "C", "days": 2}),
        ("get_time", {}),
    ]
    assert all(call["id"].startswith("call_") for call in calls.values())
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_whole_round(
    client: openai.OpenAI, tiny: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, TWO_CALLS)
    first = client.chat.completions.create(model=MODEL, messages=ASK, tools=[WEATHER, TIME])
    message = first.choices[0].message
    assert message.tool_calls is not None
    results: Any = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(message.tool_calls, ("18 degrees", "noon"), strict=True)
    ]
    says(monkeypatch, "It is 18 degrees at noon.")
    turns: Any = [*ASK, message, *results]
    second = client.chat.completions.create(model=MODEL, messages=turns, tools=[WEATHER, TIME])
    assert second.choices[0].message.content == "It is 18 degrees at noon."
    assert second.choices[0].finish_reason == "stop"
    says(monkeypatch, "x")
    alone = tiny.chat(
        [*ASK, message.model_dump(), *results],
        tools=[WEATHER, Tool(name="get_time")],
    )
    assert second.usage is not None
    assert second.usage.prompt_tokens == alone.prompt_tokens


@pytest.mark.parametrize(
    "text", ["<tool_call>nonsense</tool_call>", 'a <tool_call>{"name": "get_time"', "<tool_c"]
)
def test_what_is_no_call_stays_text(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    says(monkeypatch, text)
    answer = client.chat.completions.create(model=MODEL, messages=ASK, tools=[TIME])
    assert answer.choices[0].message.content == text
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"


def test_without_tools_or_with_none_marks_are_text(
    client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(monkeypatch, TWO_CALLS)
    plain = client.chat.completions.create(model=MODEL, messages=ASK)
    says(monkeypatch, TWO_CALLS)
    none = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[WEATHER], tool_choice="none"
    )
    for answer in (plain, none):
        assert answer.choices[0].message.content == TWO_CALLS
        assert answer.choices[0].message.tool_calls is None
    assert plain.usage is not None
    assert none.usage is not None
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens


NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_forced_calls_follow_their_schemas(bundled_client: openai.OpenAI, choice: Any) -> None:
    for seed in range(2):
        answer = bundled_client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            tools=[WEATHER, TIME],
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=1.0,
            seed=seed,
            max_tokens=300,
        )
        message = answer.choices[0].message
        assert answer.choices[0].finish_reason == "tool_calls"
        assert message.content is None
        calls: Any = message.tool_calls
        [call] = calls
        arguments = json.loads(call.function.arguments)
        if call.function.name == "get_weather":
            jsonschema_rs.validate(PARAMETERS, arguments)
        else:
            assert (choice, call.function.name, arguments) == ("required", "get_time", {})


def test_several_forced_calls_in_a_stream(bundled_client: openai.OpenAI) -> None:
    chunks = list(
        bundled_client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            tools=[TIME],
            tool_choice="required",
            temperature=1.0,
            seed=1,
            max_tokens=200,
            stream=True,
        )
    )
    parts = [p for c in chunks for p in c.choices[0].delta.tool_calls or ()]
    names = [p.function.name for p in parts if p.function is not None and p.function.name]
    assert set(names) == {"get_time"}
    assert {p.index for p in parts} == set(range(len(names)))
    assert not any(c.choices[0].delta.content for c in chunks)


def test_a_forced_call_that_the_limit_cuts_off(bundled_client: openai.OpenAI) -> None:
    answer = bundled_client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[WEATHER], tool_choice=NAMED, max_tokens=45
    )
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    calls: Any = choice.message.tool_calls
    [call] = calls
    assert call.function.name == "get_weather"
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)


class Weather(BaseModel):
    unit: Literal["C", "F"]


def test_the_parse_method_with_a_pydantic_tool(bundled_client: openai.OpenAI) -> None:
    answer = bundled_client.chat.completions.parse(
        model=MODEL,
        messages=ASK,
        tools=[openai.pydantic_function_tool(Weather)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=1.0,
        seed=2,
        max_tokens=300,
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    [call] = calls
    assert isinstance(call.function.parsed_arguments, Weather)


def test_json_or_calls(bundled_client: openai.OpenAI) -> None:
    small: Any = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    small["additionalProperties"] = False
    seen = set()
    for seed in range(3):
        answer = bundled_client.chat.completions.create(
            model=MODEL,
            messages=ASK,
            tools=[WEATHER],
            response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": small}},
            temperature=1.5,
            seed=seed,
            max_tokens=100,
        )
        [choice] = answer.choices
        seen.add(choice.finish_reason)
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content or "") == {"a": 1}
    assert "stop" in seen


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools.0.type"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        (
            {
                "tools": [WEATHER | {"function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        (
            {
                "tools": [WEATHER],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "response_format",
        ),
        ({"tools": [WEATHER], "modalities": ["text", "image"]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
    ],
)
def test_what_cannot_be(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=MODEL, messages=ASK, extra_body=fields)
    assert error.value.param == param, error.value


def test_results_of_tools_hold_no_images(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    turns: Any = [*ASK, {"role": "tool", "tool_call_id": "1", "content": [image]}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=MODEL, messages=turns)


def test_tools_and_turns_arrive() -> None:
    service = Scripted(
        lambda request, previews: [
            PromptPrefilled(),
            TextPiece("Well."),
            ToolCallPiece("get_time", "{}"),
            Finished("stop", 5, 3),
        ]
    )
    turns: Any = [
        *ASK,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "noon"}]},
    ]
    with openai_client(create_app(service)) as client:
        answer = client.chat.completions.create(model=MODEL, messages=turns, tools=[WEATHER, TIME])
    assert answer.choices[0].message.tool_calls is not None
    request = service.last
    assert isinstance(request, ChatRequest)
    assert [tool.name for tool in request.tool_use.offered] == ["get_weather", "get_time"]
    assert [(m.role, m.text, len(m.tool_calls)) for m in request.messages] == [
        ("user", "What is the weather?", 0),
        ("assistant", "", 1),
        ("tool", "noon", 0),
    ]
