"""Names and values of other servers' APIs, read as ours.

An alias holds only where its own field is in the body, so one table serves chat and images. Objects
that clients wrap fields into (`extra_body`, `chat_template_kwargs`, …) are unfolded first.
docs/serving-api.md has the table of aliases; a test compares the two.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from neounify.serve.http.errors import ApiError, bad_request

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
