"""Counts of used and damaged samples per data source of a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from neounify.data.loader import Loaded, Skipped
from neounify.data.sources import FileSource, Mixture, source_name


class Tally:
    """Counts per source of a mixture; part of a training state.

    `used` and `skipped` count draws, `damaged` holds the numbers of different damaged samples.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        count = len(mixture.sources)
        self.used: Counter[int] = Counter()
        self.skipped: Counter[int] = Counter()
        self.damaged: list[set[int]] = [set() for _ in range(count)]

    def add(self, loaded: Sequence[Loaded]) -> list[Skipped]:
        """Count packs in; the damaged samples among them that were not met before."""
        new = []
        for item in loaded:
            self.used.update(item.used)
            for skipped in item.skipped:
                self.skipped[skipped.source] += 1
                if skipped.number not in self.damaged[skipped.source]:
                    self.damaged[skipped.source].add(skipped.number)
                    new.append(skipped)
        return new

    def by_source(self) -> dict[str, int]:
        """Different damaged samples by the name of their source, where there are any."""
        names = [source_name(source) for source in self.mixture.sources]
        counts: Counter[str] = Counter()
        for name, numbers in zip(names, self.damaged, strict=True):
            counts[name] += len(numbers)
        return {name: count for name, count in counts.items() if count}

    def summary(self) -> list[str]:
        """A line per source of files: which share of the samples met so far could be used."""
        lines = []
        for number, source in enumerate(self.mixture.sources):
            if not isinstance(source, FileSource):
                continue
            drawn, damaged = self.used[number] + self.skipped[number], len(self.damaged[number])
            size = source.size or drawn
            met = max(damaged, min(size, drawn))
            share = 100 * (met - damaged) / met if met else 100.0
            epochs = f", {drawn / size:.1f} epochs" if size else ""
            lines.append(
                f"{source.name}: {met - damaged:,} of {met:,} samples usable ({share:.0f} %)"
                + (f", {damaged:,} listed in skipped.txt" if damaged else "")
                + epochs
            )
        return lines

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "used": self.used[number],
                "skipped": self.skipped[number],
                "damaged": sorted(numbers),
            }
            for number, numbers in enumerate(self.damaged)
        ]

    def load(self, record: Any) -> None:
        """Take over what `to_json` wrote; nothing from what is absent or of other sources."""
        if not isinstance(record, list) or len(record) != len(self.damaged):
            return
        with suppress(KeyError, TypeError, ValueError):  # only counts, on which nothing depends
            for number, item in enumerate(record):
                self.used[number] = int(item["used"])
                self.skipped[number] = int(item["skipped"])
                self.damaged[number] = {int(n) for n in item["damaged"]}
