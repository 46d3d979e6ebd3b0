"""Worker loop of the engines: receive commands, run a step, send replies."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import Command, Reply, Report, is_for_generation
from neounify.engine.understanding import UnderstandingEngine

MAX_YIELDED = 4
"""Denoising yields to prompts that wait for a first token, that many steps in a row."""
REPORT_SECONDS = 0.5
TEXT_SECONDS = 1.0
"""Denoising steps stay short for so many seconds after the last text."""


class Channel(Protocol):
    """A worker's end of the connection to the server."""

    def receive(self, *, wait: bool) -> list[Command] | None:
        """All commands received, after waiting for one with `wait`; None at the end."""

    def send(self, replies: Sequence[Reply], report: Report | None) -> None:
        """Send replies, and now and then a report, to the server."""


def receive_commands(
    get: Callable[[], Command | None], pending: Callable[[], bool], *, wait: bool
) -> list[Command] | None:
    """Commands from `get` while some are `pending`, at least one with `wait`; see `Channel`."""
    commands: list[Command] = []
    while wait or pending():
        command = get()
        if command is None:
            return None
        commands.append(command)
        wait = False
    return commands


class Worker:
    """One or both engines behind one channel.

    With both, a step of text is taken before each denoising step, and a prompt that waits for its
    first token goes before the images, so that text does not wait behind them.
    """

    def __init__(
        self,
        channel: Channel,
        understanding: UnderstandingEngine | None,
        generation: GenerationEngine | None,
    ) -> None:
        self.channel = channel
        self.understanding, self.generation = understanding, generation
        self._counters: Counter[str] = Counter()
        self._yielded = 0
        self._last_text = -TEXT_SECONDS
        self._reported = 0.0
        self._begun: float | None = None

    def step_seconds(self) -> float:
        """Seconds since the current step began, 0 between steps; for any thread."""
        begun = self._begun
        return 0.0 if begun is None else time.monotonic() - begun

    def run(self) -> None:
        """Work until the server hangs up."""
        while True:
            self._begun = None
            commands = self.channel.receive(wait=not self._busy())
            if commands is None:
                return
            self._begun = time.monotonic()
            for command in commands:
                self._engine_of(command).submit(command)  # type: ignore[arg-type]
            self._work()
            self._send()

    def _busy(self) -> bool:
        return any(engine is not None and engine.busy for engine in self._engines())

    def _engines(self) -> tuple[UnderstandingEngine | None, GenerationEngine | None]:
        return self.understanding, self.generation

    def _engine_of(self, command: Command) -> UnderstandingEngine | GenerationEngine:
        engine = self.generation if is_for_generation(command) else self.understanding
        assert engine is not None
        return engine

    def _work(self) -> None:
        und, gen = self._engines()
        if und is not None and und.busy:
            decoding = und.decoding
            self._timed("und", und.step)
            if decoding:
                self._last_text = time.perf_counter()
        if gen is None or not gen.busy:
            return
        if und is not None and und.urgent and self._yielded < MAX_YIELDED:
            self._yielded += 1
            return
        self._yielded = 0
        beside_text = time.perf_counter() - self._last_text < TEXT_SECONDS
        self._timed("gen", partial(gen.step, beside_text=beside_text))

    def _timed(self, name: str, step: Callable[[], None]) -> None:
        start = time.perf_counter()
        step()
        self._counters[f"{name}_step_seconds"] += time.perf_counter() - start  # type: ignore[assignment]

    def _send(self) -> None:
        replies: list[Reply] = []
        for engine in self._engines():
            if engine is not None:
                replies += engine.replies
                engine.replies = []
        now = time.monotonic()
        due = now - self._reported >= REPORT_SECONDS or not self._busy()
        if due:
            self._reported = now
        if replies or due:
            self.channel.send(replies, self._report() if due else None)

    def _report(self) -> Report:
        gauges: dict[str, float] = {}
        counters: dict[str, float] = dict(self._counters)
        for engine in self._engines():
            if engine is not None:
                gauges |= engine.gauges()
                counters |= engine.counters
        return Report(gauges, counters)
