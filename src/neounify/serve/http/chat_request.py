"""Chat bodies turned into requests to the service: images decoded, options checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from neounify.serve.http.chat_schema import (
    ChatBody,
    ChatImagePart,
    ChatMessage,
    ChatTextPart,
    NamedTool,
)
from neounify.serve.http.context import Context, seed_or_random
from neounify.serve.http.errors import bad_request, blame
from neounify.serve.http.media import RequestImages
from neounify.serve.http.streaming import off_loop
from neounify.serve.http.text_answers import for_each_answer
from neounify.tasks.chat import ChatRequest
from neounify.tasks.conversation import read_conversation, read_request
from neounify.tasks.interleave import InterleaveRequest
from neounify.text.message import IMAGE_MARK
from neounify.text.tools import Tool, ToolCall, ToolUse

_HOLD_IMAGES = ("user", "assistant")
DEFAULT_TOKENS = 512
"""`max_tokens` where a body has none."""


@dataclass(frozen=True)
class Turn:
    """A message of a conversation: its texts and decoded images in their order."""

    role: str
    pieces: list[str | PIL.Image.Image]
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text with IMAGE_MARK in the place of each image."""
        return "".join(p if isinstance(p, str) else IMAGE_MARK for p in self.pieces)

    @property
    def images(self) -> list[PIL.Image.Image]:
        return [p for p in self.pieces if isinstance(p, PIL.Image.Image)]

    def for_pipeline(self) -> dict[str, Any]:
        parts = [
            {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p}
            for p in self.pieces
        ]
        return {"role": self.role, "content": parts, "tool_calls": self.tool_calls}


async def read_turns(body: ChatBody, context: Context) -> list[Turn]:
    """The messages of a body. Raises ApiError for images that are misplaced or unreadable."""
    parts_of_messages = await off_loop(
        lambda: [_parts(message, index) for index, message in enumerate(body.messages)],
        body.text_size,
    )
    count = sum(isinstance(part, ChatImagePart) for parts in parts_of_messages for part in parts)
    images = context.input_images(count, "messages")
    turns = []
    for index, (message, parts) in enumerate(zip(body.messages, parts_of_messages, strict=True)):
        with blame(f"messages.{index}.content"):
            pieces = [await _read_part(part, images) for part in parts]
        role = "system" if message.role == "developer" else message.role
        calls = [call.function for call in message.tool_calls or ()]
        turns.append(
            Turn(
                role,
                _in_lines(pieces) if role == "user" else pieces,
                tuple(ToolCall(call.name, call.arguments) for call in calls),
            )
        )
    return turns


def _parts(message: ChatMessage, index: int) -> list[ChatTextPart | ChatImagePart]:
    """The parts of a message. Raises ApiError for images in a role that holds none."""
    parts = message.parts
    if message.role not in _HOLD_IMAGES and any(isinstance(p, ChatImagePart) for p in parts):
        what = "result of a tool" if message.role == "tool" else f"{message.role} message"
        raise bad_request(
            f"messages.{index}.content: a {what} is text; put images into user messages",
            f"messages.{index}.content",
        )
    if message.images and message.role != "assistant":
        raise bad_request(
            f"messages.{index}.images: is for earlier answers; put images of a {message.role} "
            "message into its content",
            f"messages.{index}.images",
        )
    return parts


def _in_lines(pieces: list[str | PIL.Image.Image]) -> list[str | PIL.Image.Image]:
    """The pieces with a line break after each leading image, as in the prompts of training."""
    leading = list(itertools.takewhile(lambda p: not isinstance(p, str), pieces))
    rest = pieces[len(leading) :]
    if not rest:
        return pieces
    return [piece for image in leading for piece in (image, "\n")] + rest


async def _read_part(
    part: ChatTextPart | ChatImagePart, images: RequestImages
) -> str | PIL.Image.Image:
    if isinstance(part, ChatTextPart):
        return part.text
    return await images.read_url(part.image_url.url)


