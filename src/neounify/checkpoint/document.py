"""Values of a config.json, checked by key, and the section that is this package's own."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from neounify.config import CheckpointDefaults, FlowConfig, ModelConfig, VideoConfig
from neounify.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def unlist(value: Any) -> Any:
    """The one item of a list of one, else the value."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def integer(section: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a section. Raises ConfigError."""
    value = section.get(key, default)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"config.json: {key} must be a whole number, found {value!r}")
    return value


def number(section: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A finite number of a section. Raises ConfigError."""
    value = section.get(key, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ConfigError(f"config.json: {key} must be a finite number, found {value!r}")
    return float(value)


def flag(section: Mapping[str, Any], key: str, default: bool) -> bool:
    """A boolean of a section. Raises ConfigError."""
    value = section.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key} must be true or false, found {value!r}")
    return value


def subsection(section: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of a section, empty if it is not there. Raises ConfigError."""
    value = section.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be an object, found {value!r}")
    return value


OWN_FLOW: Mapping[str, Any] = {
    name: getattr(FlowConfig(), name)
    for name in (
        "t_eps_sampling",
        "time_embedding",
        "unread_time_embedder",
        "noise_draw",
        "first_time",
        "guidance_end_open",
        "unipc_grid",
        "restart_solver",
    )
}
"""Fields of FlowConfig that the published layout has no key for, with their defaults."""

OWN_MODEL: Mapping[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(ModelConfig)
    if field.name
    in ("template", "capabilities", "patch_embed", "und_pixels", "image_head", "video")
}
"""Fields of ModelConfig that the published layout has no key for, with their defaults."""

_DEFAULTS = CheckpointDefaults()
_OPTIONAL: Mapping[tuple[str, str], Any] = {
    ("model", "video"): VideoConfig(),
    ("flow", "t_eps_sampling"): 0.02,
}
"""(section, field) of those that may be None, and a value of their types."""


def read_own(package: Mapping[str, Any], name: str, like: Mapping[str, Any]) -> dict[str, Any]:
    """A section of this package's own as fields, whose types are those of the values of `like`.

    Null is for fields that may be None. Raises ConfigError.
    """
    section, where = subsection(package, name), f"neounify.{name}"
    values: dict[str, Any] = {}
    for key, value in section.items():
        require(key in like, f"{where}.{key} is unknown; known: {', '.join(like)}")
        if value is None and (name, key) in _OPTIONAL:
            values[key] = None
            continue
        default = like[key] if like[key] is not None else _OPTIONAL[name, key]
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            fields = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
            inner = read_own({key: subsection(section, key)}, key, fields)
            values[key] = dataclasses.replace(default, **inner)
        elif isinstance(default, bool):
            values[key] = flag(section, key, default)
        elif isinstance(default, int):
            values[key] = integer(section, key)
        elif isinstance(default, float):
            values[key] = number(section, key)
        elif isinstance(default, str):
            require(isinstance(value, str), f"{where}.{key} must be text, found {value!r}")
            values[key] = value
        else:
            kind = type(default[0])
            require(
                isinstance(value, list) and all(type(item) is kind for item in value),
                f"{where}.{key} must be a list such as {list(default)}, found {value!r}",
            )
            values[key] = tuple(value)
    return values


def stated_own(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A section of this package's own: the values that are not the defaults, for JSON."""
    return {name: _plain(value) for name, value in values.items() if value != defaults[name]}


def _plain(value: Any) -> Any:
    """A value as JSON has it: dataclasses as objects, tuples as lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def stated_sampling(
    sampling: CheckpointDefaults, default: CheckpointDefaults = _DEFAULTS
) -> dict[str, Any]:
    """The section `sampling`; what is not recorded, and later fields at their defaults, are out."""
    left = ("trained_sizes", "trained_pixels", "solver", "video")
    return {
        name: value
        for name, value in _plain(sampling).items()
        if name not in left or getattr(sampling, name) != getattr(default, name)
    }


def read_sampling(
    package: Mapping[str, Any], default: CheckpointDefaults = _DEFAULTS
) -> CheckpointDefaults:
    """The values of the section `sampling`, others as in `default`. Raises ConfigError."""
    section = subsection(package, "sampling")
    plain = {
        name: section[name] for name in section if name not in ("trained_sizes", "trained_pixels")
    }
    like = {f.name: getattr(default, f.name) for f in dataclasses.fields(CheckpointDefaults)}
    values = read_own({"sampling": plain}, "sampling", like)
    if "trained_sizes" in section:
        sizes = section["trained_sizes"]
        require(
            isinstance(sizes, list) and all(_is_pair(size) for size in sizes),
            f"neounify.sampling.trained_sizes must be a list of [width, height], found {sizes!r}",
        )
        values["trained_sizes"] = tuple(tuple(size) for size in sizes)
    if "trained_pixels" in section:
        pixels = section["trained_pixels"]
        require(
            _is_pair(pixels),
            f"neounify.sampling.trained_pixels must be [least, greatest], found {pixels!r}",
        )
        values["trained_pixels"] = tuple(pixels)
    return dataclasses.replace(default, **values)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
