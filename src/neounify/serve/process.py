"""Engine process: loads its stream, runs the worker, reports to the server process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from neounify.checkpoint import Dtype
from neounify.engine.generation import GenerationEngine, GenerationSettings
from neounify.engine.messages import Command, Reply, Report
from neounify.engine.understanding import UnderstandingEngine, UnderstandingSettings
from neounify.pipeline import load
from neounify.runtime import freeze_objects, keep_freed_memory
from neounify.serve.shared_memory import remove_after_end
from neounify.serve.transport import SharedTransport
from neounify.serve.worker import Worker, receive_commands

Role = Literal["und", "gen"]

BEAT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Settings of both engines."""

    understanding: UnderstandingSettings = field(default_factory=UnderstandingSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """Settings of an engine process, which keeps only the stream it needs in memory.

    Its pieces of shared memory have names that begin with `pieces`.
    """

    role: Role
    folder: Path
    dtype: Dtype
    device: str
    threads: int | None
    lora: tuple[tuple[Path, float], ...] = ()
    engines: EngineSettings = field(default_factory=EngineSettings)
    pieces: str | None = None


# --- messages to the server process ---


@dataclass(frozen=True)
class Ready:
    """The engine takes commands."""


@dataclass(frozen=True)
class Beat:
    """Heartbeat, sent every BEAT_SECONDS, with the duration of the current step."""

    step_seconds: float


@dataclass(frozen=True)
class Batch:
    """Replies of a step. Shared-memory pieces up to number `last_piece` have been reported."""

    replies: Sequence[Reply]
    report: Report | None
    last_piece: int


class ServerGone(Exception):
    """The server process has ended."""


def run_process(connection: Connection, settings: ProcessSettings) -> None:
    """Load the engine, report that it is ready, and work until the server hangs up."""
    # The server drains on a signal and hangs up last; a terminal signals all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    line = _Line(connection)
    assert settings.pieces is not None
    heartbeat = Heartbeat(line.send, settings.pieces)
    heartbeat.start()
    try:
        _work(line, heartbeat, settings)
    except ServerGone:
        remove_after_end(settings.pieces)


def _work(line: _Line, heartbeat: Heartbeat, settings: ProcessSettings) -> None:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()
    pipe = load(
        settings.folder,
        dtype=settings.dtype,
        device=settings.device,
        lora=settings.lora or None,
        memory="stream",
    )
    transport = SharedTransport(settings.pieces)
    und = gen = None
    with pipe.residency.use(settings.role):
        if settings.role == "und":
            pipe.processor.vocabulary.prepare_soon()  # grammars in commands refer to it
            und = UnderstandingEngine(pipe.model, settings.engines.understanding, transport)
        else:
            gen = GenerationEngine(pipe.model, settings.engines.generation, transport)
        worker = Worker(_PipeChannel(line, transport), und, gen)
        heartbeat.step_seconds = worker.step_seconds
        freeze_objects()
        line.send(Ready())
        worker.run()


class Heartbeat(threading.Thread):
    """Sends a Beat every BEAT_SECONDS during steps too, and ends the process with the server.

    Without it a step of minutes would look like a process that was stopped.
    """

    def __init__(self, send: Callable[[object], None], pieces: str) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self.step_seconds: Callable[[], float] = lambda: 0.0
        self._send, self._pieces = send, pieces

    def run(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            try:
                self._send(Beat(self.step_seconds()))
            except ServerGone:
                remove_after_end(self._pieces)
                os._exit(1)  # in the middle of a step, whose results are not needed any more


class _Line:
    """The pipe to the server: the worker and the heartbeat send, only the worker receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Raises ServerGone."""
        try:
            with self._lock:
                self._connection.send(message)
        except OSError as error:
            raise ServerGone from error

    def poll(self) -> bool:
        return self._connection.poll()

    def receive(self) -> Command | None:
        """The next command, or None for the end. Raises ServerGone."""
        try:
            command: Command | None = self._connection.recv()
        except (EOFError, OSError) as error:
            raise ServerGone from error
        return command


class _PipeChannel:
    """The worker's end of the line; see `worker.Channel`."""

    def __init__(self, line: _Line, transport: SharedTransport) -> None:
        self._line, self._transport = line, transport

    def receive(self, *, wait: bool) -> list[Command] | None:
        return receive_commands(self._line.receive, self._line.poll, wait=wait)

    def send(self, replies: Sequence[Reply], report: Report | None) -> None:
        self._line.send(Batch(replies, report, self._transport.last_piece))
