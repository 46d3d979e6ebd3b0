"""Image generation and editing: requests, prompts of the guidance branches, program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import Capability, ModelConfig, TextSampling
from neounify.config.sampling import check_seed
from neounify.engine.generation import preview_steps
from neounify.engine.messages import (
    Append,
    Decode,
    FramesReady,
    GenerateImages,
    ImageInput,
    ImageReady,
    Prefill,
    Prefix,
    Release,
    SequenceName,
    TensorRef,
    TextInput,
    new_number,
)
from neounify.errors import PromptError, RequestError, naming_param
from neounify.flow.guidance import Branch
from neounify.flow.path import initial_noise, noise_scale
from neounify.flow.sampling import ResolvedSampling
from neounify.image.pixels import patchify
from neounify.model.layout import Grid
from neounify.tasks.answer import AnswerEvents, decode_text
from neounify.tasks.clips import ClipPiece
from neounify.tasks.program import (
    NEXT,
    Compute,
    FramesFinished,
    ImageFinished,
    PackTensors,
    Preview,
    Processor,
    Program,
    Take,
    Usage,
    export,
    new_sequences,
    pack_images,
    prompt_inputs,
    take_pixels,
)
from neounify.tasks.video import clip_grid, draw_clip_noise
from neounify.text.template import (
    IMAGE_MARK,
    Prompt,
    after_think_ids,
    check_negative,
    image_prompt,
    images_only_prompt,
    place_images,
)
from neounify.text.tokens import IM_END, THINK_CLOSE

Request = TypeVar("Request")
KeptPrefixes = Mapping[str, str]
"""Names of unconditional prefixes that the generation engine keeps, by their negative prompt."""

MAX_IMAGES_PER_PROMPT = 64
MAX_THINK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Request for `count` images of one prompt, or clips; with input `images` it is an edit.

    With `frames` a clip of so many is generated, of `fps` a second; `check_clip` says what a model
    generates. It continues the pieces of a `condition`, whose marks are in the prompt.

    The noise of all images is one draw from `seed`, unless each has its own in `seeds`, and then
    equals the single image of that seed. `noise` [count, channels, height, width], already times
    σ, replaces both.
    `system` None means the checkpoint's default message, "" none at all. Guidance steers
    away from `negative_prompt`, which needs guidance. Raises RequestError.
    """

    prompt: str
    width: int
    height: int
    sampling: ResolvedSampling
    images: tuple[PIL.Image.Image, ...] = ()
    seed: int = 0
    seeds: tuple[int, ...] = ()
    noise: Float[Tensor, "count channels height width"] | None = None
    count: int = 1
    think: bool = False
    max_think_tokens: int = MAX_THINK_TOKENS
    system: str | None = None
    negative_prompt: str = ""
    frames: int = 0
    fps: float = 24.0
    condition: tuple[ClipPiece, ...] = ()

    def __post_init__(self) -> None:
        is_count = hasattr(self.count, "__index__")
        if not is_count or not 1 <= self.count <= MAX_IMAGES_PER_PROMPT:
            raise RequestError(
                f"images_per_prompt must be from 1 to {MAX_IMAGES_PER_PROMPT}, got {self.count}",
                param="images_per_prompt",
            )
        for seed in (self.seed, *self.seeds):
            check_seed(seed)
        if self.seeds and len(self.seeds) != self.count:
            raise RequestError(f"{len(self.seeds)} seeds for {self.count} images", param="seeds")
        if self.noise is not None and self.frames:
            raise RequestError("noise is for images; a clip has a seed", param="noise")
        if self.noise is not None:
            shape, expected = tuple(self.noise.shape), (self.count, self.height, self.width)
            if len(shape) != 4 or (shape[0], *shape[2:]) != expected:
                raise RequestError(
                    f"noise must be ({self.count}, channels, {self.height}, {self.width}), "
                    f"got {shape}",
                    param="noise",
                )
            finite = int(torch.isfinite(self.noise).sum())
            if finite < self.noise.numel():
                raise RequestError(
                    f"noise must be finite, {self.noise.numel() - finite:,} of its "
                    f"{self.noise.numel():,} values are NaN or infinite",
                    param="noise",
                )
        if self.max_think_tokens < 1:
            raise RequestError(
                f"max_think_tokens must be at least 1, got {self.max_think_tokens}",
                param="max_think_tokens",
            )
        check_negative_prompt(self.negative_prompt, self.sampling)

    def grid(self, config: ModelConfig) -> Grid:
        """Token rows and columns, and tubes."""
        if self.frames:
            return clip_grid(config, self.width, self.height, self.frames, self.fps)
        return Grid.of_pixels(self.height, self.width, config.token_size)

    def start(self, config: ModelConfig) -> Float[Tensor, "count n ccc"]:
        """Initial scaled noise as tokens [count, n, token_width], of a clip tube_width."""
        if self.noise is not None:
            return patchify(self.noise.float(), config.token_size, config.channels)
        draw: Callable[..., Tensor] = partial(draw_noise, config, self.width, self.height)
        if self.frames:
            draw = partial(draw_clip_noise, config, self.grid(config))
        if self.seeds:
            return torch.cat([draw(torch.Generator().manual_seed(seed)) for seed in self.seeds])
        return draw(torch.Generator().manual_seed(self.seed), self.count)


