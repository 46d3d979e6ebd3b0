"""`python -m benchmarks`: every figure, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch

from benchmarks import bundled, memory, post_training, quantised, speed
from benchmarks.figure import Figure, table
from benchmarks.timing import describe_machine
from neounify.runtime import keep_freed_memory

GROUPS = ["speed", "memory", "quantised", "bundled", "post-training"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def measure(arguments: argparse.Namespace) -> Iterator[Figure]:
    if "speed" in arguments.only:
        for name in arguments.dtypes:
            for mode in arguments.modes:
                yield from speed.figures(DTYPES[name], compiled=mode == "compiled")
    if "memory" in arguments.only:
        yield from memory.figures()
    if "quantised" in arguments.only:
        yield from quantised.figures()
    if "bundled" in arguments.only:
        for name in arguments.dtypes:
            yield from bundled.figures(DTYPES[name])
    if "post-training" in arguments.only:
        yield from post_training.figures()


def bfloat16_gain(figures: list[Figure]) -> Iterator[Figure]:
    """How much faster a denoising step is in bfloat16 than in float32."""
    seconds = {(f.name, f.dtype, f.mode): f.value for f in figures}
    for (name, dtype, mode), value in seconds.items():
        rounded = seconds.get((name, "bfloat16", mode))
        if dtype == "float32" and "denoising" in name and rounded:
            gain = value / rounded
            yield Figure(
                name=f"{name}: speed-up",
                dtype="bfloat16",
                mode=mode,
                value=gain,
                unit="×",
                aim="2.2 ×",
                met=gain >= 2.2,
            )


def redrawn(path: Path) -> str:
    """The table of a file of figures; the file gets the shares that today's counts give."""
    record = json.loads(path.read_text())
    figures = speed.recounted([Figure(**figure) for figure in record["figures"]])
    record["figures"] = [asdict(figure) for figure in figures]
    path.write_text(_text(record))
    return table(figures)


def _text(record: Mapping[str, object]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", default=GROUPS, choices=GROUPS, metavar="GROUP")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--redraw",
        type=Path,
        metavar="JSON",
        help="measure nothing: print the table of an earlier run, its shares counted as today",
    )
    arguments = parser.parse_args()
    if arguments.redraw:
        print(redrawn(arguments.redraw))
        return
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    figures: list[Figure] = []
    for figure in measure(arguments):
        figures.append(figure)
        print(f"{figure.name} ({figure.dtype} {figure.mode})", file=sys.stderr)
    figures += bfloat16_gain(figures)
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), "\n")
    print(table(figures))
    if arguments.json:
        record = {
            "date": date.today().isoformat(),
            "machine": machine,
            "figures": [asdict(figure) for figure in figures],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(_text(record))


if __name__ == "__main__":
    main()
