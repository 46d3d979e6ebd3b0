"""Other wordings of the prompts, instructions and questions in the training data of the scenes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np

Wording = Callable[[str, np.random.Generator], str]
"""A text and a source of chance → the same request in another form."""

_SHAPES = {
    "circle": "disc",
    "square": "box",
    "triangle": "pyramid",
    "cross": "plus sign",
    "star": "asterisk",
}
_COLOURS = {
    "purple": "violet",
    "cyan": "turquoise",
    "grey": "gray",
    "yellow": "golden",
    "red": "scarlet",
    "blue": "navy",
    "green": "emerald",
    "pink": "rose",
    "orange": "amber",
    "brown": "chestnut",
}
_DIGITS = {"one": "1", "two": "2", "three": "3", "four": "4"}


def same(text: str, rng: np.random.Generator) -> str:
    """The text as it is."""
    return text


def prefixed(prefix: str, suffix: str = "") -> Wording:
    """Words before and after; text behind a full stop stays behind it."""

    def change(text: str, rng: np.random.Generator) -> str:
        return f"{prefix}{text.rstrip('.')}{suffix}"

    return change


def lowered(prefix: str) -> Wording:
    """Words in front of a sentence, which then begins with a small letter."""
    return lambda text, rng: f"{prefix}{text[0].lower()}{text[1:]}"


def upper(text: str, rng: np.random.Generator) -> str:
    """UPPER CASE."""
    return text.upper()


def capital(text: str, rng: np.random.Generator) -> str:
    """A capital in front."""
    return text[0].upper() + text[1:]


def lower(text: str, rng: np.random.Generator) -> str:
    """No capital at all."""
    return text.lower()


def stopped(text: str, rng: np.random.Generator) -> str:
    """A full stop at the end."""
    return f"{text.rstrip('.')}."


def unstopped(text: str, rng: np.random.Generator) -> str:
    """No full stop or question mark at the end."""
    return text.rstrip(".?")


def no_article(text: str, rng: np.random.Generator) -> str:
    """Without a, an and the."""
    kept = re.sub(r"\b(?:a|an|the) ", "", text)
    return re.sub(r"\b(?:A|An|The) (\w)", lambda m: m[1].upper(), kept)


def typo(text: str, rng: np.random.Generator) -> str:
    """Two neighbouring letters swapped inside one word of at least four letters."""
    words = [m for m in re.finditer(r"[a-z]{4,}", text) if len(set(m[0][1:])) > 1]
    word = words[int(rng.integers(len(words)))]
    starts = [n for n in range(1, len(word[0]) - 1) if word[0][n] != word[0][n + 1]]
    start = word.start() + starts[int(rng.integers(len(starts)))]
    return f"{text[:start]}{text[start + 1]}{text[start]}{text[start + 2 :]}"


def spaced(text: str, rng: np.random.Generator) -> str:
    """Two spaces between words."""
    return text.replace(" ", "  ")


def exchanged(table: Mapping[str, str]) -> Wording:
    """Words exchanged for others, their plurals too."""
    pattern = re.compile(rf"\b({'|'.join(table)})((?:e?s)?)\b")
    return lambda text, rng: pattern.sub(lambda m: _as_many(table[m[1]], plural=bool(m[2])), text)


def _as_many(word: str, *, plural: bool) -> str:
    return word + ("es" if word.endswith("x") else "s") if plural else word


PROMPTS: dict[str, Wording] = {
    "plain": same,
    "a full stop at the end": stopped,
    "a capital in front": capital,
    "two spaces between words": spaced,
    "no article": no_article,
    "one typo (two letters swapped)": typo,
    "UPPER CASE": upper,
    "Draw …": prefixed("Draw "),
    "Please draw ….": prefixed("Please draw ", "."),
    "Can you paint …?": prefixed("Can you paint ", "?"),
    "digits for numbers": exchanged(_DIGITS),
    "other words for shapes": exchanged(_SHAPES),
    "other words for colours": exchanged(_COLOURS),
}
"""Of prompts in the plainest wording."""

EDITS: dict[str, Wording] = {
    "as in training": same,
    "no full stop": unstopped,
    "no capital": lower,
    "one typo (two letters swapped)": typo,
    "UPPER CASE": upper,
    "Please …": lowered("Please "),
}
"""Of instructions as training words them."""

QUESTIONS: dict[str, Wording] = {
    "as in training": same,
    "no question mark": unstopped,
    "no capital": lower,
    "no article": no_article,
    "one typo (two letters swapped)": typo,
    "UPPER CASE": upper,
    "Please tell me: …": prefixed("Please tell me: "),
    "other words for shapes": exchanged(_SHAPES),
}
"""Of questions as training words them."""
