"""Engine in a separate process: its start and watch in the server, and the work in it."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from neounify.checkpoint import Dtype
from neounify.distributed.group import Group
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import Command, EngineReport, Reply, failed
from neounify.engine.orders import Engine, LedEngine, agreed, follow, lead
from neounify.engine.shared_memory import (
    PREFIX,
    GroupTransport,
    SharedTransport,
    remove_after_end,
    remove_pieces,
)
from neounify.engine.spread import Spread
from neounify.engine.understanding import UnderstandingEngine
from neounify.model.parts import UND, StreamName
from neounify.pipeline.loading import LoadOptions, load_rank
from neounify.runtime import freeze_objects, keep_freed_memory
from neounify.serve.engines import (
    Deliver,
    Died,
    EngineConfig,
    WatchConfig,
    Worker,
    receive_commands,
)
from neounify.serve.memory import EngineMemory

log = logging.getLogger("neounify.serve")

BEAT_SECONDS = 1.0
PIECES_OF_A_START = 10**12
"""More than a start of an engine ever sends: its pieces have the numbers from there."""


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Config of an engine's processes, which keep only the stream they need in memory.

    One process for each of `devices`, the ranks of a group, of which `sequence` share the rows of
    an image. `threads` are those of each. Its pieces of shared memory have names that begin with
    `pieces`, and the numbers from `first_piece`.
    """

    role: StreamName
    folder: Path
    dtype: Dtype
    devices: tuple[str, ...]
    sequence: int = 1
    threads: int | None
    config: Path | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    quantise: str | None = None
    backend: str = "auto"
    memory: EngineMemory = field(default_factory=EngineMemory)
    engines: EngineConfig = field(default_factory=EngineConfig)
    pieces: str = PREFIX
    first_piece: int = 1

    def pieces_of(self, rank: int) -> str:
        """The beginning of the names of a rank's pieces."""
        return f"{self.pieces}r{rank}_" if rank else self.pieces


# --- messages to the server process ---


@dataclass(frozen=True)
class Ready:
    """The engine takes commands."""


@dataclass(frozen=True)
class Beat:
    """Heartbeat, sent every BEAT_SECONDS, with the duration of the current step."""

    step_seconds: float


@dataclass(frozen=True)
class ReplyBatch:
    """Replies of a step. Shared-memory pieces up to number `last_piece` have been reported."""

    replies: Sequence[Reply]
    report: EngineReport | None
    last_piece: int


# --- in the server ---


