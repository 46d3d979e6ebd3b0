"""Fields of request bodies: their rules, those of images and of text."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from neounify.config import TextSampling
from neounify.config.sampling import IMAGE_RANGES, SolverName, TextKnobs, knob_doc
from neounify.errors import InputError
from neounify.flow.guidance import Norm
from neounify.flow.sampling import Fast, ImageSampling
from neounify.provenance.metadata import Format
from neounify.serve.http.deadline import Deadline
from neounify.serve.http.errors import ApiError, bad_request, to_api_error
from neounify.serve.http.names import instead_of, suggestion, to_our_names

MAX_TEXT = 4_000_000
"""Maximum characters of one string, data URLs apart, whatever the operator's limits are."""
SEEDS = 2**64
"""Seeds are below it."""
Seed = Annotated[int, Field(ge=-(2**63), lt=SEEDS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
"""Ranges are those of ImageSampling and TextSampling, which raise errors with the bounds."""
LimitedText = Annotated[str, Field(max_length=MAX_TEXT)]
TokenCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stop = Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True)
class _Form:
    """Check of a text: errors say the `rule` in words, where pydantic would show the pattern."""

    pattern: str
    rule: str

    def __call__(self, value: str) -> str:
        if re.fullmatch(self.pattern, value) is None:
            shown = {"rule": self.rule, "value": repr(value[:40])}
            raise PydanticCustomError("form", "must be {rule}, got {value}", shown)
        return value

    @property
    def schema(self) -> WithJsonSchema:
        """The pattern for OpenAPI."""
        return WithJsonSchema({"type": "string", "pattern": f"^{self.pattern}$"})


_SIZE_TEXT = _Form(
    r"(auto|[124][kK]|[0-9]{1,6}x[0-9]{1,6})",
    "WIDTHxHEIGHT in pixels, such as 512x512, or auto, 1K, 2K or 4K",
)
_RATIO = _Form(r"[1-9][0-9]{0,3}:[1-9][0-9]{0,3}", "WIDTH:HEIGHT, such as 16:9")
SizeText = Annotated[str, AfterValidator(_SIZE_TEXT), _SIZE_TEXT.schema]
Ratio = Annotated[str, AfterValidator(_RATIO), _RATIO.schema]


def _pair(value: Any) -> Any:
    """A pair of numbers, which forms write as "0.1,0.9"."""
    return value.split(",") if isinstance(value, str) else value


def _image_field(knob: str) -> Any:
    """A field with the default, the sentence and the range of ImageSampling; none is OpenAI's."""
    low, high = IMAGE_RANGES.get(knob, (None, None))
    return Field(
        ImageSampling.__dataclass_fields__[knob].default,
        description=f"{knob_doc(ImageSampling, knob)} Extension.",
        json_schema_extra=None if low is None else {"minimum": low, "maximum": high},
    )


def _text_field(knob: str) -> Any:
    """A field with the default and the sentence of TextSampling."""
    extension = "" if knob in ("temperature", "top_p") else " Extension."
    return Field(
        TextSampling.__dataclass_fields__[knob].default,
        description=knob_doc(TextSampling, knob) + extension,
    )


def seeds_of(seed: int | None, n: int) -> list[int]:
    """The seeds of `n` answers: the given or a random one, then each next; 0 after 2^64 - 1."""
    seed = secrets.randbelow(2**32) if seed is None else seed
    return [seed + i if seed + i < SEEDS else seed + i - SEEDS for i in range(n)]


@contextmanager
def blame(param: str) -> Iterator[None]:
    """Context whose errors about images, prompts and values name the field `param`."""
    try:
        yield
    except InputError as error:
        answer = to_api_error(error)
        answer.param = param
        raise answer from error


class Fields(BaseModel):
    """Request body: null means absent, unknown fields are refused, aliases are read.

    `without_effect` names fields of OpenAI's that are accepted and change no answer; `only` names
    unsupported ones, with the values that ask for nothing and so are accepted.
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
        for name, value in to_our_names(body, known).items():
            if name in known:
                kept[name] = value
            elif name in cls.only:
                if not _is_one_of(value, cls.only[name]):
                    raise _unsupported(name, cls.only[name], known)
            elif name not in cls.without_effect:
                raise unknown_field(name, known)
        return kept


def unknown_field(name: str, known: Collection[str], inside: str = "") -> ApiError:
    """The error for a field that is none of `known`; `inside` is the path in front of its name."""
    path = f"{inside}{name}"[:80]
    message = f"{path}: this field is not known{suggestion(name, known)}"
    return bad_request(message, path, "invalid_value")


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of several, as JSON or as a form writes it."""
    if value in values:
        return True
    return isinstance(value, str) and value.strip().lower() in map(json.dumps, values)


def _unsupported(name: str, values: tuple[Any, ...], known: Collection[str]) -> ApiError:
    fine = " or ".join(map(json.dumps, values))
    rule = f"only {fine} is supported by this server" if fine else "not supported by this server"
    return bad_request(f"{name}: {rule}{instead_of(name, known)}", name, "unsupported")


class RequestFields(Fields):
    """Fields of every request."""

    seed: Seed | None = Field(None, description="The same seed gives the same answer.")
    deadline: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Seconds after which the request is given up. Extension."
    )
    stream: bool = False
    _begin: float = PrivateAttr(default_factory=time.monotonic)
    """When the body had arrived."""

    def deadline_within(self, max_seconds: float) -> Deadline:
        """The request's own deadline, or `max_seconds` after the body had arrived if earlier."""
        if self.deadline is None or self.deadline >= max_seconds:
            return Deadline(max_seconds, self._begin, is_servers=True)
        return Deadline(self.deadline, self._begin)


