"""The closed vocabulary of the world of scenes: colours, shapes, sizes, relations and places.

Every other module speaks these canonical names; `lexicon` maps them to and from English and
Chinese words. Colours lie at least 75 levels apart in RGB, so that a colour painted a
little off still has one nearest name.
"""

from __future__ import annotations

import math

RGB = tuple[int, int, int]
Cell = tuple[int, int]

COLOURS: dict[str, RGB] = {
    "red": (215, 35, 45),
    "green": (40, 160, 70),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 50),
    "purple": (135, 45, 165),
    "orange": (245, 130, 25),
    "cyan": (50, 200, 220),
    "pink": (250, 140, 195),
    "brown": (115, 70, 30),
    "white": (255, 255, 255),
    "black": (15, 15, 15),
    "grey": (150, 150, 150),
    "light blue": (170, 210, 250),
    "light green": (190, 235, 180),
}
SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond", "ring")
SIZES = ("small", "large")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

MIN_CONTRAST = 90.0
"""Least RGB distance between an object and the background it lies on."""

_ROW_WORDS = {1: ("middle",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMN_WORDS = {1: ("middle",), 2: ("left", "right"), 3: ("left", "middle", "right")}
MAX_GRID = 3
"""Rows and columns of a grid, at most: more have no plain words."""

PLACES = tuple(
    "centre" if (row, column) == ("middle", "middle") else f"{row} {column}"
    for row in _ROW_WORDS[3]
    for column in _COLUMN_WORDS[3]
)


def colour_distance(a: RGB, b: RGB) -> float:
    """Euclidean distance in RGB, 0 to 441."""
    return math.dist(a, b)


def stands_out(colour: str, background: str) -> bool:
    """Whether an object of this colour is plainly visible on this background."""
    return colour_distance(COLOURS[colour], COLOURS[background]) >= MIN_CONTRAST


def place_name(cell: Cell, grid: tuple[int, int]) -> str:
    """The words for a cell (row, column) of a grid (rows, columns): "top left", "centre", …"""
    row = _ROW_WORDS[grid[0]][cell[0]]
    column = _COLUMN_WORDS[grid[1]][cell[1]]
    return "centre" if row == column == "middle" else f"{row} {column}"


def cell_of_place(place: str, grid: tuple[int, int]) -> Cell | None:
    """The cell with that name, or None where the grid has no such place."""
    for row in range(grid[0]):
        for column in range(grid[1]):
            if place_name((row, column), grid) == place:
                return row, column
    return None


def relations_between(a: Cell, b: Cell) -> tuple[str, ...]:
    """All relations that hold from cell a to cell b; two of them on a diagonal.

    Objects stay inside their cells, so "left of" means that a's column lies left of b's.
    """
    held = []
    if a[1] != b[1]:
        held.append("left of" if a[1] < b[1] else "right of")
    if a[0] != b[0]:
        held.append("above" if a[0] < b[0] else "below")
    return tuple(held)