def draw_noise(
    config: ModelConfig, width: int, height: int, generator: torch.Generator, count: int = 1
) -> Float[Tensor, "count n ccc"]:
    """Initial scaled noise of images of a size as tokens, one draw of all of them."""
    tokens = Grid.of_pixels(height, width, config.token_size).length
    scale = noise_scale(tokens, config.flow)
    if config.flow.noise_draw == "tokens":
        return initial_noise((count, tokens, config.token_width), scale, generator)
    noise = initial_noise((count, config.channels, height, width), scale, generator)
    return patchify(noise, config.token_size, config.channels)


def split_noise(noise: Tensor | None, prompts: int, config: ModelConfig) -> list[Tensor | None]:
    """Explicit noise cut into one piece per prompt."""
    if noise is None:
        return [None] * prompts
    fits = noise.ndim == 4 and noise.shape[1] == config.channels
    if not fits or noise.shape[0] % prompts or not noise.shape[0]:
        raise RequestError(
            f"noise must be [prompts · images_per_prompt, {config.channels}, H, W] "
            f"for {prompts} prompts, "
            f"got {tuple(noise.shape)}",
            param="noise",
        )
    return list(noise.chunk(prompts))


def check_negative_prompt(text: str, sampling: ResolvedSampling) -> None:
    """Check that a negative prompt is text and that guidance is on. Raises RequestError."""
    if not isinstance(text, str):
        raise RequestError(
            f"negative_prompt must be text, not {type(text).__name__}", param="negative_prompt"
        )
    try:
        check_negative(text)
    except PromptError as error:
        raise RequestError(f"negative_prompt: {error}", param="negative_prompt") from error
    guidance = sampling.guidance
    if text.strip() and guidance.branches() == ("cond",):
        used = f"guidance is {guidance.text:g}"
        if guidance.editing:
            used += f" and image_guidance {guidance.image:g}"
        raise RequestError(
            f"negative_prompt: {used}, so nothing is steered away from; set guidance above 1",
            param="negative_prompt",
        )


# --- program ---


def edit_images(
    processor: Processor, images: Sequence[PIL.Image.Image | ClipPiece]
) -> list[Tensor]:
    """Input images of editing and interleaving [3, height, width], resized and normalised."""
    return processor.prepare(images, *processor.config.sampling.edit_bounds(len(images)))


def branch_prompt(processor: Processor, request: ImageRequest, branch: Branch) -> Prompt:
    """Prompt of an image for one guidance branch."""
    tokenizer, count = processor.tokenizer, len(request.images) + len(request.condition)
    negative = request.negative_prompt
    if branch == "uncond":
        return processor.unconditional_prompt(negative)
    if branch == "image":
        return images_only_prompt(tokenizer, count, open_image=True, negative=negative)
    system = processor.system_message if request.system is None else request.system
    text = place_images(request.prompt, count, numbered=True)
    if not request.prompt.replace(IMAGE_MARK, "").strip():
        raise PromptError("the prompt is empty; describe the image, or what to change in it")
    return image_prompt(
        tokenizer, text, system=system, think=request.think, template=processor.template
    )


def check_trained(config: ModelConfig, request: ImageRequest) -> None:
    """RequestError for a model that was not trained for what a request asks for."""
    able: Capability = "edit" if request.images else "generate"
    config.check_can("generate_video" if request.frames else able)


def check_prompts(processor: Processor, request: ImageRequest) -> None:
    """Build the prompts of a request. Raises PromptError, about its parameter."""
    for branch in request.sampling.guidance.branches():
        with naming_param("prompt" if branch == "cond" else "negative_prompt"):
            branch_prompt(processor, request, branch)


