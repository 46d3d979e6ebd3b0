"""Engine in a separate process: its start and watch in the server, and the work in it."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from neounify.checkpoint import Dtype
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import Command, EngineReport, Reply, failed
from neounify.engine.understanding import UnderstandingEngine
from neounify.model.parts import UND, StreamName
from neounify.pipeline import load
from neounify.runtime import freeze_objects, keep_freed_memory
from neounify.serve.engines import (
    Deliver,
    Died,
    EngineConfig,
    WatchConfig,
    Worker,
    receive_commands,
)
from neounify.serve.shared_memory import PREFIX, SharedTransport, remove_after_end, remove_pieces

log = logging.getLogger("neounify.serve")

BEAT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class ProcessConfig:
    """Config of an engine process, which keeps only the stream it needs in memory.

    Its pieces of shared memory have names that begin with `pieces`.
    """

    role: StreamName
    folder: Path
    dtype: Dtype
    device: str
    threads: int | None
    config: Path | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    backend: str = "auto"
    engines: EngineConfig = field(default_factory=EngineConfig)
    pieces: str = PREFIX


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
    """One engine in a separate process, which ends when this one does."""

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
    def pid(self) -> int | None:
        return None if self._current is None else self._current.pid

    def start(self, deliver: Deliver, died: Died) -> None:
        with self._changing:
            if self._stopping:
                raise RuntimeError("the server is ending")
            self._end(0.0)
            self._starts += 1
            prefix = f"{self.config.pieces}{self.config.role}{self._starts}_"
            run = self._current = _ProcessRun(replace(self.config, pieces=prefix))
        try:
            run.wait_ready(self.watch)
            run.run(self.watch, deliver, died)
        except BaseException:  # also where the machine has no threads left
            run.end(0.0)
            raise

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
    """One run of an engine process, with its pipe and the threads that read and write it."""

    def __init__(self, config: ProcessConfig) -> None:
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._name, self._pieces, self._last_piece = config.role, config.pieces, 0
        self._asked = self._closed = False
        self._ending = threading.Lock()  # `end` comes from `stop` and from a start that failed
        self._threads: list[threading.Thread] = []
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=run_process, args=(theirs, config), name=config.role, daemon=True
        )
        try:
            self._process.start()
        finally:
            theirs.close()
        # Else an interpreter that ends without `end` would wait for the process for ever.
        atexit.register(self._process.kill)
        self.pid = self._process.pid

    def wait_ready(self, watch: WatchConfig) -> None:
        """Wait until the engine takes commands. Raises RuntimeError."""
        end = time.monotonic() + watch.start
        try:
            while not isinstance(self._next(watch.start_silence), Ready):
                if time.monotonic() > end:
                    raise RuntimeError(
                        f"the {self._name} process was not ready after {watch.start:g} s"
                    )
        except TimeoutError as error:
            raise RuntimeError(
                f"the {self._name} process gave no sign for {watch.start_silence:g} s of its start"
            ) from error
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the {self._name} process ended while starting") from error

    def run(self, watch: WatchConfig, deliver: Deliver, died: Died) -> None:
        """Start the threads that pass on commands and replies."""
        for target, arguments in (
            (self._write_commands, (deliver,)),
            (self._read_replies, (watch, deliver, died)),
        ):
            thread = threading.Thread(target=target, args=arguments, daemon=True)
            thread.start()
            self._threads.append(thread)

    def end(self, seconds: float) -> None:
        """Ask the process to end, kill it after `seconds`, and release its resources."""
        self._asked = True
        self.commands.put(None)
        with self._ending:
            if self._closed:
                return
            if seconds and self._threads:
                self._process.join(seconds)
            self._process.kill()
            self._process.join()
            for thread in self._threads:
                thread.join()
            self._connection.close()
            atexit.unregister(self._process.kill)
            self._process.close()
            self._closed = True
            # Pieces that were reported belong to their requests; the later ones have no owner.
            remove_pieces(self._pieces, after=self._last_piece)

    def _next(self, seconds: float) -> object:
        """The next message. Raises TimeoutError after `seconds` of silence."""
        if not self._connection.poll(seconds):
            raise TimeoutError
        return self._connection.recv()

    def _read_replies(self, watch: WatchConfig, deliver: Deliver, died: Died) -> None:
        try:
            why = self._pass_on(watch, deliver)
        except (EOFError, OSError):
            why = "ended"
        except Exception:
            log.exception("a message of the %s process cannot be read", self._name)
            why = "is given up"
        if not self._asked:
            log.error("the %s process %s", self._name, why)
            self._process.kill()
            died()

    def _pass_on(self, watch: WatchConfig, deliver: Deliver) -> str:
        """Deliver replies; returns why the process was given up. Raises EOFError and OSError."""
        while True:
            try:
                message = self._next(watch.silence)
            except TimeoutError:
                return f"gave no sign for {watch.silence:g} s and is killed"
            if isinstance(message, ReplyBatch):
                self._last_piece = message.last_piece
                deliver(message.replies, message.report)
            elif isinstance(message, Beat) and message.step_seconds > watch.step:
                return f"was in one step for more than {watch.step:g} s and is killed"

    def _write_commands(self, deliver: Deliver) -> None:
        try:
            while (command := self.commands.get()) is not None:
                _write(self._connection, command, deliver)
            self._connection.send(None)
        except OSError:
            return  # the process is gone, which the reading thread reports


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


def run_process(connection: Connection, config: ProcessConfig) -> None:
    """Load the engine, report that it is ready, and work until the server hangs up."""
    # The server drains on a signal and hangs up last; a terminal signals all processes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    server = _ServerPipe(connection)
    heartbeat = Heartbeat(server.send, config.pieces)
    heartbeat.start()
    try:
        _work(server, heartbeat, config)
    except ServerGone:
        remove_after_end(config.pieces)


def _work(server: _ServerPipe, heartbeat: Heartbeat, config: ProcessConfig) -> None:
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    keep_freed_memory()
    pipe = load(
        config.folder,
        config=config.config,
        dtype=config.dtype,
        device=config.device,
        lora=config.lora or None,
        backend=config.backend,
        memory="stream",
        plan="ignore",  # of a model whose streams are in two processes, on one device or two
    )
    transport = SharedTransport(config.pieces)
    und = gen = None
    with pipe.residency.use(config.role):
        plan = config.engines.plan(pipe.model)
        if config.role == UND:
            pipe.processor.vocabulary.prepare_soon()  # grammars in commands refer to it
            und = UnderstandingEngine(pipe.model, transport, plan)
        else:
            gen = GenerationEngine(pipe.model, transport, plan)
        worker = Worker(_PipeChannel(server, transport), und, gen)
        heartbeat.step_seconds = worker.step_seconds
        freeze_objects()
        server.send(Ready())
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
