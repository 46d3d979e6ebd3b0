"""POST /v1/chat/completions: bodies as requests, events as completions, whole or in chunks."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from neounify.serve.http.chat_schema import (
    ChatBody,
    ChatCompletion,
    ChatImagePart,
    ChatMessage,
    ChatTextPart,
    ChatVideoPart,
    Part,
)
from neounify.serve.http.completions import Choice, TextAnswer, for_each_answer, of_chat
from neounify.serve.http.connections import BoundedRoute, add_warnings
from neounify.serve.http.errors import bad_request
from neounify.serve.http.fields import blame, seeds_of
from neounify.serve.http.serving import (
    EVENTS,
    ServerState,
    State,
    account_of,
    off_loop,
    to_base64,
)
from neounify.tasks.chat import CHAT_TOKENS, ChatRequest, read_conversation, read_request
from neounify.tasks.clips import Frames, clip_ranges
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.program import (
    Finished,
    ImageFinished,
    Preview,
    PromptPrefilled,
    TaskEvent,
    TextPiece,
    ToolCallPiece,
)
from neounify.text.forms import TEMPLATES
from neounify.text.template import IMAGE_MARK
from neounify.text.tools import ToolCall, ToolUse

Piece = str | PIL.Image.Image | Frames
_HOLD_IMAGES = ("user", "assistant")
router = APIRouter(tags=["chat"], route_class=BoundedRoute)


# --- requests ---


@dataclass(frozen=True)
class ChatTurn:
    """A message of a conversation: its texts and decoded images and clips in their order."""

    role: str
    pieces: list[Piece]
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text with IMAGE_MARK in the place of each image and frame."""
        return "".join(map(_text_of, self.pieces))

    @property
    def images(self) -> list[PIL.Image.Image]:
        """The images, frames of clips included."""
        images: list[PIL.Image.Image] = []
        for piece in self.pieces:
            if not isinstance(piece, str):
                images += piece.frames if isinstance(piece, Frames) else [piece]
        return images

    def for_pipeline(self) -> dict[str, Any]:
        parts = [{"type": kind, kind: piece} for piece in self.pieces for kind in [_kind(piece)]]
        return {"role": self.role, "content": parts, "tool_calls": self.tool_calls}


def _text_of(piece: Piece) -> str:
    if isinstance(piece, Frames):
        return piece.stamps
    return piece if isinstance(piece, str) else IMAGE_MARK


def _kind(piece: Piece) -> str:
    if isinstance(piece, Frames):
        return "video"
    return "text" if isinstance(piece, str) else "image"


async def read_turns(
    body: ChatBody, state: ServerState, caller: str, warnings: list[str]
) -> list[ChatTurn]:
    """The messages of a body. Raises ApiError for misplaced or unreadable images and clips.

    `warnings` gets those about clips.
    """
    parts_of_messages = await off_loop(
        lambda: [_parts(message, index) for index, message in enumerate(body.messages)],
        body.text_size,
    )
    urls = [
        (f"messages.{index}.content", part.image_url.url)
        for index, parts in enumerate(parts_of_messages)
        for part in parts
        if isinstance(part, ChatImagePart)
    ]
    images = iter(await state.read_images(urls, "messages"))
    clips = iter(await _read_clips(body, parts_of_messages, state, caller, warnings))
    turns, line = [], TEMPLATES[state.service.config.template].image_line
    for message, parts in zip(body.messages, parts_of_messages, strict=True):
        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, ChatTextPart):
                pieces.append(part.text)
            else:
                pieces.append(next(clips) if isinstance(part, ChatVideoPart) else next(images))
        role = "system" if message.role == "developer" else message.role
        calls = [call.function for call in message.tool_calls or ()]
        turns.append(
            ChatTurn(
                role,
                _in_lines(pieces, line) if role == "user" else pieces,
                tuple(ToolCall(call.name, call.arguments) for call in calls),
            )
        )
    return turns


