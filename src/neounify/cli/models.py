"""The model of a command: which folder, which LoRAs, and loading it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neounify.bundled import bundled_model
from neounify.cli.command import CliError, UsageError
from neounify.files import WEIGHT_FILES
from neounify.runtime import keep_freed_memory

if TYPE_CHECKING:
    from neounify.cli.display import Display
    from neounify.cli.options import ModelOptions
    from neounify.pipeline import Pipeline

VARIABLE = "NEOUNIFY_MODEL"


def resolve_model(option: Path | None, name: str = "--model") -> Path:
    """The folder or file of the model: the one asked for, else the bundled one.

    `name` is the option or argument it was given as; its default is the environment variable
    NEOUNIFY_MODEL. Raises CliError.
    """
    if option is None:
        return bundled_model()
    if not option.is_dir() and not (option.is_file() and option.suffix.lower() in WEIGHT_FILES):
        source = VARIABLE if os.environ.get(VARIABLE) == str(option) else name
        kind = "is not a model" if option.exists() else "does not exist"
        default = "" if source == "MODEL" else " (without it, the bundled model is used)"
        raise CliError(
            f"{source} {option} {kind}; a model is a folder with config.json, *.safetensors and "
            f"tokenizer files, or one file, *.safetensors or *.gguf{default}"
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


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline, and the files it was loaded from."""

    pipe: Pipeline
    folder: Path
    loras: tuple[tuple[Path, float], ...] = ()
    quantise: str | None = None

    @cached_property
    def description(self) -> dict[str, Any]:
        """The model's entry in a record: names of files without their folders."""
        model = self.pipe.model
        changed: dict[str, Any] = {}
        if not self.pipe.colour_profiles:
            changed["colour_profiles"] = False
        if self.quantise is not None:
            changed["quantise"] = self.quantise
        return {
            "folder": self.folder.resolve().name,
            "fingerprint": self.pipe.fingerprint,
            "dtype": str(model.compute_dtype).removeprefix("torch."),
            "device": str(model.device),
            "lora": [{"file": file.name, "strength": strength} for file, strength in self.loras],
            **changed,
        }


def open_model(options: ModelOptions, display: Display) -> LoadedModel:
    """Load the model with a progress bar. Raises the errors of loading."""
    import torch

    from neounify.checkpoint import resolve_device
    from neounify.pipeline import load

    folder = resolve_model(options.model)
    loras = parse_loras(options.lora)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    name = folder.resolve().name
    devices = parse_devices(options.devices, "--devices")
    if devices and options.device is not None:
        raise UsageError("give --device for one device or --devices for several, not both")
    device = resolve_device(options.device or default_device())
    with display.bar(f"loading {name}"):
        pipe = load(
            folder,
            config=options.config,
            dtype=options.dtype,
            device=device,
            devices=devices,
            lora=loras or None,
            memory=options.memory,  # type: ignore[arg-type]
            resident_layers=options.resident_layers,
            plan=options.plan,  # type: ignore[arg-type]
            attention=options.attention,
            colour_profiles=options.colour_profiles,
            quantise=options.quantise,
            backend=options.backend,
        )
    quantised = f", layers quantised to {options.quantise}" if options.quantise else ""
    display.note(f"{name} in {pipe.loaded_dtype}{quantised}")
    model = LoadedModel(pipe, folder, tuple(loras), options.quantise)
    _ = model.description  # hashes the files now: an unreadable one must not cost an image
    return model


def parse_devices(text: str | None, option: str) -> tuple[str, ...]:
    """The devices of a list such as "cuda:0,cuda:1", none without it. Raises UsageError."""
    names = tuple(name.strip() for name in (text or "").split(","))
    if text is not None and not all(names):
        raise UsageError(f"{option} {text!r} must be names of devices, such as cuda:0,cuda:1")
    return names if text is not None else ()


def default_device() -> str:
    """A GPU if there is one, else the CPU."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else accelerator.type
