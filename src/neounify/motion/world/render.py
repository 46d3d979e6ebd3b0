"""Renderer of clips: the scenes' anti-aliased shapes, placed anew in every frame."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from neounify.motion.world.scene import MotionConfig, MotionScene
from neounify.scenes.world.lexicon import COLOURS
from neounify.scenes.world.render import shape_mask


def render_motion(scene: MotionScene, config: MotionConfig) -> NDArray[np.uint8]:
    """A clip as uint8 RGB [frames, side, side, 3]."""
    side = config.side
    clip = np.empty((scene.frames, side, side, 3), np.float32)
    clip[:] = COLOURS[scene.background]
    for mover in scene.movers:
        colour = np.asarray(COLOURS[mover.colour], np.float32)
        for frame, place in zip(clip, mover.path, strict=True):
            if place is None:
                continue
            x, y, radius = (side * value for value in place)
            y0, x0, mask = shape_mask(mover.shape, x, y, radius, side, side)
            window = frame[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]]
            window += mask * (colour - window)
    return (clip + np.float32(0.5)).astype(np.uint8)
