"""A model, loaded as the options say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neounify.checkpoint import CheckpointFolder, choose_dtype, resolve_device
from neounify.cli.display import Display
from neounify.cli.models import parse_loras, resolve_model
from neounify.cli.options import ModelOptions
from neounify.pipeline import Pipeline, load
from neounify.runtime import keep_freed_memory


@dataclass(frozen=True)
class Session:
    """A loaded model and where it came from."""

    pipe: Pipeline
    folder: Path
    loras: tuple[tuple[Path, float], ...] = ()

    @cached_property
    def description(self) -> dict[str, Any]:
        """What a record says of the model: names of files, but not where they lie."""
        model = self.pipe.model
        changed = {} if self.pipe.colour_profiles else {"colour_profiles": False}
        return {
            "folder": self.folder.resolve().name,
            "fingerprint": self.pipe.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "lora": [{"file": file.name, "strength": strength} for file, strength in self.loras],
            **changed,
        }


def open_session(options: ModelOptions, display: Display) -> Session:
    """Load the model; a bar shows that something happens."""
    folder = resolve_model(options.model)
    loras = parse_loras(options.lora)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    name = folder.resolve().name
    device = resolve_device(options.device or default_device())
    choice = choose_dtype(options.dtype, CheckpointFolder.open(folder), device.type)
    with display.bar(f"loading {name}"):
        pipe = load(
            folder,
            dtype=choice.dtype,
            device=device,
            lora=loras or None,
            memory=options.memory,  # type: ignore[arg-type]
            colour_profiles=options.colour_profiles,
        )
    display.note(f"{name} in {choice}")
    session = Session(pipe, folder, tuple(loras))
    _ = session.description  # read now: a file that cannot be read should not cost a painting
    return session


def default_device() -> str:
    """A GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
