"""Scenes: flat objects on a grid over a plain background, drawn from a seed.

A scene is unambiguous by construction: one object per cell, each wholly inside its cell with a
margin, every colour well apart from every other and from the background. Positions are cells of
a small grid, so that "left of" or "top left" has one meaning; `jitter` moves objects off their
cell's centre without leaving it.

Held-out combinations, which training (`split="train"`) never shows and evaluation does:
each shape misses one colour (`HELD_OUT_PAIRS`), and each shape in one other colour never stands
in one relation to an object unlike it (`HELD_OUT_RELATIONS`; "A above B" counts as "B below A").
Every shape, colour and relation is still seen, only not together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import chance, pick, pick_weighted, shuffled
from neounify.scenes.world.lexicon import (
    COLOURS,
    MAX_GRID,
    OPPOSITE,
    SHAPES,
    SIZES,
    Cell,
    relations_between,
    stands_out,
)

Split = Literal["train", "held_out", "any"]
SceneKind = Literal["single", "pair", "group", "mixed"]

HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "yellow"),
        ("square", "green"),
        ("triangle", "blue"),
        ("cross", "red"),
        ("star", "purple"),
        ("diamond", "orange"),
        ("ring", "cyan"),
    }
)
HELD_OUT_RELATIONS = frozenset(
    {
        ("circle", "red", "above"),
        ("square", "yellow", "left of"),
        ("triangle", "green", "right of"),
        ("cross", "blue", "below"),
        ("star", "orange", "left of"),
        ("diamond", "purple", "above"),
        ("ring", "pink", "below"),
    }
)

KIND_WEIGHTS: dict[SceneKind, float] = {"single": 0.3, "pair": 0.3, "group": 0.2, "mixed": 0.2}
CELL_MARGIN = 0.075
"""Share of a cell's side that stays free on each side of an object."""
MIN_SIDE = 32
"""Pixels of an image's shorter side, at least."""
MAX_OBJECTS = 8
"""Objects of a scene, at most: the checker tries all ways to match words and objects."""
EXTENT = 1.08
"""Reach of the widest shape from its centre, in radii."""
_MAX_TRIES = 2000


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """Objects, colours, grid and sizes of scenes.

    Sizes are diameters as a share of the (smaller) cell side.
    """

    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    backgrounds: tuple[str, ...]
    sizes: tuple[str, ...] = SIZES
    grid: tuple[int, int] = (3, 3)
    """Rows and columns, 1 to 3 each."""
    max_objects: int = 3
    side: int = 64
    """Pixels of the shorter side."""
    stretch: tuple[int, int] = (0, 0)
    """Pixels by which width and height exceed `side`; (0, 0): images are square."""
    small: float = 0.5
    large: float = 0.78
    jitter: float = 0.0
    """0: objects sit on the cell's centre; 1: anywhere in the cell that keeps the margin."""

    def __post_init__(self) -> None:
        for field, known in (
            ("shapes", SHAPES),
            ("colours", COLOURS),
            ("backgrounds", COLOURS),
            ("sizes", SIZES),
        ):
            names = getattr(self, field)
            if not names or len(set(names)) != len(names) or not set(names) <= set(known):
                raise DataError(f"{field} {names} must be distinct names of {tuple(known)}")
        if not all(1 <= n <= MAX_GRID for n in self.grid):
            raise DataError(f"grid {self.grid} must have 1 to {MAX_GRID} rows and columns")
        room_for = min(MAX_OBJECTS, self.grid[0] * self.grid[1])
        if not 1 <= self.max_objects <= room_for:
            raise DataError(f"max_objects {self.max_objects} is outside 1 to {room_for}")
        if self.side < MIN_SIDE:
            raise DataError(
                f"side {self.side} is under {MIN_SIDE} pixels: shapes cannot be distinguished"
            )
        if min(self.stretch) != 0:
            raise DataError(
                f"stretch {self.stretch} must hold a 0 and nothing below: side is the shorter side"
            )
        room = (1 - 2 * CELL_MARGIN) / EXTENT
        if not 0 < self.small < self.large <= room + 1e-9:
            raise DataError(
                f"sizes must keep 0 < small < large <= {room:.3f}; got {self.small}, {self.large}"
            )
        if not 0 <= self.jitter <= 1:
            raise DataError(f"jitter {self.jitter} is outside 0 to 1")
        for background in self.backgrounds:
            if sum(stands_out(colour, background) for colour in self.colours) < 2:
                raise DataError(f"fewer than two colours stand out on a {background} background")
        for colour in self.colours:
            if not any(stands_out(colour, background) for background in self.backgrounds):
                raise DataError(f"{colour} stands out on no background of {self.backgrounds}")

    @property
    def width(self) -> int:
        """Pixels of an image from left to right."""
        return self.side + self.stretch[0]

    @property
    def height(self) -> int:
        """Pixels of an image from top to bottom."""
        return self.side + self.stretch[1]

    def sized(self, width: int, height: int) -> SceneConfig:
        """The same world in images of another size, in pixels."""
        side = min(width, height)
        return replace(self, side=side, stretch=(width - side, height - side))

    @property
    def cell_side(self) -> float:
        """Side of a cell (the smaller one), as a share of the image's shorter side."""
        if self.stretch == (0, 0):
            return 1 / max(self.grid)
        return min(self.width / self.grid[1], self.height / self.grid[0]) / self.side

    @property
    def cells(self) -> tuple[Cell, ...]:
        """All cells (row, column) in reading order."""
        return tuple((r, c) for r in range(self.grid[0]) for c in range(self.grid[1]))

    def radius(self, size: str) -> float:
        """Radius of a size class, as a share of the image's shorter side."""
        return (self.small if size == "small" else self.large) * self.cell_side / 2

    def centre(self, placed: SceneObject) -> tuple[float, float]:
        """Where an object's centre lies: x to the right, y down, both 0 to 1."""
        slack = self.cell_side * (0.5 - CELL_MARGIN) - EXTENT * self.radius(placed.size)
        across, along = self.side / self.width, self.side / self.height
        x = (placed.cell[1] + 0.5) / self.grid[1] + placed.offset[0] * slack * self.jitter * across
        y = (placed.cell[0] + 0.5) / self.grid[0] + placed.offset[1] * slack * self.jitter * along
        return x, y


