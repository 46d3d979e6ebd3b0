"""Following shapes through a clip: from frames to tracks, and from a track to its motion.

Every frame is perceived by the checker of scenes. Objects of neighbouring frames are linked where
place, colour and shape are nearest, then each track is fitted: presence by the one change that
disagrees with the fewest frames, places by a line and by a line with one turn, radii by an
exponential. Fits use all frames, so noise in single ones moves them little.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from neounify.data.sample import DataError
from neounify.motion.world.scene import DIRECTIONS, EDGES, Motion, MotionConfig
from neounify.scenes.bench.perceive import Percept, SeenObject, perceive

Clip = NDArray[np.uint8]
"""Frames, uint8 RGB [frames, height, width, 3]."""
Floats = NDArray[np.float64]

MAX_JUMP = 0.25
"""Furthest that a shape may move from one frame to the next, as a share of the frame's side."""
_COLOUR_SCALE, _SHAPE_COST = 200.0, 0.15
"""RGB distance that counts as one side of the frame when frames are linked; cost of a new shape."""
MAX_LINK_COST = 1.0
MIN_TRAVEL = 0.12
"""Least distance between both ends of a path that counts as a move, in sides of the frame."""
MIN_SWING = 0.07
"""Least distance to and from its turn that counts as a bounce."""
MIN_GROWTH = 1.3
"""Least ratio of the radii at both ends that counts as growing or shrinking."""


@dataclass
class Track:
    """One shape through the frames in which it was seen."""

    seen: dict[int, SeenObject] = field(default_factory=dict)

    def share(self, name: str, value: str) -> float:
        """Share of its frames in which an attribute has that value, 0 to 1."""
        return sum(getattr(o, name) == value for o in self.seen.values()) / len(self.seen)

    @property
    def last(self) -> int:
        """The last frame in which it was seen."""
        return max(self.seen)


@dataclass(frozen=True)
class Followed:
    """A clip as seen: what each frame shows, and its shapes as tracks, longest first."""

    percepts: tuple[Percept, ...]
    tracks: tuple[Track, ...]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.percepts)


@dataclass(frozen=True)
class FittedMotion:
    """The motion of a track.

    `motion` is None where it is none of the world's, such as a shape that moves and grows.
    `presence` is "always", or the "appear" or "vanish" with the fewest disagreeing frames, and
    `steady` the share of frames that agree. `travel` (x, y) leads from its first to its last fitted
    place; `angle` is that of the travel in degrees, x right and y down. `misfit` is the root mean
    square distance of its places from the fit, all in sides of the frame; `unevenness` that of the
    logarithm of its radius.
    """

    motion: Motion | None
    presence: str
    steady: float
    travel: tuple[float, float]
    misfit: float
    unevenness: float

    @property
    def angle(self) -> float:
        """Direction of the travel in degrees, −180 to 180."""
        return math.degrees(math.atan2(self.travel[1], self.travel[0]))


def as_clip(clip: Clip | Sequence[Clip]) -> Clip:
    """A clip as an array. Raises DataError for anything but uint8 RGB frames of one size."""
    try:
        frames = np.asarray(clip)
    except ValueError as error:
        raise DataError("the frames of a clip must have one size") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise DataError(
            f"a clip is {frames.dtype} {list(frames.shape)}, not uint8 [frames, h, w, 3]"
        )
    return frames


def follow(clip: Clip | Sequence[Clip], config: MotionConfig) -> Followed:
    """Follow the shapes of a clip of square frames of any size.

    Raises DataError for anything else.
    """
    percepts = tuple(perceive(frame, config.still) for frame in as_clip(clip))
    tracks: list[Track] = []
    for number, percept in enumerate(percepts):
        _link(tracks, percept.objects, number)
    tracks.sort(key=lambda track: -len(track.seen))
    return Followed(percepts, tuple(tracks))


def _link(tracks: list[Track], objects: Sequence[SeenObject], frame: int) -> None:
    """Add the objects of a frame to the tracks that they continue, the likeliest first."""
    costs = sorted(
        (cost, number, index)
        for number, track in enumerate(tracks)
        for index, seen in enumerate(objects)
        if (cost := _cost(track, seen, frame)) <= MAX_LINK_COST
    )
    linked_tracks, linked = set[int](), set[int]()
    for _, number, index in costs:
        if number not in linked_tracks and index not in linked:
            tracks[number].seen[frame] = objects[index]
            linked_tracks.add(number)
            linked.add(index)
    tracks += [Track({frame: seen}) for index, seen in enumerate(objects) if index not in linked]


