"""From the engines' events to chat completions, whole or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from neounify.pipeline.chatting import ChatRequest
from neounify.pipeline.interleaving import InterleaveRequest
from neounify.serve.events import Finished, Painted, Preview, TextPiece
from neounify.serve.http.chat_schema import ChatBody
from neounify.serve.http.context import Context
from neounify.serve.http.facts import facts_of
from neounify.serve.http.pictures import to_data_url, write_picture
from neounify.serve.http.sse import DONE, sse


class ChatAnswer:
    """One answer under way."""

    def __init__(
        self, body: ChatBody, request: ChatRequest | InterleaveRequest, context: Context
    ) -> None:
        self._body, self._request, self._context = body, request, context
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": context.settings.model_name,
        }

    async def whole(self) -> dict[str, Any]:
        """The `chat.completion`."""
        content = _Content()
        reasoning = ""
        finished = None
        async with aclosing(self._context.answer(self._request, self._body)) as events:
            async for event in events:
                if isinstance(event, TextPiece) and event.thought:
                    reasoning += event.text
                elif isinstance(event, TextPiece):
                    content.add_text(event.text)
                elif isinstance(event, Painted):
                    content.add_image(event.index, await self._url(event))
                elif isinstance(event, Finished):
                    finished = event
        if finished is None:
            raise RuntimeError("the engines ended an answer without Finished")
        message = {"role": "assistant", "refusal": None}
        message |= content.message(as_parts=self._as_parts)
        if self._body.thinks and self._body.include_reasoning:
            message["reasoning_content"] = reasoning
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": finished.finish_reason,
            "logprobs": None,
        }
        return self._head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(finished),
        }

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The `chat.completion.chunk`s as server-sent events, ended by [DONE]."""
        begun = False
        silent = not self._body.include_reasoning
        async with aclosing(self._context.answer(self._request, self._body)) as events:
            async for event in events:
                if silent and isinstance(event, TextPiece) and event.thought:
                    continue
                if not begun:
                    yield self._chunk({"role": "assistant", "content": ""})
                    begun = True
                if isinstance(event, Finished):
                    yield self._chunk({}, finish_reason=event.finish_reason)
                    if self._body.stream_options.include_usage:
                        yield sse(self._chunk_head() | {"choices": [], "usage": _usage(event)})
                else:
                    yield self._chunk(await self._delta(event))
        yield DONE

    @property
    def _as_parts(self) -> bool:
        return self._body.paints and self._body.content_format == "parts"

    async def _delta(self, event: TextPiece | Preview | Painted) -> dict[str, Any]:
        if isinstance(event, TextPiece):
            return {"reasoning_content" if event.thought else "content": event.text}
        image = _image(await self._url(event), event.index)
        if isinstance(event, Painted):
            return {"images": [image]}
        return {"image_preview": image | {"step": event.step, "steps": event.steps}}

    async def _url(self, event: Preview | Painted) -> str:
        if isinstance(self._request, ChatRequest):
            raise RuntimeError("the engines painted in a text answer")
        facts = facts_of(self._request, event, self._context.settings.model_name)
        file = await write_picture(
            self._context.hooks, event.pixels, self._body.output_format, facts
        )
        return to_data_url(file, self._body.output_format)

    def _chunk_head(self) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk"}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        chunk = self._chunk_head() | {"choices": [choice]}
        if self._body.stream_options.include_usage:
            chunk["usage"] = None
        return sse(chunk)


class _Content:
    """Text and images in the order in which they came."""

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

    def message(self, *, as_parts: bool) -> dict[str, Any]:
        if as_parts:
            return {"content": self._parts}
        images = {"images": self._images} if self._images else {}
        return {"content": self._text} | images


def _image(url: str, index: int) -> dict[str, Any]:
    return {"type": "image_url", "index": index, "image_url": {"url": url}}


def _usage(finished: Finished) -> dict[str, Any]:
    return {
        "prompt_tokens": finished.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": finished.cached_tokens},
        "completion_tokens_details": {"image_tokens": finished.image_tokens},
    }
