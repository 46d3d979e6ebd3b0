"""Which model a command uses."""

from __future__ import annotations

from pathlib import Path

from neounify.bundled import bundled_model
from neounify.cli.errors import CliError, UsageError


def resolve_model(option: Path | None) -> Path:
    """The folder of the model to use: the one asked for, else the one that comes with the package.

    The option's own default is the environment variable NEOUNIFY_MODEL. Raises CliError.
    """
    if option is None:
        return bundled_model()
    if not option.is_dir():
        kind = "is not a folder" if option.exists() else "is not there"
        raise CliError(
            f"--model {option} {kind}; a model is a folder with config.json, *.safetensors and "
            "tokenizer files (without --model the small one of the package is used)"
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