def generate_images(
    processor: Processor, request: ImageRequest, kept: KeptPrefixes, previews: int | None
) -> Program[None]:
    """Generate the images of one prompt, after a thought if requested.

    At most `previews` of each image are events, None for one after every step.
    """
    check_trained(processor.config, request)
    room = 0
    if request.think:
        processor.check_writes_text("think")
        closing = [processor.token(THINK_CLOSE), *after_think_ids(processor.tokenizer)]
        room = request.max_think_tokens + len(closing)
    prefilled = branches_to_prefill(request.sampling, request.negative_prompt, kept)
    shown: list[PIL.Image.Image | ClipPiece] = [*request.images, *request.condition]
    names, usage, _ = yield from prefill_branches(
        processor, request, shown, branch_prompt, prefilled, {"cond": room}
    )
    if request.think:
        yield from _think(processor, request, names["cond"], usage)
    prefixes = yield from branch_prefixes(request.sampling, request.negative_prompt, names, kept)
    # Denoising reads the exports; text must not wait for the blocks of these sequences.
    yield Release(tuple(names.values()))
    grid, draw = request.grid(processor.config), partial(request.start, processor.config)
    yield from denoise(draw, grid, request.sampling, prefixes, previews, usage)
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
    images: Sequence[PIL.Image.Image | ClipPiece],
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
    draw: Callable[[], Float[Tensor, "count n ccc"]],
    grid: Grid,
    sampling: ResolvedSampling,
    prefixes: Mapping[Branch, Prefix | str],
    previews: int | None,
    usage: Usage,
    first: int = 0,
) -> Program[list[Tensor]]:
    """Images [channels, height, width] from the noise that `draw` returns.

    Of clips, whose frames are events, an empty list. Events number from `first`.
    """
    # The engine alone keeps the noise: that of a clip is large, and the first step replaces it.
    noise: Tensor = yield Compute(draw)
    count = len(noise)
    ref: TensorRef = yield PackTensors({"noise": noise})
    del noise
    steps = preview_steps(sampling.steps, previews)
    answer = yield GenerateImages(new_number(), ref, grid, sampling, prefixes, steps)
    images: dict[int, Tensor] = {}
    clips = 0
    while True:
        if isinstance(answer, FramesReady):
            clips += yield from _frames(answer, grid, usage, first)
            if clips == count:
                return []
            answer = yield NEXT
            continue
        pixels = yield from take_pixels(answer)
        if isinstance(answer, ImageReady):
            images[answer.index] = pixels
            usage.images += grid.length
            alone = replace(usage, images=grid.length).finished(None)
            yield ImageFinished(first + answer.index, pixels, alone, answer.evaluations)
            if len(images) == count:
                return [images[index] for index in sorted(images)]
        else:
            yield Preview(first + answer.index, answer.step, answer.steps, pixels)
        answer = yield NEXT


def _frames(answer: FramesReady, grid: Grid, usage: Usage, first: int) -> Program[bool]:
    """Report frames of a clip; whether they are its last ones."""
    taken: Mapping[str, Tensor] = yield Take(answer.frames)
    frames = taken["frames"]
    alone = replace(usage, images=grid.length).finished(None)
    number, total, evaluations = first + answer.index, answer.total, answer.evaluations
    event = FramesFinished(number, answer.first, total, frames, alone, evaluations)
    ends = answer.first + len(frames) == total
    usage.images += grid.length * ends
    yield event
    return ends


def _think(
    processor: Processor, request: ImageRequest, name: SequenceName, usage: Usage
) -> Program[None]:
    """Decode the thought and open the image behind it."""
    close = processor.token(THINK_CLOSE)
    stops = frozenset((close, processor.token(IM_END)))
    text = AnswerEvents(processor, processor.tokenizer.stream, thinking=True)
    first = yield Decode(new_number(), name, TextSampling(), stops, request.max_think_tokens)
    answer = yield from decode_text(first, text, usage)
    assert answer is not None  # a thought has no stop strings
    # As published: a thought cut off by its limit or by <|im_end|> is not closed.
    closing = (close,) if answer.stopped_by == close else ()
    ids = (*answer.pending, *closing, *after_think_ids(processor.tokenizer))
    yield Append(new_number(), {name: (TextInput(ids),)})
