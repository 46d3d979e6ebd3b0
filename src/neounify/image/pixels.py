"""Pixels of images: value ranges of the streams, tokens (square pieces), sizes and resizing."""

from __future__ import annotations

import math
from operator import index

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from neounify.config import CheckpointDefaults, ModelConfig
from neounify.config.model import UndPixels
from neounify.errors import ImageError, RequestError

RGB = 3
"""Channels of the images that files hold."""

MEAN = (0.485, 0.456, 0.406)
"""Mean of the understanding stream's input, per channel of pixels in [0, 1]."""

STD = (0.229, 0.224, 0.225)
"""Standard deviation of the understanding stream's input, per channel."""


# --- value ranges ---


def to_und_pixels(
    image: Image.Image, dtype: torch.dtype = torch.float32, kind: UndPixels = "imagenet"
) -> Float[Tensor, "3 height width"]:
    """Input of the understanding stream from an RGB image, see `normalise_und`.

    Computed in float32, then cast to `dtype`.

    Raises:
        ValueError: the image is not RGB.
    """
    return normalise_und(_to_unit(image), kind).to(dtype)


def normalise_und(
    x: Float[Tensor, "*batch 3 height width"], kind: UndPixels = "imagenet"
) -> Float[Tensor, "*batch 3 height width"]:
    """Pixels in [0, 1], normalised for the understanding stream, in their dtype.

    "imagenet": (x - MEAN) / STD; "symmetric": 2·x - 1. Values outside [0, 1] are not clamped.

    Raises:
        ValueError: the third dimension from the end is not 3 channels.
    """
    if x.ndim < 3 or x.shape[-3] != len(MEAN):
        raise ValueError(f"pixels must be [..., 3, height, width], got {tuple(x.shape)}")
    if kind == "symmetric":
        return x * 2 - 1
    mean = torch.tensor(MEAN, dtype=x.dtype, device=x.device)[:, None, None]
    std = torch.tensor(STD, dtype=x.dtype, device=x.device)[:, None, None]
    return (x - mean) / std


def to_pil(pixels: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """RGB images of pixels of the generation stream, in [-1, 1].

    Values outside are clamped; each is rounded to the nearest of 256 levels.

    Raises:
        ValueError: the shape is not [batch, 3, height, width].
    """
    if pixels.ndim != 4 or pixels.shape[1] != len(MEAN):
        raise ValueError(f"pixels must be [batch, 3, height, width], got {tuple(pixels.shape)}")
    unit = (pixels.detach().float() + 1) / 2
    levels = (unit.clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def prepare_image(
    image: Image.Image,
    *,
    multiple: int,
    min_pixels: int,
    max_pixels: int,
    dtype: torch.dtype = torch.float32,
    kind: UndPixels = "imagenet",
) -> Float[Tensor, "3 height width"]:
    """An RGB prompt image, resized by the rule of `fit_size` (bicubic) and normalised.

    Args:
        image: of any size.
        multiple: what both sides of the result are multiples of, in pixels.
        min_pixels: least area of the result, in pixels.
        max_pixels: greatest area of the result, in pixels.
        dtype: of the result.
        kind: of normalisation.

    Raises:
        ImageError: the image is too narrow or the bounds make no sense.
        ValueError: the image is not RGB.
    """
    height, width = fit_size(
        image.height, image.width, multiple=multiple, min_pixels=min_pixels, max_pixels=max_pixels
    )
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    return to_und_pixels(image, dtype, kind)


def _to_unit(image: Image.Image) -> Float[Tensor, "3 height width"]:
    """Pixels in [0, 1], float32."""
    if image.mode != "RGB":
        raise ValueError(f"the image must be RGB, not {image.mode}; read_image converts it")
    levels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return levels.permute(2, 0, 1).contiguous().float() / 255


# --- tokens ---


def patchify(
    images: Float[Tensor, "batch c height width"], size: int, channels: int
) -> Float[Tensor, "batch tokens values"]:
    """Tokens of `size` x `size` pixels, each in order (row, column, channel).

    Returns:
        [batch, h·w, size²·channels] where h = height / size, w = width / size.

    Raises:
        ValueError: not so many channels, or a side is no multiple of `size`.
    """
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(
            f"images must be [batch, {channels}, height, width], got {tuple(images.shape)}"
        )
    height, width = images.shape[2:]
    if size < 1 or height % size or width % size:
        raise ValueError(f"sides {height} and {width} must be multiples of the size {size}")
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=size, q=size)


def unpatchify(
    tokens: Float[Tensor, "batch tokens values"], h: int, w: int, size: int, channels: int
) -> Float[Tensor, "batch c height width"]:
    """Images of a grid of `h` rows and `w` columns of tokens: the inverse of `patchify`.

    Raises:
        ValueError: the shape is not [batch, h·w, size²·channels].
    """
    width = channels * size * size
    if tokens.ndim != 3 or tokens.shape[1:] != (h * w, width):
        raise ValueError(
            f"a grid of {h} x {w} tokens of side {size} needs "
            f"[batch, {h * w}, {width}], got {tuple(tokens.shape)}"
        )
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=size, q=size)


# --- sizes ---

MAX_ASPECT_RATIO = 200
"""The longer side of a prompt image over its shorter side may not exceed this."""

TRAINING_BUCKETS: tuple[tuple[int, int], ...] = (
    (2048, 2048),
    (2720, 1536),
    (1536, 2720),
    (2496, 1664),
    (1664, 2496),
    (2368, 1760),
    (1760, 2368),
    (2880, 1440),
    (1440, 2880),
    (3456, 1152),
    (1152, 3456),
)
"""The (width, height) that the published models were trained to generate, in pixels."""

