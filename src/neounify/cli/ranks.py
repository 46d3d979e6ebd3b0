"""Commands under `torchrun`: the device of a rank, and one message for what went wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from neounify.cli.command import INTERRUPTED, explain, reported
from neounify.cli.models import default_device
from neounify.errors import NeounifyError
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    import torch

    from neounify.distributed.ranks import Ranks


def device_of(name: str | None, ranks: Ranks) -> torch.device:
    """The device of this rank, the default one without a name. Raises RequestError."""
    import torch

    from neounify.checkpoint.load import resolve_device

    device = resolve_device(name or default_device())
    if ranks.size > 1 and device.type == "cuda":
        device = torch.device("cuda", ranks.local)
        torch.cuda.set_device(device)
    return device


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """The ranks of this run; what goes wrong is reported once and ends all of them."""
    with lasting_imports():
        from neounify.distributed.ranks import joined

    with joined() as ranks:
        try:
            with reported(debug=False), _reported_by_rank(ranks):
                yield ranks
        except typer.Exit as end:
            if ranks.size == 1:
                raise
            # Threads of the process group, which is not left, abort a Python that ends as usual.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.exit_code)


@contextmanager
def _reported_by_rank(ranks: Ranks) -> Iterator[None]:
    """Errors as one message that names the rank; rank 0 reports what all ranks meet.

    A rank that fails alone ends, and so the others lose the connection to it: the first one to
    report is the only one.
    """
    from neounify.distributed.ranks import OtherRankError, is_lost_connection
    from neounify.train.method import TrainingStopped

    try:
        yield
    except OtherRankError:
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if ranks.first:
            raise
        raise typer.Exit(INTERRUPTED) from None
    except (NeounifyError, OSError, MemoryError, RuntimeError) as error:
        if ranks.size == 1:
            raise
        stops_all = isinstance(error, TrainingStopped)
        if (stops_all and not ranks.first) or not ranks.speaks():
            raise typer.Exit(1) from None
        if ranks.first and isinstance(error, NeounifyError):
            raise
        lost = is_lost_connection(error)
        text = "the connection to another rank, which ended, is lost" if lost else explain(error)
        if text is None:
            raise
        typer.echo(f"error: rank {ranks.rank}: {text}", err=True)
        raise typer.Exit(1) from None
