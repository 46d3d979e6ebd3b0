"""Function calling in prompts and answers: the Qwen3 format of the language backbone.

Definitions stand in the system turn between `<tools>` marks, a call in an answer between
`<tool_call>` marks, results in a user turn between `<tool_response>` marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neounify.errors import PromptError

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<tool_response>", "</tool_response>"

MARKS = (CALL_OPEN, CALL_CLOSE, RESPONSE_OPEN, RESPONSE_CLOSE)
"""Single tokens in the published tokenizers; text that a user typed must not become one."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_ESCAPED = re.compile(r"\\.", re.DOTALL)
_BEGUN = re.compile(r'\s*\{"name": "([A-Za-z0-9_.-]{1,64})", "arguments": ')

_HEAD = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
TOOLS_FOOT = f"""
</tools>

For each function call, return a json object with function name and arguments within \
{CALL_OPEN}{CALL_CLOSE} XML tags:
{CALL_OPEN}
{{"name": <function-name>, "arguments": <args-json-object>}}
{CALL_CLOSE}"""


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function that the model may call; `parameters` is a JSON schema, None for no arguments.

    Raises PromptError for a name other than 1 to 64 letters, digits, `_`, `-` and `.`.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise PromptError(
                f"a tool's name must be 1 to 64 letters, digits, _, - or ., got {self.name[:80]!r}"
            )

    @property
    def schema(self) -> Mapping[str, Any]:
        """The JSON schema of the arguments."""
        if self.parameters is not None:
            return self.parameters
        return {"type": "object", "properties": {}, "additionalProperties": False}

    def definition(self) -> str:
        """The definition as one line of JSON, in the order the backbone was taught."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return _json({"type": "function", "function": function})


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """Functions that a model may call in an answer, and whether it must call one.

    With `choice` "none" the prompt does not list them, with "required" the answer must be a call,
    of the function called `name` where that is given. `parallel` allows several calls in one
    answer. Raises PromptError for two tools of one name, and for a choice without a tool.
    """

    tools: tuple[Tool, ...] = ()
    choice: Literal["auto", "none", "required"] = "auto"
    name: str | None = None
    parallel: bool = True

    def __post_init__(self) -> None:
        names = [tool.name for tool in self.tools]
        for name in names:
            if names.count(name) > 1:
                raise PromptError(
                    f"tools: {names.count(name)} tools are called {name!r}; a name stands for one",
                    param="tools",
                )
        if self.choice not in ("auto", "none", "required"):
            raise PromptError(
                f"tool_choice: must be auto, none or required, got {self.choice!r}",
                param="tool_choice",
            )
        if self.choice == "required" and not self.tools:
            raise PromptError(
                "tool_choice: a call is required, but there are no tools", param="tool_choice"
            )
        if self.name is not None and (self.choice != "required" or self.name not in names):
            raise PromptError(
                f"tool_choice: there is no tool called {self.name!r}; tools are "
                f"{', '.join(names) or 'none'}",
                param="tool_choice",
            )

    @property
    def offered(self) -> tuple[Tool, ...]:
        """The tools that the prompt describes."""
        return () if self.choice == "none" else self.tools

    @property
    def forced(self) -> tuple[Tool, ...]:
        """The tools of which one must be called; none where the model is free."""
        if self.choice != "required":
            return ()
        return tuple(tool for tool in self.tools if self.name in (None, tool.name))


@dataclass(frozen=True)
class ToolCall:
    """A call of a function; `arguments` are JSON text, as far as the model wrote them."""

    name: str
    arguments: str

    def as_json(self) -> str:
        """The object that stands between the marks."""
        try:
            arguments = _json(json.loads(self.arguments))
        except (ValueError, RecursionError):
            arguments = self.arguments  # cut off by a limit, and sent back as it is
        return f'{{"name": {_json(self.name)}, "arguments": {arguments}}}'


def tools_head(tools: Sequence[Tool]) -> str:
    """The part of the system message that offers `tools`; TOOLS_FOOT follows it."""
    return "\n".join([_HEAD, *(tool.definition() for tool in tools)])


def read_tool(value: Tool | Mapping[str, Any]) -> Tool:
    """A tool as OpenAI's clients write it: {"type": "function", "function": {"name", …}}.

    Raises PromptError for what is none.
    """
    if isinstance(value, Tool):
        return value
    function = value.get("function") if isinstance(value, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise PromptError(
            "tools: a tool is {'type': 'function', 'function': {'name': …, 'parameters': …}}, "
            f"got {str(value)[:80]}",
            param="tools",
        )
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise PromptError(
            f"tools: the parameters of {function['name'][:64]!r} must be a JSON schema, got "
            f"{str(parameters)[:80]}",
            param="tools",
        )
    description = function.get("description")
    return Tool(
        name=function["name"],
        description=description if isinstance(description, str) else "",
        parameters=parameters,
    )


def read_call(text: str) -> ToolCall | None:
    """The call that stands between two marks; None where it is not one."""
    try:
        call = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict) or not _NAME.fullmatch(call["name"]):
        return None
    return ToolCall(call["name"], _json(arguments))


class ToolCallReader:
    """Separates the calls from the text of an answer that arrives in pieces.

    Text that may be the beginning of a call is held back. Text between the marks that is not a
    call stays text, marks included; with `forced` a call that a limit cut off counts.
    """

    def __init__(self, *, forced: bool = False) -> None:
        self._forced = forced
        self._pending = ""
        self._space = ""
        self._inside = False
        self._called = False

    def put(self, piece: str) -> list[str | ToolCall]:
        """Add text; the pieces of text and the calls that are complete now."""
        self._pending += piece
        pieces: list[str | ToolCall] = []
        while True:
            if self._inside:
                end = _end_of_call(self._pending)
                if end < 0:
                    return pieces
                body = self._pending[:end]
                self._pending = self._pending[end + len(CALL_CLOSE) :]
                self._inside = False
                call = read_call(body)
                self._called |= call is not None
                pieces.append(call or f"{self._space}{CALL_OPEN}{body}{CALL_CLOSE}")
                continue
            start = self._pending.find(CALL_OPEN)
            if start >= 0:
                text = self._pending[:start].rstrip()
                self._add_text(text, pieces)
                self._space = self._pending[len(text) : start]
                self._pending = self._pending[start + len(CALL_OPEN) :]
                self._inside = True
                continue
            keep = len(self._pending) - _overlap(self._pending)
            keep = len(self._pending[:keep].rstrip())  # whitespace in front of a call is not text
            self._add_text(self._pending[:keep], pieces)
            self._pending = self._pending[keep:]
            return pieces

    def flush(self) -> list[str | ToolCall]:
        """The rest at the end of the answer; a call without an end counts if it is whole."""
        text, inside = self._pending, self._inside
        self._pending, self._inside = "", False
        if not inside:
            return [text] if text and not (self._called and not text.strip()) else []
        call = read_call(text) or (_cut_call(text) if self._forced else None)
        return [call or self._space + CALL_OPEN + text]

    def _add_text(self, text: str, pieces: list[str | ToolCall]) -> None:
        """Add text to the pieces, without the line ends between and behind calls."""
        if self._called:
            text = text if text.strip() else ""
        if text:
            pieces.append(text)


def _end_of_call(text: str) -> int:
    """Index of the closing mark that is no part of a JSON string; -1 where there is none."""
    end = text.find(CALL_CLOSE)
    while end >= 0 and _ESCAPED.sub("", text[:end]).count('"') % 2:
        end = text.find(CALL_CLOSE, end + 1)
    return end


def _cut_call(text: str) -> ToolCall | None:
    """A call whose arguments were cut off."""
    head = _BEGUN.match(text)
    return None if head is None else ToolCall(head[1], text[head.end() :])


def _overlap(text: str) -> int:
    """Number of characters at the end of `text` that may begin the mark of a call."""
    return max((n for n in range(1, len(CALL_OPEN)) if text.endswith(CALL_OPEN[:n])), default=0)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # An escaped lone surrogate is JSON, but as a character it is no text.
    return json.dumps(value) if _SURROGATE.search(text) else text
