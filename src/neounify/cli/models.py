"""Which model a command uses."""

from __future__ import annotations

from pathlib import Path

from neounify.cli.errors import CliError, UsageError

NO_MODEL = """\
this command needs a model, and none was named.

A model is a folder with a checkpoint: config.json, the weights (*.safetensors) and the
tokenizer's files. Name it with --model FOLDER, or once for all commands:

    export NEOUNIFY_MODEL=/path/to/folder

Where to get one:
  * The published models are SenseNova-U1 8B-MoT and A3B-MoT. Download all files of one from
    its page on a model hub, with any downloader, into one folder.
  * To try the commands now, make a tiny model with random weights (it is untrained, so its
    words and pictures mean nothing):

    neounify toy my-toy
    export NEOUNIFY_MODEL=my-toy"""


def resolve_model(option: Path | None) -> Path:
    """The folder of the model to use: the one asked for. Raises CliError that says how to get one.

    The option's own default is the environment variable NEOUNIFY_MODEL.
    """
    if option is None:
        raise CliError(NO_MODEL)
    if not option.is_dir():
        kind = "is not a folder" if option.exists() else "is not there"
        raise CliError(
            f"--model {option} {kind}; a model is a folder with config.json, *.safetensors and "
            "tokenizer files (`neounify toy FOLDER` makes a tiny one to try)"
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
