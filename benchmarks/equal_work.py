"""`python -m benchmarks.equal_work`: how far apart ranks that meet after every pack are.

Made documents of a unified mixture, 512² to 2048², in packs of 28,672 rows from 64 data streams:
the slowest rank over the mean one of each micro-step, by the cost of their packs. Packs are filled
by rows alone, as the loader fills them (by rows and cost), and taken in falling order of cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from neounify.config import ModelConfig
from neounify.config.presets import U1_8B, U1_A3B
from neounify.data.loader import WINDOW_PACKS
from neounify.data.packing import Drawn, cost_of, fill_packs, first_fit
from neounify.model.layout import Document, Grid, Image, Layout, Noise, Text

ROWS = 28_672
STREAMS = 64
PACKS_PER_STEP = 384
STEPS = 2
SIDES, SHARES = (16, 32, 48, 64), (0.35, 0.40, 0.15, 0.10)
"""Tokens along a side of an image, and how often it is drawn."""
TASKS = {"image": 0.40, "edit": 0.15, "question": 0.15, "chat": 0.20, "story": 0.10}

WINDOWS_BEFORE = 8
"""Windows of each data stream before the packs that are compared: the mean cost has settled."""

Fill = Callable[[Sequence[int], Sequence[float], Drawn], list[list[int]]]


def document(rng: np.random.Generator) -> Document:
    """A document of the mixture."""
    task = rng.choice(list(TASKS), p=list(TASKS.values()))
    grid = Grid(*[int(rng.choice(SIDES, p=SHARES))] * 2)
    prompt = Text(int(np.clip(rng.lognormal(4.2, 0.6), 10, 1000)))
    if task == "image":
        return Document((prompt, Noise.of(grid)))
    if task == "edit":
        return Document((Image.of(grid), prompt, Noise.of(grid)))
    if task == "question":
        return Document((Image.of(grid), Text(prompt.length + int(rng.lognormal(5, 0.8)))))
    if task == "chat":
        return Document((Text(int(np.clip(rng.lognormal(6, 1), 20, 8000))),))
    grid = Grid(*[int(rng.choice(SIDES[:2]))] * 2)
    page = (prompt, Noise.of(grid), Image.of(grid))
    return Document(page * int(rng.integers(2, 6)))


def stream(seed: int, kappa: float, fill: Fill, packs: int) -> list[tuple[int, float]]:
    """(rows, cost) of some packs of a data stream."""
    rng = np.random.default_rng(seed)
    settled: list[tuple[int, float]] = []
    drawn, windows = Drawn(), 0
    while windows < WINDOWS_BEFORE or len(settled) < packs:
        lengths: list[int] = []
        costs: list[float] = []
        while sum(lengths) < WINDOW_PACKS * ROWS:
            layout = Layout([document(rng)])
            if (rows := sum(layout.lengths.values())) <= ROWS:
                lengths.append(rows)
                costs.append(cost_of(layout, kappa))
        drawn = drawn.plus(lengths, costs)
        window = [
            (sum(lengths[n] for n in pack), sum(costs[n] for n in pack))
            for pack in fill(lengths, costs, drawn)
        ]
        window.remove(min(window, key=lambda pack: pack[1]))  # carried over
        windows += 1
        if windows > WINDOWS_BEFORE:
            settled += [window[n] for n in rng.permutation(len(window))]
    return settled[:packs]


def by_rows(lengths: Sequence[int], _: Sequence[float], _drawn: Drawn) -> list[list[int]]:
    return first_fit(lengths, lengths, ROWS, ROWS)


def by_cost(lengths: Sequence[int], costs: Sequence[float], drawn: Drawn) -> list[list[int]]:
    return fill_packs(lengths, costs, ROWS, drawn)


def slowest_over_mean(costs: np.ndarray, ranks: int, falling: bool) -> float:
    """Of the packs of some steps in the order of the run."""
    steps = costs.reshape(STEPS, -1, ranks)
    if falling:
        steps = np.sort(steps, axis=1)
    return float(steps.max(-1).sum() / steps.mean(-1).sum())


def line(name: str, config: ModelConfig) -> list[str]:
    """Lines of the table for one model."""
    kappa = config.pairs_per_row
    packs = {}
    for fill in (by_rows, by_cost):
        each = PACKS_PER_STEP * STEPS // STREAMS
        streams = [stream(seed, kappa, fill, each) for seed in range(STREAMS)]
        packs[fill] = np.array([one[n] for n in range(each) for one in streams])
    empty = {fill: 1 - table[:, 0].mean() / ROWS for fill, table in packs.items()}
    return [
        f"| {name} | {ranks} | {slowest_over_mean(packs[by_rows][:, 1], ranks, False):.3f} "
        f"| {slowest_over_mean(packs[by_cost][:, 1], ranks, False):.3f} "
        f"| {slowest_over_mean(packs[by_cost][:, 1], ranks, True):.3f} "
        f"| {100 * empty[by_rows]:.1f} → {100 * empty[by_cost]:.1f} % |"
        for ranks in (8, 64)
    ]


def main() -> None:
    print("| model | ranks | filled by rows | by cost | in falling order | empty rows |")
    print("|---|---|---|---|---|---|")
    for name, config in (("8B", U1_8B), ("A3B", U1_A3B)):
        print("\n".join(line(name, config)))


if __name__ == "__main__":
    main()
