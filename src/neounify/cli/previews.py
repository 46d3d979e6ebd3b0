"""A sheet that shows how an image came about, step by step."""

from __future__ import annotations

import math

from PIL import Image

from neounify.pipeline import PaintProgress

THUMBNAIL = 192
GAP = 4


class PreviewSheets:
    """Collects the predicted clean images of each step, small, for every image of a call."""

    def __init__(self) -> None:
        self._steps: list[list[Image.Image]] = []

    def add(self, progress: PaintProgress) -> None:
        images = progress.preview()
        for image in images:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
        self._steps.append(images)

    def sheet(self, number: int) -> Image.Image:
        """The steps of one image of the call, row by row."""
        steps = [images[number] for images in self._steps]
        width, height = steps[0].width + GAP, steps[0].height + GAP
        columns = min(len(steps), max(5, math.ceil(math.sqrt(len(steps)))))
        rows = math.ceil(len(steps) / columns)
        sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
        for place, image in enumerate(steps):
            sheet.paste(image, (place % columns * width, place // columns * height))
        return sheet
