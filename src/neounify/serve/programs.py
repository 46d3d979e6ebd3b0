"""What each kind of request makes the engines do, step by step.

The same steps as in `pipeline/`, on engines that many requests share. Rules stand there and are
called from here: prompts, noise, what a model sees of its own pictures.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from neounify.config import TextSampling
from neounify.engine.messages import (
    Done,
    Opened,
    PicturePart,
    Prefix,
    PromptPart,
    TextPart,
    Token,
    Written,
)
from neounify.errors import ContextFullError
from neounify.flow.guidance import Branch
from neounify.model.layout import Grid
from neounify.pipeline.chatting import (
    ChatRequest,
    CompletionRequest,
    answer_text,
    call_reader,
    chat_images,
    constrained,
    prompt_of,
)
from neounify.pipeline.interleaving import InterleaveRequest, draw_noise, seen_again, turn_prompt
from neounify.pipeline.painting import branch_prompt, edit_images
from neounify.serve.answer_events import AnswerEvents
from neounify.serve.events import (
    Finished,
    Painted,
    Preview,
    PromptRead,
    ServiceEvent,
    TextPiece,
)
from neounify.serve.session import Session
from neounify.tasks.answer import AnswerText
from neounify.tasks.processor import Front
from neounify.tasks.requests import PaintRequest
from neounify.text.special import END_OF_TEXT, IM_END, IMAGE_CLOSE, IMAGE_OPEN, THINK_CLOSE
from neounify.text.template import Prompt, after_think_ids

Events = AsyncGenerator[ServiceEvent]
Painting = TypeVar("Painting", PaintRequest, InterleaveRequest)
_CONTEXT_FULL = Written("length", None, ())
"""How an answer ends that has no room for another image."""
UNCONDITIONAL = "uncond"
"""Name of the prefix that every guided image shares; the service has the engine keep it."""


@dataclass
class _Usage:
    """Counts for the last event; `prompt` is what the conditional prompt holds."""

    prompt: int = 0
    prompt_images: int = 0
    cached: int = 0
    written: int = 0
    thought: int = 0
    painted: int = 0

    @classmethod
    def of(cls, prompt: Sequence[PromptPart], opened: Opened) -> _Usage:
        """Before anything is written."""
        images = sum(part.tokens for part in prompt if isinstance(part, PicturePart))
        tokens = sum(part.tokens for part in prompt)
        # What was known of the other branches' prompts is not of this one.
        return cls(tokens, images, min(opened.cached, tokens))

    def finished(self, written: Written | None) -> Finished:
        """The last event."""
        return Finished(
            "stop" if written is None else written.finish_reason,
            prompt_tokens=self.prompt,
            completion_tokens=self.written,
            cached_tokens=self.cached,
            image_tokens=self.painted,
            prompt_image_tokens=self.prompt_images,
            reasoning_tokens=self.thought,
        )


async def chat(session: Session, front: Front, request: ChatRequest, previews: int) -> Events:
    """Text, the thought and calls of functions apart from the answer."""
    # Off the event loop, as a schema may take a while to compile and a prompt to tokenise; once,
    # as each way into a thread and back waits for the interpreter beside the engines.
    sampling, prompt, images = await asyncio.to_thread(_prepare_chat, front, request)
    parts = await session.parts(prompt, images, front.config.token_size)
    text = AnswerEvents(
        front,
        lambda: answer_text(front, request),
        thinking=request.think,
        calls=call_reader(request),
    )
    stops = frozenset((front.token(IM_END),))
    async for event in _write(session, parts, text, sampling, stops, request.max_new_tokens):
        yield event


def _prepare_chat(front: Front, request: ChatRequest) -> tuple[TextSampling, Prompt, list[Tensor]]:
    sampling = constrained(front, request)
    return sampling, prompt_of(front, request), chat_images(front, request)


async def complete(
    session: Session, front: Front, request: CompletionRequest, previews: int
) -> Events:
    """A text that is continued as it stands."""
    ids = await asyncio.to_thread(request.ids, front)
    text = AnswerEvents(
        front,
        lambda: AnswerText(front.tokenizer.stream(), request.stop, strip=False),
        thoughts=False,
    )
    ends = (front.tokenizer.find(name) for name in (IM_END, END_OF_TEXT))
    stops = frozenset(end for end in ends if end is not None)
    if request.echo:
        prompt = request.prompt
        yield TextPiece(prompt if isinstance(prompt, str) else front.tokenizer.decode(ids, False))
    async for event in _write(
        session, [TextPart(ids)], text, request.sampling, stops, request.max_new_tokens
    ):
        yield event


async def _write(
    session: Session,
    parts: Sequence[PromptPart],
    text: AnswerEvents,
    sampling: TextSampling,
    stops: frozenset[int],
    most: int,
) -> Events:
    usage = _Usage()
    ended = None
    async for answer in session.open_and_write("cond", parts, sampling, stops, most):
        if isinstance(answer, Opened):
            usage = _Usage.of(parts, answer)
            yield PromptRead()
            continue
        if isinstance(answer, Written):
            ended = answer
            break
        usage.written += 1
        usage.thought += text.thinking
        for piece in text.put(answer):
            yield piece
        if text.stopped:
            break
    for piece in text.flush():
        yield piece
    yield usage.finished(ended)


async def paint(session: Session, front: Front, request: PaintRequest, previews: int) -> Events:
    """Images of one prompt, behind a thought if one is asked for."""
    closing = [front.token(THINK_CLOSE), *after_think_ids(front.tokenizer)]
    thinking = request.max_think_tokens + len(closing) if request.think else 0
    usage = await _open(session, front, request, branch_prompt, words=thinking)
    if request.think:
        async for event in _think(session, front, request, usage):
            yield event
    prefixes = await _prefixes(session, request)
    # The image is painted behind copies; texts must not wait for the room of what they are of.
    session.leave(_own(request))
    noise = await asyncio.to_thread(request.start, front.config)
    grid = request.grid(front.config)
    async for seen, pixels in session.paint(noise, grid, request.sampling, prefixes, previews):
        if isinstance(seen, Done):
            usage.painted += grid.length
            yield Painted(seen.index, pixels)
        else:
            yield Preview(seen.index, seen.step, seen.steps, pixels)
    yield usage.finished(None)


async def interleave(
    session: Session, front: Front, request: InterleaveRequest, previews: int
) -> Events:
    """Text and images by turns; an image is read back by the model that painted it."""
    side = front.config.token_size
    seeing = [branch for branch in _own(request) if branch != "uncond"]
    # Room for one image; how many more the cache has room for shows as the answer grows.
    pictures = request.max_images and max(_tokens(front, size) for size in request.sizes) + 2
    usage = await _open(
        session, front, request, turn_prompt, words=request.max_new_tokens, pictures=pictures
    )
    generator = torch.Generator().manual_seed(request.seed)
    opens = front.token(IMAGE_OPEN)
    stops = frozenset((front.token(IM_END), opens))
    text = AnswerEvents(front, front.tokenizer.stream)
    for index in range(request.max_images + 1):
        ended: Written | None = None
        async for answer in session.write("cond", request.text, stops, request.max_new_tokens):
            if isinstance(answer, Written):
                ended = answer
                break
            usage.written += 1
            usage.thought += text.thinking
            for piece in text.put(answer):
                yield piece
        for piece in text.flush():
            yield piece
        if ended is None or ended.stopped_by != opens or index == request.max_images:
            break
        size = request.sizes[min(index, len(request.sizes) - 1)]
        try:
            await session.extend({branch: (TextPart((opens,)),) for branch in seeing})
        except ContextFullError:
            ended = _CONTEXT_FULL
            break
        prefixes = await _prefixes(session, request)
        if index + 1 == request.max_images:
            # Only text may follow, which the conditional sequence alone goes on with.
            session.leave(branch for branch in _own(request) if branch != "cond")
            seeing = ["cond"]
        noise = await asyncio.to_thread(draw_noise, front.config, *size, generator)
        grid = Grid.of_pixels(size[1], size[0], side)
        finished: Tensor | None = None
        async for seen, pixels in session.paint(
            noise[None], grid, request.sampling, prefixes, previews
        ):
            if isinstance(seen, Done):
                finished = pixels
            else:
                yield Preview(index, seen.step, seen.steps, pixels)
        assert finished is not None
        yield Painted(index, finished)
        usage.painted += grid.length
        again = await asyncio.to_thread(seen_again, finished, front.dtype)
        shown: dict[str, tuple[PromptPart, ...]] = {
            branch: (await session.picture(again, side), TextPart((front.token(IMAGE_CLOSE),)))
            for branch in seeing
        }
        try:
            await session.extend(shown)
        except ContextFullError:
            ended = _CONTEXT_FULL
            break
    yield usage.finished(ended)


async def _open(
    session: Session,
    front: Front,
    request: Painting,
    prompt: Callable[[Front, Painting, Branch], Prompt],
    *,
    words: int,
    pictures: int = 0,
) -> _Usage:
    """Read the prompt of every branch that is not kept.

    There is room for `words` tokens behind the conditional one, and for `pictures` behind
    all that see images.
    """
    own = _own(request)
    images = await asyncio.to_thread(edit_images, front, request.images)
    side = front.config.token_size
    parts: dict[str, list[PromptPart]] = {}
    for branch in own:
        # Off the event loop: a long text takes a while to tokenise.
        read = await asyncio.to_thread(prompt, front, request, branch)
        parts[branch] = await session.parts(read, images, side)
    room = {b: (words if b == "cond" else 0) + (pictures if b != "uncond" else 0) for b in parts}
    return _Usage.of(parts["cond"], await session.open(parts, room))


async def _think(session: Session, front: Front, request: PaintRequest, usage: _Usage) -> Events:
    """Write the thought and open the image behind it."""
    close = front.token(THINK_CLOSE)
    stops = frozenset((close, front.token(IM_END)))
    text = AnswerEvents(front, front.tokenizer.stream, thinking=True)
    async for answer in session.write("cond", TextSampling(), stops, request.max_think_tokens):
        if isinstance(answer, Token):
            usage.written += 1
            usage.thought += 1
            for piece in text.put(answer):
                yield piece
            continue
        for piece in text.flush():
            yield piece
        closing = (close,) if answer.stopped_by == close else ()
        ids = (*answer.pending, *closing, *after_think_ids(front.tokenizer))
        await session.extend({"cond": (TextPart(ids),)})


async def _prefixes(session: Session, request: Painting) -> dict[Branch, Prefix | str]:
    own = _own(request)
    prefixes: dict[Branch, Prefix | str] = dict(zip(own, await session.export(own), strict=True))
    for branch in request.sampling.guidance.branches():
        prefixes.setdefault(branch, UNCONDITIONAL)
    return prefixes


def _own(request: PaintRequest | InterleaveRequest) -> list[Branch]:
    """The branches whose prompt the request reads itself.

    The unconditional one is kept for all, but a negative prompt makes it the request's own.
    """
    branches = request.sampling.guidance.branches()
    return [b for b in branches if b != "uncond" or request.negative_prompt]


def _tokens(front: Front, size: tuple[int, int]) -> int:
    return size[0] * size[1] // front.config.token_size**2