def tools_of(body: ChatBody) -> ToolUse:
    """The tools of a body, and which must be called. Raises ApiError and PromptError."""
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
    """Number of alternatives reported with every token; None for no log-probabilities at all."""
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
    return body.top_logprobs if body.logprobs else None


def check_text_only(body: ChatBody) -> None:
    """Raises ApiError for fields that answers with images do not support."""
    for name, asked in (
        ("n", body.n > 1),
        ("tools", bool(body.tools)),
        ("response_format", body.response_format.type != "text"),
        ("logprobs", body.logprobs),
    ):
        if asked:
            raise bad_request(f"{name}: not supported for answers with images", name, "unsupported")


async def read_chat(
    body: ChatBody, context: Context
) -> Sequence[ChatRequest] | Sequence[InterleaveRequest]:
    """A request for each of the `n` answers.

    Raises ApiError, PromptError, ImageError, RequestError and Refused.
    """
    context.check_model(body.model)
    context.check_n(body.n)
    turns = await read_turns(body, context)
    images = [image for turn in turns for image in turn.images]
    tools = tools_of(body)
    await context.check_prompt(_texts(body, turns, tools), images)
    if body.wants_images:
        check_text_only(body)
        return [await off_loop(lambda: _interleave_request(body, turns, context), body.text_size)]
    return await off_loop(lambda: _chat_requests(body, turns, tools, context), body.text_size)


def _texts(body: ChatBody, turns: Sequence[Turn], tools: ToolUse) -> Iterator[str]:
    """Every text in a body, for content checks."""
    yield from (turn.text for turn in turns)
    yield from (tool.definition() for tool in tools.offered)
    yield from (call.arguments for turn in turns for call in turn.tool_calls)
    if body.negative_prompt:
        yield body.negative_prompt


def _chat_requests(
    body: ChatBody, turns: Sequence[Turn], tools: ToolUse, context: Context
) -> Sequence[ChatRequest]:
    messages, images = read_conversation([turn.for_pipeline() for turn in turns], ())
    request = ChatRequest(
        messages=messages,
        images=images,
        max_new_tokens=_max_tokens(body, context),
        stop=body.stops,
        think=body.thinks,
        sampling=body.sampling(seed=body.seed, logprobs=logprobs_of(body)),
        tool_use=tools,
        response_format=body.response_format.schema_of_answer,
    )
    return for_each_answer(request, body.n)


def _interleave_request(body: ChatBody, turns: list[Turn], context: Context) -> InterleaveRequest:
    if "text" not in body.modalities:
        raise bad_request(
            'modalities: use ["text", "image"], or /v1/images/generations for images alone',
            "modalities",
        )
    if body.stops:
        raise bad_request("stop: answers with images take no stop strings", "stop")
    system = turns.pop(0).text if turns[0].role == "system" else ""
    with blame("messages"):
        text, history, images = read_request([turn.for_pipeline() for turn in turns], ())
    references = turns[-1].images
    seed = seed_or_random(body.seed)
    max_images = context.settings.limits.answer_images
    if body.max_images is not None and body.max_images > max_images:
        raise bad_request(
            f"max_images: {body.max_images} is over this server's {max_images}", "max_images"
        )
    return InterleaveRequest(
        prompt=text,
        history=history,
        sizes=[context.size(body, references[0] if references else None)],
        sampling=context.sampling(body, editing=True, steps=body.steps),
        images=images,
        max_images=max_images if body.max_images is None else body.max_images,
        max_new_tokens=_max_tokens(body, context),
        seed=seed,
        negative_prompt=body.negative_prompt,
        think=body.thinks,
        system=system,
        text=body.sampling(seed=seed),
    )


def _max_tokens(body: ChatBody, context: Context) -> int:
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise bad_request(
                "max_tokens and max_completion_tokens are the same setting with different "
                f"values, {body.max_tokens} and {body.max_completion_tokens}; give one of them",
                "max_tokens",
            )
        return context.check_tokens(body.max_completion_tokens, "max_completion_tokens")
    if body.max_tokens is not None:
        return context.check_tokens(body.max_tokens, "max_tokens")
    return min(DEFAULT_TOKENS, context.settings.limits.tokens)
