"""The fields of painting by prompt and of editing: OpenAI's, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from neounify.serve.http.fields import MOST_TEXT, PaintingFields

Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]

STEPS_OF_QUALITY: Mapping[str, float] = {
    "low": 0.25,
    "medium": 0.5,
    "high": 1.0,
    "auto": 1.0,
    "standard": 1.0,
    "hd": 1.0,
}
"""The share of the checkpoint's own steps."""


class ImageBody(PaintingFields):
    """What to paint; the input pictures of an edit come beside it."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        ("input_fidelity", "moderation", "output_compression", "safety_identifier", "style", "user")
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "background": ("auto", "opaque"),
        "complexity": (),
        "enable_safety_checker": (True,),
        "frame_count": (),
        "frame_duration_ms": (),
        "mask": (),
        "markup": (),
        "num_frames": (1,),
        "prompt_extend": (False,),
        "strength": (1,),
        "svg": (),
        "watermark": (False,),
    }

    model: str = Field("", max_length=200)
    prompt: Annotated[str, Field(max_length=MOST_TEXT)]
    n: Annotated[int, Field(ge=1, le=64)] = Field(
        1, description="Image i has seed + i and is what that seed paints alone."
    )
    quality: Quality = Field(
        "auto", description="low: a quarter of the checkpoint's steps; medium: half; else all."
    )
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False

    def steps_of(self, own: int) -> int:
        """The steps asked for, of a checkpoint that takes `own` steps by itself."""
        if self.steps is not None:
            return self.steps
        return max(1, round(STEPS_OF_QUALITY[self.quality] * own))
