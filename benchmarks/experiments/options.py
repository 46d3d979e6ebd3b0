"""Options that experiments share."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.experiments.bench import Bench


def add_options(parser: argparse.ArgumentParser, *, world: str, cases: int) -> None:
    """Where the report goes, and how SceneBench asks."""
    parser.add_argument("--output", type=Path, help="folder; default: out/experiments/NAME")
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--world", default=world, help=f"world of scenes; default: {world}")
    parser.add_argument("--cases", type=int, default=cases, help=f"per category; default: {cases}")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the checkpoint's")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the checkpoint's")
    parser.add_argument("--seed", type=int, default=0, help="of cases and noise; default: 0")
    parser.add_argument("--batch-size", type=int, default=64, help="cases at once; default: 64")


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Options of an experiment with one trained checkpoint."""
    add_options(parser, world="default", cases=200)
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the bundled one")


def bench_of(arguments: argparse.Namespace) -> Bench:
    """How SceneBench is to ask, as the command line says."""
    return Bench(
        world=arguments.world,
        cases=arguments.cases,
        steps=arguments.steps,
        guidance=arguments.guidance,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
