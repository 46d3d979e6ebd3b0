"""Perception one candidate at a time: what the batched checker must equal to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.data.sample import DataError
from neounify.scenes.bench.perceive import (
    FOREGROUND,
    MIN_AREA,
    MISFIT,
    SIZE_SLACK,
    Percept,
    SeenObject,
    as_array,
    label_components,
    nearest_colour,
)
from neounify.scenes.world.lexicon import SHAPES, place_name
from neounify.scenes.world.render import coverage, signed_distance
from neounify.scenes.world.scene import SceneConfig

Floats = NDArray[np.float32]


def perceive(image: NDArray[np.uint8] | Image.Image, config: SceneConfig) -> Percept:
    """Perceive an image of any size of the world's shape; it is scaled to the config's size.

    Raises:
        DataError: the image has another ratio of width to height.
    """
    pixels = as_array(image)
    height, width = pixels.shape[:2]
    if width * config.height != height * config.width:
        if config.stretch == (0, 0):
            raise DataError(f"a scene is square; this image is {width}×{height}")
        raise DataError(
            f"this image is {width}×{height}, not of the shape {config.width}×{config.height}"
        )
    if (width, height) != (config.width, config.height):
        size = (config.width, config.height)
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
    values = pixels.astype(np.float32)
    ground = _background(values)
    away = np.sqrt(((_smooth(values) - ground) ** 2).sum(-1))
    threshold = np.maximum(FOREGROUND, 0.5 * _largest_near(away, reach=2))
    labels, count = label_components(away > threshold)
    least = MIN_AREA * _smallest_area(config)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    noise = _noise(values, ground, labels)
    objects = [
        _see_object(values, ground, away, labels, label, noise, config)
        for label in range(1, count + 1)
        if areas[label - 1] >= least
    ]
    specks = int(areas[areas < least].sum())
    return Percept(
        background=nearest_colour(ground),
        objects=tuple(sorted(objects, key=lambda seen: seen.cell)),
        background_rgb=_rgb(ground),
        clutter=specks / labels.size,
    )


def _background(image: Floats) -> Floats:
    rim = (image[:2], image[-2:], image[2:-2, :2], image[2:-2, -2:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in rim]), axis=0)


def _smooth(image: Floats) -> Floats:
    """Binomial 3×3 smoothing, edges repeated."""
    for axis in (0, 1):
        ends = [(1, 1) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(image, ends, mode="edge")
        at = np.arange(image.shape[axis])
        beside = np.take(padded, at, axis=axis) + np.take(padded, at + 2, axis=axis)
        image = ((beside + 2 * image) / 4).astype(np.float32)
    return image


def _largest_near(values: Floats, reach: int) -> Floats:
    """The maximum over the square of `reach` pixels around each pixel."""
    side = 2 * reach + 1
    padded = np.pad(values, reach, mode="edge")
    across = np.lib.stride_tricks.sliding_window_view(padded, side, axis=1).max(-1)
    return np.lib.stride_tricks.sliding_window_view(across, side, axis=0).max(-1)


def _noise(image: Floats, ground: Floats, labels: NDArray[np.int32]) -> float:
    """Standard deviation of one channel over the background, robust against objects' edges."""
    plain = image[_largest_near((labels > 0).astype(np.float32), 2) == 0]
    if len(plain) < 50:
        return 0.0
    return float(1.4826 * np.median(np.abs(plain - np.median(plain, axis=0))))


def _see_object(
    image: Floats,
    ground: Floats,
    away: Floats,
    labels: NDArray[np.int32],
    label: int,
    noise: float,
    config: SceneConfig,
) -> SeenObject:
    side, width, height = config.side, config.width, config.height
    inside = labels == label
    ys, xs = np.nonzero(inside)
    pad = 3
    y0, y1 = max(0, ys.min() - pad), min(height, ys.max() + pad + 1)
    x0, x1 = max(0, xs.min() - pad), min(width, xs.max() + pad + 1)
    # Pixels of other objects are no part of this one's window.
    others = (labels[y0:y1, x0:x1] > 0) & ~inside[y0:y1, x0:x1]
    mine = (~_grown(others)).astype(np.float32)
    window = image[y0:y1, x0:x1] - ground
    core = inside & (away >= 0.85 * np.quantile(away[inside], 0.9))
    colour = np.median(image[core], axis=0)
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5)
    ink = colour - ground
    share = (window @ ink) / max(float(ink @ ink), 1.0)
    fit = _fit_shape(share, mine, x, y)
    # With the shape known, its colour is a least-squares estimate over all its pixels.
    weight = fit.mask * mine
    seen_ink = (weight[..., None] * window).sum((0, 1)) / max(float((weight * fit.mask).sum()), 1.0)
    rgb = (ground + seen_ink).astype(np.float32)
    expected = float(mine.sum()) * (noise**2) / max(float(ink @ ink), 1.0)
    misfit = max(0.0, fit.residual - expected) / max(float((weight * fit.mask).sum()), 1.0)
    cell = (
        min(config.grid[0] - 1, max(0, int(fit.y / height * config.grid[0]))),
        min(config.grid[1] - 1, max(0, int(fit.x / width * config.grid[1]))),
    )
    return SeenObject(
        shape=fit.shape if misfit <= MISFIT else None,
        colour=nearest_colour(rgb),
        size=_size_name(fit.radius / side, config),
        x=fit.x / width,
        y=fit.y / height,
        radius=fit.radius / side,
        cell=cell,
        place=place_name(cell, config.grid),
        misfit=misfit,
        rgb=_rgb(rgb),
    )


