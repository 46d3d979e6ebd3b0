"""What request bodies have in common: their rules, and the fields of painting."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from neounify.flow.guidance import Norm
from neounify.flow.solvers import SolverName
from neounify.provenance.metadata import Format
from neounify.serve.http.aliases import instead_of, suggestion, to_own_names
from neounify.serve.http.errors import ApiError, bad_request

MOST_TEXT = 4_000_000
"""Characters of one string, data URLs apart, whatever the operator's limits say."""

Seed = Annotated[int, Field(ge=-(2**63), le=2**64 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
SizeText = Annotated[str, Field(pattern=r"^(auto|[124][kK]|[0-9]{1,6}x[0-9]{1,6})$")]
Ratio = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}:[1-9][0-9]{0,3}$")]


def _pair(value: Any) -> Any:
    """A form holds two numbers as "0.1,0.9"."""
    return value.split(",") if isinstance(value, str) else value


class Fields(BaseModel):
    """A request body. A null is as good as nothing; unknown fields are refused.

    Other servers' names are read as our own (`aliases.py`). `without_effect` names fields of
    OpenAI's that change no answer here and are let pass; `only` those that ask for something
    this server does not do, with the values that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid")

    without_effect: ClassVar[frozenset[str]] = frozenset()
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        known = cls.model_fields
        kept: dict[str, Any] = {}
        for name, value in to_own_names(body, known).items():
            if name in known:
                kept[name] = value
            elif name in cls.only:
                if not _is_one_of(value, cls.only[name]):
                    raise _unsupported(name, cls.only[name], known)
            elif name not in cls.without_effect:
                name = name[:80]
                message = f"{name}: this field is not known{suggestion(name, known)}"
                raise bad_request(message, name, "invalid_value")
        return kept


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of several, as JSON or as a form writes it."""
    if value in values:
        return True
    return isinstance(value, str) and value.strip().lower() in map(json.dumps, values)


def _unsupported(name: str, values: tuple[Any, ...], known: Collection[str]) -> ApiError:
    fine = " or ".join(map(json.dumps, values))
    rule = f"only {fine} is supported by this server" if fine else "not supported by this server"
    return bad_request(f"{name}: {rule}{instead_of(name, known)}", name, "unsupported")


class AnsweredFields(Fields):
    """What every request may say of how it is answered."""

    seed: Seed | None = Field(None, description="The same seed gives the same answer.")
    deadline: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Seconds after which the request is given up. Extension."
    )


class PaintingFields(AnsweredFields):
    """How images are painted; where nothing is said, as the checkpoint's own settings say."""

    size: SizeText = Field(
        "auto",
        description="WIDTHxHEIGHT in pixels, multiples of the model's token side. 'auto': the "
        "shape of the first input image, else the model's own size. '1K', '2K', '4K': that area, "
        "but not above the model's own.",
    )
    aspect_ratio: Ratio | None = Field(
        None, description="WIDTH:HEIGHT, for a size that leaves the shape open. Extension."
    )
    negative_prompt: Annotated[str, Field(max_length=MOST_TEXT)] = Field(
        "", description="What guidance steers away from. Extension."
    )
    steps: Annotated[int, Field(ge=1, le=10_000)] | None = Field(
        None, description="Denoising steps. Extension."
    )
    guidance: Number | None = Field(
        None, description="Pull towards the prompt, 0 to 1 is none. Extension."
    )
    image_guidance: Number | None = Field(
        None, description="Pull towards the input images of an edit, 1 is none. Extension."
    )
    shift: Number | None = Field(
        None, description="Bends the schedule towards noise, 1 is none. Extension."
    )
    guidance_norm: Norm = Field("none", description="Rescaling of guided steps. Extension.")
    guidance_interval: Annotated[tuple[Number, Number], BeforeValidator(_pair)] = Field(
        (0.0, 1.0), description="The range of t in which guidance acts. Extension."
    )
    solver: SolverName = Field("euler", description="Solver of the flow. Extension.")
    think: bool | None = Field(None, description="Write a thought first. Extension.")
    partial_images: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="Previews of each image while it is painted; with `stream` only."
    )
    output_format: Format = "png"

    @property
    def width_height(self) -> tuple[int, int] | None:
        """(width, height) in pixels; None where the shape is left open."""
        width, x, height = self.size.partition("x")
        return (int(width), int(height)) if x else None

    @property
    def pixels(self) -> int | None:
        """The area that a size such as '2K' names, in pixels."""
        return (1024 * int(self.size[0])) ** 2 if self.size[-1] in "kK" else None

    @property
    def ratio(self) -> tuple[int, int] | None:
        """(width, height) of the shape asked for."""
        if self.aspect_ratio is None:
            return None
        width, _, height = self.aspect_ratio.partition(":")
        return int(width), int(height)
