"""POST /v1/chat/completions: events of the service as completions, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from neounify.serve.http.chat_request import read_chat
from neounify.serve.http.chat_schema import ChatBody, ChatCompletion
from neounify.serve.http.connections import BoundedRoute
from neounify.serve.http.context import Context, Shared
from neounify.serve.http.media import encode_result, image_metadata, to_data_url
from neounify.serve.http.streaming import DONE, EVENTS, json_response, off_loop, sse, start_stream
from neounify.serve.http.text_answers import Choice, of_chat, text_usage
from neounify.tasks.chat import ChatRequest
from neounify.tasks.events import (
    Finished,
    ImageFinished,
    Preview,
    PromptRead,
    TaskEvent,
    TextPiece,
    ToolCallPiece,
)
from neounify.tasks.interleave import InterleaveRequest

router = APIRouter(tags=["chat"], route_class=BoundedRoute)


class ChatAnswer:
    """The answer to one body in progress: one choice, or `n` of them to the same messages."""

    def __init__(
        self,
        body: ChatBody,
        requests: Sequence[ChatRequest] | Sequence[InterleaveRequest],
        context: Context,
    ) -> None:
        self._body, self._requests, self._context = body, requests, context
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": context.settings.model_name,
        }

    async def whole(self) -> JSONResponse:
        """The `chat.completion`."""
        choices = [_Choice() for _ in self._requests]
        async with aclosing(self._events()) as events:
            async for index, event in events:
                if isinstance(event, ImageFinished):
                    choices[index].content.add_image(event.index, await self._url(event))
                else:
                    choices[index].add(event)
        size = sum(choice.size for choice in choices)
        return await json_response(partial(self._whole, choices), size)

    def _whole(self, choices: Sequence[_Choice]) -> dict[str, Any]:
        return self._head | {
            "object": "chat.completion",
            "choices": [self._choice(index, choice) for index, choice in enumerate(choices)],
            "usage": _usage(choices),
        }

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The `chat.completion.chunk`s as server-sent events, ended by [DONE]."""
        choices = [_Choice() for _ in self._requests]
        begun: set[int] = set()
        silent = not self._body.include_reasoning
        async with aclosing(self._events()) as events:
            async for index, event in events:
                if isinstance(event, PromptRead):
                    continue
                if silent and isinstance(event, TextPiece) and event.thought:
                    continue
                if index not in begun:
                    yield self._chunk(index, {"role": "assistant", "content": ""})
                    begun.add(index)
                choice = choices[index]
                choice.count(event)
                if isinstance(event, Finished):
                    yield self._chunk(index, {}, finish_reason=choice.finish_reason)
                    continue
                if isinstance(event, Preview | ImageFinished):
                    url = await self._url(event)
                    yield await off_loop(partial(self._image_chunk, index, event, url), len(url))
                    continue
                *deltas, last = self._deltas(choice, event)
                for delta in deltas:
                    yield self._chunk(index, delta)
                yield self._chunk(index, last, self._log_probs(event))
        if self._body.stream_options.include_usage:
            yield sse(self._chunk_head() | {"choices": [], "usage": _usage(choices)})
        yield DONE

    def _events(self) -> AsyncGenerator[tuple[int, TaskEvent]]:
        return self._context.answers([self._requests], self._body)

    @property
    def _form(self) -> str:
        return self._body.content_format if self._body.wants_images else "string"

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        message |= choice.content.message(self._form)
        if choice.calls:
            message["tool_calls"] = choice.calls
            message["content"] = message["content"] or None
        if self._body.thinks and self._body.include_reasoning:
            message["reasoning_content"] = choice.reasoning
        return {
            "index": index,
            "message": message,
            "finish_reason": choice.finish_reason,
            "logprobs": of_chat(choice.log_probs) if self._body.logprobs else None,
        }

    def _log_probs(self, event: TaskEvent) -> dict[str, Any] | None:
        """The `logprobs` of a chunk; None for thoughts."""
        if not self._body.logprobs or not isinstance(event, TextPiece | ToolCallPiece):
            return None
        if isinstance(event, TextPiece) and event.thought:
            return None
        return of_chat(event.log_probs)

    def _deltas(self, choice: _Choice, event: TextPiece | ToolCallPiece) -> list[dict[str, Any]]:
        if isinstance(event, TextPiece):
            return [{"reasoning_content" if event.thought else "content": event.text}]
        index, call = {"index": len(choice.calls) - 1}, choice.calls[-1]
        head = call | {"function": {"name": event.name, "arguments": ""}}
        arguments = {"function": {"arguments": event.arguments}}
        return [{"tool_calls": [index | head]}, {"tool_calls": [index | arguments]}]

    def _image_chunk(self, index: int, event: Preview | ImageFinished, url: str) -> bytes:
        image = _image(url, event.index)
        if isinstance(event, Preview):
            progress = {"step": event.step, "steps": event.steps}
            return self._chunk(index, {"image_preview": image | progress})
        if self._form == "markdown":
            return self._chunk(index, {"content": _markdown(image)})
        return self._chunk(index, {"images": [image]})

    async def _url(self, event: Preview | ImageFinished) -> str:
        [request] = self._requests
        if isinstance(request, ChatRequest):
            raise RuntimeError("an answer in text alone came with an image")
        metadata = image_metadata(request, event, self._context.settings)
        format = self._body.output_format
        form = partial(to_data_url, format=format)
        return await encode_result(self._context.hooks, event.pixels, format, metadata, form)

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk"}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        log_probs: dict[str, Any] | None = None,
        *,
        finish_reason: str | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "finish_reason": finish_reason,
            "logprobs": log_probs,
        }
        chunk = self._chunk_head() | {"choices": [choice]}
        if self._body.stream_options.include_usage:
            chunk["usage"] = None
        return sse(chunk)


class _Choice(Choice):
    """One choice in progress."""

    def __init__(self) -> None:
        super().__init__()
        self.content = _Content()
        self.reasoning = ""
        self.calls: list[dict[str, Any]] = []

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
        """About the bytes of the answer as JSON."""
        calls = sum(len(call["function"]["arguments"]) for call in self.calls)
        return super().size + self.content.size + len(self.reasoning) + calls

    @property
    def finish_reason(self) -> str:
        """Why the answer ended."""
        reason = self.finished.finish_reason
        return "tool_calls" if self.calls and reason == "stop" else reason


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

    def add_image(self, index: int, url: str) -> None:
        self._parts.append({"type": "image_url", "image_url": {"url": url}})
        self._images.append(_image(url, index) | {"text_offset": len(self._text)})

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


def _usage(choices: Sequence[_Choice]) -> dict[str, Any]:
    """The usage of answers to one prompt."""
    finished = [choice.finished for choice in choices]
    return text_usage(finished, finished[:1])


@router.post(
    "/v1/chat/completions",
    summary="Continue a conversation, in text or in text and images",
    response_class=JSONResponse,
    responses={200: {"model": ChatCompletion, "content": EVENTS}},
)
async def chat_completions(body: ChatBody, context: Shared) -> Response:
    """Text and images in; text, or with `modalities: ["text", "image"]` both, out."""
    requests = await read_chat(body, context)
    answer = ChatAnswer(body, requests, context)
    if body.stream:
        return await start_stream(answer.chunks())
    return await answer.whole()
