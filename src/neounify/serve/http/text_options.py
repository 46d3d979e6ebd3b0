"""What bodies ask of text answers: tools, formats, log-probabilities, several answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from neounify.pipeline.chatting import ChatRequest, CompletionRequest
from neounify.serve.http.chat_schema import ChatBody, NamedTool
from neounify.serve.http.errors import bad_request, blame
from neounify.text.tools import Tool, ToolUse

Request = TypeVar("Request", ChatRequest, CompletionRequest)
SEEDS = 2**64


def tools_of(body: ChatBody) -> ToolUse:
    """Which tools may and must be called. Raises ApiError and PromptError for what cannot be."""
    named = body.tool_choice if isinstance(body.tool_choice, NamedTool) else None
    with blame("tools"):
        tools = tuple(
            Tool(
                name=tool.function.name,
                description=tool.function.description or "",
                parameters=tool.function.parameters,
            )
            for tool in body.tools
        )
    return ToolUse(
        tools=tools,
        choice="required" if isinstance(body.tool_choice, NamedTool) else body.tool_choice,
        name=None if named is None else named.function.name,
        parallel=body.parallel_tool_calls,
    )


def logprobs_of(body: ChatBody) -> int | None:
    """How many alternatives are reported with every token; None: not even its own."""
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
    return body.top_logprobs if body.logprobs else None


def check_text_only(body: ChatBody) -> None:
    """Raises ApiError for what answers with images do not have."""
    for name, asked in (
        ("n", body.n > 1),
        ("tools", bool(body.tools)),
        ("response_format", body.response_format.type != "text"),
        ("logprobs", body.logprobs),
    ):
        if asked:
            raise bad_request(f"{name}: not supported for answers with images", name, "unsupported")


def for_each_answer(request: Request, n: int) -> Sequence[Request]:
    """The requests of `n` answers; the first has the seed that was given, each next one more."""
    seed = request.sampling.seed
    if seed is None:
        return [request] * n
    return [
        replace(request, sampling=replace(request.sampling, seed=_moved(seed, number)))
        for number in range(n)
    ]


def _moved(seed: int, by: int) -> int:
    """A seed further on, within the range that seeds have."""
    moved = seed + by
    return moved - SEEDS if moved >= SEEDS else moved
