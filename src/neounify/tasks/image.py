"""Image generation and editing: requests, sizes, prompts of the guidance branches, program."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import CheckpointDefaults, ModelConfig, TextSampling
from neounify.config.sampling import check_seed
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
    new_number,
)
from neounify.errors import ImageError, PromptError, RequestError
from neounify.flow.guidance import Branch
from neounify.flow.path import initial_noise, noise_scale
from neounify.flow.sampling import ResolvedSampling
from neounify.image.pixels import TRAINING_BUCKETS, check_size, fit_size, patchify
from neounify.model.layout import Grid
from neounify.tasks.answer import AnswerEvents, decode_text
from neounify.tasks.program import (
    NEXT,
    Compute,
    ImageFinished,
    PackTensors,
    Preview,
    Processor,
    Program,
    Usage,
    export,
    new_sequences,
    pack_images,
    prompt_inputs,
    take_pixels,
)
from neounify.text.template import (
    Prompt,
    after_think_ids,
    check_negative,
    image_prompt,
    images_only_prompt,
    place_images,
    unconditional_prompt,
)
from neounify.text.tokens import IM_END, THINK_CLOSE

Request = TypeVar("Request")
KeptPrefixes = Mapping[str, str]
"""Names of unconditional prefixes that the generation engine keeps, by their negative prompt."""

MAX_IMAGES_PER_PROMPT = 64
MAX_THINK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Request for `count` images of one prompt; with input `images` it is an edit.

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

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MAX_IMAGES_PER_PROMPT:
            raise RequestError(
                f"images_per_prompt must be from 1 to {MAX_IMAGES_PER_PROMPT}, got {self.count}",
                param="images_per_prompt",
            )
        for seed in (self.seed, *self.seeds):
            check_seed(seed)
        if self.seeds and len(self.seeds) != self.count:
            raise RequestError(f"{len(self.seeds)} seeds for {self.count} images", param="seeds")
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
        """Token rows and columns."""
        return Grid.of_pixels(self.height, self.width, config.token_size)

    def start(self, config: ModelConfig) -> Float[Tensor, "count n ccc"]:
        """Initial scaled noise as tokens [count, n, token_width]."""
        if self.noise is not None:
            return patchify(self.noise.float(), config.token_size, config.channels)
        draw = partial(draw_noise, config, self.width, self.height)
        if self.seeds:
            return torch.cat([draw(torch.Generator().manual_seed(seed)) for seed in self.seeds])
        return draw(torch.Generator().manual_seed(self.seed), self.count)


def draw_noise(
    config: ModelConfig, width: int, height: int, generator: torch.Generator, count: int = 1
) -> Float[Tensor, "count n ccc"]:
    """Initial scaled noise of images of a size as tokens, one draw of all of them."""
    scale = noise_scale(Grid.of_pixels(height, width, config.token_size).length, config.flow)
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


# --- sizes ---

Sizes = tuple[tuple[int, int], ...]
"""(width, height) pairs in pixels."""

PUBLISHED_PIXELS = (512**2, 2048**2)
"""(least, greatest) area the published models were trained to generate, in pixels."""

MAX_NAMED = 6
"""Sizes that a message lists."""


def max_image_tokens(config: ModelConfig) -> int:
    """Tokens of the largest image a model generates: its context, or its default size if larger.

    The tokens of an image attend to one another, and the model has never attended to more than
    its context holds.
    """
    return max(config.max_positions, image_tokens(config, *config.sampling.image_size))


def image_tokens(config: ModelConfig, width: int, height: int) -> int:
    """Tokens of an image of a legal size in pixels."""
    return width * height // config.token_size**2


def check_image_tokens(
    config: ModelConfig, width: int, height: int, limit: int | None = None
) -> None:
    """Check the tokens of an image against the model and `limit`. Raises ImageError.

    The message gives the tokens, the limit and the largest size of the same shape.
    """
    largest, tokens = max_image_tokens(config), image_tokens(config, width, height)
    maximum = largest if limit is None else min(largest, limit)
    if tokens <= maximum:
        return
    who = "this model's context holds" if maximum == largest else "this server generates"
    side, scale = config.token_size, math.sqrt(maximum / tokens)
    rows, columns = (min(maximum, max(1, int(n // side * scale))) for n in (height, width))
    raise ImageError(
        f"an image of {width}x{height} has {tokens:,} tokens, {who} {maximum:,} at most; "
        f"the largest of this shape is {columns * side}x{rows * side}",
        param="size",
    )


def output_size(
    config: ModelConfig,
    width: int | None,
    height: int | None,
    reference: PIL.Image.Image | None = None,
) -> tuple[int, int]:
    """(width, height) in pixels: as asked, else like the reference image, else the default.

    A reference gives its aspect ratio at the area of the model's default size.
    Raises ImageError for sizes that are not multiples of the token side or too large for the
    model, RequestError when only one side is given.
    """
    if (width is None) != (height is None):
        raise RequestError(
            f"give both width and height, or neither; got {width} and {height}", param="size"
        )
    if width is not None and height is not None:
        limit = config.max_grid * config.token_size
        check_size(width, height, config.token_size, limit)
        check_image_tokens(config, width, height)
        return width, height
    default = config.sampling.image_size
    if reference is None:
        return default
    area = math.prod(default)
    size = fit_size(
        reference.height,
        reference.width,
        multiple=config.token_size,
        min_pixels=area,
        max_pixels=area,
    )
    return size[1], size[0]


def size_of_shape(
    config: ModelConfig, ratio: tuple[int, int], pixels: int | None = None
) -> tuple[int, int]:
    """(width, height) nearest to a shape, at `pixels` or the default area, whichever is less.

    One of the sizes that the checkpoint was trained at, where they are recorded, or of the
    published buckets at their area; else both sides are fitted. `ratio` is (width, height) of
    any size. Raises ImageError for a ratio over 200.
    """
    sampling = config.sampling
    default_area = math.prod(sampling.image_size)
    area = default_area if pixels is None else min(pixels, default_area)
    width, height = ratio
    sizes = sampling.trained_sizes
    if not sizes and (area, config.token_size) == (math.prod(TRAINING_BUCKETS[0]), 32):
        sizes = TRAINING_BUCKETS
    if sizes:
        shape = math.log(width / height)

        def distance(size: tuple[int, int]) -> float:
            """A wrong shape is worse than a wrong area."""
            wrong_shape = abs(math.log(size[0] / size[1]) - shape)
            return 3 * wrong_shape + abs(math.log(size[0] * size[1] / area))

        return min(sizes, key=distance)
    # Scaled far above the area, so that the sides are rounded towards it from below.
    scale = 1 + math.isqrt(area)
    fitted = fit_size(
        height * scale,
        width * scale,
        multiple=config.token_size,
        min_pixels=area,
        max_pixels=area,
    )
    return fitted[1], fitted[0]


def trained_sizes(sampling: CheckpointDefaults) -> tuple[Sizes, tuple[int, int] | None]:
    """((width, height) pairs, (least, greatest) area) in pixels that a checkpoint was trained at.

    A checkpoint that records neither and has the published default size is a published one.
    ((), None) if nothing is known.
    """
    if sampling.trained_sizes or sampling.trained_pixels:
        return sampling.trained_sizes, sampling.trained_pixels
    if sampling.image_size == CheckpointDefaults().image_size:
        return TRAINING_BUCKETS, PUBLISHED_PIXELS
    return (), None


def size_advice(config: ModelConfig, width: int, height: int) -> str | None:
    """A sentence that names the trained sizes, if width x height (pixels) is not one of them.

    None for a trained size, and where the checkpoint does not record its sizes.
    """
    sizes, pixels = trained_sizes(config.sampling)
    fits = pixels is not None and pixels[0] <= width * height <= pixels[1]
    if fits or (width, height) in sizes or not (sizes or pixels):
        return None
    return (
        f"size {width}x{height}: the model was trained at {named_sizes(sizes, pixels)}; "
        "images of other sizes may come out broken"
    )


def named_sizes(sizes: Sizes, pixels: tuple[int, int] | None) -> str:
    """Trained sizes in words, as "64x64 only" or "areas from 512x512 to 2048x2048 pixels"."""
    listed = ", ".join(f"{w}x{h}" for w, h in sizes[:MAX_NAMED])
    more = f" and {len(sizes) - MAX_NAMED} more" if len(sizes) > MAX_NAMED else ""
    named = f"{listed}{more}" if len(sizes) != 1 else f"{listed} only"
    if pixels is None:
        return named
    low, high = (f"{math.isqrt(area)}x{math.isqrt(area)}" for area in pixels)
    area = f"areas from {low} to {high} pixels"
    return f"{area}, as {listed}{more}" if sizes else area


# --- program ---


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
    """Images [channels, height, width] from `noise` [count, n, token_width].

    Events number from `first`.
    """
    ref: TensorRef = yield PackTensors({"noise": noise})
    steps = preview_steps(sampling.steps, previews)
    answer = yield GenerateImages(new_number(), ref, grid, sampling, prefixes, steps)
    images: dict[int, Tensor] = {}
    while True:
        pixels = yield from take_pixels(answer)
        if isinstance(answer, ImageReady):
            images[answer.index] = pixels
            usage.images += grid.length
            alone = replace(usage, images=grid.length).finished(None)
            yield ImageFinished(first + answer.index, pixels, alone)
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
    first = yield Decode(new_number(), name, TextSampling(), stops, request.max_think_tokens)
    answer = yield from decode_text(first, text, usage)
    assert answer is not None  # a thought has no stop strings
    # As published: a thought cut off by its limit or by <|im_end|> is not closed.
    closing = (close,) if answer.stopped_by == close else ()
    ids = (*answer.pending, *closing, *after_think_ids(processor.tokenizer))
    yield Append(new_number(), {name: (TextInput(ids),)})