async def _read_clips(
    body: ChatBody,
    parts_of_messages: Sequence[Sequence[Part]],
    state: ServerState,
    caller: str,
    warnings: list[str],
) -> Sequence[Frames]:
    sources = [
        (f"messages.{index}.content.{number}", part.video_url.url)
        for index, parts in enumerate(parts_of_messages)
        for number, part in enumerate(parts)
        if isinstance(part, ChatVideoPart)
    ]
    if not sources:
        return ()
    from neounify.serve.http.input_videos import read_videos

    return await read_videos(sources, body.media_io_kwargs.video, state, caller, warnings)


def _parts(message: ChatMessage, index: int) -> list[Part]:
    """The parts of a message. Raises ApiError for images and clips in a role that holds none."""
    parts = message.parts
    content = message.content if isinstance(message.content, list) else []
    if message.role != "user" and any(isinstance(p, ChatVideoPart) for p in content):
        raise bad_request(
            f"messages.{index}.content: only user messages hold videos, this one is "
            f"{message.role!r}",
            f"messages.{index}.content",
        )
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


def _in_lines(pieces: list[Piece], line: str) -> list[Piece]:
    """The pieces with `line` after each leading image, as in the prompts of training."""
    leading = list(itertools.takewhile(lambda p: isinstance(p, PIL.Image.Image), pieces))
    rest = pieces[len(leading) :]
    if not rest or not line:
        return pieces
    return [piece for image in leading for piece in (image, line)] + rest


async def read_chat(
    body: ChatBody, state: ServerState, caller: str, warnings: list[str]
) -> Sequence[ChatRequest] | Sequence[InterleaveRequest]:
    """A request for each of the `n` answers; `warnings` gets those about clips.

    Raises ApiError, PromptError, ImageError, RequestError and Refused.
    """
    state.check_model(body.model)
    state.check_n(body.n)
    tools = _checked_tools(body, state)
    # What takes time comes after what does not.
    turns = await read_turns(body, state, caller, warnings)
    images = [image for turn in turns for image in turn.images]
    await state.check_prompt(_texts(body, turns, tools), images)
    if body.wants_images:
        return [await off_loop(lambda: _interleave_request(body, turns, state), body.text_size)]
    return await off_loop(lambda: _chat_requests(body, turns, tools, state), body.text_size)


def _checked_tools(body: ChatBody, state: ServerState) -> ToolUse:
    """The tools. Raises as `read_chat` does for fields that are wrong whatever the images are."""
    _max_tokens(body, state)
    body.sampling(seed=body.seed, logprobs=None if body.wants_images else body.alternatives)
    if body.wants_images:
        body.check_interleaved()
        _max_images(body, state)
        state.sampling(body, editing=True, steps=body.steps)
    return body.tool_use


def _texts(body: ChatBody, turns: Sequence[ChatTurn], tools: ToolUse) -> Iterator[str]:
    """Every text in a body, for content checks."""
    yield from (turn.text for turn in turns)
    yield from (tool.definition() for tool in tools.offered)
    yield from (call.arguments for turn in turns for call in turn.tool_calls)
    if body.negative_prompt:
        yield body.negative_prompt


def _chat_requests(
    body: ChatBody, turns: Sequence[ChatTurn], tools: ToolUse, state: ServerState
) -> Sequence[ChatRequest]:
    conversation = [turn.for_pipeline() for turn in turns]
    messages, images = read_conversation(conversation, (), state.service.processor.template)
    request = ChatRequest(
        messages=messages,
        images=images,
        clips=clip_ranges(conversation, images),
        max_new_tokens=_max_tokens(body, state),
        stop=body.stops,
        think=body.thinks,
        sampling=body.sampling(seed=body.seed, logprobs=body.alternatives),
        tool_use=tools,
        response_format=body.response_format.schema_of_answer,
    )
    return for_each_answer(request, body.n)


