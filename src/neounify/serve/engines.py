"""Engines of a server: the worker loop that runs them, in a thread of this process."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from neounify.checkpoint.residency import Residency
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import Command, EngineReport, LocalTransport, Reply, is_for_generation
from neounify.engine.orders import LedEngine
from neounify.engine.understanding import UnderstandingEngine
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS
from neounify.runtime.plan import ExecutionPlan, measured_plan

log = logging.getLogger("neounify.serve")

MAX_YIELDED = 4
"""Denoising yields to prompts that wait for a first token, that many steps in a row."""
REPORT_SECONDS = 0.5
TEXT_SECONDS = 1.0
"""Denoising steps stay short for so many seconds after the last text."""

Deliver = Callable[[Sequence[Reply], EngineReport | None], None]
Died = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of both engines: values of ExecutionPlan's fields, instead of those it measures."""

    limits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attention(self) -> str:
        """Name of the attention backend."""
        return str(self.limits.get("attention", ExecutionPlan.attention))

    def plan(self, model: NeoUnify) -> ExecutionPlan:
        """The plan of a model in the memory that is free now, with these limits."""
        measured = measured_plan(model.config, model.device, model.compute_dtype)
        return replace(measured, **self.limits)


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Timeouts of an engine, in seconds.

    `start`: until it is ready. `start_silence`, `silence`: without any sign of a process, while it
    loads and afterwards; it sends a heartbeat every second, so a longer silence means that it was
    stopped. `step`: until a step ends. `end`: until the engine ends when it was asked to.
    """

    start: float = 600.0
    start_silence: float = 120.0
    silence: float = 20.0
    step: float = 600.0
    end: float = 10.0


class EngineHandle(Protocol):
    """A running worker. `deliver` and `died` are called from its own threads."""

    def start(self, deliver: Deliver, died: Died) -> None:
        """Start the worker, after ending what there is of an earlier one. Returns when it is ready.

        `died` is called when the worker ends, or has to be given up, without being asked to end.
        Raises RuntimeError when it does not come up.
        """

    def send(self, command: Command) -> None:
        """Send a command; never blocks. Commands to a dead worker are lost."""

    def stop(self) -> None:
        """End the worker and wait for it; it is not started again."""


# --- the worker ---


class Channel(Protocol):
    """A worker's end of the connection to the server."""

    def receive(self, *, wait: bool) -> list[Command] | None:
        """All commands received, after waiting for one with `wait`; None at the end."""

    def send(self, replies: Sequence[Reply], report: EngineReport | None) -> None:
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
        understanding: UnderstandingEngine | LedEngine | None,
        generation: GenerationEngine | LedEngine | None,
    ) -> None:
        self.channel = channel
        self.understanding, self.generation = understanding, generation
        self._engines = [engine for engine in (understanding, generation) if engine is not None]
        self._seconds = defaultdict[str, float](float)
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
        return any(engine.busy for engine in self._engines)

    def _engine_of(self, command: Command) -> UnderstandingEngine | GenerationEngine | LedEngine:
        engine = self.generation if is_for_generation(command) else self.understanding
        assert engine is not None
        return engine

    def _work(self) -> None:
        und, gen = self.understanding, self.generation
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
        self._seconds[f"{name}_step_seconds"] += time.perf_counter() - start

    def _send(self) -> None:
        replies: list[Reply] = []
        for engine in self._engines:
            replies += engine.replies
            engine.replies = []
        now = time.monotonic()
        due = now - self._reported >= REPORT_SECONDS or not self._busy()
        if due:
            self._reported = now
        if replies or due:
            self.channel.send(replies, self._report() if due else None)

    def _report(self) -> EngineReport:
        gauges: dict[str, float] = {}
        counters = dict(self._seconds)
        for engine in self._engines:
            gauges |= engine.gauges()
            counters |= engine.counters
        return EngineReport(gauges, counters)


# --- both engines in a thread ---


class EngineThread:
    """Both engines in one thread over one model, whose weights `residency` keeps."""

    def __init__(
        self,
        model: NeoUnify,
        config: EngineConfig,
        watch: WatchConfig | None = None,
        residency: Residency | None = None,
    ) -> None:
        self.model, self.config = model, config
        self._residency, self._uses = residency, ExitStack()
        self.watch = watch or WatchConfig()
        self.understanding: UnderstandingEngine | None = None
        self._current: _ThreadRun | None = None

    def start(self, deliver: Deliver, died: Died) -> None:
        """A thread cannot be killed: RuntimeError while the earlier one is still in its step."""
        if self._current is not None and not self._current.end(self.watch.end):
            raise RuntimeError(
                f"the engines' thread is still in a step, {self.watch.end:g} s after it was to end"
            )
        # Free the earlier engines' memory before the new ones take theirs.
        self._current = self.understanding = None
        self._uses.close()
        if self._residency is not None:
            for stream in STREAMS:  # both engines work at once
                self._uses.enter_context(self._residency.use(stream))
        transport = LocalTransport()
        plan = self.config.plan
        self.understanding = UnderstandingEngine(self.model, transport, plan(self.model))
        # Planned once the KV cache above has its memory.
        generation = GenerationEngine(self.model, transport, plan(self.model))
        commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        worker = Worker(_QueueChannel(commands, deliver), self.understanding, generation)
        self._current = _ThreadRun(worker, commands, self.watch.step, died)

    def send(self, command: Command) -> None:
        if self._current is not None:
            self._current.commands.put(command)

    def stop(self) -> None:
        if self._current is not None and not self._current.end(self.watch.end):
            log.warning("the engines' thread is left in a step of %g s", self._current.step_seconds)
        else:
            self._uses.close()


class _ThreadRun:
    """One run of the engines' thread, with a watchdog for the duration of steps."""

    def __init__(
        self,
        worker: Worker,
        commands: queue.SimpleQueue[Command | None],
        step_seconds: float,
        died: Died,
    ) -> None:
        self.commands = commands
        self._worker, self._step_seconds, self._died = worker, step_seconds, died
        self._ended, self._asked = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        # The watch first: it can be ended when the other cannot be started, not the other way.
        threading.Thread(target=self._watch, name="engines' watch", daemon=True).start()
        try:
            self._thread.start()
        except RuntimeError:  # the machine has no threads left
            self._ended.set()
            raise

    def end(self, seconds: float) -> bool:
        """Ask the thread to end after its step; whether it did in time."""
        self._asked.set()
        self.commands.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def step_seconds(self) -> float:
        """Seconds since the current step began."""
        return self._worker.step_seconds()

    def _run(self) -> None:
        try:
            self._worker.run()
        except BaseException:
            log.exception("the engines stopped on an unexpected error")
        finally:
            self._ended.set()
            if not self._asked.is_set():
                self._died()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._step_seconds)):
            if self._asked.is_set():
                return
            if self._worker.step_seconds() > self._step_seconds:
                log.error("a step of the engines takes longer than %g s", self._step_seconds)
                self._died()
                return


class _QueueChannel:
    """The worker's end of the two queues in one process; see `Channel`."""

    def __init__(self, commands: queue.SimpleQueue[Command | None], deliver: Deliver) -> None:
        self._commands, self._deliver = commands, deliver

    def receive(self, *, wait: bool) -> list[Command] | None:
        return receive_commands(self._commands.get, lambda: not self._commands.empty(), wait=wait)

    def send(self, replies: Sequence[Reply], report: EngineReport | None) -> None:
        self._deliver(replies, report)
