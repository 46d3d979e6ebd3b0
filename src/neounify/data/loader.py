"""Packs of documents without end, read by worker processes, from an exact position.

The samples are dealt to S data streams: stream s packs samples s, s + S, s + 2S, … by itself, by
rows and by cost (`packing.py`), and pack j comes from stream j mod S. Rank r of R reads every R-th
pack, from the r-th after the position on, and its workers share the streams of these: neither ranks
nor workers change a pack. Sample
i of a source is a function of i alone, so a position is a few numbers: the next sample of every
stream, those it has carried over, what it has drawn, and which stream is next. Each pack comes with
the position after it; a loader built from that position continues as if it had never stopped.
Samples that cannot be used are skipped and reported; `check_sources` refuses a source without
usable ones.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.packing import Drawn, cost_of, fill_packs
from neounify.data.reasons import reason_of
from neounify.data.sample import TASKS, DataError, Sample
from neounify.data.sizes import Pixels
from neounify.data.sources import Mixture, SampleSource, sample_location, source_name
from neounify.errors import NeounifyError
from neounify.model.layout import Layout


@dataclass(eq=False)
class Pack:
    """Documents of one forward pass, as tensors.

    N text tokens, L labels, I clean and J noisy images; U understanding rows.
    `label_rows` index the understanding rows; `label_tasks` [L] and `target_tasks` [J] are
    indices in `TASKS`. Images are arrays uint8 [height, width, 3] and not tensors: torch sends each
    tensor between processes as an open file, and there can be hundreds.
    """

    layout: Layout
    ids: Tensor
    label_rows: Tensor
    label_ids: Tensor
    label_tasks: Tensor
    images: list[Pixels]
    targets: list[Pixels]
    target_tasks: Tensor
    samples: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of both streams."""
        return sum(self.layout.lengths.values())


def make_pack(documents: Sequence[Encoded]) -> Pack:
    """Join encoded samples into one pack."""
    rows: list[int] = []
    first = 0
    for d in documents:
        rows += [first + row for row in d.label_rows]
        first += d.document.und_length()
    task = [TASKS.index(d.task) for d in documents]
    per_label = [len(d.label_ids) for d in documents]
    per_target = [len(d.targets) for d in documents]
    return Pack(
        layout=Layout(d.document for d in documents),
        ids=torch.tensor([i for d in documents for i in d.ids], dtype=torch.int64),
        label_rows=torch.tensor(rows, dtype=torch.int64),
        label_ids=torch.tensor([i for d in documents for i in d.label_ids], dtype=torch.int64),
        label_tasks=torch.from_numpy(np.repeat(task, per_label)),
        images=[image for d in documents for image in d.images],
        targets=[image for d in documents for image in d.targets],
        target_tasks=torch.from_numpy(np.repeat(task, per_target)),
        samples=[d.sample for d in documents],
    )


WINDOW_PACKS = 16
"""Packs that are filled together; more fill better and wait longer."""
MAX_SKIPPED_IN_A_ROW = 1000
"""After that many damaged samples of one source without a good one, loading ends."""
MAX_MESSAGE_CHARS = 600
MAX_PROBED = 50
"""Samples of a source that are tried before it counts as one of which nothing can be used."""


@dataclass(frozen=True)
class Skipped:
    """A sample that cannot be used: source in the mixture, number in it, location and error.

    `reason` is the kind of its error, to count by.
    """

    source: int
    number: int
    message: str
    reason: str = "unknown"


def skipped_sample(mixture: Mixture, source: int, number: int, error: Exception) -> Skipped:
    """The report on one sample, with its location once."""
    location = sample_location(mixture.sources[source], number)
    text = str(error) if isinstance(error, NeounifyError) else f"{type(error).__name__}: {error}"
    message = _line(text if text.startswith(location) else f"{location}: {text}")
    return Skipped(source, number, message, reason_of(error))