_MAX_SIDE = 2**31 - 1


def fit_size(
    height: int, width: int, *, multiple: int = 32, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Size that a prompt image is resized to: near its size and shape, both sides legal.

    Both sides are rounded to the nearest multiple (halves to even). Where the area then
    leaves [min_pixels, max_pixels], the original sides are scaled to the bound that was
    crossed and rounded towards the inside. Only the least side, one multiple, can still
    push a very long image over the maximum.

    Args:
        height: of the original, in pixels.
        width: of the original, in pixels.
        multiple: what both sides are multiples of, in pixels.
        min_pixels: least area, in pixels.
        max_pixels: greatest area, in pixels.

    Returns:
        (height, width) in pixels.

    Raises:
        ImageError: a side is not a positive integer, the aspect ratio is over
            MAX_ASPECT_RATIO, or the bounds are not 0 < min_pixels <= max_pixels.
    """
    height, width = _positive(height, "height"), _positive(width, "width")
    multiple = _positive(multiple, "multiple")
    min_pixels = _positive(min_pixels, "min_pixels", maximum=_MAX_SIDE**2)
    max_pixels = _positive(max_pixels, "max_pixels", maximum=_MAX_SIDE**2)
    if min_pixels > max_pixels:
        raise ImageError(f"min_pixels {min_pixels} is above max_pixels {max_pixels}")
    check_aspect(height, width)
    new_height = max(multiple, round(height / multiple) * multiple)
    new_width = max(multiple, round(width / multiple) * multiple)
    if new_height * new_width > max_pixels:
        k = math.sqrt(height * width / max_pixels)
        new_height = max(multiple, math.floor(height / k / multiple) * multiple)
        new_width = max(multiple, math.floor(width / k / multiple) * multiple)
    elif new_height * new_width < min_pixels:
        k = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * k / multiple) * multiple
        new_width = math.ceil(width * k / multiple) * multiple
    return new_height, new_width


def check_aspect(height: int, width: int) -> None:
    """Raise ImageError for an image whose sides, in pixels, differ too much."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"an image of {width}x{height} is too narrow; its sides may differ by a factor of "
            f"{MAX_ASPECT_RATIO} at most, these by {max(height, width) / min(height, width):.1f}"
        )


def nearest_legal_sizes(
    width: int, height: int, multiple: int, max_side: int | None = None
) -> list[tuple[int, int]]:
    """One to four legal sizes around the requested one, nearest first.

    Args:
        width: requested width, in pixels; any integer.
        height: requested height, in pixels; any integer.
        multiple: what both sides must be multiples of, in pixels.
        max_side: greatest legal side, in pixels; no bound when None.

    Returns:
        (width, height) pairs, in pixels.

    Raises:
        ImageError: a value is not an integer, or no side is legal.
    """
    width, height = _integer(width, "width"), _integer(height, "height")
    multiple = _positive(multiple, "multiple")
    limit = _MAX_SIDE if max_side is None else _positive(max_side, "max_side")
    if limit < multiple:
        raise ImageError(f"no side is legal: the least is {multiple}, the greatest {limit}")
    sizes = [
        (w, h) for w in _around(width, multiple, limit) for h in _around(height, multiple, limit)
    ]
    return sorted(sizes, key=lambda size: (size[0] - width) ** 2 + (size[1] - height) ** 2)


def check_size(width: int, height: int, multiple: int, max_side: int) -> None:
    """Raise ImageError unless the model can generate an image of this size.

    Args:
        width: in pixels.
        height: in pixels.
        multiple: what both sides must be multiples of, in pixels.
        max_side: greatest legal side, in pixels.

    Raises:
        ImageError: not integers, not multiples, or out of [multiple, max_side]; the message
            names the nearest legal sizes.
    """
    width, height = _integer(width, "width"), _integer(height, "height")
    multiple, max_side = _positive(multiple, "multiple"), _positive(max_side, "max_side")
    legal = all(multiple <= side <= max_side and side % multiple == 0 for side in (width, height))
    if not legal:
        sizes = nearest_legal_sizes(width, height, multiple, max_side)
        names = ", ".join(f"{w}x{h}" for w, h in sizes)
        raise ImageError(
            f"size {_short(width)}x{_short(height)}: both sides must be multiples of {multiple} "
            f"from {multiple} to {max_side}; nearest: {names}",
            param="size",
        )


def _around(side: int, multiple: int, limit: int) -> list[int]:
    """Legal sides just below and just above `side`, or `side` itself."""
    highest = limit // multiple
    below = min(max(side // multiple, 1), highest)
    above = min(max(-(-side // multiple), 1), highest)
    return sorted({below * multiple, above * multiple})


def _integer(value: object, what: str) -> int:
    if isinstance(value, bool):
        raise ImageError(f"{what} must be an integer, got {value}")
    try:
        return index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ImageError(f"{what} must be an integer, got {str(value)[:40]!r}") from error


def _positive(value: object, what: str, maximum: int = _MAX_SIDE) -> int:
    number = _integer(value, what)
    if not 1 <= number <= maximum:
        raise ImageError(f"{what} must be from 1 to {maximum}, got {_short(number)}")
    return number


def _short(number: int) -> str:
    # Python refuses to print integers of thousands of digits.
    return str(number) if abs(number) < 10**15 else f"{'-' if number < 0 else ''}(over 10^15)"


# --- sizes of a model ---

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
    reference: Image.Image | None = None,
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
