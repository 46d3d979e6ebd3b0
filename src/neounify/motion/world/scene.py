"""Clips of the synthetic world: one or two flat shapes and what each does, drawn from a seed.

A clip is unambiguous by construction: its shapes differ in shape and colour, each does one thing
from the first frame to the last, stays wholly inside the frame, and never comes near the other.
Shapes, colours and the renderer are those of `neounify.scenes`.

Held-out combinations, which training (`split="train"`) never shows and evaluation does: those of
shape and colour of the scenes (`HELD_OUT_PAIRS`), and for each shape one motion
(`HELD_OUT_MOTIONS`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import chance, pick, pick_weighted, shuffled
from neounify.scenes.world.lexicon import COLOURS, SHAPES, stands_out
from neounify.scenes.world.scene import EXTENT, HELD_OUT_PAIRS, SceneConfig, Split

MotionKind = Literal["move", "grow", "shrink", "appear", "vanish", "bounce", "stay"]
MOTION_KINDS: tuple[MotionKind, ...] = get_args(MotionKind)
_HALF = math.sqrt(0.5)
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-_HALF, -_HALF),
    "up right": (_HALF, -_HALF),
    "down left": (-_HALF, _HALF),
    "down right": (_HALF, _HALF),
}
"""Unit vectors (x right, y down) of the ways a shape can move."""
EDGES = {"left": "left", "right": "right", "top": "up", "bottom": "down"}
"""Edges of the frame that a shape can bounce off, with the way towards each."""

MIN_FRAMES, MAX_FRAMES = 8, 16
FPS = 8.0
"""Frames per second of all clips; shapes move the same distances in any number of frames."""
KIND_WEIGHTS: dict[MotionKind, float] = {
    "move": 4.0,
    "bounce": 2.0,
    "grow": 1.0,
    "shrink": 1.0,
    "appear": 1.0,
    "vanish": 1.0,
    "stay": 0.5,
}
PAIR_SHARE = 0.4
"""Share of clips with two shapes, where the world allows two."""
COMPANION_STAYS = 0.4
"""Share of pairs whose second shape stays where it is."""

RADII = (0.12, 0.16)
"""Radii of shapes that keep their size; here and below, shares of the frame's side."""
SMALL_RADII, GROWTH = (0.09, 0.11), (1.6, 1.9)
"""The smaller radius of a shape that grows or shrinks, and the ratio of the larger one to it."""
MOVES = (0.3, 0.5)
"""Distances that a shape moves in a clip."""
APPROACHES, RETURNS = (0.2, 0.35), (0.15, 0.35)
"""Distances that a bouncing shape moves to the edge and away from it."""
MARGIN, EDGE_MARGIN = 0.04, 0.01
"""Least distance from the frame's edge, and that of a shape that bounces off it."""
GAP = 0.07
"""Least distance between two shapes."""
_MAX_TRIES = 4000

HELD_OUT_MOTIONS = frozenset(
    {
        ("circle", "move up"),
        ("square", "grow"),
        ("triangle", "move left"),
        ("cross", "appear"),
        ("star", "bounce bottom"),
        ("diamond", "shrink"),
        ("ring", "vanish"),
    }
)


class Place(NamedTuple):
    """Centre (x right, y down) and radius of a shape, as shares of the frame's side."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Motion:
    """A kind of motion, with the direction of a move or the edge of a bounce."""

    kind: MotionKind
    way: str | None = None

    def __post_init__(self) -> None:
        ways: Iterable[str | None] = (
            DIRECTIONS if self.kind == "move" else EDGES if self.kind == "bounce" else (None,)
        )
        if self.kind not in MOTION_KINDS or self.way not in ways:
            raise DataError(f"no such motion: {self.kind} {self.way or ''}")

    def __str__(self) -> str:
        return f"{self.kind} {self.way}" if self.way else self.kind


@dataclass(frozen=True, kw_only=True)
class MotionConfig:
    """Shapes, colours, motions and lengths of clips. Raises DataError."""

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    directions: tuple[str, ...] = tuple(DIRECTIONS)
    lengths: tuple[int, ...] = (8, 12, 16)
    """Frames of a clip, 8 to 16 each; a model with tubes needs multiples of a tube's frames."""
    max_shapes: int = 2
    """1 or 2."""
    side: int = 64
    """Pixels of a frame's side, at least 64."""

    def __post_init__(self) -> None:
        for field, known in (
            ("directions", DIRECTIONS),
            ("lengths", range(MIN_FRAMES, MAX_FRAMES + 1)),
        ):
            values = getattr(self, field)
            if not values or len(set(values)) != len(values) or not set(values) <= set(known):
                raise DataError(f"{field} {values} must be distinct, and some of {tuple(known)}")
        if self.max_shapes not in (1, 2):
            raise DataError(f"max_shapes {self.max_shapes} must be 1 or 2")
        if len(self.shapes) < self.max_shapes:
            raise DataError(f"{self.max_shapes} shapes of a clip differ; got {self.shapes}")
        if self.side < 64:
            raise DataError(f"side {self.side} is under 64 pixels: small shapes look alike")
        self.still  # noqa: B018 - the scenes' config checks shapes, colours and backgrounds

    @property
    def still(self) -> SceneConfig:
        """The world of single frames, as the renderer and the checker of scenes take it."""
        return SceneConfig(
            shapes=self.shapes,
            colours=self.colours,
            backgrounds=self.backgrounds,
            grid=(1, 1),
            max_objects=1,
            side=self.side,
            small=2 * SMALL_RADII[0],
            large=2 * SMALL_RADII[1] * GROWTH[1],
        )

    @property
    def motions(self) -> tuple[Motion, ...]:
        """All motions of the world."""
        ways: dict[str, Sequence[str]] = {"move": self.directions, "bounce": tuple(EDGES)}
        return tuple(Motion(kind, way) for kind in MOTION_KINDS for way in ways.get(kind, (None,)))