class EngineProcess:
    """One engine in separate processes, which end when this one does.

    The first process, rank 0, has the line to the server; if one dies, all are started again.
    """

    def __init__(self, config: ProcessConfig, watch: WatchConfig | None = None) -> None:
        self.config = config
        self.watch = watch or WatchConfig()
        self._current: _ProcessRun | None = None
        self._starts = 0
        # A start whose caller is gone may still run in its thread when `stop` is called:
        # either it finds `_stopping` set, or `stop` finds its process and ends it.
        self._changing = threading.Lock()
        self._stopping = False

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Process numbers by rank; none before the start."""
        return () if self._current is None else self._current.pids

    def start(self, deliver: Deliver, died: Died) -> None:
        with self._changing:
            if self._stopping:
                raise RuntimeError("the server is ending")
            self._end(0.0)
            run = self._current = _ProcessRun(self._next_config())
        try:
            run.wait_ready(self.watch)
            run.run(self.watch, deliver, died)
        except BaseException:  # also where the machine has no threads left
            run.end(0.0)
            raise

    def _next_config(self) -> ProcessConfig:
        """The config of another start: the earlier pieces' names, since the other engine may give
        some back later, and other numbers."""
        self._starts += 1
        prefix = f"{self.config.pieces}{self.config.role}_"
        return replace(self.config, pieces=prefix, first_piece=self._starts * PIECES_OF_A_START)

    def send(self, command: Command) -> None:
        if self._current is not None:
            self._current.commands.put(command)

    def stop(self) -> None:
        self._stopping = True
        with self._changing:
            self._end(self.watch.end)

    def _end(self, seconds: float) -> None:
        if self._current is not None:
            self._current.end(seconds)


class _ProcessRun:
    """One run of an engine's processes, with their pipes and the threads that use them."""

    def __init__(self, config: ProcessConfig) -> None:
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._config, self._name = config, config.role
        self._last_piece = config.first_piece - 1
        self._asked = self._closed = False
        self._ending = threading.Lock()  # `end` comes from `stop` and from a start that failed
        self._dying = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._meeting = tempfile.TemporaryDirectory(prefix="neounify-")
        self._ranks: list[_Rank] = []
        try:
            for rank in range(len(config.devices)):
                self._ranks.append(_Rank(config, rank, Path(self._meeting.name) / "store"))
        except BaseException:
            self.end(0.0)
            raise
        self.pids = tuple(rank.process.pid for rank in self._ranks)

    def wait_ready(self, watch: WatchConfig) -> None:
        """Wait until the engine takes commands. Raises RuntimeError."""
        end = time.monotonic() + watch.start
        waiting = list(self._ranks)
        heard = dict.fromkeys(waiting, time.monotonic())
        while waiting:
            silence = min(heard[rank] for rank in waiting) + watch.start_silence
            left = max(0.0, silence - time.monotonic())
            for connection in wait([rank.connection for rank in waiting], left):
                rank = next(rank for rank in waiting if rank.connection is connection)
                heard[rank] = time.monotonic()
                try:
                    if isinstance(rank.connection.recv(), Ready):
                        waiting.remove(rank)
                except (EOFError, OSError) as error:
                    raise RuntimeError(f"the {rank.name} process ended while starting") from error
            now = time.monotonic()
            if waiting and now > end:
                raise RuntimeError(
                    f"the {self._name} process was not ready after {watch.start:g} s"
                )
            if any(now - heard[rank] >= watch.start_silence for rank in waiting):
                raise RuntimeError(
                    f"the {self._name} process gave no sign for {watch.start_silence:g} s of its "
                    "start"
                )

    def run(self, watch: WatchConfig, deliver: Deliver, died: Died) -> None:
        """Start the threads that pass on commands and replies."""
        work = [partial(self._read_replies, rank, watch, deliver, died) for rank in self._ranks]
        for target in (partial(self._write_commands, deliver), *work):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            self._threads.append(thread)

    def end(self, seconds: float) -> None:
        """Ask the processes to end, kill them after `seconds`, and release their resources."""
        self._asked = True
        self.commands.put(None)
        with self._ending:
            if self._closed:
                return
            deadline = time.monotonic() + seconds
            if seconds and self._threads:
                for rank in self._ranks:
                    rank.process.join(max(0.0, deadline - time.monotonic()))
            self._kill()
            for rank in self._ranks:
                rank.process.join()
            for thread in self._threads:
                thread.join()
            for number, rank in enumerate(self._ranks):
                rank.close()
                # Reported pieces belong to their requests; the later ones have no owner. All ranks
                # number theirs alike.
                remove_pieces(self._config.pieces_of(number), after=self._last_piece)
            self._meeting.cleanup()
            self._closed = True

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()

    def _read_replies(self, rank: _Rank, watch: WatchConfig, deliver: Deliver, died: Died) -> None:
        try:
            why = self._pass_on(rank, watch, deliver)
        except (EOFError, OSError):
            why = "ended"
        except Exception:
            log.exception("a message of the %s process cannot be read", rank.name)
            why = "is given up"
        with self._dying:
            if self._asked:
                return
            self._asked = True
            log.error("the %s process %s", rank.name, why)
            self._kill()
        self.commands.put(None)
        died()

    def _pass_on(self, rank: _Rank, watch: WatchConfig, deliver: Deliver) -> str:
        """Deliver replies; returns why the process was given up. Raises EOFError and OSError."""
        while True:
            if not rank.connection.poll(watch.silence):
                return f"gave no sign for {watch.silence:g} s and is killed"
            message = rank.connection.recv()
            if isinstance(message, ReplyBatch):
                self._last_piece = message.last_piece
                deliver(message.replies, message.report)
            elif isinstance(message, Beat) and message.step_seconds > watch.step:
                return f"was in one step for more than {watch.step:g} s and is killed"

    def _write_commands(self, deliver: Deliver) -> None:
        first = self._ranks[0].connection
        try:
            while (command := self.commands.get()) is not None:
                _write(first, command, deliver)
            first.send(None)
        except OSError:
            return  # the process is gone, which the reading thread reports


