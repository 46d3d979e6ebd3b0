"""Lexicon of the synthetic scenes in English and Chinese, for writing and for parsing.

Writing uses the first word of an entry or any of its variants; reading knows all of them, longest
first. The readers here only cut text into typed tokens; grammar is the parser's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from neounify.data.sample import DataError

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
    relations = []
    if a[1] != b[1]:
        relations.append("left of" if a[1] < b[1] else "right of")
    if a[0] != b[0]:
        relations.append("above" if a[0] < b[0] else "below")
    return tuple(relations)


Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_CHINESE_NUMBERS = "零一两三四五六七八九"

_CHINESE_COLOURS = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "orange": "橙色",
    "cyan": "青色",
    "pink": "粉色",
    "brown": "棕色",
    "white": "白色",
    "black": "黑色",
    "grey": "灰色",
    "light blue": "浅蓝色",
    "light green": "浅绿色",
}
_CHINESE_SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字形",
    "star": "五角星",
    "diamond": "菱形",
    "ring": "圆环",
}
_CHINESE_PLACES = {
    "top left": "左上角",
    "top middle": "上方中间",
    "top right": "右上角",
    "middle left": "左侧中间",
    "centre": "正中央",
    "middle right": "右侧中间",
    "bottom left": "左下角",
    "bottom middle": "下方中间",
    "bottom right": "右下角",
}
_RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_CHINESE_RELATIONS = {
    "left of": ("左边", "左侧"),
    "right of": ("右边", "右侧"),
    "above": ("上面", "上方"),
    "below": ("下面", "下方"),
}

TokenKind = Literal[
    "number", "size", "colour", "shape", "place", "relation", "background", "the", "at", "stop"
]


@dataclass(frozen=True)
class Token:
    """A word that carries meaning: its kind and canonical value."""

    kind: TokenKind
    value: str


def number_word(count: int, language: Language = "en") -> str:
    """A number from 0 to 9 in words (Chinese as before a measure word: 两, not 二)."""
    if not 0 <= count <= 9:
        raise DataError(f"there is no word here for the number {count}")
    return _NUMBERS[count] if language == "en" else _CHINESE_NUMBERS[count]


def plural(shape: str) -> str:
    """The English plural of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def word(kind: TokenKind, value: str, language: Language) -> str:
    """The usual word for a name."""
    if language == "en":
        return value
    tables: Mapping[str, Mapping[str, str]] = {
        "colour": _CHINESE_COLOURS,
        "shape": _CHINESE_SHAPES,
        "place": _CHINESE_PLACES,
        "size": {"small": "小", "large": "大"},
    }
    return tables[kind][value]


def relation_words(relation: str, language: Language) -> tuple[str, ...]:
    """The phrases for a relation, usual one first."""
    return (_RELATION_WORDS if language == "en" else _CHINESE_RELATIONS)[relation]


def language_of(text: str) -> Language:
    """Chinese if the text holds any Chinese character, else English."""
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"


def tokens(text: str) -> list[Token]:
    """Cut a text into the words that carry meaning.

    Raises:
        DataError: the text holds a word that is not of this world.
    """
    language = language_of(text)
    text = text.lower() if language == "en" else re.sub(r"\s+", "", text.lower())
    table, pattern = _reader(language)
    words: list[Token] = []
    at = 0
    while at < len(text):
        hit = pattern.match(text, at)
        if hit is None:
            unknown = re.match(r"\w+|.", text[at:], re.DOTALL)
            raise DataError(f"cannot read {unknown.group() if unknown else ''!r} in {text!r}")
        if token := table.get(hit.group()):
            words.append(token)
        at = hit.end()
    return words


@cache
def phrases(kind: TokenKind, language: Language) -> dict[str, str]:
    """All phrases that are read as this kind of word, with the name each stands for."""
    return {p: token.value for p, token in _reader(language)[0].items() if token.kind == kind}