@dataclass(frozen=True)
class _Fit:
    shape: str
    x: float
    y: float
    radius: float
    mask: Floats
    residual: float


def _fit_shape(share: Floats, mine: Floats, x: Floats, y: Floats) -> _Fit:
    """The shape whose coverage lies nearest to the shares, in the mean square."""
    solid = np.clip(share, 0, 1) * mine
    area = max(float(solid.sum()), 1e-6)
    mean_x, mean_y = float((solid * x).sum() / area), float((solid * y).sum() / area)
    starts = []
    for shape in SHAPES:
        unit_area, off_x, off_y = _moments(shape)
        radius = max(1.0, float(np.sqrt(area / unit_area)))
        start = (mean_x - off_x * radius, mean_y - off_y * radius, radius)
        starts.append(_try(shape, *start, share, mine, x, y))
    starts.sort(key=lambda fit: fit.residual)
    rivals = [fit for fit in starts[:3] if fit.residual <= 4 * starts[0].residual + 1]
    return min((_refine(fit, share, mine, x, y) for fit in rivals), key=lambda f: f.residual)


def _try(
    shape: str,
    cx: float,
    cy: float,
    radius: float,
    share: Floats,
    mine: Floats,
    x: Floats,
    y: Floats,
) -> _Fit:
    """The residual of one shape at one place, at the better of two softnesses of edge."""
    distance = _distance(shape, x - np.float32(cx), y - np.float32(cy), radius)
    fits = []
    for softness in (1.0, 2.5):
        mask = np.minimum(np.maximum(np.float32(0.5) - distance * np.float32(1 / softness), 0), 1)
        off = share - mask
        residual = float((mine * off * off).sum())
        fits.append(_Fit(shape, cx, cy, radius, mask, residual))
    return min(fits, key=lambda fit: fit.residual)


_TABLE_REACH = 2.0  # radii
_TABLE_STEP = 0.01


@cache
def _distance_table(shape: str) -> Floats:
    at = np.arange(-_TABLE_REACH, _TABLE_REACH + _TABLE_STEP / 2, _TABLE_STEP, dtype=np.float32)
    return signed_distance(shape, at[None, :], at[:, None])


def _distance(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Signed distance in pixels, looked up to a hundredth of the radius."""
    table = _distance_table(shape)
    scale, last = 1 / (radius * _TABLE_STEP), len(table) - 1
    column = np.minimum(np.maximum(x * scale + (last / 2 + 0.5), 0), last).astype(np.intp)
    row = np.minimum(np.maximum(y * scale + (last / 2 + 0.5), 0), last).astype(np.intp)
    return table[row, column] * np.float32(radius)


def _refine(fit: _Fit, share: Floats, mine: Floats, x: Floats, y: Floats) -> _Fit:
    """Coordinate descent over centre and radius, with steps that halve."""
    for step in (0.6, 0.3):
        for move in ((step, 0.0, 0.0), (0.0, step, 0.0), (0.0, 0.0, step)):
            for sign in (1, -1):
                dx, dy, dr = (sign * part for part in move)
                moved = (fit.x + dx, fit.y + dy, fit.radius + dr)
                tried = _try(fit.shape, *moved, share, mine, x, y)
                if tried.residual < fit.residual:
                    fit = tried
                    break
    return fit


@cache
def _moments(shape: str) -> tuple[float, float, float]:
    """Area and centroid of a shape of radius 1, measured on its own rendering."""
    at = np.linspace(-1.25, 1.25, 501, dtype=np.float32) * np.float32(100)
    mask = coverage(shape, at[None, :], at[:, None], 100.0)
    area = float(mask.sum()) * 0.005**2
    centre = mask * np.float32(0.005**2 / 100)
    mean_x, mean_y = float((centre * at[None, :]).sum()), float((centre * at[:, None]).sum())
    return area, mean_x / area, mean_y / area


def _smallest_area(config: SceneConfig) -> float:
    """Pixels of the smallest object of a world."""
    unit = min(_moments(shape)[0] for shape in config.shapes)
    return unit * (min(config.radius(size) for size in config.sizes) * config.side) ** 2


def _size_name(radius: float, config: SceneConfig) -> str | None:
    sizes = {size: config.radius(size) for size in config.sizes}
    if not min(sizes.values()) / SIZE_SLACK <= radius <= max(sizes.values()) * SIZE_SLACK:
        return None
    return min(sizes, key=lambda size: abs(np.log(radius / sizes[size])))


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if not mask.any():
        return mask
    return _largest_near(mask.astype(np.float32), 1) > 0


def _rgb(colour: Floats) -> tuple[float, float, float]:
    r, g, b = (round(float(c), 1) for c in colour)
    return r, g, b
