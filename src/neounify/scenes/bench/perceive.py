"""Perception: from an image back to background, objects, shapes, colours, sizes and places.

Analysis by synthesis, for images that may be noisy, soft-edged or a little off in colour:

1. the background is the median colour of the image's rim;
2. a pixel belongs to an object if, after light smoothing, it lies further from the background
   than `FOREGROUND` and than half the strongest difference near it; parts that touch are one
   object;
3. with b the background and c an object's colour, every pixel p near the object gives a share
   α = (p − b)·(c − b) / |c − b|²; each shape of the world is fitted to α by the renderer's own
   coverage (centre, radius and softness), and the least misfit wins;
4. the misfit that noise does not explain must stay small, or the object has no known shape.

Names are None where nothing of the world is near enough; nothing is guessed from a caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.data.sample import DataError
from neounify.scenes.world.lexicon import COLOURS, SHAPES, Cell, place_name
from neounify.scenes.world.render import coverage, signed_distance
from neounify.scenes.world.scene import SceneConfig

Floats = NDArray[np.float32]

FOREGROUND = 45.0
"""Least RGB distance from the background (of 255 per channel) of a pixel of an object."""
COLOUR_REACH = 60.0
"""A colour further than this from every name has none."""
MISFIT = 0.12
"""Largest share of a shape's energy that may differ from it, noise aside."""
MIN_AREA = 0.3
"""A part smaller than this share of the smallest object is a speck, not an object."""
SIZE_SLACK = 1.3
"""A radius may lie this factor below the smallest or above the largest size class."""


@dataclass(frozen=True)
class SeenObject:
    """One object as seen: names, or None where nothing fits.

    x and y are shares of the image's width and height, the radius one of its shorter side.
    """

    shape: str | None
    colour: str | None
    size: str | None
    x: float
    y: float
    radius: float
    cell: Cell
    place: str
    misfit: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Percept:
    """Everything perceived; `clutter`: share of the image that is neither background nor object."""

    background: str | None
    objects: tuple[SeenObject, ...]
    background_rgb: tuple[float, float, float]
    clutter: float


def as_array(image: NDArray[np.uint8] | Image.Image) -> NDArray[np.uint8]:
    """An image as uint8 RGB [h, w, 3].

    Raises:
        DataError: the array is not uint8 [h, w, 3].
    """
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"an image is {image.dtype} {list(image.shape)}, not uint8 [h, w, 3]")
    return image


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
    ground = _background(pixels)
    away = np.sqrt(((_smooth(values) - ground) ** 2).sum(-1))
    threshold = np.maximum(FOREGROUND, 0.5 * _largest_near(away, reach=2))
    labels, count = label_components(away > threshold)
    least = MIN_AREA * _smallest_area(config)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    noise = _noise(pixels, labels)
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


def nearest_colour(rgb: Floats) -> str | None:
    """The name nearest to a colour, or None if all lie further than `COLOUR_REACH`."""
    names, table = _colour_table()
    distances = np.sqrt(((table - rgb) ** 2).sum(-1))
    best = int(distances.argmin())
    return names[best] if distances[best] <= COLOUR_REACH else None


@cache
def _colour_table() -> tuple[tuple[str, ...], Floats]:
    return tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)


def _background(image: NDArray[np.uint8]) -> Floats:
    rim = (image[:2], image[-2:], image[2:-2, :2], image[2:-2, -2:])
    return _medians(np.concatenate([side.reshape(-1, 3) for side in rim]))


def _medians(pixels: NDArray[np.uint8]) -> Floats:
    """The median of every channel of pixels [n, 3], counted rather than sorted."""
    return np.array([_median_of_counts(np.bincount(channel)) for channel in pixels.T], np.float32)


