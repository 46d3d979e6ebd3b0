"""Rewards of a user, as recipes of tests name them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_kinds import Pixels

CALLS = {"falling": 0}
LEVELS = (8, 0.9)
"""Calls of `falling` that are rewarded, and how much."""


def redness(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """The mean of the red channel: rewards that differ within a group."""
    return [{"red": float(image[..., 0].mean()) / 255} for image in images]


def none(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """No reward for anything."""
    return [{"red": float("nan")} for _ in images]


def falling(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """High rewards at first, then almost none."""
    CALLS["falling"] += 1
    level = LEVELS[1] if CALLS["falling"] <= LEVELS[0] else 0.0
    return [{"r": level + 0.01 * (i % 3)} for i in range(len(images))]


def brightness(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """Two parts."""
    return [{"bright": float(image.mean()) / 255, "dark": 0.5} for image in images]


def fails_on_black(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """An error for a batch with a black image."""
    if any(not image.any() for image in images):
        raise RuntimeError("no light")
    return [{"light": 1.0} for _ in images]


def sleeps(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """A second for any batch."""
    import time

    time.sleep(1)
    return [{"late": 1.0} for _ in images]


def out_of_range(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[Any]:
    """Values that are no rewards, and one that is."""
    values = [{"a": 1.5}, {"a": float("nan")}, {"a": "much"}, {}, "good", {"a": 0.25}]
    return values[: len(images)]


def reads_open(images: Sequence[Pixels]) -> list[str]:
    """An OCR reader."""
    return ["open n0w" for _ in images]


def alike(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """One reward for everything."""
    return [{"a": 0.5} for _ in images]


def some_fail(images: Sequence[Pixels], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """An error for one image at a time, by its content, and for any batch."""
    if len(images) > 1 or images[0].sum() % 3 == 0:
        raise RuntimeError("no light")
    return [{"light": float(images[0].mean()) / 255}]


def vowels(texts: Sequence[str], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """Whether a text begins with a vowel."""
    return [{"vowel": float(text[:1].lower() in tuple("aeiou"))} for text in texts]


def lengths(texts: Sequence[str], cases: Sequence[PromptCase]) -> list[dict[str, float]]:
    """Rewards that differ between texts of random tokens."""
    return [{"length": min(1.0, len(text) / 40)} for text in texts]


def redness_with_text(
    outputs: Sequence[str | tuple[str | Pixels, ...]], cases: Sequence[PromptCase]
) -> list[dict[str, float]]:
    """Rewards that differ between texts, and between texts with images in turn."""
    rows = []
    for output in outputs:
        parts = (output,) if isinstance(output, str) else output
        texts = [part for part in parts if isinstance(part, str)]
        images = [part[..., 0].mean() / 255 for part in parts if not isinstance(part, str)]
        length = min(1.0, sum(map(len, texts)) / 80)
        rows.append({"length": length, "red": float(sum(images) / max(1, len(images)))})
    return rows


def differs_for_some(
    images: Sequence[Pixels], cases: Sequence[PromptCase]
) -> list[dict[str, float]]:
    """The mean of the red channel for half of the prompts, by their length, else one reward."""
    reds = redness(images, cases)
    return [
        red if len(case.prompt) % 2 else {"red": 0.5} for red, case in zip(reds, cases, strict=True)
    ]
