"""Renderer of scenes: anti-aliased flat shapes at any side.

Each shape is a signed distance d (negative inside, in radii); a pixel is covered by
clip(1/2 − d·r, 0, 1), r the radius in pixels: one pixel of linear ramp across every edge.
`coverage` is shared with the checker, which fits the same shapes to images.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from neounify.data.sample import DataError
from neounify.scenes.world.lexicon import COLOURS
from neounify.scenes.world.scene import EXTENT, Scene, SceneConfig, SceneObject

Floats = NDArray[np.float32]

_ARM = 0.34  # half width of a cross's arm
_STAR_INNER = 0.46  # inner radius of a star over its outer one
_RING_HOLE = 0.52


def _star() -> list[tuple[float, float]]:
    points = []
    for k in range(10):
        reach = EXTENT if k % 2 == 0 else EXTENT * _STAR_INNER
        angle = math.pi * k / 5
        points.append((reach * math.sin(angle), 0.09 - reach * math.cos(angle)))
    return points


POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.98), (1.05, 0.84), (-1.05, 0.84)],
    "cross": [
        (-_ARM, -1.0),
        (_ARM, -1.0),
        (_ARM, -_ARM),
        (1.0, -_ARM),
        (1.0, _ARM),
        (_ARM, _ARM),
        (_ARM, 1.0),
        (-_ARM, 1.0),
        (-_ARM, _ARM),
        (-1.0, _ARM),
        (-1.0, -_ARM),
        (-_ARM, -_ARM),
    ],
    "star": _star(),
    "diamond": [(0.0, -1.06), (0.86, 0.0), (0.0, 1.06), (-0.86, 0.0)],
}
"""Corners (x right, y down) in radii around an object's centre."""


def signed_distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Distance to a shape's edge in radii, negative inside; x and y in radii from the centre."""
    if shape == "circle":
        return np.hypot(x, y) - np.float32(1)
    if shape == "ring":
        reach = np.hypot(x, y)
        return np.maximum(reach - np.float32(1), np.float32(_RING_HOLE) - reach)
    return _polygon_distance(np.asarray(POLYGONS[shape], np.float32), x, y)


def _polygon_distance(corners: Floats, x: Floats, y: Floats) -> Floats:
    """Distance to the nearest edge; the sign from counting edges a ray to the right crosses."""
    nearest = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    inside = np.zeros(nearest.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        dx, dy = x - ax - along * ex, y - ay - along * ey
        nearest = np.minimum(nearest, dx * dx + dy * dy)
        if ey != 0:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) * ex / ey)
    distance = np.sqrt(nearest)
    return np.where(inside, -distance, distance).astype(np.float32)


def coverage(shape: str, x: Floats, y: Floats, radius: float) -> Floats:
    """Share of each pixel that a shape covers, 0 to 1; x, y, radius in pixels from its centre.

    The edge's ramp is a pixel wide.
    """
    scale = np.float32(1 / radius)
    distance = signed_distance(shape, x * scale, y * scale) * np.float32(radius)
    return np.clip(np.float32(0.5) - distance, 0, 1)


def shape_mask(
    shape: str, cx: float, cy: float, radius: float, width: int, height: int
) -> tuple[int, int, Floats]:
    """Top row, left column and coverage [h, w, 1] of a shape in an image; sizes in pixels."""
    reach = EXTENT * radius + 1
    x0, y0 = max(0, math.floor(cx - reach)), max(0, math.floor(cy - reach))
    x1, y1 = min(width, math.ceil(cx + reach)), min(height, math.ceil(cy + reach))
    x = (np.arange(x0, x1, dtype=np.float32) + np.float32(0.5 - cx))[None, :]
    y = (np.arange(y0, y1, dtype=np.float32) + np.float32(0.5 - cy))[:, None]
    mask = coverage(shape, x, y, radius)[..., None]
    mask.flags.writeable = False
    return y0, x0, mask


_cached_mask = lru_cache(maxsize=4096)(shape_mask)
_CACHED_RADIUS = 24.0  # pixels: larger masks are drawn anew, so the cache stays below 50 MB


def render(scene: Scene, config: SceneConfig, side: int | None = None) -> NDArray[np.uint8]:
    """A scene as uint8 RGB [height, width, 3]; `side`: another shorter side in pixels."""
    width, height = size_at(config, side or config.side)
    if min(width, height) < 16:
        raise DataError(f"a scene cannot be rendered {side} pixels wide; the minimum is 16")
    canvas = np.empty((height, width, 3), np.uint8)
    canvas[:] = COLOURS[scene.background]
    ground = np.asarray(COLOURS[scene.background], np.float32)
    for placed in scene.objects:
        y0, x0, mask = object_mask(config, placed, side or config.side)
        ink = np.asarray(COLOURS[placed.colour], np.float32) - ground
        h, w = mask.shape[:2]
        canvas[y0 : y0 + h, x0 : x0 + w] = mask * ink + (ground + np.float32(0.5))
    return canvas


def size_at(config: SceneConfig, side: int) -> tuple[int, int]:
    """Width and height in pixels of a world's images whose shorter side is `side`."""
    return round(config.width * side / config.side), round(config.height * side / config.side)


def object_mask(config: SceneConfig, placed: SceneObject, side: int) -> tuple[int, int, Floats]:
    """Position of an object in an image: top row, left column, coverage [h, w, 1].

    `side`: pixels of the image's shorter side.
    """
    x, y = config.centre(placed)
    width, height = size_at(config, side)
    radius = config.radius(placed.size) * side
    mask_of = _cached_mask if radius <= _CACHED_RADIUS else shape_mask
    return mask_of(placed.shape, x * width, y * height, radius, width, height)