def _interleave_request(
    body: ChatBody, turns: list[ChatTurn], state: ServerState
) -> InterleaveRequest:
    system = turns.pop(0).text if turns[0].role == "system" else ""
    with blame("messages"):
        text, history, images = read_request([turn.for_pipeline() for turn in turns], ())
    references = turns[-1].images
    [seed] = seeds_of(body.seed, 1)
    return InterleaveRequest(
        prompt=text,
        history=history,
        sizes=[state.size(body, references[0] if references else None)],
        sampling=state.sampling(body, editing=True, steps=body.steps),
        images=images,
        max_images=_max_images(body, state),
        max_new_tokens=_max_tokens(body, state),
        seed=seed,
        negative_prompt=body.negative_prompt,
        think=body.thinks,
        system=system,
        text=body.sampling(seed=seed),
    )


def _max_images(body: ChatBody, state: ServerState) -> int:
    max_images = state.config.limits.answer_images
    if body.max_images is None:
        return max_images
    if body.max_images > max_images:
        raise bad_request(
            f"max_images: {body.max_images} is over this server's {max_images}", "max_images"
        )
    return body.max_images


def _max_tokens(body: ChatBody, state: ServerState) -> int:
    if body.max_completion_tokens is not None:
        if body.max_tokens not in (None, body.max_completion_tokens):
            raise bad_request(
                "max_tokens and max_completion_tokens are the same setting with different "
                f"values, {body.max_tokens} and {body.max_completion_tokens}; give one of them",
                "max_tokens",
            )
        return state.check_tokens(body.max_completion_tokens, "max_completion_tokens")
    if body.max_tokens is not None:
        return state.check_tokens(body.max_tokens, "max_tokens")
    return min(CHAT_TOKENS, state.config.limits.tokens)


# --- answers ---


class _Choice(Choice):
    """One choice in progress."""

    def __init__(self) -> None:
        super().__init__()
        self.content = _Content()
        self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.is_begun = False
        """Whether a stream has sent its first chunk, which names the role."""

    def add(self, event: TaskEvent) -> None:
        """Take in an event, images apart."""
        super().add(event)
        if isinstance(event, TextPiece) and event.thought:
            self.reasoning += event.text
        elif isinstance(event, TextPiece):
            self.content.add_text(event.text)

    def count(self, event: TaskEvent) -> None:
        super().count(event)
        if isinstance(event, ToolCallPiece):
            function = {"name": event.name, "arguments": event.arguments}
            call_id = f"call_{secrets.token_hex(12)}"
            self.calls.append({"id": call_id, "type": "function", "function": function})

    @property
    def size(self) -> int:
        """Approximate bytes of the answer as JSON."""
        calls = sum(len(call["function"]["arguments"]) for call in self.calls)
        return super().size + self.content.size + len(self.reasoning) + calls

    @property
    def finish_reason(self) -> str:
        """Reason why the answer ended."""
        reason = self.finished.finish_reason
        return "tool_calls" if self.calls and reason == "stop" else reason