@cache
def _reader(language: Language) -> tuple[dict[str, Token], re.Pattern[str]]:
    """Tokens by phrase, and a pattern that matches the longest phrase, meant or only filling."""
    table = _english_table() if language == "en" else _chinese_table()
    fill = _ENGLISH_FILL if language == "en" else _CHINESE_FILL
    edge = r"\b" if language == "en" else ""
    longest_first = sorted((*table, *fill), key=len, reverse=True)
    known = "|".join(re.escape(p) + (edge if p[-1].isalnum() else "") for p in longest_first)
    return table, re.compile(rf"{known}|[\s\"'*_`-]+")


_ENGLISH_FILL = (
    *("there is", "there are", "is", "are", "that", "which", "with", "of", "and", "also"),
    *("picture", "image", "drawing", "painting", "photo", "shows", "show", "showing"),
    *("contains", "containing", "draw", "paint", "corner", "shape", "coloured", "colored"),
    *("it", "has", "a picture", "an image", "a drawing", "a painting", "a photo"),
    *("the picture", "the image", "the drawing", "in the picture", "in the image"),
)
_CHINESE_FILL = (
    *("图中有", "图片中有", "图中", "一张有", "的图片", "画面中有", "有", "的", "和", "还", "其中"),
    *("个", "是", "位于", "画", "颜色", "以及", "着", "上"),
)


def _english_table() -> dict[str, Token]:
    table: dict[str, Token] = {}
    for count, name in enumerate(_NUMBERS):
        table[name] = table[str(count)] = Token("number", str(count))
    table["a"] = table["an"] = Token("number", "1")
    table["the"] = Token("the", "")
    for name in ("in", "at", "on", "against"):
        table[name] = table[f"{name} the"] = Token("at", "")
    for colour in COLOURS:
        table[colour] = Token("colour", colour)
        table[colour.replace("grey", "gray")] = Token("colour", colour)
    for shape in SHAPES:
        table[shape] = table[plural(shape)] = Token("shape", shape)
    table["rhombus"] = Token("shape", "diamond")
    table["object"] = table["objects"] = Token("shape", "")
    for size, others in (("small", ("little", "tiny")), ("large", ("big", "huge"))):
        for name in (size, *others):
            table[name] = Token("size", size)
    for place in PLACES:
        swapped = " ".join(reversed(place.split()))
        for name in (place, place.replace(" ", "-"), swapped):
            for middle in ("middle", "centre", "center"):
                table[name.replace("middle", middle)] = Token("place", place)
    for name in ("centre", "center", "middle", "very centre", "very middle"):
        table[name] = Token("place", "centre")
    for relation, forms in _RELATION_WORDS.items():
        for phrase in forms:
            table[phrase] = Token("relation", relation)
    for name in ("beneath", "underneath"):
        table[name] = Token("relation", "below")
    table["background"] = Token("background", "")
    for mark in ".,;:!?\n":
        table[mark] = Token("stop", mark)
    return table


def _chinese_table() -> dict[str, Token]:
    table: dict[str, Token] = {}
    for count, character in enumerate(_CHINESE_NUMBERS):
        table[character] = Token("number", str(count))
    table["二"] = Token("number", "2")
    for count in range(10):
        table[str(count)] = Token("number", str(count))
    for colour, name in _CHINESE_COLOURS.items():
        table[name] = Token("colour", colour)
    table["粉红色"] = Token("colour", "pink")
    table["橘色"] = Token("colour", "orange")
    for shape, name in _CHINESE_SHAPES.items():
        table[name] = Token("shape", shape)
    table["星形"] = Token("shape", "star")
    table["物体"] = Token("shape", "")
    table["小"], table["大"] = Token("size", "small"), Token("size", "large")
    for place, name in _CHINESE_PLACES.items():
        table[name] = Token("place", place)
    table["中央"] = table["中间"] = table["中心"] = Token("place", "centre")
    for relation, forms in _CHINESE_RELATIONS.items():
        for phrase in forms:
            table[phrase] = Token("relation", relation)
    table["在"] = Token("at", "")
    table["背景"] = table["背景上"] = Token("background", "")
    for mark in "。，、；：！？.,;:!?":
        table[mark] = Token("stop", mark)
    return table
