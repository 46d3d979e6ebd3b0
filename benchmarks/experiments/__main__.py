"""`python -m benchmarks.experiments NAME`: one experiment, written into out/experiments/NAME."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.experiments import forms, joint, noise, thinking
from neounify.errors import NeounifyError
from neounify.files import locked_folder
from neounify.runtime import keep_freed_memory

EXPERIMENTS = {"joint": joint, "thinking": thinking, "noise": noise, "forms": forms}


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line and run; errors of the package are one line and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in EXPERIMENTS.items():
        module.add_arguments(commands.add_parser(name, help=module.TITLE, description=module.TITLE))
    arguments = parser.parse_args(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    output = arguments.output or Path("out/experiments") / arguments.name
    try:
        with locked_folder(output):
            EXPERIMENTS[arguments.name].run(arguments, output)
    except NeounifyError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