def _cost(track: Track, seen: SeenObject, frame: int) -> float:
    before = track.seen[track.last]
    jump = math.hypot(seen.x - before.x, seen.y - before.y)
    # One shape may vanish and another appear where it was; what changes both looks is another one.
    is_other = seen.shape != before.shape and seen.colour != before.colour
    if is_other or jump > MAX_JUMP * (frame - track.last):
        return math.inf
    colour = math.dist(seen.rgb, before.rgb) / _COLOUR_SCALE
    return jump + colour + _SHAPE_COST * (seen.shape != before.shape)


def fit_motion(track: Track, frames: int, config: MotionConfig) -> FittedMotion:
    """The motion of a track of a clip with that many frames."""
    presence, steady = _presence(track.seen, frames)
    numbers = np.array(sorted(track.seen))
    places = np.array([(track.seen[n].x, track.seen[n].y) for n in numbers])
    times = (numbers - numbers[0]) / max(1, frames - 1)
    line, off = _fitted(places, times, None)
    travel = line[-1] - line[0]
    edge, turned_off = _bounce(places, times, off)
    growth, unevenness = _growth(np.array([track.seen[n].radius for n in numbers]), times)
    motion = _named(presence, travel, edge, growth, config)
    misfit = turned_off if edge else off
    return FittedMotion(
        motion, presence, steady, (float(travel[0]), float(travel[1])), misfit, unevenness
    )


def _named(
    presence: str, travel: Floats, edge: str | None, growth: float, config: MotionConfig
) -> Motion | None:
    """The one motion of the world that the measures show, or None for several."""
    motions: list[Motion] = []
    if edge is not None:
        motions.append(Motion("bounce", edge))
    elif math.hypot(*travel) >= MIN_TRAVEL:
        motions.append(Motion("move", nearest_direction(travel, config)))
    if max(growth, 1 / growth) >= MIN_GROWTH:
        motions.append(Motion("grow" if growth > 1 else "shrink"))
    if presence == "appear":
        motions.append(Motion("appear"))
    elif presence == "vanish":
        motions.append(Motion("vanish"))
    if len(motions) > 1:
        return None
    return motions[0] if motions else Motion("stay")


def nearest_direction(travel: Floats | tuple[float, float], config: MotionConfig) -> str:
    """The direction of the world that is nearest in angle."""
    return max(
        config.directions,
        key=lambda way: DIRECTIONS[way][0] * travel[0] + DIRECTIONS[way][1] * travel[1],
    )


def _presence(seen: Mapping[int, SeenObject], frames: int) -> tuple[str, float]:
    """The presence that disagrees with the fewest frames, and the share of those that agree."""
    there = np.array([frame in seen for frame in range(frames)])
    options = [(int((~there).sum()), 0, "always")]
    for event in range(1, frames):
        before, after = there[:event], there[event:]
        options.append((int(before.sum() + (~after).sum()), 1, "appear"))
        options.append((int((~before).sum() + after.sum()), 1, "vanish"))
    wrong, _, presence = min(options, key=lambda option: option[:2])
    return presence, 1 - wrong / frames


def _fitted(places: Floats, times: Floats, turn: float | None) -> tuple[Floats, float]:
    """Least-squares places [n, 2] at constant speed, or with one turn, and their misfit."""
    columns = [np.ones_like(times), times]
    columns += [np.abs(times - turn)] if turn is not None else []
    base = np.stack(columns, axis=1)
    fitted = base @ np.linalg.lstsq(base, places, rcond=None)[0]
    return fitted, float(np.sqrt(((fitted - places) ** 2).sum(1).mean()))


def _bounce(places: Floats, times: Floats, line_misfit: float) -> tuple[str | None, float]:
    """The edge that a path turns back from, if it does so, and the misfit of the turned path."""
    best, misfit, at = None, line_misfit, 0
    for index in range(1, len(times) - 1):
        for turn in (times[index], (times[index] + times[index + 1]) / 2):
            fitted, off = _fitted(places, times, turn)
            if off < misfit:
                best, misfit, at = fitted, off, index
    if best is None:
        return None, line_misfit
    # Between frames, the turn itself lies beyond both neighbours: the further one stands for it.
    swings = {}
    for edge, way in EDGES.items():
        along = best @ np.array(DIRECTIONS[way])
        peak = max(along[at], along[at + 1])
        swings[edge] = float(min(peak - along[0], peak - along[-1]))
    edge = max(swings, key=lambda name: swings[name])
    return (edge, misfit) if swings[edge] >= MIN_SWING else (None, line_misfit)


def _growth(radii: Floats, times: Floats) -> tuple[float, float]:
    """Ratio of the fitted last to the first radius, and the misfit of the logarithms."""
    if len(radii) < 3:
        return 1.0, 0.0
    logs = np.log(np.maximum(radii, 1e-3))
    slope, start = np.polyfit(times, logs, 1)
    off = logs - (start + slope * times)
    return float(np.exp(slope * (times[-1] - times[0]))), float(np.sqrt((off**2).mean()))
