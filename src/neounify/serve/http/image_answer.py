"""From the engines' events to painted images: in one answer, or as events while they come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from neounify.pipeline.request import PaintRequest
from neounify.serve.events import Finished, Painted, Preview, TextPiece
from neounify.serve.http.context import Context
from neounify.serve.http.facts import facts_of
from neounify.serve.http.image_schema import ImageBody
from neounify.serve.http.pictures import Form, to_base64, write_picture
from neounify.serve.http.rendering import json_response, sse_of


class ImagesAnswer:
    """The images of one HTTP request, each a request of its own to the engines."""

    def __init__(self, body: ImageBody, requests: Sequence[PaintRequest], context: Context) -> None:
        self._body, self._requests, self._context = body, requests, context
        self._thoughts = [""] * len(requests)
        self._finished: list[Finished] = []
        first = requests[0]
        self._about = {
            "background": "opaque",
            "output_format": body.output_format,
            "quality": body.quality,
            "size": f"{first.width}x{first.height}",
        }

    async def whole(self, http: Request) -> JSONResponse:
        """OpenAI's images response."""
        images: dict[int, dict[str, Any]] = {}
        async with aclosing(self._events()) as events:
            async for number, event in events:
                if isinstance(event, Painted):
                    images[number] = await self._image(number, event, http)
        if len(images) != len(self._requests):
            raise RuntimeError("the engines ended without painting every image")
        content = {
            "created": int(time.time()),
            "data": [images[number] | self._own(number) for number in sorted(images)],
            **self._about,
            "usage": self._usage(),
        }
        size = sum(len(image.get("b64_json", "")) for image in images.values())
        return await json_response(lambda: content, size)

    async def chunks(self) -> AsyncGenerator[bytes]:
        """OpenAI's events of partial and completed images."""
        kind = "image_edit" if self._requests[0].images else "image_generation"
        partial: Counter[int] = Counter()
        painted: dict[int, str] = {}
        async with aclosing(self._events()) as events:
            async for number, event in events:
                if isinstance(event, Preview):
                    fields = {
                        "partial_image_index": partial[number],
                        "step": event.step,
                        "steps": event.steps,
                    }
                    partial[number] += 1
                    image = await self._write(number, event, to_base64)
                    yield await self._event(f"{kind}.partial_image", number, image, fields)
                elif isinstance(event, Painted):
                    painted[number] = await self._write(number, event, to_base64)
                elif isinstance(event, Finished):
                    usage = {"usage": self._usage_of([event])}
                    image = painted.pop(number)
                    yield await self._event(f"{kind}.completed", number, image, usage)

    async def _events(
        self,
    ) -> AsyncGenerator[tuple[int, Preview | Painted | Finished]]:
        groups = [[request] for request in self._requests]
        async with aclosing(self._context.answers(groups, self._body)) as events:
            async for number, event in events:
                if isinstance(event, TextPiece):
                    self._thoughts[number] += event.text
                    continue
                if isinstance(event, Finished):
                    self._finished.append(event)
                if isinstance(event, Preview | Painted | Finished):
                    yield number, event

    async def _write(
        self, number: int, event: Preview | Painted, form: Callable[[bytes], Form]
    ) -> Form:
        context, format = self._context, self._body.output_format
        facts = facts_of(self._requests[number], event, context.settings)
        return await write_picture(context.hooks, event.pixels, format, facts, form)

    async def _image(self, number: int, event: Painted, http: Request) -> dict[str, Any]:
        if self._body.response_format == "b64_json":
            return {"b64_json": await self._write(number, event, to_base64)}
        context, suffix = self._context, self._body.output_format
        file = await self._write(number, event, bytes)
        name = context.results.put(file, f"image/{suffix}", suffix)
        base = context.settings.public_url or str(http.base_url)
        return {"url": f"{base.rstrip('/')}/v1/results/{name}"}

    async def _event(self, kind: str, number: int, image: str, fields: dict[str, Any]) -> bytes:
        data = {
            "type": kind,
            "b64_json": image,
            "created_at": int(time.time()),
            **self._about,
            "index": number,
            **self._own(number),
            **fields,
        }
        return await sse_of(lambda: data, len(image), kind)

    def _own(self, number: int) -> dict[str, Any]:
        thought = self._thoughts[number]
        seed = {"seed": self._requests[number].seed}
        return seed | ({"reasoning_content": thought} if thought else {})

    def _usage(self) -> dict[str, Any]:
        return self._usage_of(self._finished)

    def _usage_of(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """The prompt counts once, as it is the same for all images."""
        prompt, shown = finished[0].prompt_tokens, finished[0].prompt_image_tokens
        images = sum(f.image_tokens for f in finished)
        text = sum(f.completion_tokens for f in finished)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": finished[0].cached_tokens,
                "image_tokens": shown,
                "text_tokens": prompt - shown,
            },
            "output_tokens": images + text,
            "output_tokens_details": {"image_tokens": images, "text_tokens": text},
            "total_tokens": prompt + images + text,
        }
