"""Rules: the bounds of stages 3, 4, 7 and the hooks, as data; the first reason of a sample.

A reason is `stage.setting`, such as "quality.min_sharpness". The report reads the same table to
say how many samples another bound would keep or drop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neounify.curate.recipe import ImageStage, Stages

Sense = Literal["below", "above", "reaches"]
"""When a value drops a sample: under the bound, over it, or at it and over it."""
Values = Mapping[str, Any]
"""Measured values of one image, or of the text, by name."""


@dataclass(frozen=True)
class Bound:
    """A bound of a stage; `value` reads what it bounds; `step` is one step of the report."""

    stage: str
    setting: str
    sense: Sense
    step: float
    value: Callable[[Values], float | None]
    of_text: bool = False

    @property
    def reason(self) -> str:
        return f"{self.stage}.{self.setting}"

    def drops(self, value: float, bound: float) -> bool:
        """Whether a value is outside."""
        if self.sense == "below":
            return value < bound
        return value > bound if self.sense == "above" else value >= bound

    def looser(self, bound: float, steps: int = 1) -> float:
        """The bound that many steps further out; a negative number is tighter."""
        return bound - steps * self.step if self.sense == "below" else bound + steps * self.step


def _short(values: Values) -> float | None:
    return None if values["width"] is None else min(values["width"], values["height"])


def _aspect(values: Values) -> float | None:
    if not values["width"]:
        return None
    return float(max(values["width"], values["height"]) / min(values["width"], values["height"]))


def _named(name: str) -> Callable[[Values], float | None]:
    return lambda values: values[name]


IMAGE_BOUNDS = (
    Bound("geometry", "min_side", "below", 64, _short),
    Bound("geometry", "max_aspect", "above", 0.5, _aspect),
    Bound("quality", "min_sharpness", "below", 25, _named("sharpness")),
    Bound("quality", "min_entropy", "below", 0.5, _named("entropy")),
    Bound("quality", "min_luma", "below", 5, _named("luma")),
    Bound("quality", "max_luma", "above", 5, _named("luma")),
    Bound("quality", "max_border", "above", 0.1, _named("border")),
)
TEXT_BOUNDS = (
    Bound("text", "min_words", "below", 1, _named("words"), of_text=True),
    Bound("text", "min_characters", "below", 5, _named("characters"), of_text=True),
    Bound("text", "max_repetition", "above", 0.1, _named("repetition"), of_text=True),
    Bound("text", "max_urls", "above", 1, _named("urls"), of_text=True),
)
HOOK_BOUNDS = (
    Bound("watermark", "bound", "reaches", 0.1, _named("watermark")),
    Bound("beauty", "bound", "below", 0.5, _named("beauty")),
    Bound("match", "bound", "below", 0.02, _named("match")),
)
BOUNDS = (*IMAGE_BOUNDS, *TEXT_BOUNDS, *HOOK_BOUNDS)

READABLE = ("readable.record", "readable.image", "readable.task")
KNOWN = ("known.sha256", "known.hash")
COPIES = ("exact.copy", "near.copy", "near.stored")
TEXTS = ("text.languages", "text.file_name", "text.copy")
EVALUATION = ("evaluation.image", "evaluation.text")
ORDER = (
    "readable",
    "known",
    "geometry",
    "quality",
    "exact",
    "near",
    "text",
    "evaluation",
    "safety",
    "watermark",
    "beauty",
    "match",
    "embeddings",
    "captions",
)
"""Names of the stages in the order in which they run."""


def setting(stages: Stages, bound: Bound) -> float | None:
    """The value of a bound in a recipe; None where it is off."""
    stage = getattr(stages, bound.stage)
    value = getattr(stage, bound.setting) if stage.enabled else None
    return None if value is None else float(value)


def image_reasons(
    stages: Stages, images: Sequence[Values], bounds: Sequence[Bound] = IMAGE_BOUNDS
) -> Iterator[str]:
    """Reasons that the images of a sample give, in the order of the bounds."""
    for bound in bounds:
        limit, stage = setting(stages, bound), getattr(stages, bound.stage)
        if limit is None:
            continue
        assert isinstance(stage, ImageStage)
        for image in images:
            value = bound.value(image) if image["role"] in stage.on else None
            if value is not None and bound.drops(value, limit):
                yield bound.reason
                break


def text_reasons(stages: Stages, text: Values) -> Iterator[str]:
    """Reasons that the text of a sample gives."""
    if not stages.text.enabled:
        return
    for bound in TEXT_BOUNDS:
        limit = setting(stages, bound)
        if limit is not None and bound.drops(bound.value(text) or 0.0, limit):
            yield bound.reason
    languages = stages.text.languages
    if languages is not None and text["language"] not in languages:
        yield "text.languages"
    if stages.text.drop_file_names and text["file_name"]:
        yield "text.file_name"
