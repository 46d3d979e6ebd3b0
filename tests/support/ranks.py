"""A function run by several processes that form one `torch.distributed` group over gloo."""

from __future__ import annotations

import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_CONTEXT = multiprocessing.get_context("forkserver")


class RankError(AssertionError):
    """A rank raised, died, or did not finish in time."""


def run_ranks(
    function: Callable[..., T], *arguments: Any, ranks: int = 2, seconds: float = 60.0
) -> list[T]:
    """Call `function(*arguments)` in every rank; the results by rank.

    The function stands at the top level of its module and returns what can be pickled; tensors go
    as NumPy arrays. A rank that raises, dies or exceeds `seconds` ends all of them: RankError then
    has its number and traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
        source = sys.modules[function.__module__].__file__
        processes = [
            _CONTEXT.Process(
                target=_run,
                args=(source, function.__qualname__, arguments, folder, rank, ranks, seconds, send),
                daemon=True,
            )
            for rank, (_, send) in enumerate(pipes)
        ]
        try:
            for process in processes:
                process.start()
            for _, send in pipes:
                send.close()  # a rank that dies then reads as the end of its pipe
            return _collect([receive for receive, _ in pipes], time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankError(f"ranks {late} of {len(pipes)} did not end in time")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.index(pipe)
            try:
                error, results[rank] = pipe.recv()
            except EOFError:
                raise RankError(f"rank {rank} died without a word") from None
            if error:
                raise RankError(f"rank {rank} raised:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _run(
    source: str,
    name: str,
    arguments: tuple[Any, ...],
    folder: str,
    rank: int,
    ranks: int,
    seconds: float,
    send: Connection,
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=seconds),
        )
        result = getattr(_module(source), name)(*arguments)
        distributed.barrier()  # no rank leaves while another still needs the connection
    except BaseException:
        send.send((traceback.format_exc(), None))
    else:
        send.send(("", result))
        distributed.destroy_process_group()


def _module(source: str) -> Any:
    """The module of a file; pytest's own names of test modules hold only in its process."""
    name = f"_ranks_{Path(source).stem}"
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
