"""`neounify convert`: a checkpoint or a LoRA in another form."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer

from neounify.cli.command import UsageError
from neounify.cli.display import Display, human_bytes
from neounify.cli.files import check_apart, check_new_folder
from neounify.cli.models import parse_loras, resolve_model
from neounify.cli.options import (
    FILES,
    ConfigFolder,
    OverwriteOptions,
    ReportOptions,
    WeightOptions,
    option,
)
from neounify.files import WEIGHT_FILES
from neounify.runtime import lasting_imports

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Form of the files that are read."""

    from_dcp: Annotated[
        bool,
        option(
            FILES,
            None,
            "MODEL is a torch distributed checkpoint, as PixelUMM is published. Its metadata "
            "is a pickle: nothing in it is run, and names that no checkpoint needs are refused. "
            "Use it only for files whose source you trust.",
            "--from-dcp",
        ),
    ] = False


def convert(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Checkpoint, a folder or one file of weights.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    *,
    config: ConfigFolder = None,
    weights: WeightOptions,
    to: Annotated[
        str | None,
        option(
            FILES,
            "stored|f16|q8_0|q5_1|q5_0|q4_1|q4_0",
            "Write weights as one GGUF file, the layers in this format; stored keeps the formats "
            "of a quantised checkpoint, into which a LoRA is merged by quantising again.",
        ),
    ] = None,
    max_shard_size: Annotated[
        str,
        option(FILES, "SIZE", "Maximum size of a *.safetensors file, such as 5GB or 500MB."),
    ] = "5GB",
    lora_form: Annotated[
        str | None,
        option(
            FILES,
            "peft|published",
            "Write only the --lora, in this format: peft, a folder of PEFT's, or published, "
            "one file in the format of the published models.",
        ),
    ] = None,
    source: SourceOptions,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Convert a checkpoint: another number format, LoRA merged, other file sizes.

    OUT has the published layout and can be used wherever MODEL can. All weights are checked;
    damaged ones (NaN) are refused.

    With --lora-form, OUT is the LoRA alone, for the model MODEL; several files become one.

    \b
      neounify convert FOLDER smaller --dtype bfloat16
      neounify convert FOLDER quantised --to q8_0
      neounify convert model-Q4_K.gguf plain --config FOLDER
      neounify convert FOLDER fast --lora distilled.safetensors:0.8
      neounify convert FOLDER-int8 fast-int8 --lora distilled.safetensors --to stored
      neounify convert FOLDER adapter --lora theirs.safetensors --lora-form peft
      neounify convert PixelUMM pixelumm --from-dcp --config Qwen3-8B
    """
    folder = resolve_model(model, "MODEL")
    check_apart(out, folder, config, *(file for file, _ in parse_loras(weights.lora)))
    display = Display(quiet=report.quiet, json=report.json)
    if lora_form is not None:
        if to is not None:
            raise UsageError("--to applies to models; with --lora-form no model is written")
        _convert_loras(folder, config, out, weights, lora_form, overwrite.overwrite, display)
        return
    shard = parse_bytes(max_shard_size)
    if source.from_dcp and (to is not None or weights.dtype is not None or weights.lora):
        raise UsageError("--from-dcp keeps weights as they are; convert its result a second time")
    check_new_folder(out, "a model", overwrite=overwrite.overwrite)
    if source.from_dcp:
        _convert_dcp(folder, config or folder, out, shard, overwrite.overwrite, display)
    elif to is not None:
        _write_quantised(folder, config, out, weights, to, shard, overwrite.overwrite, display)
    else:
        _convert_model(folder, config, out, weights, shard, overwrite.overwrite, display)
    print_saved(out, display)


def parse_bytes(text: str) -> int:
    """A number of bytes from "5GB", "500MB", "1000". Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"size {text!r} is not a number of bytes, such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def print_saved(folder: Path, display: Display) -> None:
    """Print what a saved checkpoint holds."""
    from neounify.checkpoint import CheckpointFolder, summarise
    from neounify.checkpoint.reader import files_ending

    checkpoint = CheckpointFolder.open(folder)
    files = [file.name for kind in WEIGHT_FILES for file in files_ending(folder, kind)]
    total = summarise(checkpoint).total
    display.result(
        f"saved {folder}  ({total.parameters:,} parameters, {total.dtype}, "
        f"{human_bytes(total.bytes)} in {len(files)} weight file{'s' * (len(files) != 1)})",
        folder,
    )
    display.emit(
        {
            "folder": str(folder),
            "fingerprint": checkpoint.fingerprint(),
            "files": files,
            "total": asdict(total),
        }
    )


def _write_quantised(
    model: Path,
    config: Path | None,
    out: Path,
    weights: WeightOptions,
    preset: str,
    shard: int,
    overwrite: bool,
    display: Display,
) -> None:
    with lasting_imports():
        import torch

        from neounify.checkpoint import CheckpointFolder
        from neounify.checkpoint.gguf_save import save_gguf
        from neounify.checkpoint.quantise_files import STORED, quantise_checkpoint
        from neounify.pipeline.loading import load_processor
        from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE

    if weights.dtype is not None:
        raise UsageError("--dtype and --to are two forms of the weights; give one")
    checkpoint = CheckpointFolder.open(model, config)
    processor = load_processor(checkpoint, torch.float32)
    preset = preset.lower()
    write: Callable[..., Path] = save_gguf
    if preset == STORED:
        write = partial(quantise_checkpoint, max_shard_bytes=shard)
    with display.bar(f"writing {out.name}"):
        write(
            checkpoint,
            out,
            preset,
            lora=parse_loras(weights.lora) or None,
            tokenizer=processor.tokenizer,
            extra_files={SYSTEM_MESSAGE_FILE: processor.system_message},
            overwrite=overwrite,
        )


def _convert_model(
    model: Path,
    config: Path | None,
    out: Path,
    weights: WeightOptions,
    shard: int,
    overwrite: bool,
    display: Display,
) -> None:
    with lasting_imports():
        from neounify.checkpoint.load import DECODED
        from neounify.pipeline import load

    loras = parse_loras(weights.lora)
    with display.bar(f"reading {model.resolve().name}"):
        pipe = load(
            model,
            config=config,
            dtype=weights.dtype or "stored",
            lora=loras or None,
            verify=True,
            backend=DECODED,
        )
    with display.bar(f"writing {out.name}"):
        pipe.save(out, max_shard_bytes=shard, overwrite=overwrite)


def _convert_dcp(
    model: Path, config: Path, out: Path, shard: int, overwrite: bool, display: Display
) -> None:
    with lasting_imports():
        from neounify.checkpoint.dcp import convert_dcp
        from neounify.checkpoint.reader import DCP_SUBFOLDER
        from neounify.pipeline.loading import load_tokenizer

    check_apart(out, model / DCP_SUBFOLDER)
    display.note(
        f"the metadata of {model} is a pickle; it is read without running anything, but trust "
        "where the files came from"
    )
    with display.bar(f"writing {out.name}"):
        convert_dcp(
            model,
            config,
            out,
            tokenizer=partial(load_tokenizer, config),
            max_shard_bytes=shard,
            overwrite=overwrite,
            note=display.note,
        )


def _convert_loras(
    model: Path,
    config: Path | None,
    out: Path,
    weights: WeightOptions,
    form: str,
    overwrite: bool,
    display: Display,
) -> None:
    with lasting_imports():
        from neounify.checkpoint import CheckpointFolder, expected_shapes
        from neounify.lora.peft import LoraForm, convert_lora

    if form not in get_args(LoraForm):
        raise UsageError(f"--lora-form {form} is unknown; known: {', '.join(get_args(LoraForm))}")
    loras = parse_loras(weights.lora)
    if not loras:
        raise UsageError("--lora-form needs --lora FILE, the LoRA to convert")
    if weights.dtype is not None:
        raise UsageError("--dtype applies to models; a LoRA keeps its number format")
    checkpoint = CheckpointFolder.open(model, config)
    described = checkpoint.config
    check_apart(out, *{info.file for info in checkpoint.tensors.values()})
    written = convert_lora(
        loras,
        expected_shapes(described),
        out,
        form,  # type: ignore[arg-type]
        base=model.resolve().name,
        overwrite=overwrite,
        family=described.family,
    )
    display.result(f"saved {out}  (LoRA, {form} format)", out)
    display.emit({"lora": str(written), "form": form})
