"""Samples that cannot be used: how they are reported, and sources that hold nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from neounify.data.encode import Encoder, GuidanceDropout
from neounify.data.mixture import Mixture
from neounify.data.sample import DataError, Sample
from neounify.data.source import Source, sample_place, source_name
from neounify.errors import NeounifyError

MAX_MESSAGE_CHARS = 600
MAX_PROBED = 50
"""Samples of a source that are tried before it counts as one of which nothing can be used."""


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used: source in the mixture, number in the source, place and why."""

    source: int
    number: int
    message: str


@dataclass(frozen=True)
class Probe:
    """What a look at some samples of a source gave: the usable ones, and why others are not."""

    name: str
    size: int | None
    usable: list[Sample]
    skipped: list[Skipped]


def skipped_sample(mixture: Mixture, source: int, number: int, error: Exception) -> Skipped:
    """The report on one sample; the place is named once."""
    place = sample_place(mixture.sources[source], number)
    text = str(error) if isinstance(error, NeounifyError) else f"{type(error).__name__}: {error}"
    return Skipped(source, number, _line(text if text.startswith(place) else f"{place}: {text}"))


def _line(text: str) -> str:
    """One line of bounded length, however long and odd the names of files in it are.

    Names that are not UTF-8 hold characters that no file of text can, others control characters.
    """
    plain = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())
    )
    return plain if len(plain) <= MAX_MESSAGE_CHARS else plain[: MAX_MESSAGE_CHARS - 1] + "…"


def probe_sources(
    mixture: Mixture, encoder: Encoder, samples: int, *, until_usable: bool = False
) -> Iterator[Probe]:
    """Read and encode up to `samples` samples of each source, spread evenly over it.

    `until_usable` ends with the first that can be used. Guidance dropout is off: it would shorten
    a document that is too long.
    """
    plain = replace(encoder, dropout=GuidanceDropout(text=0.0, all=0.0))
    for source, content in enumerate(mixture.sources):
        probe = Probe(source_name(content), content.size, [], [])
        for number in _spread(content, samples):
            try:
                sample = content[number]
                plain(sample, np.random.default_rng(0))
            except Exception as error:  # as in the loader
                probe.skipped.append(skipped_sample(mixture, source, number, error))
                continue
            probe.usable.append(sample)
            if until_usable:
                break
        yield probe


def check_sources(mixture: Mixture, encoder: Encoder) -> None:
    """Raise DataError for a source of which none of the first MAX_PROBED samples can be used."""
    for probe in probe_sources(mixture, encoder, MAX_PROBED, until_usable=True):
        if not probe.usable:
            raise DataError(nothing_usable(probe))


def nothing_usable(probe: Probe) -> str:
    """What to say of a source without a usable sample."""
    tried = len(probe.skipped)
    of = "" if probe.size in (None, tried) else f" of {probe.size:,}"
    which = "its only sample" if tried == 1 and not of else f"any of {tried}{of} samples looked at"
    return f"{probe.name}: cannot use {which}. {probe.skipped[0].message}"


def _spread(source: Source, samples: int) -> list[int]:
    if source.size is None:
        return list(range(samples))
    count = min(samples, source.size)
    return [place * source.size // count for place in range(count)]
