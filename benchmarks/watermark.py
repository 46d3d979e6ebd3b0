"""Measure the invisible mark: what it survives, how little it shows, how often it is imagined.

    python benchmarks/watermark.py --marked 200 --unmarked 1000

Prints the tables of docs/safety.md. Scenes are those of the bundled model's world; smooth images
are sums of random waves in three colours, the nearest to photographs that can be synthesised.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from io import BytesIO

import numpy as np
from PIL import Image

from neounify.provenance.watermark import FIELDS, MIN_AGREEING, Marker, agreeing
from neounify.runtime.process import processor_name
from neounify.scenes.world import render, sample_rng, sample_scene, scene_config

SIDES = (64, 128, 512)
NUMBER = 9
PRESET = scene_config("default")


def scene(number: int, side: int) -> Image.Image:
    """A scene of the bundled model's world."""
    return Image.fromarray(render(sample_scene(sample_rng(number), PRESET), PRESET, side))


def smooth(number: int, side: int) -> Image.Image:
    """Random waves, the slow ones strong, the fast ones weak."""
    rng = np.random.default_rng(number)
    levels = np.full((side, side, 3), 128.0)
    for waves in (2, 4, 8, 16, 32, 64):
        grid = Image.fromarray(rng.normal(0, 60 / waves**0.5, (waves, waves)).astype(np.float32))
        plane = np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
        levels += plane[..., None] * rng.uniform(0.5, 1, 3)
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def noise(number: int, side: int) -> Image.Image:
    """Every level of every pixel by chance."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def png(image: Image.Image) -> Image.Image:
    """Through a file without losses."""
    return _through(image, format="PNG")


def jpeg(image: Image.Image) -> Image.Image:
    """Through a JPEG of quality 90 with halved colours, as is usual."""
    return _through(image, format="JPEG", quality=90, subsampling="4:2:0")


def half(image: Image.Image) -> Image.Image:
    """At half the size."""
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


KINDS: Mapping[str, Callable[[int, int], Image.Image]] = {
    "scenes": scene,
    "smooth": smooth,
    "noise": noise,
}
TRIALS: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "PNG": png,
    "JPEG 90": jpeg,
    "half": half,
    "half, JPEG 90": lambda image: jpeg(half(image)),
}


def survival(kind: str, side: int, number: int) -> str:
    """A row: PSNR, time to mark, and per trial the share read (and the fewest fields right)."""
    marker = Marker(NUMBER)
    before = [KINDS[kind](index, side) for index in range(number)]
    start = time.process_time()
    marked = [marker.mark(image) for image in before]
    milliseconds = (time.process_time() - start) / number * 1000
    quality = [psnr(*pair) for pair in zip(before, marked, strict=True)]
    cells = [kind, str(side), f"{np.mean(quality):.1f} ({min(quality):.1f})", f"{milliseconds:.0f}"]
    for trial in TRIALS.values():
        tried = [trial(image) for image in marked]
        rate = np.mean([marker.read(image) == f"neounify:{NUMBER}" for image in tried])
        fewest = min(agreeing(marker.fields(image))[NUMBER] for image in tried)
        cells.append(f"{rate:.1%} ({fewest})")
    return f"| {' | '.join(cells)} |"


def imagined(kind: str, side: int, number: int) -> str:
    """A row: images without a watermark in which one is found, and the most blocks that agree."""
    marker = Marker()
    most = [
        int(agreeing(marker.fields(KINDS[kind](10**6 + index, side))).max())
        for index in range(number)
    ]
    marked = sum(count >= MIN_AGREEING for count in most)
    return f"| {kind} | {side} | {number} | {marked} | {max(most)} |"


def psnr(before: Image.Image, after: Image.Image) -> float:
    """Decibels; more is less visible."""
    error = np.asarray(before, dtype=np.float64) - np.asarray(after, dtype=np.float64)
    return float(10 * np.log10(255**2 / np.mean(error**2)))


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--marked", type=int, default=200, help="watermarked images per row")
    parser.add_argument("--unmarked", type=int, default=1000, help="images without one per row")
    options = parser.parse_args()
    print(f"{processor_name()}; {options.marked} images per row; ", end="")
    print(f"{MIN_AGREEING} of {FIELDS} blocks must agree")
    print(f"| images | side | PSNR, dB (least) | CPU ms to write | {' | '.join(TRIALS)} |")
    print("|---" * (4 + len(TRIALS)) + "|")
    for kind in KINDS:
        for side in SIDES:
            print(survival(kind, side, options.marked), flush=True)
    print("\n| without watermark | side | images | found | most blocks |\n|---|---|---|---|---|")
    for kind in KINDS:
        for side in SIDES:
            print(imagined(kind, side, options.unmarked), flush=True)


def _through(image: Image.Image, **options: object) -> Image.Image:
    buffer = BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return Image.open(BytesIO(buffer.getvalue())).convert("RGB")


if __name__ == "__main__":
    main()