@dataclass(frozen=True)
class SceneObject:
    """One flat object; `offset` (x, y), −1 to 1 each, places it in its cell under jitter."""

    shape: str
    colour: str
    size: str
    cell: Cell
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS or self.size not in SIZES:
            raise DataError(f"no such object: {self.size} {self.colour} {self.shape}")
        if not all(-1 <= o <= 1 for o in self.offset):
            raise DataError(f"offset {self.offset} is outside -1 to 1")


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it, kept in reading order; equal scenes look equal."""

    background: str
    objects: tuple[SceneObject, ...] = ()

    def __post_init__(self) -> None:
        if self.background not in COLOURS:
            raise DataError(f"no such background: {self.background}")
        cells = [placed.cell for placed in self.objects]
        if len(set(cells)) != len(cells):
            raise DataError(f"two objects share a cell: {sorted(cells)}")
        for placed in self.objects:
            if not stands_out(placed.colour, self.background):
                raise DataError(f"{placed.colour} does not stand out on {self.background}")
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda o: o.cell)))

    def at(self, cell: Cell) -> SceneObject | None:
        """The object in a cell."""
        return next((placed for placed in self.objects if placed.cell == cell), None)

    def swap(self, old: SceneObject, new: SceneObject) -> Scene:
        """The scene with one object exchanged for another."""
        return replace(self, objects=tuple(new if o == old else o for o in self.objects))


_FIVE = ("circle", "square", "triangle", "cross", "star")
_EIGHT = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
PRESETS: dict[str, SceneConfig] = {
    "easy": SceneConfig(
        shapes=("circle", "square", "triangle"),
        colours=("red", "green", "blue", "yellow"),
        backgrounds=("white", "black"),
        sizes=("large",),
        grid=(2, 2),
        max_objects=3,
    ),
    "default": SceneConfig(
        shapes=_FIVE,
        colours=_EIGHT,
        backgrounds=("white", "black", "grey"),
        sizes=("small", "large"),
        grid=(2, 2),
        max_objects=3,
    ),
    "wide": SceneConfig(
        shapes=_FIVE,
        colours=_EIGHT,
        backgrounds=("white", "black", "grey"),
        sizes=("small", "large"),
        grid=(3, 3),
        max_objects=3,
    ),
    "hard": SceneConfig(
        shapes=SHAPES,
        colours=(*_EIGHT, "brown", "white", "black"),
        backgrounds=("white", "black", "grey", "light blue", "light green"),
        sizes=("small", "large"),
        grid=(3, 3),
        max_objects=5,
        small=0.5,
        large=0.72,
        jitter=1.0,
    ),
}


def scene_config(name: str) -> SceneConfig:
    """The preset of that name: "easy", "default", "wide" or "hard"."""
    if name not in PRESETS:
        raise DataError(f"no difficulty {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def is_held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination that training never shows (see the module)."""
    if any((placed.shape, placed.colour) in HELD_OUT_PAIRS for placed in scene.objects):
        return True
    for a, b in combinations(scene.objects, 2):
        if (a.shape, a.colour) == (b.shape, b.colour):
            continue
        for relation in relations_between(a.cell, b.cell):
            if (a.shape, a.colour, relation) in HELD_OUT_RELATIONS:
                return True
            if (b.shape, b.colour, OPPOSITE[relation]) in HELD_OUT_RELATIONS:
                return True
    return False


