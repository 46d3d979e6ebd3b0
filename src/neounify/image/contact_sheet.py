"""Contact sheets: a grid of captioned images, or of clips as frames side by side."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from neounify.errors import ImageError

SHOWN_FRAMES = 8
"""Frames of a clip that a strip shows at most."""
_PASS, _FAIL = (30, 150, 60), (205, 45, 45)


def contact_sheet(
    images: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    passed: Sequence[bool],
    columns: int = 6,
    side: int = 128,
    lines: int = 4,
) -> Image.Image:
    """Images in rows, each in a green (passed) or red (failed) frame over its caption.

    Args:
        images: uint8 [h, w, 3], shown `side` pixels high; columns are as wide as the widest.
        captions: up to `lines` lines are shown; letters the built-in font lacks show as boxes.
    """
    if not images or not len(images) == len(captions) == len(passed):
        raise ImageError(
            f"{len(images)} images, {len(captions)} captions, {len(passed)} verdicts; give as many "
            "of each, at least one"
        )
    frame, gap, line = 4, 10, 13
    font = ImageFont.load_default(size=11)
    widths = [round(side * pixels.shape[1] / pixels.shape[0]) for pixels in images]
    wide, high = max(widths) + 2 * frame, side + 2 * frame + lines * line + 4
    rows = math.ceil(len(images) / columns)
    size = (columns * (wide + gap) + gap, rows * (high + gap) + gap)
    sheet = Image.new("RGB", size, (248, 248, 248))
    draw = ImageDraw.Draw(sheet)
    for number, (pixels, text, right) in enumerate(zip(images, captions, passed, strict=True)):
        x = gap + number % columns * (wide + gap)
        y = gap + number // columns * (high + gap)
        width, bottom = widths[number], y + side + 2 * frame
        draw.rectangle(
            (x, y, x + width + 2 * frame - 1, bottom - 1), fill=_PASS if right else _FAIL
        )
        image = Image.fromarray(pixels).resize((width, side), Image.Resampling.NEAREST)
        sheet.paste(image, (x + frame, y + frame))
        for row, words in enumerate(textwrap.wrap(text, max(widths) // 6)[:lines]):
            draw.text((x, bottom + 3 + row * line), words, fill=(40, 40, 40), font=font)
    return sheet


def strip(clip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames of a clip [frames, h, w, 3] side by side as one image.

    At most `SHOWN_FRAMES` of them, evenly from the first to the last.
    """
    number = min(SHOWN_FRAMES, len(clip))
    chosen = clip[np.linspace(0, len(clip) - 1, number).round().astype(int)]
    bar = np.full((clip.shape[1], 1, 3), 248, np.uint8)
    pieces = [piece for frame in chosen for piece in (frame, bar)]
    return np.concatenate(pieces[:-1], axis=1)
