"""`neounify toy`: a tiny model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neounify.cli.convert import print_saved
from neounify.cli.display import Display
from neounify.cli.files import check_new_folder
from neounify.cli.options import OverwriteOptions, ReportOptions
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from neounify.pipeline import Pipeline


def toy(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    *,
    seed: Annotated[int, typer.Option(metavar="N", help="Random seed of the weights.")] = 0,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Write a tiny untrained model, for trying the other commands.

    Its weights are random: text and images are noise, but come quickly on any machine.

    \b
      neounify toy my-toy
      neounify generate "a red boat" --model my-toy
    """
    check_new_folder(folder, "a model", overwrite=overwrite.overwrite)
    display = Display(quiet=report.quiet, json=report.json)
    toy_pipeline(seed).save(folder, overwrite=overwrite.overwrite)
    print_saved(folder, display)
    display.note(
        "The toy is UNTRAINED: its weights are random, its text and images are noise.\n"
        f"Try the commands with it:\n\n"
        f'    neounify generate "a red boat" --model {folder}\n'
        f"    neounify chat --model {folder}\n"
        f"    neounify inspect {folder}"
    )


def toy_pipeline(seed: int) -> Pipeline:
    """An untrained model, the same for the same seed."""
    with lasting_imports():
        import torch

        from neounify.config.presets import TINY
        from neounify.model import NeoUnify
        from neounify.pipeline import Pipeline
        from neounify.text import byte_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NeoUnify(TINY).requires_grad_(False).eval()
    return Pipeline(model, byte_tokenizer())