def _median_of_counts(counts: NDArray[np.intp]) -> float:
    """The median of whole numbers from 0, `counts[v]` of which are v."""
    below = np.cumsum(counts)
    number = int(below[-1])
    low, high = np.searchsorted(below, ((number - 1) // 2, number // 2), side="right")
    return (int(low) + int(high)) / 2


def _smooth(image: Floats) -> Floats:
    """Binomial 3×3 smoothing, edges repeated."""
    padded = np.concatenate([image[:1], image, image[-1:]])
    image = (padded[:-2] + padded[2:] + 2 * image) / np.float32(4)
    padded = np.concatenate([image[:, :1], image, image[:, -1:]], axis=1)
    return (padded[:, :-2] + padded[:, 2:] + 2 * image) / np.float32(4)


def _largest_near(values: Floats, reach: int) -> Floats:
    """The maximum over the square of `reach` pixels around each pixel."""
    for _ in range(2):
        largest = values.copy()
        for step in range(1, reach + 1):
            np.maximum(largest[step:], values[:-step], out=largest[step:])
            np.maximum(largest[:-step], values[step:], out=largest[:-step])
        values = largest.T
    return values


def _noise(image: NDArray[np.uint8], labels: NDArray[np.int32]) -> float:
    """Standard deviation of one channel over the background, robust against objects' edges."""
    plain = image[_largest_near((labels > 0).astype(np.int8), 2) == 0]
    if len(plain) < 50:
        return 0.0
    # Twice the distances are whole numbers, as medians of whole numbers are halves.
    doubled = np.abs(2 * plain.astype(np.int32) - (2 * _medians(plain)).astype(np.int32))
    return float(
        np.float32(1.4826) * np.float32(_median_of_counts(np.bincount(doubled.ravel())) / 2)
    )


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
    colour = _medians(image[core].astype(np.uint8))
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + np.float32(0.5)
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5)
    ink = colour - ground
    share = np.asarray((window @ ink) / max(float(ink @ ink), 1.0), np.float32)
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
    area = max(float(solid.sum()), 1e-6)  # a speck of noise may have no area at all
    mean_x, mean_y = float((solid * x).sum() / area), float((solid * y).sum() / area)
    starts = []
    for shape in range(len(SHAPES)):
        unit_area, off_x, off_y = _moments(SHAPES[shape])
        radius = max(1.0, float(np.sqrt(area / unit_area)))
        starts.append((shape, mean_x - off_x * radius, mean_y - off_y * radius, radius))
    window = (share, mine, x, y)
    residuals = [pair.min() for pair in _residuals(starts, *window)]
    order = np.argsort(residuals, kind="stable")[:3]
    least = float(residuals[order[0]])
    rivals = [(starts[n], float(residuals[n])) for n in order if residuals[n] <= 4 * least + 1]
    best, _ = min(_refined(rivals, *window), key=lambda rival: rival[1])
    return _fitted(best, *window)


_Candidate = tuple[int, float, float, float]
"""Index of a shape, centre and radius in pixels."""
_SOFTNESSES = np.array([1.0, 2.5])
_SHARPNESSES = (1 / _SOFTNESSES).astype(np.float32)[:, None, None]


def _residuals(
    candidates: Sequence[_Candidate], share: Floats, mine: Floats, x: Floats, y: Floats
) -> Floats:
    """Residuals of candidates [n, 2], at both softnesses of edge."""
    off = _masks(candidates, x, y)
    np.subtract(share, off, out=off)
    squares = mine * off
    squares *= off
    return squares.reshape(*off.shape[:2], -1).sum(-1)


def _masks(candidates: Sequence[_Candidate], x: Floats, y: Floats) -> Floats:
    """Coverage by candidates [n, 2, h, w], at both softnesses of edge."""
    masks = _distances(candidates, x, y)[:, None] * _SHARPNESSES
    np.subtract(np.float32(0.5), masks, out=masks)
    np.maximum(masks, 0, out=masks)
    return np.minimum(masks, 1, out=masks)


def _fitted(candidate: _Candidate, share: Floats, mine: Floats, x: Floats, y: Floats) -> _Fit:
    """A candidate at the better softness, with its mask."""
    shape, cx, cy, radius = candidate
    masks = _masks([candidate], x, y)[0]
    residuals = [float(r) for r in _residuals([candidate], share, mine, x, y)[0]]
    softness = int(residuals[1] < residuals[0])
    return _Fit(SHAPES[shape], cx, cy, radius, masks[softness], residuals[softness])


_TABLE_REACH = 2.0  # radii
_TABLE_STEP = 0.01


@cache
def _distance_tables() -> Floats:
    """Signed distances of all shapes in radii, one table after the other [shapes · side · side]."""
    at = np.arange(-_TABLE_REACH, _TABLE_REACH + _TABLE_STEP / 2, _TABLE_STEP, dtype=np.float32)
    tables = [signed_distance(shape, at[None, :], at[:, None]) for shape in SHAPES]
    return np.stack(tables).ravel()


_TABLE_SIDE = round(2 * _TABLE_REACH / _TABLE_STEP) + 1


def _distances(candidates: Sequence[_Candidate], x: Floats, y: Floats) -> Floats:
    """Signed distances in pixels [n, h, w], looked up to a hundredth of the radius."""
    shapes = np.array([shape for shape, *_ in candidates])[:, None, None]
    places = np.array([place for _, *place in candidates])
    cx, cy, radius = places.astype(np.float32).T[:, :, None, None]
    scale = (1 / (places[:, 2] * _TABLE_STEP)).astype(np.float32)[:, None, None]
    last = _TABLE_SIDE - 1
    middle = np.float32(last / 2 + 0.5)
    column = np.minimum(np.maximum((x - cx) * scale + middle, 0), last).astype(np.intp)
    row = np.minimum(np.maximum((y - cy) * scale + middle, 0), last).astype(np.intp)
    distances = _distance_tables().take((shapes * _TABLE_SIDE + row) * _TABLE_SIDE + column)
    distances *= radius
    return distances


_MOVES = [
    tuple(step * part for part in axis)
    for step in (0.6, 0.3)
    for axis in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
]


def _refined(
    rivals: Sequence[tuple[_Candidate, float]], share: Floats, mine: Floats, x: Floats, y: Floats
) -> list[tuple[_Candidate, float]]:
    """Coordinate descent over centre and radius, with steps that halve; all rivals side by side.

    Of a step forth and one back the first that lowers a rival's residual is taken.
    """
    best = list(rivals)
    for dx, dy, dr in _MOVES:
        moved: list[_Candidate] = []
        for (shape, cx, cy, radius), _ in best:
            moved.append((shape, cx + dx, cy + dy, radius + dr))
            moved.append((shape, cx - dx, cy - dy, radius - dr))
        residuals = _residuals(moved, share, mine, x, y).min(-1).tolist()
        for n in range(len(best)):
            for m in (2 * n, 2 * n + 1):
                if residuals[m] < best[n][1]:
                    best[n] = (moved[m], residuals[m])
                    break
    return best


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


def label_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Label the 8-connected parts of a mask: labels [h, w], 0 outside, and how many there are.

    Labels run from 1 in reading order of each part's first pixel.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 1), np.int8)
    padded[:, :width] = mask
    steps = np.diff(padded.ravel(), prepend=np.int8(0))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    rows = starts // (width + 1)
    first, last = (starts % (width + 1)).tolist(), ((ends - 1) % (width + 1)).tolist()
    parent = list(range(len(first)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    bounds = np.searchsorted(rows, np.arange(height + 1)).tolist()
    for row in range(1, height):
        above, above_end = bounds[row - 1], bounds[row]
        here, here_end = bounds[row], bounds[row + 1]
        while above < above_end and here < here_end:
            if first[above] <= last[here] + 1 and first[here] <= last[above] + 1:
                a, b = root(above), root(here)
                parent[max(a, b)] = min(a, b)
            if last[above] < last[here]:
                above += 1
            else:
                here += 1

    labels = np.zeros((height, width), np.int32)
    number: dict[int, int] = {}
    for run, row in enumerate(rows.tolist()):
        label = number.setdefault(root(run), len(number) + 1)
        labels[row, first[run] : last[run] + 1] = label
    return labels, len(number)