def in_split(scene: Scene, split: Split) -> bool:
    """Whether a scene belongs to a split."""
    return split == "any" or is_held_out(scene) == (split == "held_out")


def sample_scene(
    rng: np.random.Generator,
    config: SceneConfig,
    kind: SceneKind | None = None,
    split: Split = "train",
) -> Scene:
    """Draw a scene of a kind and split.

    Kinds: "single": one object; "pair": two, unlike in shape and colour; "group": two or more
    that look alike; "mixed": any objects. Kinds that do not fit the config fall back to "single".
    """
    for _ in range(_MAX_TRIES):
        chosen = pick_weighted(rng, KIND_WEIGHTS) if kind is None else kind
        scene = _draw_scene(rng, config, chosen)
        if in_split(scene, split):
            return scene
    raise DataError(f"no {kind or 'any'} scene of split {split!r} in {_MAX_TRIES} draws: {config}")


def visible_colours(config: SceneConfig, background: str) -> tuple[str, ...]:
    """The object colours that stand out on a background."""
    return tuple(colour for colour in config.colours if stands_out(colour, background))


def draw_offset(rng: np.random.Generator, config: SceneConfig) -> tuple[float, float]:
    """An offset in the cell, in eighths; (0, 0) without jitter."""
    if not config.jitter:
        return 0.0, 0.0
    return int(rng.integers(-8, 9)) / 8, int(rng.integers(-8, 9)) / 8


def _draw_scene(rng: np.random.Generator, config: SceneConfig, kind: SceneKind) -> Scene:
    background = pick(rng, config.backgrounds)
    colours = visible_colours(config, background)
    looks: list[tuple[str, str, str]]
    if config.max_objects < 2:
        kind = "single"
    if kind == "single":
        looks = [_draw_look(rng, config, colours)]
    elif kind == "pair":
        two_shapes, two_colours = shuffled(rng, config.shapes), shuffled(rng, colours)
        looks = [
            (shape, colour, pick(rng, config.sizes))
            for shape, colour in zip(two_shapes[:2], two_colours[:2], strict=False)
        ]
    elif kind == "group":
        count = int(rng.integers(2, config.max_objects + 1))
        looks = [_draw_look(rng, config, colours)] * count
    else:
        count = int(rng.integers(2, config.max_objects + 1))
        looks = [_draw_look(rng, config, colours) for _ in range(count)]
        if count > 2 and chance(rng, 0.5):
            looks[-1] = looks[0]
    cells = shuffled(rng, config.cells)
    return Scene(
        background,
        tuple(
            SceneObject(*look, cell, draw_offset(rng, config))
            for look, cell in zip(looks, cells, strict=False)
        ),
    )


def _draw_look(
    rng: np.random.Generator, config: SceneConfig, colours: tuple[str, ...]
) -> tuple[str, str, str]:
    return pick(rng, config.shapes), pick(rng, colours), pick(rng, config.sizes)
