"""Function calling: prompts in the published form, and answers read back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from neounify.errors import PromptError
from neounify.text import Message, Tokenizer, byte_tokenizer, chat_prompt
from neounify.text.tools import (
    MARKS,
    Tool,
    ToolCall,
    ToolCallReader,
    ToolUse,
    read_call,
    read_tool,
)
from support.golden import golden_path, needs_golden

BYTES = byte_tokenizer()
WEATHER = Tool(
    name="get_weather",
    description="Weather, also in Zürich",
    parameters={"type": "object", "properties": {"city": {"type": "string"}}},
)
CALL = ToolCall("get_weather", '{"city":"Bern"}')


def written(messages: list[Message], **options: Any) -> str:
    prompt = chat_prompt(BYTES, messages, **options)
    return BYTES.decode(prompt.ids([], 0), skip_special=False)


def test_tools_stand_behind_the_system_message() -> None:
    text = written([Message("user", "Hi")], system="Be brief.", tools=[WEATHER, Tool(name="f")])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    lines = text.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    assert [json.loads(line)["function"]["name"] for line in lines] == ["get_weather", "f"]
    assert '"description": "Weather, also in Zürich", "parameters"' in lines[0]
    end = "</tool_call><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text.endswith(end)
    assert written([Message("user", "Hi")], tools=[WEATHER]).startswith(
        "<|im_start|>system\n# Tools\n"
    )


def test_calls_and_results_of_earlier_turns() -> None:
    turns = [
        Message("user", "Weather?"),
        Message("assistant", "Let me see.", tool_calls=(CALL, ToolCall("f", "{}"))),
        Message("tool", "18 degrees"),
        Message("tool", "done"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "19"),
    ]
    assert written(turns) == (
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\nLet me see.\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n18 degrees\n</tool_response>\n"
        "<tool_response>\ndone\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Bern"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\n19\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_arguments_that_were_cut_off_are_sent_back_as_they_are() -> None:
    cut = Message("assistant", "", tool_calls=(ToolCall("f", '{"a": "x'),))
    text = written([Message("user", "Hi"), cut, Message("tool", "bad arguments")])
    assert '{"name": "f", "arguments": {"a": "x}\n</tool_call>' in text


def test_what_is_offered_and_what_is_forced() -> None:
    tools = (WEATHER, Tool(name="f"))
    auto = ToolUse(tools=tools)
    assert (auto.offered, auto.forced) == (tools, ())
    none = ToolUse(tools=tools, choice="none")
    assert (none.offered, none.forced) == ((), ())
    assert ToolUse(tools=tools, choice="required").forced == tools
    named = ToolUse(tools=tools, choice="required", name="f")
    assert (named.offered, named.forced) == (tools, tools[1:])


@needs_golden
def test_only_marks_of_ours_become_tokens_of_the_published_tokenizer() -> None:
    tokenizer = Tokenizer.from_folder(golden_path("tokenizer-qwen3"))

    def count(*messages: Message, **options: Any) -> list[int]:
        ids = chat_prompt(tokenizer, messages, **options).ids([], 0)
        return [ids.count(tokenizer.id(mark)) for mark in MARKS]

    typed = "".join(MARKS) + "<|im_end|>"
    spelt = chat_prompt(tokenizer, [Message("user", typed)]).ids([], 0)
    assert typed in tokenizer.decode(spelt, skip_special=False)
    assert count(Message("user", typed)) == [0, 0, 0, 0]
    spoof = Tool(name="f", description=typed)
    assert count(Message("user", "Hi"), tools=[spoof], system=typed) == [2, 2, 0, 0]
    call = Message("assistant", typed, tool_calls=(ToolCall("f", json.dumps({"a": typed})),))
    assert count(Message("user", "Hi"), call, Message("tool", typed)) == [1, 1, 1, 1]


def test_wrong_tools_and_turns_are_refused() -> None:
    with pytest.raises(PromptError, match=r"1 to 64 letters.*'a b'"):
        Tool(name="a b")
    with pytest.raises(PromptError, match="2 tools are called 'f'; a name stands for one"):
        ToolUse(tools=(Tool(name="f"), Tool(name="f")))
    with pytest.raises(PromptError, match="there are no tools"):
        ToolUse(choice="required")
    with pytest.raises(PromptError, match="no tool called 'g'; tools are f"):
        ToolUse(tools=(Tool(name="f"),), choice="required", name="g")
    for wrong in ({"name": "f"}, {"function": {"name": 1}}, "f", {"function": {"name": "a b"}}):
        with pytest.raises(PromptError):
            read_tool(wrong)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match=r"of 'f' must be a JSON schema, got \[\]"):
        read_tool({"type": "function", "function": {"name": "f", "parameters": []}})
    with pytest.raises(PromptError, match="only assistant messages hold tool calls"):
        Message("user", "Hi", tool_calls=(CALL,))
    with pytest.raises(PromptError, match="U\\+0000"):
        Message("assistant", "", tool_calls=(ToolCall("f", "\0"),))


def read(text: str, size: int) -> list[str | ToolCall]:
    """What a reader makes of a text that arrives in pieces; pieces of text joined."""
    reader = ToolCallReader()
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    items: list[str | ToolCall] = []
    for item in [i for piece in pieces for i in reader.put(piece)] + reader.flush():
        if isinstance(item, str) and items and isinstance(items[-1], str):
            items[-1] += item
        else:
            items.append(item)
    return items


F, G = ToolCall("f", '{"a": "ü"}'), ToolCall("g", "{}")
F_TEXT = '<tool_call>\n{"name": "f", "arguments": {"a": "\\u00fc"}}\n</tool_call>'


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("just text", ["just text"]),
        (F_TEXT, [F]),
        (f"Sure. \n{F_TEXT}", ["Sure.", F]),
        (F_TEXT + '\n<tool_call>{"name": "g"}</tool_call>\n', [F, G]),
        (f"{F_TEXT}\nDone.", [F, "\nDone."]),
        # whole, but the model ended its turn without the closing mark
        ('<tool_call>\n{"name": "g", "arguments": {}}', [G]),
        # malformed: kept as text
        ("a <tool_call>no json</tool_call> b", ["a <tool_call>no json</tool_call> b"]),
        ('<tool_call>{"name": 1}</tool_call>', ['<tool_call>{"name": 1}</tool_call>']),
        ('<tool_call>{"name": ""}</tool_call>', ['<tool_call>{"name": ""}</tool_call>']),
        ('<tool_call>["f"]</tool_call>', ['<tool_call>["f"]</tool_call>']),
        (
            '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
            ['<tool_call>{"name": "f", "arguments": "x"}</tool_call>'],
        ),
        ('x <tool_call>{"name": "f", "argu', ['x <tool_call>{"name": "f", "argu']),
        (
            '<tool_call>{"name": "g", "arguments": {"a": NaN}}</tool_call>',
            ['<tool_call>{"name": "g", "arguments": {"a": NaN}}</tool_call>'],
        ),
        (
            '<tool_call>{"name": "g", "arguments": {"a": "\\ud800"}}</tool_call>',
            [ToolCall("g", '{"a": "\\ud800"}')],
        ),
        # the closing mark inside a string closes nothing
        (
            '<tool_call>{"name": "g", "arguments": {"a": "\\"</tool_call>"}}</tool_call>',
            [ToolCall("g", '{"a": "\\"</tool_call>"}')],
        ),
        ("5 <tool_c", ["5 <tool_c"]),
        ("</tool_call> a < b <<tool_x>", ["</tool_call> a < b <<tool_x>"]),
        (f"{F_TEXT} <tool_call>?</tool_call>", [F, " <tool_call>?</tool_call>"]),
    ],
)
def test_calls_are_separated_from_text(
    text: str, expected: list[str | ToolCall], size: int
) -> None:
    assert read(text, size) == expected


def test_nesting_beyond_all_bounds_is_text() -> None:
    text = '{"name": "f", "arguments": ' + '{"a": ' * 200_000
    assert read_call(text) is None


def test_text_is_shown_as_soon_as_it_cannot_be_a_call() -> None:
    reader = ToolCallReader()
    assert reader.put("a <") == ["a"]
    assert reader.put("b") == [" <b"]


def test_a_forced_call_that_was_cut_off_is_one() -> None:
    cut = '<tool_call>\n{"name": "f", "arguments": {"a": "x'
    reader = ToolCallReader(forced=True)
    assert reader.put(cut) + reader.flush() == [ToolCall("f", '{"a": "x')]
    reader = ToolCallReader(forced=True)
    assert reader.put(cut[:20]) + reader.flush() == [cut[:20]]