@dataclass(frozen=True)
class Mover:
    """One shape, what it does, and its place in every frame; None where it is not there."""

    shape: str
    colour: str
    motion: Motion
    path: tuple[Place | None, ...]

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS:
            raise DataError(f"no such shape: {self.colour} {self.shape}")
        if not MIN_FRAMES <= len(self.path) <= MAX_FRAMES:
            raise DataError(
                f"a clip has {MIN_FRAMES} to {MAX_FRAMES} frames; this path has {len(self.path)}"
            )


@dataclass(frozen=True)
class MotionScene:
    """A background and the shapes on it, frame by frame."""

    background: str
    movers: tuple[Mover, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.movers) <= 2 or len({len(m.path) for m in self.movers}) != 1:
            raise DataError("a clip has one or two shapes, whose paths are equally long")
        for mover in self.movers:
            if not stands_out(mover.colour, self.background):
                raise DataError(f"{mover.colour} does not stand out on {self.background}")

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.movers[0].path)

    def shown(self, frame: int) -> int:
        """Number of shapes in a frame."""
        return sum(mover.path[frame] is not None for mover in self.movers)

    def swap(self, old: Mover, new: Mover) -> MotionScene:
        """The clip with one shape exchanged for another."""
        return replace(self, movers=tuple(new if m is old else m for m in self.movers))


_EIGHT = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
MOTION_PRESETS: dict[str, MotionConfig] = {
    "easy": MotionConfig(
        shapes=("circle", "square", "triangle"),
        colours=("red", "green", "blue", "yellow"),
        backgrounds=("white", "black"),
        directions=("left", "right", "up", "down"),
        lengths=(8,),
        max_shapes=1,
    ),
    "default": MotionConfig(
        shapes=("circle", "square", "triangle", "cross", "star"),
        colours=_EIGHT,
        backgrounds=("white", "black", "grey"),
    ),
    "hard": MotionConfig(
        shapes=SHAPES,
        colours=(*_EIGHT, "brown", "white", "black"),
        backgrounds=("white", "black", "grey", "light blue", "light green"),
    ),
}


def motion_config(name: str) -> MotionConfig:
    """The preset of that name: "easy", "default" or "hard"."""
    if name not in MOTION_PRESETS:
        raise DataError(f"no difficulty {name!r}; there are {', '.join(MOTION_PRESETS)}")
    return MOTION_PRESETS[name]


def is_held_out(scene: MotionScene) -> bool:
    """Whether the clip shows a combination that training never shows (see the module)."""
    return any(
        (m.shape, m.colour) in HELD_OUT_PAIRS or (m.shape, str(m.motion)) in HELD_OUT_MOTIONS
        for m in scene.movers
    )


def sample_motion(
    rng: np.random.Generator,
    config: MotionConfig,
    split: Split = "train",
    *,
    kinds: Sequence[MotionKind] = MOTION_KINDS,
    shapes: int | None = None,
    frames: int | None = None,
) -> MotionScene:
    """Draw a clip of a split whose first shape does one of `kinds`.

    `shapes`: 1 or 2, by default as `PAIR_SHARE` says; `frames`: one of the config's lengths by
    default. Raises DataError where the world has no such clip.
    """
    for _ in range(_MAX_TRIES):
        length = pick(rng, config.lengths) if frames is None else frames
        count = shapes or (2 if config.max_shapes > 1 and chance(rng, PAIR_SHARE) else 1)
        scene = _draw(rng, config, kinds, count, length)
        if scene is None:
            continue
        if split == "any" or is_held_out(scene) == (split == "held_out"):
            return scene
    raise DataError(f"no clip of {kinds} in split {split!r} in {_MAX_TRIES} draws: {config}")


