"""Fields of request bodies: their rules, those of images and of text, names of other servers' APIs.

An alias holds only where its own field is in the body, so one table serves chat and images. Objects
that clients wrap fields into (`extra_body`, `chat_template_kwargs`, …) are unfolded first.
docs/serving-api.md has the table of aliases; a test compares the two.
"""

from __future__ import annotations

import difflib
import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
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
from neounify.serve.http.errors import ApiError, bad_request, to_api_error

ALIASES: Mapping[str, str] = {
    "num_inference_steps": "steps",
    "num_steps": "steps",
    "sample_steps": "steps",
    "guidance_scale": "guidance",
    "true_cfg_scale": "guidance",
    "cfg_scale": "guidance",
    "image_guidance_scale": "image_guidance",
    "img_cfg_scale": "image_guidance",
    "cfg_norm": "guidance_norm",
    "cfg_interval": "guidance_interval",
    "flow_shift": "shift",
    "timestep_shift": "shift",
    "num_outputs_per_prompt": "n",
    "num_images_per_prompt": "n",
    "num_images": "n",
    "resolution": "size",
    "image_size": "size",
    "think_mode": "think",
    "enable_thinking": "think",
    "max_new_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "repeat_penalty": "repetition_penalty",
}
"""Our field by another server's name. `width` with `height` is `size` too."""

INSTEAD: Mapping[str, str] = {
    "frequency_penalty": "repetition_penalty",
    "presence_penalty": "repetition_penalty",
    "prompt_extend": "think",
}
"""The closest field of ours by a name that is not supported."""

Unfold = Callable[[Any], tuple[str, Any]]

SIDES = "width and height"
"""The name under which both sides are one value of `size`."""
_SIDE = re.compile(r"[1-9][0-9]{0,5}(\.0{1,20})?")
_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[xX*×]\s*([0-9]{1,6})\s*")
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


def _as(name: str) -> Unfold:
    return lambda value: (name, value)


def _thinking_type(value: Any) -> tuple[str, Any]:
    """The field `thinking.type` of DeepSeek's and GLM's APIs; "auto" leaves it to the server."""
    known = {"enabled": True, "disabled": False, "auto": None}
    if not isinstance(value, str) or value not in known:
        message = f"thinking.type: must be enabled, disabled or auto, got {str(value)[:40]!r}"
        raise bad_request(message, "thinking.type")
    return "think", known[value]


def _exclude(value: Any) -> tuple[str, Any]:
    return "include_reasoning", not value if isinstance(value, bool) else value


WRAPPED: Mapping[str, Mapping[str, Unfold]] = {
    "chat_template_kwargs": {"enable_thinking": _as("think"), "thinking": _as("think")},
    "reasoning": {
        "effort": _as("reasoning_effort"),
        "enabled": _as("think"),
        "exclude": _exclude,
    },
    "thinking": {"type": _thinking_type},
    "image_config": {"aspect_ratio": _as("aspect_ratio"), "image_size": _as("size")},
}
"""Our fields and values by the name of a wrapping object and the key inside it."""


def _unless(*off: object) -> Callable[[Any], Any]:
    """A function that turns values that mean "not set" into None, in JSON and in forms."""
    return lambda value: None if value in off or value in map(str, off) else value


def _stops(value: Any) -> Any:
    """Stop strings without empty ones, which would stop an answer before it begins."""
    if isinstance(value, list):
        return [stop for stop in value if stop != ""] or None
    return value or None