def _line(text: str) -> str:
    """One printable line of bounded length: file names may be long, hold control characters, or
    not be UTF-8."""
    plain = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())
    )
    return plain if len(plain) <= MAX_MESSAGE_CHARS else plain[: MAX_MESSAGE_CHARS - 1] + "…"


@dataclass(frozen=True)
class StreamPosition:
    """Position of a data stream: next sample, those carried over, packs yielded of this window, and
    all that was drawn before it."""

    next: int
    carried: tuple[int, ...] = ()
    yielded: int = 0
    drawn: Drawn = field(default_factory=Drawn)


@dataclass(frozen=True)
class Position:
    """Position of a loader: that of every data stream, and which stream is next."""

    streams: tuple[StreamPosition, ...]
    turn: int = 0

    @staticmethod
    def start(streams: int) -> Position:
        return Position(tuple(StreamPosition(next=0) for _ in range(streams)))

    @staticmethod
    def merged(parts: Sequence[Position]) -> Position:
        """The position of all ranks from that of each, after equally many packs of all."""
        ranks, turn = len(parts), parts[-1].turn
        streams = (parts[(n - turn) % ranks].streams[n] for n in range(len(parts[0].streams)))
        return Position(tuple(streams), turn)

    def to_json(self) -> dict[str, Any]:
        return {
            "turn": self.turn,
            "streams": [
                [s.next, list(s.carried), s.yielded, s.drawn.rows, s.drawn.cost]
                for s in self.streams
            ],
        }

    @staticmethod
    def from_json(record: Any) -> Position:
        """Raises DataError for what `to_json` cannot have written.

        In states of earlier versions each worker had one stream, and packs were filled by rows.
        """
        try:
            entries = record["streams" if "streams" in record else "workers"]
            streams = tuple(
                StreamPosition(
                    int(first),
                    tuple(int(i) for i in carried),
                    int(yielded),
                    Drawn(int(drawn[0]), float(drawn[1])) if drawn else Drawn(),
                )
                for first, carried, yielded, *drawn in entries
            )
            turn = int(record["turn"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"a loader position is damaged: {error!r}") from error
        if not streams or not 0 <= turn < len(streams):
            raise DataError(f"a loader position has {len(streams)} data streams and turn {turn}")
        return Position(streams, turn)


@dataclass(eq=False)
class LoadedPack:
    """A pack, the position after it, and the damaged samples skipped for it.

    `used` counts the pack's samples by the number of their source in the mixture.
    """

    pack: Pack
    position: Position
    skipped: list[Skipped] = field(default_factory=list)
    used: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Rank `rank` of `ranks` reads every `ranks`-th pack of `streams` data streams."""

    tokens_per_pack: int
    seed: int = 0
    workers: int = 1
    prefetch: int = 4
    streams: int = 1
    rank: int = 0
    ranks: int = 1

    @property
    def shared(self) -> int:
        """How many data streams each rank reads."""
        return self.streams // self.ranks

    @property
    def processes(self) -> int:
        """The most workers, up to `workers`, that share the rank's streams evenly; 0 for none."""
        return max((n for n in range(1, self.workers + 1) if self.shared % n == 0), default=0)

    def order(self, position: Position) -> list[int]:
        """The streams of this rank in the order in which it reads them from a position on.

        The first rank reads the next pack, whatever number of ranks came to it.
        """
        first = position.turn + self.rank
        return [(first + n * self.ranks) % self.streams for n in range(self.shared)]


def _check_streams(config: LoaderConfig, position: Position) -> None:
    """Raise DataError for streams that the ranks cannot share, or that a position is not of."""
    if config.streams % config.ranks:
        raise DataError(
            f"{config.streams} data streams cannot be shared by {config.ranks} ranks: "
            "parallel.streams of the recipe must be a multiple of the ranks"
        )
    if len(position.streams) != config.streams:
        raise DataError(
            f"the position is of {len(position.streams)} data streams, the loader has "
            f"{config.streams}; resume with the same number (parallel.streams of the recipe)"
        )


def load_packs(
    source: SampleSource, encoder: Encoder, config: LoaderConfig, position: Position | None = None
) -> Iterator[LoadedPack]:
    """Endless packs from `position` on. With workers = 0 they are built in this process.

    Any other source is wrapped in a Mixture, so that finite data repeats in another order.
    Raises DataError when the position is of another number of data streams, when the ranks cannot
    share them, when a source yields nothing but damaged samples, or when a worker process fails.
    """
    position = position or Position.start(config.streams)
    _check_streams(config, position)
    mixture = source if isinstance(source, Mixture) else Mixture([(source, 1.0)], config.seed)
    packs = _Packs(mixture, encoder, config, position)
    if config.processes == 0:
        items = iter(packs)
    else:
        packs.lifeline, _ours = Pipe(duplex=False)
        loader = DataLoader(
            packs,
            batch_size=None,
            num_workers=config.processes,
            prefetch_factor=config.prefetch,
            multiprocessing_context="forkserver",
        )
        items = iter(loader)
    streams = list(position.streams)
    for number in cycle(config.order(position)):
        try:
            item = next(items)
        except (RuntimeError, OSError) as error:
            _worker_failed(error)
        if isinstance(item, str):
            raise DataError(item)
        streams[number] = item.position
        after = Position(tuple(streams), (number + 1) % config.streams)
        yield LoadedPack(item.pack, after, item.skipped, item.used)


def _worker_failed(error: Exception) -> NoReturn:
    """Raise one message for a worker that died or could not start; torch's has many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = lines[-1] if lines else type(error).__name__
    raise DataError(
        f"a process that loads data has failed: {why}. If the system ended it for want of "
        "memory, use fewer workers (workers in the recipe); workers = 0 loads in the main process"
    ) from error


@dataclass(frozen=True, eq=False)
class _Item:
    """Message of a worker: a pack, its stream's position after it, the samples skipped and used."""

    pack: Pack
    position: StreamPosition
    skipped: list[Skipped]
    used: Counter[int]


@dataclass(frozen=True, eq=False)
class _Document:
    """An encoded draw: its index in the mixture, and the number of its source."""

    index: int
    source: int
    encoded: Encoded


def _end_with(lifeline: Connection) -> None:
    """End this process when the trainer that reads its packs has died and closed its pipe end.

    torch checks the parent process only, which is the fork server and outlives the trainer.
    """
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


class _Packs(IterableDataset[Any]):
    """The packs of one worker: those of its share of the rank's data streams, in turn."""

    def __init__(
        self, source: Mixture, encoder: Encoder, config: LoaderConfig, position: Position
    ) -> None:
        self.source, self.encoder, self.config, self.position = source, encoder, config, position
        self._kappa = encoder.config.pairs_per_row
        self.lifeline: Connection | None = None
        self._in_a_row: Counter[int] = Counter()

    def __iter__(self) -> Iterator[_Item | str]:
        info = get_worker_info()
        if self.lifeline is not None:
            threading.Thread(target=_end_with, args=(self.lifeline,), daemon=True).start()
        # torch reads from its workers in turn, starting at the first.
        first, count = (0, 1) if info is None else (info.id, info.num_workers)
        streams = self.config.order(self.position)[first::count]
        packs = cycle([self._stream(number) for number in streams])
        while True:
            try:
                yield next(next(packs))
            except Exception as error:
                # Raised in a worker, torch would wrap it with a traceback.
                known = isinstance(error, DataError)
                yield str(error) if known else f"loading failed: {type(error).__name__}: {error}"
                return

    def _stream(self, number: int) -> Iterator[_Item]:
        """The packs of one data stream, from its position on."""
        position = self.position.streams[number]
        while True:
            skipped: list[Skipped] = []
            window, after = self._window(number, position, skipped)
            if position.yielded:
                skipped = []  # yielded with the first pack of the window, before the resume
            for which in range(position.yielded, len(window)):
                last = which + 1 == len(window)
                following = after if last else replace(position, yielded=which + 1)
                pack = make_pack([item.encoded for item in window[which]])
                yield _Item(
                    pack, following, skipped, Counter(item.source for item in window[which])
                )
                skipped = []
            position = after

    def _window(
        self, stream: int, position: StreamPosition, skipped: list[Skipped]
    ) -> tuple[list[list[_Document]], StreamPosition]:
        """Fill some packs; the cheapest is carried over to the next window."""
        capacity = WINDOW_PACKS * self.config.tokens_per_pack
        items: list[_Document] = []
        tokens, number = 0, position.next
        carried = iter(position.carried)
        while tokens < capacity:
            index = next(carried, None)
            if index is None:
                index = number * self.config.streams + stream
                number += 1
            item = self._draw(index, skipped)
            if item is not None:
                items.append(item)
                tokens += item.encoded.length
        lengths = [item.encoded.length for item in items]
        costs = [cost_of(Layout([item.encoded.document]), self._kappa) for item in items]
        drawn = position.drawn.plus(lengths, costs)
        bins = fill_packs(lengths, costs, self.config.tokens_per_pack, drawn)
        loads = [sum(costs[n] for n in numbers) for numbers in bins]
        cheapest = loads.index(min(loads))
        left = tuple(items[n].index for n in bins.pop(cheapest)) if len(bins) > 1 else ()
        rng = np.random.default_rng((self.config.seed, 1, stream, position.next))
        order = rng.permutation(len(bins))
        window = [[items[n] for n in bins[which]] for which in order]
        return window, StreamPosition(number, left, drawn=drawn)

    def _draw(self, index: int, skipped: list[Skipped]) -> _Document | None:
        """One encoded draw; None and an entry in `skipped` when its sample cannot be used."""
        source, number = self.source.describe(index)
        try:
            encoded = self._encode(index)
        except Exception as error:  # decoders of damaged files raise nearly anything
            item = skipped_sample(self.source, source, number, error)
            skipped.append(item)
            self._in_a_row[source] += 1
            if self._in_a_row[source] >= MAX_SKIPPED_IN_A_ROW:
                raise DataError(
                    f"{source_name(self.source.sources[source])}: {self._in_a_row[source]} samples "
                    f"in a row cannot be used, the last one: {item.message}"
                ) from error
            return None
        self._in_a_row[source] = 0
        return _Document(index, source, encoded)

    def _encode(self, index: int) -> Encoded:
        rng = np.random.default_rng((self.config.seed, 0, index))
        encoded = self.encoder(self.source[index], rng)
        if encoded.length > self.config.tokens_per_pack:
            raise DataError(
                f"the sample has {encoded.length} tokens, a pack {self.config.tokens_per_pack}"
            )
        return encoded


@dataclass(frozen=True)
class Probe:
    """Result of trying some samples of a source: the usable ones, and why others are not."""

    name: str
    size: int | None
    usable: list[Sample]
    skipped: list[Skipped]

    @property
    def tried(self) -> int:
        return len(self.usable) + len(self.skipped)

    @property
    def share(self) -> float:
        """The share of the samples tried that cannot be used."""
        return len(self.skipped) / max(1, self.tried)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(skipped.reason for skipped in self.skipped)


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
        for number in spread(content, samples):
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
    """The error message for a source without a usable sample."""
    tried = len(probe.skipped)
    of = "" if probe.size in (None, tried) else f" of {probe.size:,}"
    which = "its only sample" if tried == 1 and not of else f"any of {tried}{of} samples tried"
    return f"{probe.name}: cannot use {which}. {probe.skipped[0].message}"


def spread(source: SampleSource, samples: int) -> list[int]:
    if source.size is None:
        return list(range(samples))
    count = min(samples, source.size)
    return [number * source.size // count for number in range(count)]