def _draw(
    rng: np.random.Generator,
    config: MotionConfig,
    kinds: Sequence[MotionKind],
    count: int,
    frames: int,
) -> MotionScene | None:
    background = pick(rng, config.backgrounds)
    colours = shuffled(rng, [c for c in config.colours if stands_out(c, background)])
    looks = list(zip(shuffled(rng, config.shapes), colours, strict=False))[:count]
    movers: list[Mover] = []
    for number, (shape, colour) in enumerate(looks):
        allowed = kinds
        if number:
            allowed = ("stay",) if chance(rng, COMPANION_STAYS) else MOTION_KINDS
        motion = draw_motion(rng, config, allowed)
        movers.append(Mover(shape, colour, motion, draw_path(rng, motion, frames)))
    return MotionScene(background, tuple(movers)) if are_apart(movers) else None


def draw_motion(
    rng: np.random.Generator, config: MotionConfig, kinds: Sequence[MotionKind] = MOTION_KINDS
) -> Motion:
    """A motion of one of these kinds, in any direction of the world."""
    kind = pick_weighted(rng, {kind: KIND_WEIGHTS[kind] for kind in kinds})
    return pick(rng, [motion for motion in config.motions if motion.kind == kind])


def draw_path(rng: np.random.Generator, motion: Motion, frames: int) -> tuple[Place | None, ...]:
    """Places of a shape that does that, somewhere in the frame."""
    times = np.arange(frames) / (frames - 1)
    if motion.kind == "move" and motion.way:
        return _moved(rng, DIRECTIONS[motion.way], times)
    if motion.kind == "bounce" and motion.way:
        return _bounced(rng, DIRECTIONS[EDGES[motion.way]], times)
    if motion.kind in ("grow", "shrink"):
        small = rng.uniform(*SMALL_RADII)
        large = small * rng.uniform(*GROWTH)
        x, y = _inside(rng, large), _inside(rng, large)
        first, last = (small, large) if motion.kind == "grow" else (large, small)
        return tuple(Place(x, y, float(first + (last - first) * t)) for t in times)
    radius = float(rng.uniform(*RADII))
    still = Place(_inside(rng, radius), _inside(rng, radius), radius)
    event = int(rng.integers(math.ceil(frames / 4), frames * 3 // 4 + 1))
    if motion.kind == "appear":
        return (None,) * event + (still,) * (frames - event)
    if motion.kind == "vanish":
        return (still,) * event + (None,) * (frames - event)
    return (still,) * frames


def _inside(rng: np.random.Generator, radius: float, travel: float = 0.0) -> float:
    """A coordinate from which a shape may move by `travel` and stay within the margin."""
    reach = EXTENT * radius + MARGIN
    return float(rng.uniform(reach + max(0.0, -travel), 1 - reach - max(0.0, travel)))


def _moved(
    rng: np.random.Generator, way: tuple[float, float], times: np.ndarray
) -> tuple[Place, ...]:
    radius, distance = float(rng.uniform(*RADII)), rng.uniform(*MOVES)
    dx, dy = way[0] * distance, way[1] * distance
    x, y = _inside(rng, radius, dx), _inside(rng, radius, dy)
    return tuple(Place(float(x + dx * t), float(y + dy * t), radius) for t in times)


def _bounced(
    rng: np.random.Generator, way: tuple[float, float], times: np.ndarray
) -> tuple[Place, ...]:
    """Towards an edge, and back from it at the same speed."""
    radius = float(rng.uniform(*RADII))
    approach, back = rng.uniform(*APPROACHES), rng.uniform(*RETURNS)
    wall = EXTENT * radius + EDGE_MARGIN
    across = _inside(rng, radius)
    ahead = way[0] + way[1]
    turn = 1 - wall if ahead > 0 else wall
    travelled = times * (approach + back) - approach
    along = turn - ahead * np.abs(travelled)
    return tuple(
        Place(float(a), across, radius) if way[0] else Place(across, float(a), radius)
        for a in along
    )


def are_apart(movers: Sequence[Mover]) -> bool:
    """Whether no two shapes come nearer to each other than `GAP`, in any frame."""
    for first, second in pairwise(movers):
        for a, b in zip(first.path, second.path, strict=True):
            if a is None or b is None:
                continue
            if math.hypot(a.x - b.x, a.y - b.y) < EXTENT * (a.radius + b.radius) + GAP:
                return False
    return True
