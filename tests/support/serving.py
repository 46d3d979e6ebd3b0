"""Running a service in a test, and what an answer was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from neounify.serve.service import EngineService, ServiceRequest
from neounify.tasks.program import Finished, ImageFinished, Preview, TextPiece

T = TypeVar("T")


@dataclass
class Collected:
    """Everything one request gave back."""

    text: str = ""
    thought: str = ""
    images: dict[int, Tensor] = field(default_factory=dict)
    previews: list[Preview] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    finished: Finished | None = None


async def collect(service: EngineService, request: ServiceRequest, **options: object) -> Collected:
    collected = Collected()
    async for event in service.answer(request, **options):  # type: ignore[arg-type]
        collected.order.append(type(event).__name__)
        match event:
            case TextPiece(text, thought):
                if thought:
                    collected.thought += text
                else:
                    collected.text += text
            case ImageFinished(index, pixels):
                collected.images[index] = pixels
            case Preview():
                collected.previews.append(event)
            case Finished():
                collected.finished = event
    return collected


@asynccontextmanager
async def running(service: EngineService) -> AsyncIterator[EngineService]:
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def serve(service: EngineService, work: Callable[[EngineService], Awaitable[T]]) -> T:
    """Run `work` against a started service."""

    async def main() -> T:
        async with running(service) as started:
            return await work(started)

    return asyncio.run(main())


def same_image(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
