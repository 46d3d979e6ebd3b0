"""Clips frame by frame: every frame is an image behind its time that sees those made before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from neounify.engine.messages import Append, Release, TextInput, new_number
from neounify.errors import RequestError
from neounify.flow.guidance import Branch
from neounify.image.clips import frame_levels
from neounify.model.layout import Grid
from neounify.tasks.image import (
    ImageRequest,
    KeptPrefixes,
    branch_prefixes,
    branches_to_prefill,
    denoise,
    draw_noise,
    generate_images,
    prefill_branches,
)
from neounify.tasks.interleave import append_generated
from neounify.tasks.program import (
    FramesFinished,
    ImageFinished,
    Preview,
    Processor,
    Program,
    Returned,
    TaskEvent,
    Usage,
    resume,
)
from neounify.text.clips import frame_order, time_stamp
from neounify.text.template import Prompt, interleave_prompt, place_images
from neounify.text.tokens import IMAGE_OPEN


def image_program(
    processor: Processor, request: ImageRequest, kept: KeptPrefixes, previews: int | None
) -> Program[None]:
    """The program of a request: that of images and whole clips, or of clips frame by frame."""
    by_frame = request.frames and processor.config.frame_by_frame
    program = generate_frames if by_frame else generate_images
    return program(processor, request, kept, previews)


def generate_frames(
    processor: Processor, request: ImageRequest, kept: KeptPrefixes, previews: int | None
) -> Program[None]:
    """Generate the clips of one prompt, one after the other, each frame by frame.

    At most `previews` of each clip are events, of finished frames; None for one after every step.
    Raises RequestError for a thought.
    """
    processor.config.check_can("generate_video")
    if request.think:
        raise RequestError("think is not for clips that are made frame by frame", param="think")
    shared = torch.Generator().manual_seed(request.seed)
    usage_of_all: Usage | None = None
    for index in range(request.count):
        generator = torch.Generator().manual_seed(request.seeds[index]) if request.seeds else shared
        usage = yield from _clip(processor, request, kept, previews, index, generator)
        if usage_of_all is None:
            usage_of_all = usage
        else:
            usage_of_all.images += usage.images
    assert usage_of_all is not None  # a request has a count of at least 1
    yield usage_of_all.finished(None)


def frame_prompt(processor: Processor, request: ImageRequest, branch: Branch) -> Prompt:
    """Prompt of a clip for one guidance branch; the frames of a condition stand in it."""
    if branch == "uncond":
        return processor.unconditional_prompt(request.negative_prompt)
    text = place_images(request.prompt, len(request.condition), numbered=True)
    system = processor.system_message if request.system is None else request.system
    return interleave_prompt(processor.tokenizer, text, system=system, think=False)


def _clip(
    processor: Processor,
    request: ImageRequest,
    kept: KeptPrefixes,
    previews: int | None,
    index: int,
    generator: torch.Generator,
) -> Program[Usage]:
    """Generate clip `index`; its frames are appended to the conditional context alone."""
    sampling, frames, config = request.sampling, request.frames, processor.config
    grid = Grid.of_pixels(request.height, request.width, config.token_size)
    opens = processor.token(IMAGE_OPEN)
    before = len(request.condition)
    order = frame_order(frames, follows=before > 0)
    stamps = [
        (*processor.tokenizer.encode(time_stamp((before + frame) / request.fps)), opens)
        for frame in order
    ]
    room = frames * (grid.length + 1) + sum(map(len, stamps))
    names, usage, _ = yield from prefill_branches(
        processor,
        request,
        request.condition,
        frame_prompt,
        branches_to_prefill(sampling, request.negative_prompt, kept),
        {"cond": room},
    )
    cond = names["cond"]
    draw = partial(draw_noise, config, request.width, request.height, generator)
    evaluations = 0.0
    for number, (frame, stamp) in enumerate(zip(order, stamps, strict=True), 1):
        yield Append(new_number(), {cond: (TextInput(stamp),)})
        prefixes = yield from branch_prefixes(sampling, request.negative_prompt, names, kept)
        if number == frames:
            yield Release(tuple(names.values()))
        steps = None if previews is None else 0
        step = partial(_whole_step, index, number, frames)
        image = denoise(draw, grid, sampling, prefixes, steps, usage)
        finished = yield from _reporting(image, step)
        evaluations += finished.evaluations
        if previews and number * previews // frames > (number - 1) * previews // frames:
            steps_of_all = frames * sampling.steps
            yield Preview(index, number * sampling.steps, steps_of_all, finished.pixels)
        alone = replace(usage, images=number * grid.length).finished(None)
        levels = frame_levels(finished.pixels[None])
        yield FramesFinished(index, frame, frames, levels, alone, evaluations)
        if number < frames:
            # What follows sees the frame as it is saved: in range, though not rounded.
            yield from append_generated(processor, finished.pixels.clamp(-1, 1), [cond])
    return usage


def _whole_step(index: int, number: int, frames: int, preview: Preview) -> Preview:
    """A preview of the frame that is generated as `number`, from 1 on, as one of its clip."""
    step = (number - 1) * preview.steps + preview.step
    return Preview(index, step, frames * preview.steps, preview.pixels)


def _reporting(
    program: Program[list[Tensor]], report: Callable[[Preview], Preview]
) -> Program[ImageFinished]:
    """Run the program of one image; its previews are reported anew, the image is the result."""
    finished: ImageFinished | None = None
    result: object = None
    try:
        while not isinstance(step := resume(program, result), Returned):
            result = None
            if isinstance(step, ImageFinished):
                finished = step
            elif isinstance(step, Preview):
                yield report(step)
            else:
                assert not isinstance(step, TaskEvent)  # an image has no other events
                try:
                    result = yield step
                except Exception as error:
                    result = error
    finally:
        program.close()
    assert finished is not None
    return finished
