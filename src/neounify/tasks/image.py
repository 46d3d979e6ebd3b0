"""Image generation and editing: prompts of the guidance branches, and the program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import PIL.Image
from torch import Tensor

from neounify.config import TextSampling
from neounify.engine.generation import preview_steps
from neounify.engine.messages import (
    Append,
    Decode,
    GenerateImages,
    ImageInput,
    ImageReady,
    Prefill,
    Prefix,
    Release,
    SequenceName,
    TensorRef,
    TextInput,
    Token,
    new_number,
)
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ResolvedSampling
from neounify.model.layout import Grid
from neounify.tasks.answer import AnswerEvents
from neounify.tasks.events import ImageFinished, Preview
from neounify.tasks.processor import Processor
from neounify.tasks.program import (
    NEXT,
    Compute,
    Pack,
    Program,
    Usage,
    export,
    new_sequences,
    pack_images,
    prompt_inputs,
    take_pixels,
)
from neounify.tasks.requests import ImageRequest
from neounify.text.special import IM_END, THINK_CLOSE
from neounify.text.template import (
    Prompt,
    after_think_ids,
    image_prompt,
    images_only_prompt,
    place_images,
    unconditional_prompt,
)

Request = TypeVar("Request")
KeptPrefixes = Mapping[str, str]
"""Names of unconditional prefixes that the generation engine keeps, by their negative prompt."""


def edit_images(processor: Processor, images: Sequence[PIL.Image.Image]) -> list[Tensor]:
    """Input images of editing and interleaving [3, height, width], resized and normalised."""
    return processor.prepare(images, *processor.config.sampling.edit_bounds(len(images)))


def branch_prompt(processor: Processor, request: ImageRequest, branch: Branch) -> Prompt:
    """Prompt of an image for one guidance branch."""
    tokenizer, count = processor.tokenizer, len(request.images)
    negative = request.negative_prompt
    if branch == "uncond":
        return unconditional_prompt(tokenizer, negative)
    if branch == "image":
        return images_only_prompt(tokenizer, count, open_image=True, negative=negative)
    system = processor.system_message if request.system is None else request.system
    text = place_images(request.prompt, count, numbered=True)
    return image_prompt(tokenizer, text, system=system, think=request.think)


def generate_images(
    processor: Processor, request: ImageRequest, kept: KeptPrefixes, previews: int | None
) -> Program[None]:
    """Generate the images of one prompt, after a thought if requested.

    At most `previews` of each image are events, None for one after every step.
    """
    closing = [processor.token(THINK_CLOSE), *after_think_ids(processor.tokenizer)]
    room = request.max_think_tokens + len(closing) if request.think else 0
    prefilled = branches_to_prefill(request.sampling, request.negative_prompt, kept)
    names, usage, _ = yield from prefill_branches(
        processor, request, request.images, branch_prompt, prefilled, {"cond": room}
    )
    if request.think:
        yield from _think(processor, request, names["cond"], usage)
    prefixes = yield from branch_prefixes(request.sampling, request.negative_prompt, names, kept)
    # Denoising reads the exports; text must not wait for the blocks of these sequences.
    yield Release(tuple(names.values()))
    noise: Tensor = yield Compute(partial(request.start, processor.config))
    grid = request.grid(processor.config)
    yield from denoise(noise, grid, request.sampling, prefixes, previews, usage)
    yield usage.finished(None)


def branches_to_prefill(
    sampling: ResolvedSampling, negative_prompt: str, kept: KeptPrefixes
) -> list[Branch]:
    """Guidance branches whose prompt the request prefills: all but a kept one."""
    branches = sampling.guidance.branches()
    return [b for b in branches if b != "uncond" or negative_prompt not in kept]


def prefill_branches(
    processor: Processor,
    request: Request,
    images: Sequence[PIL.Image.Image],
    prompt: Callable[[Processor, Request, Branch], Prompt],
    branches: Sequence[Branch],
    room: Mapping[str, int],
) -> Program[tuple[dict[Branch, SequenceName], Usage, list[ImageInput]]]:
    """Prefill the prompt of every branch; `room` tokens may follow each.

    Each image is prepared and packed once for all branches.
    """

    def prepare() -> tuple[list[Tensor], dict[Branch, Prompt]]:
        prepared = edit_images(processor, images)
        return prepared, {branch: prompt(processor, request, branch) for branch in branches}

    prepared, prompts = yield Compute(prepare)
    packed = yield from pack_images(prepared, processor.config.token_size)
    sequences = new_sequences(*branches)
    names: dict[Branch, SequenceName] = {branch: sequences[branch] for branch in branches}
    inputs = {names[branch]: prompt_inputs(prompts[branch], packed) for branch in branches}
    rooms = {names[branch]: room.get(branch, 0) for branch in branches}
    prefilled = yield Prefill(new_number(), inputs, rooms)
    return names, Usage.of(inputs[names["cond"]], prefilled), packed


def branch_prefixes(
    sampling: ResolvedSampling,
    negative_prompt: str,
    names: Mapping[Branch, SequenceName],
    kept: KeptPrefixes,
) -> Program[dict[Branch, Prefix | str]]:
    """Prefix of each guidance branch: exported, or the name of a kept one."""
    exported = yield from export(list(names.values()))
    prefixes: dict[Branch, Prefix | str] = dict(zip(names, exported, strict=True))
    for branch in sampling.guidance.branches():
        if branch not in prefixes:
            prefixes[branch] = kept[negative_prompt]
    return prefixes


def denoise(
    noise: Tensor,
    grid: Grid,
    sampling: ResolvedSampling,
    prefixes: Mapping[Branch, Prefix | str],
    previews: int | None,
    usage: Usage,
    first: int = 0,
) -> Program[list[Tensor]]:
    """Images [3, height, width] from `noise` [count, tokens, 3·C²]; events number from `first`."""
    ref: TensorRef = yield Pack({"noise": noise})
    steps = preview_steps(sampling.steps, previews)
    answer = yield GenerateImages(new_number(), ref, grid, sampling, prefixes, steps)
    images: dict[int, Tensor] = {}
    while True:
        pixels = yield from take_pixels(answer)
        if isinstance(answer, ImageReady):
            images[answer.index] = pixels
            usage.images += grid.length
            yield ImageFinished(first + answer.index, pixels)
            if len(images) == noise.shape[0]:
                return [images[index] for index in sorted(images)]
        else:
            yield Preview(first + answer.index, answer.step, answer.steps, pixels)
        answer = yield NEXT


def _think(
    processor: Processor, request: ImageRequest, name: SequenceName, usage: Usage
) -> Program[None]:
    """Decode the thought and open the image behind it."""
    close = processor.token(THINK_CLOSE)
    stops = frozenset((close, processor.token(IM_END)))
    text = AnswerEvents(processor, processor.tokenizer.stream, thinking=True)
    answer = yield Decode(new_number(), name, TextSampling(), stops, request.max_think_tokens)
    while isinstance(answer, Token):
        usage.completion += 1
        usage.reasoning += 1
        yield answer
        yield from text.put(answer)
        answer = yield NEXT
    yield from text.flush()
    # As published: a thought cut off by its limit or by <|im_end|> is not closed.
    closing = (close,) if answer.stopped_by == close else ()
    ids = (*answer.pending, *closing, *after_think_ids(processor.tokenizer))
    yield Append(new_number(), {name: (TextInput(ids),)})
