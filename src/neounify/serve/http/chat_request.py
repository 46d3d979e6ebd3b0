"""From the body of a chat completion to what the engines answer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from neounify.pipeline.chatting import ChatRequest
from neounify.pipeline.interleaving import InterleaveRequest
from neounify.pipeline.messages import read_conversation
from neounify.serve.http.chat_schema import ChatBody, ImagePart, TextPart
from neounify.serve.http.context import Context, new_seed
from neounify.serve.http.errors import bad_request, blame
from neounify.serve.http.pictures import RequestImages
from neounify.serve.http.text_options import (
    check_text_only,
    for_each_answer,
    logprobs_of,
    tools_of,
)
from neounify.text.template import IMAGE_MARK
from neounify.text.tools import ToolCall

DEFAULT_TOKENS = 512


@dataclass(frozen=True)
class _Turn:
    role: str
    pieces: list[str | PIL.Image.Image]
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text with a mark in each picture's place."""
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


async def read_chat(
    body: ChatBody, context: Context
) -> Sequence[ChatRequest] | Sequence[InterleaveRequest]:
    """A request for each of the `n` answers.

    Raises ApiError, PromptError, ImageError, RequestError and Refused.
    """
    context.check_model(body.model)
    context.check_n(body.n)
    turns = await _read_turns(body, context)
    images = [image for turn in turns for image in turn.images]
    tools = tools_of(body)
    texts = [turn.text for turn in turns] + [tool.definition() for tool in tools.offered]
    texts += [call.arguments for turn in turns for call in turn.tool_calls]
    texts += filter(None, (body.negative_prompt,))
    await context.check_prompt("\n".join(texts), images)
    if body.paints:
        check_text_only(body)
        return [_interleave_request(body, turns, context)]
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


async def _read_turns(body: ChatBody, context: Context) -> list[_Turn]:
    limits = context.settings.limits
    count = sum(isinstance(p, ImagePart) for message in body.messages for p in message.parts)
    if count > limits.images:
        raise bad_request(
            f"{count} images in one request; at most {limits.images} are read", "messages"
        )
    images = context.input_images(count)
    turns = []
    for place, message in enumerate(body.messages):
        with blame(f"messages.{place}.content"):
            pieces = [await _read_part(part, images) for part in message.parts]
        role = "system" if message.role == "developer" else message.role
        calls = [call.function for call in message.tool_calls or ()]
        if message.role == "tool" and not all(isinstance(piece, str) for piece in pieces):
            raise bad_request("the result of a tool is text", f"messages.{place}.content")
        turns.append(
            _Turn(
                role,
                _in_lines(pieces),
                tuple(ToolCall(call.name, call.arguments) for call in calls),
            )
        )
    return turns


def _in_lines(pieces: list[str | PIL.Image.Image]) -> list[str | PIL.Image.Image]:
    """Pictures in front of a message each end their line, as in the prompts models learn from."""
    leading = list(itertools.takewhile(lambda p: not isinstance(p, str), pieces))
    rest = pieces[len(leading) :]
    if not rest:
        return pieces
    return [piece for picture in leading for piece in (picture, "\n")] + rest


async def _read_part(part: TextPart | ImagePart, images: RequestImages) -> str | PIL.Image.Image:
    if isinstance(part, TextPart):
        return part.text
    return await images.read_url(part.image_url.url)


def _interleave_request(body: ChatBody, turns: list[_Turn], context: Context) -> InterleaveRequest:
    if "text" not in body.modalities:
        raise bad_request(
            'modalities: use ["text", "image"], or /v1/images/generations for images alone',
            "modalities",
        )
    if body.stops:
        raise bad_request("stop: answers with images take no stop strings", "stop")
    system = turns.pop(0).text if turns[0].role == "system" else ""
    if len(turns) != 1 or turns[0].role != "user":
        raise bad_request(
            "messages: an answer with images takes one user message, after a system message "
            "or not; earlier turns cannot be continued with images",
            "messages",
        )
    [turn] = turns
    seed = new_seed(body.seed)
    most = context.settings.limits.answer_images
    if body.max_images is not None and body.max_images > most:
        raise bad_request(f"max_images: at most {most} on this server", "max_images")
    return InterleaveRequest(
        prompt=turn.text,
        sizes=[context.size(body, turn.images[0] if turn.images else None)],
        sampling=context.sampling(body, editing=True, steps=body.steps),
        images=turn.images,
        max_images=most if body.max_images is None else body.max_images,
        max_new_tokens=_max_tokens(body, context),
        seed=seed,
        negative_prompt=body.negative_prompt,
        think=body.thinks,
        system=system,
        text=body.sampling(seed=seed),
    )


def _max_tokens(body: ChatBody, context: Context) -> int:
    if body.max_completion_tokens is not None:
        return context.check_tokens(body.max_completion_tokens, "max_completion_tokens")
    if body.max_tokens is not None:
        return context.check_tokens(body.max_tokens, "max_tokens")
    return min(DEFAULT_TOKENS, context.settings.limits.tokens)
