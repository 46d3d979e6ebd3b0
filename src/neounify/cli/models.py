"""Which model a command uses."""

from __future__ import annotations

import os
from pathlib import Path

from neounify.bundled import bundled_model
from neounify.cli.errors import CliError, UsageError

VARIABLE = "NEOUNIFY_MODEL"


def resolve_model(option: Path | None, name: str = "--model") -> Path:
    """The folder of the model to use: the one asked for, else the one that comes with the package.

    `name` is what the user gave it as; the default of the option is the environment variable
    NEOUNIFY_MODEL. Raises CliError.
    """
    if option is None:
        return bundled_model()
    if not option.is_dir():
        given = VARIABLE if os.environ.get(VARIABLE) == str(option) else name
        kind = "is not a folder" if option.exists() else "is not there"
        default = "" if given == "MODEL" else " (by default the bundled model is used)"
        raise CliError(
            f"{given} {option} {kind}; a model is a folder with config.json, *.safetensors and "
            f"tokenizer files{default}"
        )
    return option


def parse_loras(texts: list[str] | None) -> list[tuple[Path, float]]:
    """(file, strength) pairs from FILE[:STRENGTH]. Raises UsageError."""
    return [_parse_lora(text) for text in texts or []]


def _parse_lora(text: str) -> tuple[Path, float]:
    file, colon, strength = text.rpartition(":")
    if not colon or Path(text).exists():
        return Path(text), 1.0
    try:
        return Path(file), float(strength)
    except ValueError:
        if Path(file).exists():
            raise UsageError(f"--lora {text}: the strength {strength!r} is no number") from None
        return Path(text), 1.0
