"""Throughput and latency at several numbers of clients, against one request at a time."""

from __future__ import annotations

import itertools
import sys
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.figure import Figure
from benchmarks.serving.driving import going_on, open_loop
from benchmarks.serving.sending import Outcome
from benchmarks.serving.series import Drive, Series, closed, run_series
from benchmarks.serving.server import ServerOptions
from benchmarks.serving.workload import Call, chat, mixed, paint

TEXT_AIM, IMAGE_AIM, GROWTH_AIM = 3.0, 1.5, 2.0
PAINTERS = 4
"""Clients that generate images without a pause while the latency of chats is measured."""
IMAGE_SHARE = 2
"""Series of images alone have so many times fewer requests."""
ALL_GROUPS = ("mix", "text", "images", "steady")
ALONE, BESIDE = "chats at a fixed rate", "the same chats beside images"


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """`requests` of the mix, `seconds` a series may take at most.

    `rate` of chats a second and how many `steady_seconds` they come for, in the series in
    which they come by the clock; `many` clients are compared with one.
    """

    clients: tuple[int, ...] = (1, 4, 16, 64)
    many: int = 16
    requests: int = 160
    seconds: float = 300.0
    rate: float = 2.0
    steady_seconds: float = 60.0
    groups: tuple[str, ...] = ALL_GROUPS

    @property
    def levels(self) -> list[int]:
        """Numbers of clients of the mix; always with one, which is the serial run."""
        return sorted({1, *self.clients})


async def run_load(
    settings: LoadSettings, options: ServerOptions, log: Path
) -> AsyncGenerator[Series]:
    """The series, one after the other."""
    for name, clients, calls in _closed_series(settings):
        print(f"{name}, {clients} at a time, {len(calls)} requests", file=sys.stderr)
        drive = closed(calls, clients, settings.seconds)
        yield await run_series(name, clients, drive, options=options, log=log, asked=len(calls))
    if "steady" in settings.groups:
        for name, painters in ((ALONE, 0), (BESIDE, PAINTERS)):
            print(f"{name}, {settings.rate:g} a second", file=sys.stderr)
            yield await run_series(
                name, painters, _steady(settings, painters), options=options, log=log
            )


def _closed_series(settings: LoadSettings) -> Iterable[tuple[str, int, list[Call]]]:
    some = max(settings.many, settings.requests // IMAGE_SHARE)
    calls = {
        "mix": [mixed(n) for n in range(settings.requests)],
        "text": [chat(n) for n in range(settings.requests)],
        "images": [paint(n) for n in range(some)],
    }
    for name, callers in calls.items():
        if name in settings.groups:
            for clients in settings.levels if name == "mix" else sorted({1, settings.many}):
                yield name, clients, callers


def _steady(settings: LoadSettings, painters: int) -> Drive:
    """Open-loop chats, the same ones at the same times whatever else is generated."""

    async def drive(port: int) -> list[Outcome]:
        images = map(paint, itertools.count())
        async with going_on(port, images, clients=painters) as images_beside:
            chats = await open_loop(
                port,
                map(chat, itertools.count()),
                rate=settings.rate,
                seconds=settings.steady_seconds,
            )
        return [*chats, *images_beside]

    return drive


def aims(series: Iterable[Series], settings: LoadSettings, options: ServerOptions) -> list[Figure]:
    """Each ratio the load test is for, against its aim; none for series that were not run."""
    by_name = {(s.name, s.clients): s for s in series}
    figures = [
        _gain(by_name, settings, options, name, kind, unit, aim)
        for name, kind, unit, aim in (
            ("text", "chat", "tokens/s", TEXT_AIM),
            ("images", "paint", "images/s", IMAGE_AIM),
        )
    ]
    figures.append(_growth(by_name, settings, options))
    return [figure for figure in figures if figure is not None]


def _gain(
    by_name: dict[tuple[str, int], Series],
    settings: LoadSettings,
    options: ServerOptions,
    name: str,
    kind: str,
    unit: str,
    aim: float,
) -> Figure | None:
    one, many = by_name.get((name, 1)), by_name.get((name, settings.many))
    if one is None or many is None:
        return None
    rates = [_rate(s, kind) for s in (one, many)]
    gain = rates[1] / rates[0] if rates[0] else 0.0
    return Figure(
        name=f"{name} alone, {settings.many} clients against one",
        dtype=options.dtype,
        mode=options.mode,
        value=gain,
        unit="×",
        aim=f"at least {aim:g} ×",
        met=gain >= aim,
        note=f"{rates[1]:.2f} against {rates[0]:.2f} {unit}",
    )


def _rate(series: Series, kind: str) -> float:
    summary = series.kinds[kind]
    return summary.token_rate if kind == "chat" else summary.image_rate


def _growth(
    by_name: dict[tuple[str, int], Series], settings: LoadSettings, options: ServerOptions
) -> Figure | None:
    alone, beside = by_name.get((ALONE, 0)), by_name.get((BESIDE, PAINTERS))
    if alone is None or beside is None:
        return None
    times = [s.kinds["chat"].first_text for s in (alone, beside)]
    if times[0] is None or times[1] is None:
        return None
    growth = times[1].p95 / times[0].p95
    image_rate = beside.kinds["paint"].image_rate
    return Figure(
        name=f"p95 time to first text of {settings.rate:g} chats a second, beside image generation",
        dtype=options.dtype,
        mode=options.mode,
        value=growth,
        unit="×",
        aim=f"below {GROWTH_AIM:g} ×",
        met=growth < GROWTH_AIM,
        note=f"{times[1].p95:.3f} s against {times[0].p95:.3f} s, {image_rate:.2f} images/s beside",
    )
