"""The rank of this process among those that `torchrun` started, and what ranks exchange."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
from torch import Tensor, distributed
from torch.distributed.constants import default_pg_timeout

from neounify.errors import ConfigError, NeounifyError, is_out_of_memory

T = TypeVar("T")

TOGETHER = 2**24
"""Numbers that are summed over the ranks in one call, about."""


class OtherRankError(NeounifyError):
    """An error that another rank reports: this one ends without a message."""


@dataclass(frozen=True)
class Ranks:
    """Rank `rank` of `size`, number `local` on its machine. One process is the case of size 1.

    The exchanges below are collective: every rank calls each of them, in the same order.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: distributed.ProcessGroup | None = None
    """The process group that they exchange by; None is that of the run."""
    store: distributed.Store | None = None
    """What they joined by; it outlives a rank that is gone, unless that one has started it."""
    launch: str = ""
    """A name that all starts of one `torchrun --max-restarts` have and no other; else empty."""

    @property
    def first(self) -> bool:
        """Whether this rank writes the files and messages that all share."""
        return self.rank == 0

    def beside(self) -> Ranks:
        """The same ranks with a separate process group, for a thread; collective."""
        if self.size == 1:
            return self
        return replace(self, group=distributed.new_group(backend="gloo"))

    def speaks(self) -> bool:
        """Whether this rank is the first to report an error; not collective."""
        try:
            return self.store is None or self.store.add("neounify/errors", 1) == 1
        except RuntimeError:  # the store is gone too
            return True

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values  # type: ignore[return-value]

    def total(self, numbers: Sequence[int]) -> list[int]:
        """The sum of each number over the ranks."""
        return [sum(column) for column in zip(*self.gather(list(numbers)), strict=True)]

    def add_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks."""
        waiting: list[Tensor] = []
        for tensor in tensors if self.size > 1 else ():
            count = sum(one.numel() for one in waiting) + tensor.numel()
            if waiting and (tensor.dtype != waiting[0].dtype or count > TOGETHER):
                self._add_joined(waiting)
                waiting = []
            waiting.append(tensor)
        if waiting:
            self._add_joined(waiting)

    def _add_joined(self, tensors: Sequence[Tensor]) -> None:
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(joined, group=self.group)
        sums = joined.split([tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view_as(tensor))

    def share(self, count: int) -> range:
        """Which of `count` items this rank takes: about as many as the others, side by side."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def split(self, parts: int) -> tuple[Ranks, Ranks]:
        """This rank among `parts` neighbours, and among all of its place in theirs; collective."""
        if parts == 1:
            return Ranks(), self
        sets = [range(n, n + parts) for n in range(0, self.size, parts)]
        across = [range(n, self.size, parts) for n in range(parts)]
        return self._among(sets), self._among(across)

    def _among(self, sets: Sequence[range]) -> Ranks:
        groups = [distributed.new_group(list(one)) if len(one) > 1 else None for one in sets]
        number = next(n for n, one in enumerate(sets) if self.rank in one)
        chosen = sets[number]
        return Ranks(chosen.index(self.rank), len(chosen), self.local, groups[number])

    def wait(self) -> None:
        """Return when all ranks have come here."""
        self.gather(None)

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this rank, if it ends well on all.

        Where it fails, rank 0 raises the error, which names the ranks it is of unless it is of all,
        and the others raise OtherRankError.
        """
        result, failure = None, ""
        try:
            result = work()
        except Exception as error:
            known = isinstance(error, (NeounifyError, OSError)) or is_out_of_memory(error)
            if self.size == 1 or not known:
                raise
            failure = str(error) or type(error).__name__
        failures = self.gather(failure)
        if not any(failures):
            return result  # type: ignore[return-value]
        if not self.first:
            raise OtherRankError("another rank has failed")
        raise NeounifyError(_joined(failures))

    def check_alike(self, what: str, value: str) -> None:
        """Raise ConfigError on rank 0, and OtherRankError on others, where values differ."""
        values = self.gather(value)
        other = [str(rank) for rank, one in enumerate(values) if one != values[0]]
        if other and not self.first:
            raise OtherRankError("another rank reports it")
        if other:
            raise ConfigError(
                f"{what}: rank 0 and rank {', '.join(other)} see different ones; every rank must "
                "read the same files"
            )


JOIN_TIMEOUT = timedelta(seconds=45)
"""Time in which all ranks of a start must have come."""

ONE = Ranks()
"""A single process."""


def _joined(failures: Sequence[str]) -> str:
    """One message of what failed on which ranks."""
    if all(text == failures[0] for text in failures):
        return failures[0]
    return "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(failures) if text)


def is_lost_connection(error: Exception) -> bool:
    """Whether an exchange failed because another rank is gone."""
    text = str(error)
    return isinstance(error, distributed.DistBackendError) or (
        isinstance(error, RuntimeError)
        and any(
            words in text for words in ("Connection closed", "Connection reset", "[Gloo]", "gloo/")
        )
    )


def ranks_of(environment: Mapping[str, str]) -> Ranks:
    """The rank that `torchrun` gives a process by its environment. Raises ConfigError."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in environment]
    if "RANK" not in present or "WORLD_SIZE" not in present:
        return Ranks()
    if missing := [name for name in names if name not in present]:
        raise ConfigError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}: start with "
            "torchrun, or unset them for one process"
        )
    try:
        rank, size, local = (int(environment[name]) for name in names[:3])
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers: {error}") from error
    if not 0 <= rank < size:
        raise ConfigError(f"RANK must be in 0..{size - 1}, got {rank}")
    return Ranks(rank, size, local)


def _launch_name(store: distributed.Store) -> str:
    """The name of a launch, which its first start puts into the store of torchrun's own process."""
    return str(store.compare_set("neounify/launch", "", uuid4().hex).decode())


def _end(ranks: Ranks, place: str) -> None:
    """End this process, which waits in vain for an answer."""
    sys.stderr.write(f"error: rank {ranks.rank} cannot join the others at {place}: no answer\n")
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run, as one process group; none is made for a single process.

    Raises ConfigError where they cannot join.
    """
    ranks = ranks_of(os.environ)
    if ranks.size == 1 and not ("RANK" in os.environ and distributed.is_torchelastic_launched()):
        yield ranks
        return
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    # torch waits without end for another server that listens at this place.
    late = threading.Timer(JOIN_TIMEOUT.total_seconds() + 5, _end, (ranks, place))
    late.daemon = True
    late.start()
    try:
        store, *_ = next(distributed.rendezvous("env://", timeout=JOIN_TIMEOUT))
        late.cancel()
        ranks = replace(ranks, launch=_launch_name(store))
        if ranks.size > 1:
            ranks = replace(ranks, store=_begin_group(ranks, store))
    except (RuntimeError, ValueError) as error:
        late.cancel()
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"rank {ranks.rank} cannot join the others at {place}: {reason}"
        ) from error
    yield ranks
    # After an error others may be gone, and leaving the group would wait for them.
    if ranks.size > 1:
        distributed.destroy_process_group()


def _begin_group(ranks: Ranks, store: distributed.Store) -> distributed.Store:
    """Make the process group of a run; the store that it joined by."""
    # torchrun keeps the store, with addresses of before, when it starts ranks again.
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = distributed.PrefixStore(f"start {restarts}", store)
    store.set_timeout(default_pg_timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.size)
    return store
