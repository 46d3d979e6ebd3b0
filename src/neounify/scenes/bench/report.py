"""Scores with confidence intervals, as JSON, as a Markdown table, and as a sheet of pictures."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from neounify.data.sample import DataError
from neounify.scenes.bench.checks import Verdict

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
    """One category: strict, on held-out cases alone (None if it has none), and by attribute.

    `forms` splits the strict rate by the form of what was asked, where a category has several.
    """

    category: str
    strict: Rate
    held_out: Rate | None
    attributes: Mapping[str, Rate]
    forms: Mapping[str, Rate] = field(default_factory=dict)

    @property
    def seen(self) -> Rate | None:
        """Strict, on the cases that are not held out; None if all are."""
        if self.held_out is None:
            return self.strict
        number = self.strict.number - self.held_out.number
        return Rate(self.strict.correct - self.held_out.correct, number) if number else None

    def to_json(self) -> dict[str, Any]:
        """The score as plain data."""
        return {
            "category": self.category,
            "strict": self.strict.to_json(),
            "seen": self.seen.to_json() if self.seen else None,
            "held_out": self.held_out.to_json() if self.held_out else None,
            "attributes": {name: rate.to_json() for name, rate in self.attributes.items()},
            "forms": {name: rate.to_json() for name, rate in self.forms.items()},
        }


def score(
    category: str,
    verdicts: Sequence[Verdict],
    held_out: Sequence[bool],
    forms: Sequence[str] = (),
) -> Score:
    """Count the verdicts of a category; `held_out` marks the cases that training never shows.

    `forms` gives each case's form; empty where the category has but one.
    """
    if not verdicts or len(verdicts) != len(held_out) or len(forms) not in (0, len(verdicts)):
        raise DataError(
            f"{category}: {len(verdicts)} verdicts for {len(held_out)} cases, {len(forms)} forms"
        )
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
        _by_form(verdicts, forms),
    )


def _by_form(verdicts: Sequence[Verdict], forms: Sequence[str]) -> dict[str, Rate]:
    by_form: dict[str, list[bool]] = {form: [] for form in sorted(set(forms))}
    for form, verdict in zip(forms, verdicts, strict=False):
        by_form[form].append(verdict.correct)
    return {form: Rate(sum(held), len(held)) for form, held in by_form.items()}


@dataclass(frozen=True)
class Report:
    """All scores of a run, with what was measured (`about`: model, seed, world, steps, …).

    `measures`: by category, plain numbers beside the score, such as the seam ratio.
    """

    scores: tuple[Score, ...]
    about: Mapping[str, Any]
    measures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "about": dict(self.about),
            "scores": [s.to_json() for s in self.scores],
            "measures": {category: dict(found) for category, found in self.measures.items()},
        }

    def to_markdown(self) -> str:
        """Tables of percentages with 95 % intervals by category, by form, and of the measures."""
        forms = f"\n{self._forms()}" if any(s.forms for s in self.scores) else ""
        return self._scores() + forms + (f"\n{self._measures()}" if self.measures else "")

    def _forms(self) -> str:
        lines = [_row(["form", "n", "strict, % (95 %)"]), _row(["---", "--:", "---"])]
        for s in self.scores:
            for name, rate in s.forms.items():
                lines.append(_row([f"{s.category}: {name}", str(rate.number), str(rate)]))
        return "\n".join(lines) + "\n"

    def _measures(self) -> str:
        lines = [_row(["measure", "value"]), _row(["---", "--:"])]
        for category, found in self.measures.items():
            lines += [_row([f"{category}: {name}", f"{v:.3f}"]) for name, v in found.items()]
        return "\n".join(lines) + "\n"

    def _scores(self) -> str:
        names = list(dict.fromkeys(name for s in self.scores for name in s.attributes))
        parts = [f"{part}, % (95 %)" for part in ("strict", "seen", "held out")]
        head = ["category", "n", *parts, *names]
        lines = [_row(head), _row(["---", "--:", *["---"] * (len(head) - 2)])]
        for s in self.scores:
            rates = [s.attributes.get(name) for name in names]
            lines.append(
                _row(
                    [
                        s.category,
                        str(s.strict.number),
                        *(str(rate or "") for rate in (s.strict, s.seen, s.held_out)),
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
    lines: int = 4,
) -> Image.Image:
    """Pictures in rows, each in a green (passed) or red (failed) frame over its caption.

    Args:
        pictures: uint8 [h, w, 3], shown `side` pixels high; columns are as wide as the widest.
        captions: up to `lines` lines are shown; letters the built-in font lacks show as boxes.
    """
    if not pictures or not len(pictures) == len(captions) == len(passed):
        raise DataError(
            f"{len(pictures)} pictures, {len(captions)} captions, {len(passed)} verdicts"
        )
    frame, gap, line = 4, 10, 13
    font = ImageFont.load_default(size=11)
    widths = [round(side * pixels.shape[1] / pixels.shape[0]) for pixels in pictures]
    wide, high = max(widths) + 2 * frame, side + 2 * frame + lines * line + 4
    rows = math.ceil(len(pictures) / columns)
    size = (columns * (wide + gap) + gap, rows * (high + gap) + gap)
    sheet = Image.new("RGB", size, (248, 248, 248))
    draw = ImageDraw.Draw(sheet)
    for number, (pixels, text, right) in enumerate(zip(pictures, captions, passed, strict=True)):
        x = gap + number % columns * (wide + gap)
        y = gap + number // columns * (high + gap)
        own, bottom = widths[number], y + side + 2 * frame
        draw.rectangle((x, y, x + own + 2 * frame - 1, bottom - 1), fill=_PASS if right else _FAIL)
        picture = Image.fromarray(pixels).resize((own, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (x + frame, y + frame))
        for row, words in enumerate(textwrap.wrap(text, max(widths) // 6)[:lines]):
            draw.text((x, bottom + 3 + row * line), words, fill=(40, 40, 40), font=font)
    return sheet


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
