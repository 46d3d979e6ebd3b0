"""Packs without end from a source of samples, by worker processes, from an exact position.

Sample i of a source is a function of i alone, so a position is a handful of integers: the next
sample of every worker, the samples it has carried over, and whose turn it is. Each pack comes
with the position after it; a loader made from that position goes on as if never stopped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from neounify.data.encode import Encoded, Encoder
from neounify.data.packing import Pack, first_fit, make_pack
from neounify.data.sample import DataError
from neounify.data.source import Source
from neounify.errors import NeounifyError

WINDOW_PACKS = 16
"""Packs that are filled together; more fill better and wait longer."""
MOST_DAMAGED_IN_A_ROW = 1000
"""After that many damaged samples without a good one, the data set is given up."""


@dataclass(frozen=True)
class WorkerPosition:
    """Where one worker stands: its next sample, those carried over, packs given of this window."""

    next: int
    carried: tuple[int, ...] = ()
    given: int = 0


@dataclass(frozen=True)
class Position:
    """Where a loader stands: every worker's place, and whose pack is next."""

    workers: tuple[WorkerPosition, ...]
    turn: int = 0

    @staticmethod
    def start(workers: int) -> Position:
        return Position(tuple(WorkerPosition(next=0) for _ in range(max(1, workers))))

    def to_json(self) -> dict[str, Any]:
        return {
            "turn": self.turn,
            "workers": [[w.next, list(w.carried), w.given] for w in self.workers],
        }

    @staticmethod
    def from_json(record: Any) -> Position:
        """Raises DataError for what `to_json` cannot have written."""
        try:
            workers = tuple(
                WorkerPosition(int(first), tuple(int(i) for i in carried), int(given))
                for first, carried, given in record["workers"]
            )
            turn = int(record["turn"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a loader position is damaged: {error!r}") from error
        if not workers or not 0 <= turn < len(workers):
            raise DataError(f"a loader position has {len(workers)} workers and turn {turn}")
        return Position(workers, turn)


@dataclass(eq=False)
class Loaded:
    """A pack, the position after it, and the damaged samples met on the way (message each)."""

    pack: Pack
    position: Position
    damaged: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """`budget`: tokens of a pack. Rank r of `ranks` sees samples r, r + ranks, … only."""

    budget: int
    seed: int = 0
    workers: int = 1
    prefetch: int = 4
    rank: int = 0
    ranks: int = 1


def load_packs(
    source: Source, encoder: Encoder, config: LoaderConfig, position: Position | None = None
) -> Iterator[Loaded]:
    """Packs from `position` on. With workers = 0 they are made in this process.

    Raises DataError when the position is of another number of workers, or nothing in the data
    can be used.
    """
    count = max(1, config.workers)
    position = position or Position.start(config.workers)
    if len(position.workers) != count:
        raise DataError(
            f"the position is of {len(position.workers)} workers, the loader has {count}; "
            "resume with the same number"
        )
    packs = _Packs(source, encoder, config, position)
    if config.workers == 0:
        items = iter(packs)
    else:
        packs.lifeline, _ours = Pipe(duplex=False)
        loader = DataLoader(
            packs,
            batch_size=None,
            num_workers=config.workers,
            prefetch_factor=config.prefetch,
            multiprocessing_context="forkserver",
        )
        items = iter(loader)
    workers, turn = list(position.workers), position.turn
    for pack, place, damaged in items:
        if isinstance(pack, str):
            raise DataError(pack)
        workers[turn] = place
        turn = (turn + 1) % count
        yield Loaded(pack, Position(tuple(workers), turn), damaged)


_Item = tuple[Pack | str, WorkerPosition, list[str]]


def _end_with(lifeline: Connection) -> None:
    """End this process when the one that reads its packs is gone and its end of the line closed.

    The library looks at the parent, which is the fork server, and that lives as long as its
    children: workers of a trainer that was killed would stay for good.
    """
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


class _Packs(IterableDataset[Any]):
    """The packs of one worker, which takes every (ranks · workers)-th sample."""

    def __init__(
        self, source: Source, encoder: Encoder, config: LoaderConfig, position: Position
    ) -> None:
        self.source, self.encoder, self.config, self.position = source, encoder, config, position
        self.lifeline: Connection | None = None

    def __iter__(self) -> Iterator[_Item]:
        info = get_worker_info()
        if self.lifeline is not None:
            threading.Thread(target=_end_with, args=(self.lifeline,), daemon=True).start()
        # The library asks its workers in turn from the first; the one whose turn it is comes first.
        worker = 0 if info is None else (info.id + self.position.turn) % info.num_workers
        place = self.position.workers[worker]
        while True:
            damaged: list[str] = []
            try:
                window, after = self._window(worker, place, damaged)
            except DataError as error:
                # Raised in a worker it would come out as the library's own error, with a traceback.
                yield str(error), place, damaged
                return
            for number in range(place.given, len(window)):
                last = number + 1 == len(window)
                here = after if last else replace(place, given=number + 1)
                yield make_pack(window[number]), here, damaged
                damaged = []
            place = after

    def _window(
        self, worker: int, place: WorkerPosition, damaged: list[str]
    ) -> tuple[list[list[Encoded]], WorkerPosition]:
        """Fill some packs; the emptiest is carried over to the next window."""
        stride = self.config.ranks * max(1, self.config.workers)
        offset = self.config.rank * max(1, self.config.workers) + worker
        wanted = WINDOW_PACKS * self.config.budget
        found: list[tuple[int, Encoded]] = []
        tokens, number, in_a_row = 0, place.next, 0
        carried = iter(place.carried)
        while tokens < wanted:
            index = next(carried, None)
            if index is None:
                index = number * stride + offset
                number += 1
            try:
                encoded = self._encode(index)
            except NeounifyError as error:
                damaged.append(f"sample {index}: {error}")
                in_a_row += 1
                if in_a_row >= MOST_DAMAGED_IN_A_ROW and not found:
                    raise DataError(
                        f"{in_a_row} samples in a row cannot be used, the last one: {error}"
                    ) from error
                continue
            found.append((index, encoded))
            tokens += encoded.length
            in_a_row = 0
        bins = first_fit([e.length for _, e in found], self.config.budget)
        loads = [sum(found[item][1].length for item in items) for items in bins]
        emptiest = loads.index(min(loads))
        left = tuple(found[item][0] for item in bins.pop(emptiest)) if len(bins) > 1 else ()
        rng = np.random.default_rng((self.config.seed, 1, offset, place.next))
        order = rng.permutation(len(bins))
        window = [[found[item][1] for item in bins[n]] for n in order]
        return window, WorkerPosition(number, left)

    def _encode(self, index: int) -> Encoded:
        rng = np.random.default_rng((self.config.seed, 0, index))
        encoded = self.encoder(self.source[index], rng)
        if encoded.length > self.config.budget:
            raise DataError(f"the sample has {encoded.length} tokens, a pack {self.config.budget}")
        return encoded
