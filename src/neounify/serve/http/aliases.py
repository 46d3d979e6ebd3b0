"""Names and values of other servers' APIs, read as this server's own: one table for all routes.

A name is an alias only where its own name is a field of the body, so the same table serves chat
and images. Objects that clients wrap fields into (`extra_body`, `chat_template_kwargs`, …) are
unfolded first. docs/serving-api.md has the table for people; a test compares the two.
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
"""By the other name, the field it is here. `width` with `height` is `size` too."""

INSTEAD: Mapping[str, str] = {
    "frequency_penalty": "repetition_penalty",
    "presence_penalty": "repetition_penalty",
    "prompt_extend": "think",
}
"""By a name that is known but not supported, the field that comes closest."""

Unfold = Callable[[Any], tuple[str, Any]]


def _as(name: str) -> Unfold:
    return lambda value: (name, value)


def _thinking_type(value: Any) -> tuple[str, Any]:
    """The switch of DeepSeek's and GLM's APIs; "auto" leaves it to the server."""
    known = {"enabled": True, "disabled": False, "auto": None}
    if not isinstance(value, str) or value not in known:
        raise bad_request("thinking.type: enabled, disabled or auto", "thinking.type")
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
"""Objects around fields: by the object's name and the key inside, what they are here."""

_SIZE = re.compile(r"\s*([0-9]{1,6})\s*[xX*×]\s*([0-9]{1,6})\s*")


def _unless(*off: object) -> Callable[[Any], Any]:
    """None for a value that means "not set", as a number or as a form writes it."""
    return lambda value: None if value in off or value in map(str, off) else value


def _stops(value: Any) -> Any:
    """Without the empty strings, which would stop an answer before it begins."""
    if isinstance(value, list):
        return [one for one in value if one != ""] or None
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
"""By field, how values of other servers are read; None is as good as an absent field."""


def to_own_names(body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """The body under our own names; names that are not known stay as they are.

    `known` are the fields of the body. Raises ApiError where two names of one field are given
    with different values, and for what an unfolded object should not hold.
    """
    own: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, value in _with_size(_unfolded(body), known):
        field = name if name in known else ALIASES.get(name, name)
        field = field if field in known else name
        read = VALUES.get(field)
        value = value if read is None or value is None else read(value)
        if value is None:
            continue
        if field in own and own[field] != value:
            raise _disagree(given[field], own[field], name, value, field)
        own[field] = value
        given.setdefault(field, name)
    return own


def suggestion(name: str, known: Collection[str]) -> str:
    """ "; did you mean …?" with our own name, or nothing."""
    names = {one: one for one in known}
    names |= {alias: own for alias, own in ALIASES.items() if own in known}
    close = difflib.get_close_matches(name[:80], names, n=1, cutoff=0.75)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def instead_of(name: str, known: Collection[str]) -> str:
    """ "; did you mean …?" with the field that comes closest to an unsupported one, or nothing."""
    own = INSTEAD.get(name)
    return f"; did you mean {own!r}?" if own in known else ""


def _unfolded(body: Mapping[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of the fields; `extra_body` is what OpenAI's client spreads over a body."""
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
        raise bad_request(f"{name}: must be an object", name)
    return value


def _with_size(
    fields: Iterator[tuple[str, Any]], known: Collection[str]
) -> Iterator[tuple[str, Any]]:
    """The fields with `width` and `height`, where both are given, as one `size`."""
    sides: dict[str, Any] = {}
    for name, value in fields:
        if name not in ("width", "height") or "size" not in known:
            yield name, value
        elif value is not None:
            if name in sides and sides[name] != value:
                raise _disagree(name, sides[name], f"extra_body.{name}", value, "size")
            sides[name] = value
    if len(sides) == 1:
        [name] = sides
        raise bad_request(f"{name}: give both width and height, or size", name)
    if sides:
        yield "size", f"{sides['width']}x{sides['height']}"


def _disagree(first: str, one: Any, second: str, other: Any, field: str) -> ApiError:
    values = f"{str(one)[:40]!r} and {str(other)[:40]!r}"
    return bad_request(
        f"{field}: {first} and {second} are the same setting with different values, {values}; "
        f"give {field} alone",
        field,
    )