class _Rank:
    """The process of one rank, and the pipe to it."""

    def __init__(self, config: ProcessConfig, rank: int, store: Path) -> None:
        self.name = config.role if len(config.devices) == 1 else f"{config.role} (rank {rank})"
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=run_process, args=(theirs, config, rank, store), name=config.role, daemon=True
        )
        try:
            self.process.start()
        finally:
            theirs.close()
        # Else an interpreter that ends without `end` would wait for the process for ever.
        atexit.register(self.process.kill)

    def close(self) -> None:
        self.connection.close()
        atexit.unregister(self.process.kill)
        self.process.close()


def _write(connection: Connection, command: Command, deliver: Deliver) -> None:
    try:
        connection.send(command)
    except OSError:
        raise
    except Exception as error:  # it cannot be sent, which concerns this command alone
        call = getattr(command, "call", None)
        if call is not None:
            deliver([failed(call, error)], None)


# --- in the process of the engine ---


class ServerGone(Exception):
    """The server process has ended."""


def run_process(connection: Connection, config: ProcessConfig, rank: int, store: Path) -> None:
    """Load the engine, report that it is ready, and work until the server hangs up."""
    # The server drains on a signal and hangs up last; a terminal signals all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    server = _ServerPipe(connection)
    heartbeat = Heartbeat(server.send, config.pieces)
    heartbeat.start()
    try:
        _work(server, heartbeat, config, rank, store)
    except ServerGone:
        remove_after_end(config.pieces)


def _work(
    server: _ServerPipe, heartbeat: Heartbeat, config: ProcessConfig, rank: int, store: Path
) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    group = Group.meet(store, rank, config.devices)
    weights: dict[str, Any] = {"memory": "stream", "plan": "ignore"}
    if group.size == 1:
        place = (config.folder, config.config, config.dtype, config.devices[0])
        weights = config.memory.of_load(
            *place,
            config.role,
            lora=config.lora,
            quantise=config.quantise,
            backend=config.backend,
            attention=config.engines.attention,
        )
    options = LoadOptions(
        folder=config.folder,
        config=config.config,
        dtype=config.dtype,
        lora=config.lora or None,
        attention=config.engines.attention,
        quantise=config.quantise,
        backend=config.backend,
        **weights,
    )
    pipe = load_rank(options, group, config.devices[rank], cut=config.role == UND)
    pieces = SharedTransport(config.pieces_of(rank), config.first_piece)
    transport = pieces if group.size == 1 else GroupTransport(pieces, group)
    with pipe.residency.use(config.role):
        plan = agreed(config.engines.plan(pipe.model), group)
        engine: Engine
        if config.role == UND:
            pipe.processor.vocabulary.prepare_soon()  # grammars in commands refer to it
            engine = UnderstandingEngine(pipe.model, transport, plan, group=group)
        else:
            spread = None if group.size == 1 else Spread(group, config.sequence)
            engine = GenerationEngine(pipe.model, transport, plan, spread)
        freeze_objects()
        if not group.first:
            server.send(Ready())
            follow(group, lambda order: engine)
            group.leave()
            return
        led = engine if group.size == 1 else LedEngine(engine, config.role, partial(lead, group))
        channel = _PipeChannel(server, pieces)
        understands = config.role == UND
        und = led if understands and not isinstance(led, GenerationEngine) else None
        gen = led if not understands and not isinstance(led, UnderstandingEngine) else None
        worker = Worker(channel, und, gen)
        heartbeat.step_seconds = worker.step_seconds
        server.send(Ready())
        worker.run()
        if group.size > 1:
            group.announce(None)
            group.leave()


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


class _ServerPipe:
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
    """The worker's end of the pipe; see `engines.Channel`."""

    def __init__(self, server: _ServerPipe, transport: SharedTransport) -> None:
        self._server, self._transport = server, transport

    def receive(self, *, wait: bool) -> list[Command] | None:
        return receive_commands(self._server.receive, self._server.poll, wait=wait)

    def send(self, replies: Sequence[Reply], report: EngineReport | None) -> None:
        self._server.send(ReplyBatch(replies, report, self._transport.last_piece))
