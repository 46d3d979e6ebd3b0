"""Scores with confidence intervals, as JSON, as a Markdown table, and as a sheet of pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from neounify.data.sample import DataError
from neounify.evaluate.scenebench.checks import Verdict

_Z95 = 1.959963984540054  # the normal quantile of 97.5 %


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a rate, both ends 0 to 1."""
    if not 0 <= successes <= trials or trials == 0:
        raise DataError(f"no rate of {successes} in {trials}")
    rate, z2 = successes / trials, _Z95**2
    centre = (rate + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z95 * math.sqrt(rate * (1 - rate) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Rate:
    """How often something was right."""

    correct: int
    number: int

    @property
    def value(self) -> float:
        """The share that was right, 0 to 1."""
        return self.correct / self.number

    def to_json(self) -> dict[str, float | int]:
        """Share, 95 % interval and counts."""
        low, high = wilson_interval(self.correct, self.number)
        return {
            "rate": round(self.value, 4),
            "low": round(low, 4),
            "high": round(high, 4),
            "correct": self.correct,
            "n": self.number,
        }

    def __str__(self) -> str:
        low, high = wilson_interval(self.correct, self.number)
        return f"{100 * self.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"


@dataclass(frozen=True)
class Score:
    """One category: strict, on held-out cases alone (None if it has none), and by attribute."""

    category: str
    strict: Rate
    held_out: Rate | None
    attributes: Mapping[str, Rate]

    def to_json(self) -> dict[str, Any]:
        """The score as plain data."""
        return {
            "category": self.category,
            "strict": self.strict.to_json(),
            "held_out": self.held_out.to_json() if self.held_out else None,
            "attributes": {name: rate.to_json() for name, rate in self.attributes.items()},
        }


def score(category: str, verdicts: Sequence[Verdict], held_out: Sequence[bool]) -> Score:
    """Count the verdicts of a category; `held_out` marks the cases that training never shows."""
    if not verdicts or len(verdicts) != len(held_out):
        raise DataError(f"{category}: {len(verdicts)} verdicts for {len(held_out)} cases")
    names = list(dict.fromkeys(name for v in verdicts for name in v.attributes))
    held = [v.correct for v, is_held in zip(verdicts, held_out, strict=True) if is_held]
    attributes = {}
    for name in names:
        asked = [v.attributes[name] for v in verdicts if name in v.attributes]
        attributes[name] = Rate(sum(asked), len(asked))
    return Score(
        category,
        Rate(sum(v.correct for v in verdicts), len(verdicts)),
        Rate(sum(held), len(held)) if held else None,
        attributes,
    )


@dataclass(frozen=True)
class Report:
    """All scores of a run, with what was measured (`about`: model, seed, world, steps, …)."""

    scores: tuple[Score, ...]
    about: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"about": dict(self.about), "scores": [s.to_json() for s in self.scores]}

    def to_markdown(self) -> str:
        """One table: percentages with their 95 % intervals, a row per category."""
        names = list(dict.fromkeys(name for s in self.scores for name in s.attributes))
        head = ["category", "n", "strict, % (95 %)", "held out, % (95 %)", *names]
        lines = [_row(head), _row(["---", "--:", *["---"] * (len(head) - 2)])]
        for s in self.scores:
            rates = [s.attributes.get(name) for name in names]
            lines.append(
                _row(
                    [
                        s.category,
                        str(s.strict.number),
                        str(s.strict),
                        str(s.held_out or ""),
                        *(f"{100 * rate.value:.1f}" if rate else "" for rate in rates),
                    ]
                )
            )
        return "\n".join(lines) + "\n"


_PASS, _FAIL = (30, 150, 60), (205, 45, 45)


def contact_sheet(
    pictures: Sequence[NDArray[np.uint8]],
    captions: Sequence[str],
    passed: Sequence[bool],
    columns: int = 6,
    side: int = 128,
) -> Image.Image:
    """Pictures in rows, each in a green (passed) or red (failed) frame over its caption.

    Args:
        pictures: uint8 [h, w, 3], shown `side` pixels wide.
        captions: up to four lines are shown; letters the built-in font lacks show as boxes.
    """
    if not pictures or not len(pictures) == len(captions) == len(passed):
        raise DataError(
            f"{len(pictures)} pictures, {len(captions)} captions, {len(passed)} verdicts"
        )
    frame, gap, line = 4, 10, 13
    font = ImageFont.load_default(size=11)
    wide, high = side + 2 * frame, side + 2 * frame + 4 * line + 4
    rows = math.ceil(len(pictures) / columns)
    size = (columns * (wide + gap) + gap, rows * (high + gap) + gap)
    sheet = Image.new("RGB", size, (248, 248, 248))
    draw = ImageDraw.Draw(sheet)
    for number, (pixels, text, right) in enumerate(zip(pictures, captions, passed, strict=True)):
        x = gap + number % columns * (wide + gap)
        y = gap + number // columns * (high + gap)
        draw.rectangle((x, y, x + wide - 1, y + wide - 1), fill=_PASS if right else _FAIL)
        picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + frame, y + frame))
        for row, words in enumerate(textwrap.wrap(text, side // 6)[:4]):
            draw.text((x, y + wide + 3 + row * line), words, fill=(40, 40, 40), font=font)
    return sheet


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
