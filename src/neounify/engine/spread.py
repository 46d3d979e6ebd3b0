"""Which part of a denoising step each rank of a group computes: guidance × sequence parallel.

The unit of guidance parallelism is a run, a job behind one of its prefixes. Runs are dealt out to
teams of ranks, and predictions are gathered, so that every rank moves every job. Inside a team,
sequence parallelism spreads the rows of each image over the ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from neounify.distributed.group import Group, share
from neounify.engine.denoiser import Predicted, Run
from neounify.errors import ConfigError
from neounify.model.layout import to_device

R = TypeVar("R")


def deal(tokens: Sequence[int], teams: int, placed: dict[int, int] | None = None) -> list[int]:
    """The team of each run, by its number of tokens: the largest first, ties by number.

    Each goes to the team with the fewest tokens so far. Runs that are `placed` already (number →
    team) stay and count first.
    """
    placed = placed or {}
    loads = [0] * teams
    chosen = [0] * len(tokens)
    order = sorted(range(len(tokens)), key=lambda n: (n not in placed, -tokens[n], n))
    for number in order:
        team = placed.get(number, loads.index(min(loads)))
        chosen[number] = team
        loads[team] += tokens[number]
    return chosen


class Spread:
    """Runs dealt out to teams of `sequence` ranks, whose rows are spread over the team.

    Raises ConfigError where the ranks of the group are not a multiple of `sequence`.
    """

    def __init__(self, group: Group, sequence: int = 1) -> None:
        check_sequence(group.size, sequence)
        self.group, self.sequence = group, group.part(sequence)
        self._teams, self._team = group.size // sequence, group.rank // sequence

    def mine(self, runs: tuple[Run, ...]) -> tuple[Run, ...]:
        """The runs of this rank's team."""
        teams = self._deal(runs)
        return tuple(run for run, team in zip(runs, teams, strict=True) if team == self._team)

    def rows(self, lengths: Sequence[int]) -> SpreadRows | None:
        """The rows of runs of these lengths on this rank; None where a team is one rank."""
        return None if self.sequence.size == 1 else SpreadRows(lengths, self.sequence)

    def mean_of_rows(self, a: Tensor, b: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Means over the rows of all ranks of the team, from those over the `rows` of each."""
        if self.sequence.size == 1:
            return a, b
        sums = torch.stack([a, b]).nan_to_num() * rows
        self.sequence.add_(sums)
        return sums[0], sums[1]

    def evenly(self, work: Generator[None, None, R], pauses: int) -> Generator[None, None, R]:
        """`work` with at least so many pauses, which all ranks then have alike."""
        done = 0
        while True:
            try:
                next(work)
            except StopIteration as end:
                result: R = end.value
                break
            done += 1
            yield
        for _ in range(done, pauses):
            yield
        return result

    def gather(self, runs: tuple[Run, ...], part: Predicted) -> Predicted:
        """What all teams predict for their runs, the same bits on every rank; collective."""
        teams = self._deal(runs)
        order = sorted(range(len(runs)), key=lambda n: (teams[n], n))
        lengths = [runs[n][0].z.shape[0] for n in order]
        width = runs[0][0].z.shape[1]
        device = runs[0][0].z.device
        totals = [0] * self._teams
        for n, length in zip(order, lengths, strict=True):
            totals[teams[n]] += length
        # Each rank of a team gives some of the rows, since all of them have them all.
        places = [share(total, r, self.sequence.size) for total in totals for r in self._ranks()]
        mine = torch.cat(list(part.clean)) if part.clean else torch.empty(0, width, device=device)
        rows = places[self.group.rank]
        joined = self.group.join_rows(mine[rows.start : rows.stop], [len(x) for x in places])
        clean = dict(zip(order, joined.split(lengths), strict=True))
        reused: frozenset[Run] = frozenset()
        if any(job.cache.threshold for job, _ in runs):
            kept = self.group.gather([n for n, run in enumerate(runs) if run in part.reused])
            reused = frozenset(runs[n] for numbers in kept for n in numbers)
            for (job, branch), team in zip(runs, teams, strict=True):
                job.places[branch] = team
        return Predicted([clean[n] for n in range(len(runs))], reused, part.residuals)

    def _ranks(self) -> Iterator[int]:
        return iter(range(self.sequence.size))

    def _deal(self, runs: tuple[Run, ...]) -> list[int]:
        # What a step cache keeps of a run stays with the team that computed it.
        placed = {n: job.places[b] for n, (job, b) in enumerate(runs) if b in job.places}
        return deal([job.z.shape[0] for job, _ in runs], self._teams, placed)


class SpreadRows:
    """The rows of packed images on one rank of a group: a share of each image.

    `own` are their indices, `own_lengths` their number of each image.
    """

    def __init__(self, lengths: Sequence[int], group: Group) -> None:
        self._group = group
        starts = np.cumsum([0, *lengths])
        of_ranks = [
            [
                np.arange(start + places.start, start + places.stop)
                for start, length in zip(starts, lengths, strict=False)
                for places in [share(length, rank, group.size)]
            ]
            for rank in range(group.size)
        ]
        self.own_lengths = [len(x) for x in of_ranks[group.rank]]
        self.own = np.concatenate(of_ranks[group.rank])
        self._counts = [sum(map(len, pieces)) for pieces in of_ranks]
        order = np.argsort(np.concatenate([x for pieces in of_ranks for x in pieces]))
        self._own = to_device(self.own, group.device)
        self._order = to_device(order, group.device)

    def cut(self, x: Tensor) -> Tensor:
        """This rank's rows of [n, …]."""
        return x.index_select(0, self._own)

    def joined(self, x: Tensor) -> Tensor:
        """All rows [n, …] from those of each rank; collective."""
        return self._group.join_rows(x, self._counts).index_select(0, self._order)


def check_sequence(ranks: int, sequence: int) -> None:
    """Raise ConfigError where teams of `sequence` ranks do not make up `ranks`."""
    if sequence < 1 or ranks % sequence:
        fitting = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise ConfigError(
            f"sequence parallel {sequence} on {ranks} devices for image generation: it must divide "
            f"the number of devices, so {fitting}"
        )
