"""Checkpoints written: converted ones, and the untrained toy."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch

from neounify.checkpoint import CheckpointFolder, expected_shapes, summarise
from neounify.checkpoint.lora_save import LoraForm, convert_lora
from neounify.checkpoint.reader import files_ending
from neounify.cli.display import Display
from neounify.cli.errors import CliError, UsageError
from neounify.cli.inspecting import human_bytes
from neounify.cli.models import parse_loras
from neounify.cli.options import ReportOptions, WeightOptions
from neounify.config.presets import TINY
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline, load
from neounify.text import byte_tokenizer

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def convert_model(
    model: Path,
    out: Path,
    weights: WeightOptions,
    max_shard_size: str,
    overwrite: bool,
    report: ReportOptions,
) -> None:
    """Load as the options say, save, and say what was written."""
    shard = parse_bytes(max_shard_size)
    if out.resolve() == model.resolve():
        raise CliError(f"{out} is the model itself; write to another folder")
    _check_free(out, overwrite)
    display = Display(quiet=report.quiet, json=report.json)
    loras = parse_loras(weights.lora)
    with display.bar(f"reading {model.resolve().name}"):
        pipe = load(model, dtype=weights.dtype or "stored", lora=loras or None, verify=True)
    with display.bar(f"writing {out.name}"):
        pipe.save(out, max_shard_bytes=shard, overwrite=overwrite)
    _tell(out, display)


def convert_lora_files(
    model: Path,
    out: Path,
    weights: WeightOptions,
    form: str,
    overwrite: bool,
    report: ReportOptions,
) -> None:
    """Write LoRAs of any form as one of the form asked for, and say where."""
    if form not in get_args(LoraForm):
        raise UsageError(f"--lora-form {form} is unknown; known: {', '.join(get_args(LoraForm))}")
    loras = parse_loras(weights.lora)
    if not loras:
        raise UsageError("--lora-form needs a --lora FILE to write in that form")
    if weights.dtype is not None:
        raise UsageError("--dtype is for models; a LoRA keeps its number format")
    shapes = expected_shapes(CheckpointFolder.open(model).config)
    written = convert_lora(
        loras,
        shapes,
        out,
        form,  # type: ignore[arg-type]
        base=model.resolve().name,
        overwrite=overwrite,
    )
    display = Display(quiet=report.quiet, json=report.json)
    display.result(f"saved {out}  (a LoRA of {form} form)", out)
    display.emit({"lora": str(written), "form": form})


def make_toy(folder: Path, seed: int, overwrite: bool, report: ReportOptions) -> None:
    """Save a tiny model with random weights."""
    _check_free(folder, overwrite)
    display = Display(quiet=report.quiet, json=report.json)
    toy_pipeline(seed).save(folder, overwrite=overwrite)
    _tell(folder, display)
    display.note(
        "The toy is UNTRAINED: its weights are random, its words and pictures mean nothing.\n"
        f"It is there to try the commands:\n\n"
        f'    neounify generate "a red boat" --model {folder}\n'
        f"    neounify chat --model {folder}\n"
        f"    neounify inspect {folder}"
    )


def toy_pipeline(seed: int) -> Pipeline:
    """An untrained model, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NeoUnify(TINY).requires_grad_(False).eval()
    return Pipeline(model, byte_tokenizer())


def parse_bytes(text: str) -> int:
    """A number of bytes from "5GB", "500MB", "1000". Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"size {text!r} is not a number of bytes, as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise CliError(f"{folder} is a file; a model is saved as a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise CliError(f"{folder} is not empty; choose another folder, or add --overwrite")


def _tell(folder: Path, display: Display) -> None:
    checkpoint = CheckpointFolder.open(folder)
    files = [file.name for file in files_ending(folder, ".safetensors")]
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