def _size(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    sides = _SIZE.fullmatch(value)
    return f"{int(sides[1])}x{int(sides[2])}" if sides else value.strip()


VALUES: Mapping[str, Callable[[Any], Any]] = {
    "seed": _unless(-1),
    "top_k": _unless(-1),
    "max_tokens": _unless(-1),
    "max_completion_tokens": _unless(-1),
    "stop": _stops,
    "size": _size,
    "aspect_ratio": _unless("", "auto"),
    "output_format": lambda value: "jpeg" if value == "jpg" else value,
}
"""Readers of the values of other servers, by field; None means absent."""


def to_our_names(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The body with our names of fields; unknown names stay as they are.

    `known` are the fields of the body. Raises ApiError for different values under two names of one
    field, and for unknown keys of an unfolded object.
    """
    fields: dict[str, Any] = {}
    written_as: dict[str, str] = {}
    for name, value in _with_size(_unfolded(body), known):
        field = name if name in known else "size" if name == SIDES else ALIASES.get(name, name)
        field = field if field in known else name
        read = VALUES.get(field)
        value = value if read is None or value is None else read(value)
        if value is None:
            continue
        if field in fields and fields[field] != value:
            raise _disagree(written_as[field], fields[field], name, value, field)
        fields[field] = value
        written_as.setdefault(field, name)
    return fields


def suggestion(name: str, known: Collection[str]) -> str:
    """ "; did you mean …?" with the field of ours whose name or alias is closest, or ""."""
    names = {field: field for field in known}
    names |= {alias: field for alias, field in ALIASES.items() if field in known}
    close = difflib.get_close_matches(name[:80], names, n=1, cutoff=0.75)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def instead_of(name: str, known: Collection[str]) -> str:
    """ "; did you mean …?" with the field of ours closest to an unsupported one, or ""."""
    field = INSTEAD.get(name)
    return f"; did you mean {field!r}?" if field in known else ""


def _unfolded(body: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields, those of wrapping objects and of `extra_body` included."""
    for name, value in body.items():
        if name == "extra_body" and not inside:
            if value is not None:
                yield from _unfolded(_object(name, value), "extra_body.")
        elif name in WRAPPED and value is not None and not isinstance(value, bool):
            for key, item in _object(name, value).items():
                unfold = WRAPPED[name].get(key)
                if unfold is None:
                    path = f"{name}.{key}"[:80]
                    close = suggestion(key, WRAPPED[name])
                    raise bad_request(f"{path}: this field is not known{close}", path)
                if item is not None:
                    yield unfold(item)
        else:
            yield name, value


def _object(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise bad_request(f"{name}: must be an object, got {str(value)[:40]!r}", name)
    return value


def _with_size(
    fields: Iterator[tuple[str, Any]], known: Collection[str]
) -> Iterator[tuple[str, Any]]:
    """The fields with `width` and `height` joined to one size, under the name SIDES."""
    sides: dict[str, int] = {}
    for name, value in fields:
        if name not in ("width", "height") or "size" not in known:
            yield name, value
        elif value is not None:
            side = _side(name, value)
            if sides.setdefault(name, side) != side:
                raise _disagree(name, sides[name], f"extra_body.{name}", side, "size")
    if len(sides) == 1:
        [name] = sides
        raise bad_request(f"{name}: give both width and height, or size", name)
    if sides:
        yield SIDES, f"{sides['width']}x{sides['height']}"


def _side(name: str, value: Any) -> int:
    """A side in pixels, as JSON or as a form writes it; 64.0 means 64."""
    text = str(value)
    if isinstance(value, bool) or not _SIDE.fullmatch(text):
        message = f"{name}: must be a whole number of pixels from 1 to 999999, got {text[:40]}"
        raise bad_request(message, name, "invalid_value")
    return int(text.partition(".")[0])


def _disagree(first: str, one: Any, second: str, other: Any, field: str) -> ApiError:
    values = f"{str(one)[:40]!r} and {str(other)[:40]!r}"
    return bad_request(
        f"{field}: {first} and {second} are the same setting with different values, {values}; "
        f"give {field} alone",
        field,
    )


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


class RequestFields(Fields):
    """Fields of every request."""

    seed: Seed | None = Field(None, description="The same seed gives the same answer.")
    deadline: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        None, description="Seconds after which the request is given up. Extension."
    )
    stream: bool = False


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
