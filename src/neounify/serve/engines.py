"""Engines in a thread of this process or in a separate process: start, watch, stop."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Protocol

from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import Command, LocalTransport, Reply, Report, failed
from neounify.engine.understanding import UnderstandingEngine
from neounify.model.neo import NeoUnify
from neounify.serve.process import (
    Batch,
    Beat,
    EngineSettings,
    ProcessSettings,
    Ready,
    run_process,
)
from neounify.serve.shared_memory import PREFIX, remove_pieces
from neounify.serve.worker import Worker, receive_commands

log = logging.getLogger("neounify.serve")

Deliver = Callable[[Sequence[Reply], Report | None], None]
Died = Callable[[], object]


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


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
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


class EngineThread:
    """Both engines in one thread over one model."""

    def __init__(
        self, model: NeoUnify, settings: EngineSettings, watch: WatchSettings | None = None
    ) -> None:
        self.model, self.settings = model, settings
        self.watch = watch or WatchSettings()
        self.understanding: UnderstandingEngine | None = None
        self._current: _ThreadRun | None = None

    def start(self, deliver: Deliver, died: Died) -> None:
        """A thread cannot be killed: RuntimeError while the earlier one is still in its step."""
        if self._current is not None and not self._current.end(self.watch.end):
            raise RuntimeError("the engines' thread has not come to the end of its step")
        # Free the earlier engines' memory before the new ones take theirs.
        self._current = self.understanding = None
        transport = LocalTransport()
        self.understanding = UnderstandingEngine(self.model, self.settings.understanding, transport)
        generation = GenerationEngine(self.model, self.settings.generation, transport)
        self._current = _ThreadRun(
            lambda channel: Worker(channel, self.understanding, generation),
            self.watch.step,
            deliver,
            died,
        )

    def send(self, command: Command) -> None:
        if self._current is not None:
            self._current.commands.put(command)

    def stop(self) -> None:
        if self._current is not None and not self._current.end(self.watch.end):
            log.warning("the engines' thread is left in its step")


class _ThreadRun:
    """One run of the engines' thread, with a watchdog for the duration of steps."""

    def __init__(
        self,
        make_worker: Callable[[_QueueChannel], Worker],
        step_seconds: float,
        deliver: Deliver,
        died: Died,
    ) -> None:
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._worker = make_worker(_QueueChannel(self.commands, deliver))
        self._step_seconds, self._died = step_seconds, died
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
    def __init__(self, commands: queue.SimpleQueue[Command | None], deliver: Deliver) -> None:
        self._commands, self._deliver = commands, deliver

    def receive(self, *, wait: bool) -> list[Command] | None:
        return receive_commands(self._commands.get, lambda: not self._commands.empty(), wait=wait)

    def send(self, replies: Sequence[Reply], report: Report | None) -> None:
        self._deliver(replies, report)


class EngineProcess:
    """One engine in a separate process, which ends when this one does."""

    def __init__(self, settings: ProcessSettings, watch: WatchSettings | None = None) -> None:
        self.settings = settings
        self.watch = watch or WatchSettings()
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
            prefix = f"{self.settings.pieces or PREFIX}{self.settings.role}{self._starts}_"
            run = self._current = _ProcessRun(replace(self.settings, pieces=prefix))
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

    def __init__(self, settings: ProcessSettings) -> None:
        assert settings.pieces is not None
        self.commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._name, self._pieces, self._last_piece = settings.role, settings.pieces, 0
        self._asked = self._closed = False
        self._ending = threading.Lock()  # `end` comes from `stop` and from a start that failed
        self._threads: list[threading.Thread] = []
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=run_process, args=(theirs, settings), name=settings.role, daemon=True
        )
        try:
            self._process.start()
        finally:
            theirs.close()
        # Else an interpreter that ends without `end` would wait for the process for ever.
        atexit.register(self._process.kill)
        self.pid = self._process.pid

    def wait_ready(self, watch: WatchSettings) -> None:
        """Wait until the engine takes commands. Raises RuntimeError."""
        end = time.monotonic() + watch.start
        try:
            while not isinstance(self._next(watch.start_silence), Ready):
                if time.monotonic() > end:
                    raise RuntimeError(
                        f"the {self._name} process was not ready after {watch.start:g} s"
                    )
        except TimeoutError as error:
            raise RuntimeError(f"the {self._name} process was stopped while starting") from error
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the {self._name} process ended while starting") from error

    def run(self, watch: WatchSettings, deliver: Deliver, died: Died) -> None:
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

    def _read_replies(self, watch: WatchSettings, deliver: Deliver, died: Died) -> None:
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

    def _pass_on(self, watch: WatchSettings, deliver: Deliver) -> str:
        """Deliver replies; returns why the process was given up. Raises EOFError and OSError."""
        while True:
            try:
                message = self._next(watch.silence)
            except TimeoutError:
                return f"gave no sign for {watch.silence:g} s and is killed"
            if isinstance(message, Batch):
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
