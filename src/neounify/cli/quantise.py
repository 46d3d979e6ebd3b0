"""`neounify quantise`: a checkpoint with weights in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.convert import parse_bytes, print_saved
from neounify.cli.display import Display
from neounify.cli.files import check_apart, check_new_folder
from neounify.cli.models import resolve_model
from neounify.cli.options import FILES, ConfigFolder, OverwriteOptions, ReportOptions, option
from neounify.cli.parity import ParityOptions, check_comparable, comparison_device, write_parity
from neounify.errors import RequestError
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
            "int8, int8-all (embedding and text head too), fp8, w4-mixed or w4; or one GGUF file "
            "in q8_0, q5_1, q5_0, q4_1, q4_0 or f16.",
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
      neounify quantise FOLDER --to q8_0 --output FOLDER-q8
    """
    folder = resolve_model(model, "MODEL")
    check_apart(output, folder, config)
    display = Display(quiet=report.quiet, json=report.json)
    shard = parse_bytes(max_shard_size)
    if parity:
        _check_parity(folder, config, to.lower(), options)
    _write(folder, config, output, to.lower(), shard, overwrite.overwrite, display)
    print_saved(output, display)
    if parity:
        write_parity(folder, config, output, options, output / "parity", display)


def _check_parity(folder: Path, config: Path | None, preset: str, options: ParityOptions) -> None:
    """Check the options of the comparison with what will be written. Raises RequestError."""
    with lasting_imports():
        from neounify.checkpoint import CheckpointFolder, expected_shapes
        from neounify.checkpoint.gguf_save import GGUF_PRESETS, block_formats
        from neounify.checkpoint.load import check_quantised
        from neounify.quant.backends import AUTO, DECODED
        from neounify.quant.formats import WeightFormat
        from neounify.quant.presets import preset_formats

    checkpoint = CheckpointFolder.open(folder, config)
    check_comparable(checkpoint.config, "; leave it out with --no-parity")
    shapes = expected_shapes(checkpoint.config)
    formats: Collection[WeightFormat]
    if preset in GGUF_PRESETS:
        formats = block_formats(preset, shapes)
    else:
        sizes = {name: tuple(shape) for name, shape in shapes.items()}
        layers, tied = checkpoint.config.num_layers, checkpoint.config.tie_embeddings
        formats = preset_formats(preset, sizes, layers, tied=tied).values()
    check_quantised(None, options.backend)
    if not formats and options.backend not in (AUTO, DECODED):
        raise RequestError(
            f"backend {options.backend!r} is one of quantised weights, and {preset} makes none: "
            "leave it out",
            param="backend",
        )
    comparison_device(checkpoint, formats, options)


def _write(
    folder: Path,
    config: Path | None,
    output: Path,
    preset: str,
    shard: int,
    overwrite: bool,
    display: Display,
) -> None:
    with lasting_imports():
        import torch

        from neounify.checkpoint import CheckpointFolder, expected_shapes
        from neounify.checkpoint.gguf_save import GGUF_PRESETS, save_gguf
        from neounify.checkpoint.quantise_files import check_plain, quantise_checkpoint
        from neounify.pipeline.loading import load_processor
        from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE
        from neounify.quant.presets import check_preset

    as_gguf = preset in GGUF_PRESETS
    if not as_gguf:
        check_preset(preset)
    check_new_folder(output, "a model", overwrite=overwrite)
    checkpoint = CheckpointFolder.open(folder, config)
    processor = load_processor(checkpoint, torch.float32)
    names = expected_shapes(checkpoint.config)
    if as_gguf:
        check_plain(checkpoint, names)
    write: Callable[..., Path] = partial(quantise_checkpoint, max_shard_bytes=shard)
    with display.bar(f"quantising to {preset}", total=len(names), unit="weight") as tick:
        (save_gguf if as_gguf else write)(
            checkpoint,
            output,
            preset,
            tokenizer=processor.tokenizer,
            extra_files={SYSTEM_MESSAGE_FILE: processor.system_message},
            overwrite=overwrite,
            progress=tick,
        )