class ImageFields(RequestFields):
    """Fields of image generation; absent ones take the checkpoint's defaults.

    All fields of `flow.sampling.ImageSampling` under their own names, which a test checks.
    """

    size: SizeText = Field(
        "auto",
        description="WIDTHxHEIGHT in pixels, multiples of the model's token side. 'auto': the "
        "shape of the first input image, else the model's own size. '1K', '2K', '4K': that area, "
        "but not above the model's own.",
    )
    aspect_ratio: Ratio | None = Field(
        None, description="WIDTH:HEIGHT, for a size that leaves the shape open. Extension."
    )
    negative_prompt: LimitedText = Field(
        "", description="What guidance steers away from. Extension."
    )
    steps: int | None = _image_field("steps")
    guidance: Number | None = _image_field("guidance")
    image_guidance: Number | None = _image_field("image_guidance")
    guidance_interval: Annotated[tuple[Number, Number], BeforeValidator(_pair)] = _image_field(
        "guidance_interval"
    )
    guidance_norm: Norm = _image_field("guidance_norm")
    published_interval: bool = _image_field("published_interval")
    shift: Number | None = _image_field("shift")
    solver: SolverName | None = _image_field("solver")
    published_solver: bool = _image_field("published_solver")
    t_eps: Number | None = _image_field("t_eps")
    fast: Fast | None = _image_field("fast")
    guidance_reuse: int = _image_field("guidance_reuse")
    guidance_stop: Number = _image_field("guidance_stop")
    step_cache: Number = _image_field("step_cache")
    step_cache_most: int = _image_field("step_cache_most")
    step_cache_warm: int = _image_field("step_cache_warm")
    think: bool | None = Field(None, description="Write a thought first. Extension.")
    partial_images: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="Previews of each image on its way; ignored without `stream`."
    )
    output_format: Format = "png"

    @property
    def width_height(self) -> tuple[int, int] | None:
        """(width, height) in pixels; None where `size` does not fix the shape."""
        width, x, height = self.size.partition("x")
        return (int(width), int(height)) if x else None

    @property
    def pixels(self) -> int | None:
        """The area of a size such as '2K', in pixels."""
        return (1024 * int(self.size[0])) ** 2 if self.size[-1] in "kK" else None

    @property
    def ratio(self) -> tuple[int, int] | None:
        """(width, height) of `aspect_ratio`."""
        if self.aspect_ratio is None:
            return None
        width, _, height = self.aspect_ratio.partition(":")
        return int(width), int(height)


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool = False


class TextFields(RequestFields):
    """Fields that chat and completions share."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        (
            "metadata",
            "prompt_cache_key",
            "prompt_cache_options",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "user",
        )
    )
    only: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "best_of": (1,),
        "frequency_penalty": (0,),
        "ignore_eos": (False,),
        "include_stop_str_in_output": (False,),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "min_tokens": (0,),
        "presence_penalty": (0,),
        "priority": (0,),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "stop_token_ids": ([],),
        "typical_p": (1,),
        "use_beam_search": (False,),
    }

    model: str = Field("", max_length=200)
    n: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="Answers to the same prompt; answer i is drawn with seed + i."
    )
    stream_options: StreamOptions = StreamOptions()
    temperature: Number = _text_field("temperature")
    top_p: Number = _text_field("top_p")
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] = _text_field("top_k")
    min_p: Number = _text_field("min_p")
    repetition_penalty: Number = _text_field("repetition_penalty")
    max_tokens: TokenCount | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] = Field(default_factory=list)

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, *, seed: int | None, logprobs: int | None = None) -> TextSampling:
        """Settings of the token sampler. Raises RequestError for values out of range."""
        knobs = {name: getattr(self, name) for name in TextKnobs.__annotations__}
        return TextSampling(**knobs, seed=seed, logprobs=logprobs)


class AnswerModel(BaseModel):
    """Part of an answer, for the API's description; tests check real answers against it."""

    model_config = ConfigDict(extra="forbid")
