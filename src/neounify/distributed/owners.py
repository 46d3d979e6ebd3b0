"""Whole matrices on ranks that hold rows of them: each matrix has one rank that owns it.

One all-to-all brings the rows of every matrix to its owner, which computes what needs all rows; one
brings the results back. The owner computes what one rank would, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Shard


class Rows(NamedTuple):
    """A matrix of which this rank holds rows, and the group of the ranks that hold it."""

    rows: Tensor
    shape: tuple[int, int]
    group: distributed.ProcessGroup


def on_matrices(
    parameters: Sequence[Tensor], values: Sequence[Tensor], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`work` of matrices [rows, columns] and stacks of them [n, rows, columns]; collective.

    `values` are what this rank holds for each parameter, and so are the results. What it holds
    whole it works on, all matrices of a stack together; of rows, the owner does.
    """
    results = list(values)
    cut: dict[distributed.ProcessGroup, list[tuple[int, Rows]]] = {}
    for number, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        group = _rows_group(parameter)
        if group is None:
            results[number] = work(value)
            continue
        shape = (parameter.shape[-2], parameter.shape[-1])
        parts = [value] if value.ndim == 2 else value.unbind()
        cut.setdefault(group, []).extend((number, Rows(part, shape, group)) for part in parts)
    for numbered in cut.values():
        done = on_owners([rows for _, rows in numbered], work)
        pairs = zip((number for number, _ in numbered), done, strict=True)
        for number, several in groupby(pairs, key=itemgetter(0)):
            shares = torch.stack([share for _, share in several])
            results[number] = shares.view(values[number].shape)
    return results


def _rows_group(parameter: Tensor) -> distributed.ProcessGroup | None:
    """The group of the ranks that hold rows of a parameter's matrices; None for whole ones."""
    if isinstance(parameter, DTensor):
        for axis, placement in enumerate(parameter.placements):
            if isinstance(placement, Shard) and placement.dim == parameter.ndim - 2:
                group = parameter.device_mesh.get_group(axis)
                return group if group.size() > 1 else None
    return None


def owners(shapes: Sequence[tuple[int, int]], ranks: int) -> list[int]:
    """The owner of each matrix: the costliest first, each to the rank with the least so far.

    The cost is that of products of a matrix with itself: rows · columns · the smaller of both.
    """
    loads = [0] * ranks
    chosen = [0] * len(shapes)
    costs = [rows * columns * min(rows, columns) for rows, columns in shapes]
    for number in sorted(range(len(shapes)), key=lambda n: -costs[n]):
        chosen[number] = loads.index(min(loads))
        loads[chosen[number]] += costs[number]
    return chosen


def on_owners(matrices: Sequence[Rows], work: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """The rows that this rank holds of `work(matrix)`, for every matrix; collective.

    `work` keeps the shape and may change the dtype, to the same for all. All matrices are of one
    group and dtype.
    """
    if not matrices:
        return []
    group = matrices[0].group
    ranks, rank = group.size(), group.rank()
    chosen = owners([matrix.shape for matrix in matrices], ranks)
    mine = [matrix.shape for matrix, owner in zip(matrices, chosen, strict=True) if owner == rank]
    sizes = [[_held(shape, r, ranks) for shape in mine] for r in range(ranks)]
    # To each owner the rows of its matrices, one after the other.
    order = sorted(range(len(matrices)), key=lambda n: chosen[n])
    parts = [matrices[n].rows for n in order]
    outgoing = [
        sum(
            matrix.rows.numel()
            for matrix, owner in zip(matrices, chosen, strict=True)
            if owner == r
        )
        for r in range(ranks)
    ]
    incoming = [sum(of_rank) for of_rank in sizes]
    received = _exchange(torch.cat([x.flatten() for x in parts]), outgoing, incoming, group)
    of_ranks = received.split(incoming)
    pieces = [part.split(size) for part, size in zip(of_ranks, sizes, strict=True)]
    results = [
        work(torch.cat([pieces[r][n] for r in range(ranks)]).view(shape)).flatten()
        for n, shape in enumerate(mine)
    ]
    dtype = results[0].dtype if results else work(parts[0].new_zeros(1, 1)).dtype
    back = [
        results[n][start : start + sizes[r][n]]
        for r in range(ranks)
        for n, start in enumerate(_starts(sizes, r))
    ]
    joined = torch.cat(back) if back else parts[0].new_zeros(0, dtype=dtype)
    returned = _exchange(joined, incoming, outgoing, group).split([x.numel() for x in parts])
    shares: list[Tensor] = [torch.empty(0)] * len(matrices)
    for place, number in enumerate(order):
        shares[number] = returned[place].view(parts[place].shape)
    return shares


def _starts(sizes: Sequence[Sequence[int]], rank: int) -> list[int]:
    """Where the elements of a rank begin in each of the owner's matrices."""
    return [sum(of_rank[n] for of_rank in sizes[:rank]) for n in range(len(sizes[rank]))]


def _held(shape: tuple[int, int], rank: int, ranks: int) -> int:
    """Elements that a rank holds of a matrix cut by rows, as `torch.chunk` cuts."""
    rows, columns = shape
    each = -(-rows // ranks)
    return (min(rows, (rank + 1) * each) - min(rows, rank * each)) * columns


def _exchange(
    values: Tensor, outgoing: list[int], incoming: list[int], group: distributed.ProcessGroup
) -> Tensor:
    received = values.new_empty(sum(incoming))
    distributed.all_to_all_single(received, values.contiguous(), incoming, outgoing, group=group)
    return received
