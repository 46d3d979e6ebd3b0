"""Image requests, checked: prompt, size in pixels, seed and sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import ModelConfig
from neounify.config.sampling import check_seed
from neounify.deprecation import moved
from neounify.errors import ImageError, PromptError, RequestError
from neounify.flow.path import initial_noise, noise_scale
from neounify.flow.sampling import ResolvedSampling
from neounify.image.pixels import patchify
from neounify.image.sizes import TRAINING_BUCKETS, check_size, fit_size
from neounify.model.layout import Grid
from neounify.text.template import check_negative

T = TypeVar("T", int, str)

MAX_IMAGES_PER_PROMPT = 64
MAX_THINK_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Request for `count` images of one prompt; with input `images` it is an edit.

    `noise` [count, channels, height, width], already times σ, replaces the draw from `seed`.
    `system` None means the checkpoint's default message, "" none at all. Guidance steers
    away from `negative_prompt`, which needs guidance. Raises RequestError.
    """

    prompt: str
    width: int
    height: int
    sampling: ResolvedSampling
    images: tuple[PIL.Image.Image, ...] = ()
    seed: int = 0
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
        check_seed(self.seed)
        if self.noise is not None:
            count, *_, height, width = shape = tuple(self.noise.shape)
            if (count, height, width) != (self.count, self.height, self.width) or len(shape) != 4:
                expected = f"({self.count}, channels, {self.height}, {self.width})"
                raise RequestError(f"noise must be {expected}, got {shape}", param="noise")
        if self.noise is not None and not torch.isfinite(self.noise).all():
            raise RequestError(
                "noise must be finite, it holds NaN or infinite values", param="noise"
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
        noise = self.noise
        if noise is None:
            shape = (self.count, config.channels, self.height, self.width)
            generator = torch.Generator().manual_seed(self.seed)
            noise = initial_noise(shape, image_noise_scale(self.grid(config), config), generator)
        return patchify(noise.float(), config.token_size, config.channels)


def image_noise_scale(grid: Grid, config: ModelConfig) -> float:
    """σ at which an image of this grid is sampled."""
    return noise_scale(grid.length, config.flow)


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
        raise RequestError("give both width and height, or neither", param="size")
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


def output_sizes(
    config: ModelConfig,
    width: int | Sequence[int] | None,
    height: int | Sequence[int] | None,
    reference: PIL.Image.Image | None,
) -> list[tuple[int, int]]:
    """Sizes of several images in turn; a number stands for a list of one."""
    widths = list(width) if isinstance(width, Sequence) else [width]
    heights = list(height) if isinstance(height, Sequence) else [height]
    if not widths or len(widths) != len(heights):
        raise RequestError(f"{len(widths)} widths for {len(heights)} heights", param="size")
    return [output_size(config, w, h, reference) for w, h in zip(widths, heights, strict=True)]


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


def per_prompt(value: T | Sequence[T], count: int, name: str) -> list[T]:
    """One value for every prompt, or a list with as many values as prompts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise RequestError(f"{len(value)} values of {name} for {count} prompts", param=name)
        return list(value)
    return [value] * count


__getattr__ = moved(__name__, __name__, {"PaintRequest": "ImageRequest"})
