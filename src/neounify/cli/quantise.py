"""`neounify quantise`: a checkpoint with weights in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.command import CliError
from neounify.cli.convert import parse_bytes, print_saved
from neounify.cli.display import Display
from neounify.cli.files import check_new_folder
from neounify.cli.models import resolve_model
from neounify.cli.options import FILES, ConfigFolder, OverwriteOptions, ReportOptions, option
from neounify.cli.parity import ParityOptions, write_parity
from neounify.runtime import lasting_imports


def quantise(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Checkpoint, a folder or one file of weights.")
    ],
    *,
    output: Annotated[Path, option(FILES, "DIR", "Folder to write.", "--output", "--out", "-o")],
    to: Annotated[
        str,
        option(
            FILES,
            "PRESET",
            "int8, int8-all (embedding and text head too), fp8, w4-mixed or w4.",
        ),
    ] = "int8",
    config: ConfigFolder = None,
    max_shard_size: Annotated[
        str, option(FILES, "SIZE", "Maximum size of a *.safetensors file, such as 5GB or 500MB.")
    ] = "5GB",
    parity: Annotated[
        bool,
        option(FILES, None, "Compare the two models and write the report.", "--parity/--no-parity"),
    ] = True,
    options: ParityOptions,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Quantise the linear weights of the layers of a checkpoint, and compare the two.

    DIR has the published layout and can be used wherever MODEL can; keys of quantised weights are
    those of ComfyUI. One weight at a time is in memory. The comparison goes to DIR/parity, see
    `neounify parity`.

    \b
      neounify quantise FOLDER --to int8 --output FOLDER-int8
      neounify quantise FOLDER --to w4-mixed --output FOLDER-w4 --no-parity
    """
    folder = resolve_model(model, "MODEL")
    with lasting_imports():
        import torch

        from neounify.checkpoint import CheckpointFolder, expected_shapes
        from neounify.checkpoint.quantise import quantise_checkpoint
        from neounify.pipeline.loading import load_processor
        from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE
        from neounify.quant.presets import check_preset

    check_preset(to)
    shard = parse_bytes(max_shard_size)
    if output.resolve() == folder.resolve():
        raise CliError(f"{output} is the model itself; write to another folder")
    check_new_folder(output, "a model", overwrite=overwrite.overwrite)
    display = Display(quiet=report.quiet, json=report.json)
    checkpoint = CheckpointFolder.open(folder, config)
    processor = load_processor(checkpoint, torch.float32)
    number = len(expected_shapes(checkpoint.config))
    with display.bar(f"quantising to {to}", total=number, unit="weight") as tick:
        quantise_checkpoint(
            checkpoint,
            output,
            to,
            tokenizer=processor.tokenizer,
            extra_files={SYSTEM_MESSAGE_FILE: processor.system_message},
            max_shard_bytes=shard,
            overwrite=overwrite.overwrite,
            progress=tick,
        )
    print_saved(output, display)
    if parity:
        write_parity(folder, config, output, options, output / "parity", display)
