"""Image sizes: the resize rule of prompt images, the training buckets, the legal sizes."""

import math
from operator import index

from neounify.errors import ImageError

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
"""The (width, height) that the published models were trained to paint, in pixels."""

_MAX_SIDE = 2**31 - 1


def fit_size(
    height: int, width: int, *, multiple: int = 32, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Find the size a prompt image is resized to: near its own size and shape, both sides legal.

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
    """Raises ImageError for a prompt image whose sides, in pixels, differ too much."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        raise ImageError(
            f"an image of {width}x{height} is too narrow; "
            f"its sides may differ by a factor of {MAX_ASPECT_RATIO} at most"
        )


def nearest_legal_sizes(
    width: int, height: int, multiple: int, max_side: int | None = None
) -> list[tuple[int, int]]:
    """List the one to four legal sizes around a wanted one, nearest first.

    Args:
        width: wanted width, in pixels; any integer.
        height: wanted height, in pixels; any integer.
        multiple: what both sides must be multiples of, in pixels.
        max_side: greatest legal side, in pixels; no bound when None.

    Returns:
        (width, height) pairs, in pixels.

    Raises:
        ImageError: a value is not an integer, or no side is legal.
    """
    width, height = _integer(width, "width"), _integer(height, "height")
    multiple = _positive(multiple, "multiple")
    most = _MAX_SIDE if max_side is None else _positive(max_side, "max_side")
    if most < multiple:
        raise ImageError(f"no side is legal: the least is {multiple}, the greatest {most}")
    sizes = [
        (w, h) for w in _around(width, multiple, most) for h in _around(height, multiple, most)
    ]
    return sorted(sizes, key=lambda size: (size[0] - width) ** 2 + (size[1] - height) ** 2)


def check_size(width: int, height: int, multiple: int, max_side: int) -> None:
    """Refuse the size of an image to be painted unless the model can paint it.

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


def _around(side: int, multiple: int, most: int) -> list[int]:
    """Return the legal sides just below and just above `side`, or the one that it is."""
    highest = most // multiple
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
