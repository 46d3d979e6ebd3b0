"""Where a worker runs: in a thread of this process, or in a process of its own."""

from __future__ import annotations

import logging
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, Protocol

import torch

from neounify.model.neo import NeoUnify
from neounify.pipeline import load
from neounify.runtime import keep_freed_memory
from neounify.serve.generation import GenerationEngine, GenerationSettings
from neounify.serve.messages import Order, Reply, Report
from neounify.serve.transport import LocalTransport, SharedTransport
from neounify.serve.understanding import UnderstandingEngine, UnderstandingSettings
from neounify.serve.worker import Worker

log = logging.getLogger("neounify.serve")

Deliver = Callable[[Sequence[Reply], Report | None], None]
Died = Callable[[], None]
Role = Literal["und", "gen"]


class Host(Protocol):
    """Runs a worker. `deliver` and `died` are called from threads of the host's own."""

    def start(self, deliver: Deliver, died: Died) -> None:
        """Start the worker, or start it again after it died. Returns when it is ready."""

    def send(self, order: Order) -> None:
        """Give an order; never blocks. Orders to a dead worker are lost."""

    def stop(self) -> None:
        """End the worker and wait for it."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Of both engines."""

    understanding: UnderstandingSettings = field(default_factory=UnderstandingSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)


class ThreadHost:
    """Both engines in one thread over one model."""

    def __init__(self, model: NeoUnify, settings: EngineSettings) -> None:
        self.model, self.settings = model, settings
        self.understanding: UnderstandingEngine | None = None
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, deliver: Deliver, died: Died) -> None:
        transport = LocalTransport()
        self._orders = queue.SimpleQueue()
        self.understanding = UnderstandingEngine(self.model, self.settings.understanding, transport)
        generation = GenerationEngine(self.model, self.settings.generation, transport)
        channel = _QueueChannel(self._orders, deliver)
        worker = Worker(channel, self.understanding, generation)
        self._thread = threading.Thread(
            target=_run_in_thread, args=(worker, died), name="engines", daemon=True
        )
        self._thread.start()

    def send(self, order: Order) -> None:
        self._orders.put(order)

    def stop(self) -> None:
        self._orders.put(None)
        if self._thread is not None:
            self._thread.join()


def _run_in_thread(worker: Worker, died: Died) -> None:
    try:
        worker.run()
    except Exception:
        log.exception("the engines stopped on an error nobody foresaw")
        died()


class _QueueChannel:
    def __init__(self, orders: queue.SimpleQueue[Order | None], deliver: Deliver) -> None:
        self._orders, self._deliver = orders, deliver

    def receive(self, *, wait: bool) -> list[Order] | None:
        found: list[Order] = []
        while wait or not self._orders.empty():
            order = self._orders.get()
            if order is None:
                return None
            found.append(order)
            wait = False
        return found

    def send(self, replies: Sequence[Reply], report: Report | None) -> None:
        self._deliver(replies, report)


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """How a process of its own loads its engine: only the stream it needs stays in memory."""

    role: Role
    folder: Path
    dtype: str | None
    device: str
    threads: int | None
    lora: tuple[tuple[Path, float], ...] = ()
    engines: EngineSettings = field(default_factory=EngineSettings)


class ProcessHost:
    """One engine in a process of its own, which ends when this one does."""

    START_SECONDS = 600.0

    def __init__(self, settings: ProcessSettings) -> None:
        self.settings = settings
        self._process: multiprocessing.process.BaseProcess | None = None
        self._outgoing: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._stopping = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self, deliver: Deliver, died: Died) -> None:
        """Raises RuntimeError when the process does not come up."""
        if self._process is not None:
            self._process.join()  # the one that died
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=run_process, args=(theirs, self.settings), name=self.settings.role, daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            if not ours.poll(self.START_SECONDS):
                raise RuntimeError(f"the {self.settings.role} process did not start in time")
            ours.recv()
        except EOFError as error:
            raise RuntimeError(f"the {self.settings.role} process ended while starting") from error
        self._outgoing = queue.SimpleQueue()
        for target, args in (
            (_write_orders, (ours, self._outgoing)),
            (self._read_replies, (ours, deliver, died)),
        ):
            threading.Thread(target=target, args=args, daemon=True).start()

    def send(self, order: Order) -> None:
        self._outgoing.put(order)

    def stop(self) -> None:
        self._stopping = True
        self._outgoing.put(None)
        if self._process is not None:
            self._process.join(10)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _read_replies(self, connection: Connection, deliver: Deliver, died: Died) -> None:
        try:
            while True:
                deliver(*connection.recv())
        except (EOFError, OSError):
            if not self._stopping:
                log.error("the %s process ended", self.settings.role)
                died()


def _write_orders(connection: Connection, orders: queue.SimpleQueue[Order | None]) -> None:
    try:
        while (order := orders.get()) is not None:
            connection.send(order)
        connection.send(None)
    except OSError:
        return  # the process is gone, which the reading thread tells


class _PipeChannel:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def receive(self, *, wait: bool) -> list[Order] | None:
        found: list[Order] = []
        try:
            while wait or self._connection.poll():
                order = self._connection.recv()
                if order is None:
                    return None
                found.append(order)
                wait = False
        except (EOFError, OSError):
            return None
        return found

    def send(self, replies: Sequence[Reply], report: Report | None) -> None:
        self._connection.send((replies, report))


def run_process(connection: Connection, settings: ProcessSettings) -> None:
    """What a process of its own does: load, say that it is ready, work until the front hangs up."""
    # The front drains on a signal and hangs up in the end; a terminal's signal comes to all.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()
    engine = load(
        settings.folder,
        dtype=settings.dtype,
        device=settings.device,
        lora=settings.lora or None,
        memory="stream",
    ).engine
    transport = SharedTransport()
    und = gen = None
    with engine.residency.use(settings.role):
        if settings.role == "und":
            und = UnderstandingEngine(engine.model, settings.engines.understanding, transport)
        else:
            gen = GenerationEngine(engine.model, settings.engines.generation, transport)
        connection.send("ready")
        Worker(_PipeChannel(connection), und, gen).run()