class ChatAnswer(TextAnswer[ChatBody, _Choice]):
    """The answer to one body in progress: one choice, or `n` of them to the same messages."""

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    async def add(self, choice: _Choice, event: TaskEvent) -> None:
        if isinstance(event, ImageFinished):
            choice.content.add_image(event.index, await self._url(event), event.evaluations)
        else:
            choice.add(event)

    def choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        message |= choice.content.message(self._form)
        if choice.calls:
            message["tool_calls"] = choice.calls
            message["content"] = message["content"] or None
        if self.body.thinks and self.body.include_reasoning:
            message["reasoning_content"] = choice.reasoning
        return {
            "index": index,
            "message": message,
            "finish_reason": choice.finish_reason,
            "logprobs": of_chat(choice.log_probs) if self.body.logprobs else None,
        }

    async def chunks(self, index: int, choice: _Choice, event: TaskEvent) -> list[dict[str, Any]]:
        is_thought = isinstance(event, TextPiece) and event.thought
        if isinstance(event, PromptPrefilled) or (is_thought and not self.body.include_reasoning):
            return []
        choice.count(event)
        deltas = await self._deltas(choice, event)
        if not choice.is_begun:
            choice.is_begun = True
            deltas.insert(0, {"role": "assistant", "content": ""})
        chunks: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "finish_reason": None, "logprobs": None}
            for delta in deltas
        ]
        if isinstance(event, Finished):
            chunks[-1]["finish_reason"] = choice.finish_reason
        elif self.body.logprobs and isinstance(event, TextPiece | ToolCallPiece) and not is_thought:
            chunks[-1]["logprobs"] = of_chat(event.log_probs)
        return chunks

    async def _deltas(self, choice: _Choice, event: TaskEvent) -> list[dict[str, Any]]:
        """The `delta` of every chunk that an event becomes."""
        if isinstance(event, TextPiece):
            return [{"reasoning_content" if event.thought else "content": event.text}]
        if isinstance(event, ToolCallPiece):
            index, call = {"index": len(choice.calls) - 1}, choice.calls[-1]
            head = call | {"function": {"name": event.name, "arguments": ""}}
            arguments = {"function": {"arguments": event.arguments}}
            return [{"tool_calls": [index | head]}, {"tool_calls": [index | arguments]}]
        if not isinstance(event, Preview | ImageFinished):
            return [{}]
        image = _image(await self._url(event), event.index)
        if isinstance(event, Preview):
            return [{"image_preview": image | {"step": event.step, "steps": event.steps}}]
        if self._form == "markdown":
            return [{"content": _markdown(image)}]
        return [{"images": [image | {"evaluations": event.evaluations}]}]

    @property
    def _form(self) -> str:
        return self.body.content_format if self.body.wants_images else "string"

    async def _url(self, event: Preview | ImageFinished) -> str:
        [[request]] = self.groups
        if not isinstance(request, InterleaveRequest):
            raise RuntimeError("an answer in text alone came with an image")
        format = self.body.output_format
        file = await self.state.encode(request, event, format, to_base64)
        return f"data:image/{format};base64,{file}"


class _Content:
    """Text and images of an answer in their order."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._text = ""

    def add_text(self, text: str) -> None:
        if not self._parts or self._parts[-1]["type"] != "text":
            self._parts.append({"type": "text", "text": ""})
        self._parts[-1]["text"] += text
        self._text += text

    def add_image(self, index: int, url: str, evaluations: float) -> None:
        self._parts.append({"type": "image_url", "image_url": {"url": url}})
        about = {"evaluations": evaluations, "text_offset": len(self._text)}
        self._images.append(_image(url, index) | about)

    @property
    def size(self) -> int:
        """Characters of the text and of the images' URLs."""
        return len(self._text) + sum(len(image["image_url"]["url"]) for image in self._images)

    def message(self, form: str) -> dict[str, Any]:
        """The fields `content` and `images` of a message, as parts, string or markdown."""
        if form == "parts":
            return {"content": self._parts}
        if form == "markdown":
            text = "".join(
                _markdown(part) if "image_url" in part else part["text"] for part in self._parts
            )
            return {"content": text}
        images = {"images": self._images} if self._images else {}
        return {"content": self._text} | images


def _image(url: str, index: int) -> dict[str, Any]:
    return {"type": "image_url", "index": index, "image_url": {"url": url}}


def _markdown(image: dict[str, Any]) -> str:
    return f"![image]({image['image_url']['url']})"


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation, in text or in text and images",
    response_class=JSONResponse,
    responses={200: {"model": ChatCompletion, "content": EVENTS}},
)
async def chat_completions(body: ChatBody, request: Request, state: State) -> Response:
    """Text and images in; text, or with `modalities: ["text", "image"]` both, out."""
    warnings: list[str] = []
    reading = read_chat(body, state, account_of(request), warnings)
    requests = await state.deadline(body).bound(reading)
    response = await ChatAnswer(body, [requests], state, _Choice).response()
    add_warnings(response, warnings)
    return response
