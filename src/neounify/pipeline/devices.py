"""One model on several devices: a process for each, of which the caller's is the first."""

from __future__ import annotations

import atexit
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from neounify.distributed.group import Group
from neounify.engine.messages import Prefix, TensorRef, Transport
from neounify.engine.orders import Engine, LedEngine, Order, follow
from neounify.engine.sequences import ContiguousCaches, ServedSequence
from neounify.engine.shared_memory import GroupTransport, SharedSpace, SharedTransport
from neounify.engine.spread import Spread
from neounify.errors import EngineDied, NeounifyError
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN, UND, StreamName
from neounify.pipeline.driver import call_engines
from neounify.runtime.plan import ExecutionPlan

if TYPE_CHECKING:
    from neounify.pipeline.loading import LoadOptions

T = TypeVar("T")

START_SECONDS = 180.0
"""Time for the other processes to import the package."""
HERE = b"here"


@dataclass(frozen=True)
class Open:
    """Engines for a new call; those of calls that have `ended` are not needed any more."""

    owner: int
    plan: ExecutionPlan
    ended: tuple[int, ...]


@dataclass(frozen=True)
class RankConfig:
    """What a process needs to join the others and to load its share."""

    rank: int
    devices: tuple[str, ...]
    store: Path
    pieces: str
    sequence: int
    threads: int
    options: LoadOptions


class HandedCaches(ContiguousCaches):
    """Contiguous caches of a rank's heads; exports are copies, which all ranks take."""

    def __init__(self, model: NeoUnify, transport: Transport, reserve: int) -> None:
        super().__init__(model, reserve=reserve)
        self._transport = transport

    def export(self, sequence: ServedSequence) -> Prefix:
        cache = sequence.cache
        assert cache is not None
        pairs = [cache.read(layer, cache.length) for layer in range(self._model.config.num_layers)]
        keys, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
        ref: TensorRef = self._transport.pack_heads(keys, values)
        return Prefix(ref, cache.next_t)


def _engines(
    model: NeoUnify, plan: ExecutionPlan, transport: Transport, group: Group, sequence: int
) -> dict[StreamName, Engine]:
    caches = HandedCaches(model, transport, plan.kv_reserve)
    spread = Spread(group, sequence)
    understanding, generation = call_engines(model, plan, transport, caches, spread)
    return {UND: understanding, GEN: generation}


# --- rank 0 ---


class DeviceGroup:
    """The processes that a model is spread over, as the first of them sees them.

    One that dies, or an error inside a step, ends the calls in progress with EngineDied; the next
    call starts the others again.
    """

    def __init__(self, devices: Sequence[str], sequence: int, options: LoadOptions) -> None:
        self.group = Group(0, 1, None, torch.device(devices[0]), nccl=False)
        self._devices, self._sequence, self._options = tuple(devices), sequence, options
        self._lock = threading.RLock()
        self._owners = itertools.count(1)
        self._open: set[int] = set()
        self._ended: list[int] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._space = SharedSpace()
        self._space.open()
        self.transport = SharedTransport(f"{self._space.prefix}front_")
        self._own = SharedTransport(f"{self._space.prefix}r0_")
        atexit.register(self.close)

    @property
    def pids(self) -> list[int]:
        """Process numbers of the other ranks."""
        return [process.pid for process in self._processes]

    def start(self, load: Callable[[], T] | None = None) -> T | None:
        """Start the other processes, which load their shares while `load` does it here.

        Raises what keeps one of them from it.
        """
        with tempfile.TemporaryDirectory(prefix="neounify-") as folder:
            store = Path(folder) / "store"
            for rank in range(1, len(self._devices)):
                self._processes.append(self._begin(rank, store))
            try:
                self._wait_for_all()
                met = Group.meet(store, 0, self._devices)
                # The hooks of the model know this object.
                self.group.__dict__.update(met.__dict__)
                self.group.part(self._sequence)  # while the store is there
                return self.group.together(load if load is not None else lambda: None)
            except BaseException:
                self._give_up()
                raise

    def _begin(self, rank: int, store: Path) -> subprocess.Popen[bytes]:
        config = RankConfig(
            rank,
            self._devices,
            store,
            f"{self._space.prefix}r{rank}_",
            self._sequence,
            # Sums of several threads depend on their number, and ranks must agree to the bit.
            torch.get_num_threads(),
            self._options,
        )
        process = subprocess.Popen(
            [sys.executable, "-c", "from neounify.pipeline.devices import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(config))
        process.stdin.flush()
        return process

    def _wait_for_all(self) -> None:
        end = time.monotonic() + START_SECONDS
        for rank, process in enumerate(self._processes, 1):
            assert process.stdout is not None
            timer = threading.Timer(max(0.0, end - time.monotonic()), process.kill)
            timer.start()
            said = process.stdout.read(len(HERE))
            timer.cancel()
            if said != HERE:
                raise EngineDied(
                    f"the process of device {self._devices[rank]} (rank {rank}) ended while "
                    "starting"
                )

    def open(self, model: NeoUnify, plan: ExecutionPlan) -> tuple[LedEngine, LedEngine]:
        """Engines of a call, on all ranks."""
        with self._lock:
            if not self._processes:
                self.start()
            owner = next(self._owners)
            ended, self._ended = tuple(self._ended), []
            self._exchange(lambda: self.group.announce(Open(owner, plan, ended)))
            self._open.add(owner)
            transport = GroupTransport(self._own, self.group)
            engines = _engines(model, plan, transport, self.group, self._sequence)
        und, gen = (LedEngine(engines[role], role, self._carry_out, owner) for role in (UND, GEN))
        return und, gen

    def end(self, owner: int) -> None:
        """A call has ended: its engines are dropped at the next one."""
        with self._lock:
            if owner in self._open:
                self._open.remove(owner)
                self._ended.append(owner)

    def _carry_out(self, order: Order, engine: Engine) -> None:
        with self._lock:
            if order.owner not in self._open:
                raise EngineDied("a process of the devices ended while it worked on the call")

            def work() -> None:
                self.group.announce(order)
                order.carry_out(engine)

            self._exchange(work)

    def _exchange(self, work: Callable[[], None]) -> None:
        """What is left in the middle leaves the others there, so that they are given up."""
        try:
            work()
        except BaseException as error:
            self._give_up()
            if isinstance(error, Exception):
                raise EngineDied(
                    f"a process of the devices {', '.join(self._devices)} ended, or failed, while "
                    f"it worked on the call: {error}"
                ) from error
            raise

    def _give_up(self) -> None:
        self._open.clear()
        self._ended.clear()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
        if self._processes:
            self.group.leave()
        self._processes = []

    def close(self) -> None:
        """End the other processes."""
        atexit.unregister(self.close)
        with self._lock:
            self._give_up()
            self._space.close()


# --- the other ranks ---


def main() -> None:
    """Work of rank 1 and the following, until rank 0 ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    config: RankConfig = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_first, daemon=True).start()
    torch.set_num_threads(config.threads)
    from neounify.pipeline.loading import load_rank

    sys.stdout.buffer.write(HERE)
    sys.stdout.buffer.flush()
    group = Group.meet(config.store, config.rank, config.devices)
    group.part(config.sequence)
    device = config.devices[config.rank]
    try:
        pipe = group.together(lambda: load_rank(config.options, group, device))
    except NeounifyError:
        os._exit(1)  # rank 0 raises it
    work = _Followed(config, group, pipe.model)
    try:
        with torch.inference_mode():
            follow(group, work.engine_of, work.open)
    except RuntimeError:
        os._exit(1)  # rank 0 is gone, or gives this process up


def _end_with_first() -> None:
    """End this process, in a step too, when that of rank 0 has ended."""
    sys.stdin.buffer.read()
    os._exit(1)


class _Followed:
    """The engines of the calls in progress."""

    def __init__(self, config: RankConfig, group: Group, model: NeoUnify) -> None:
        self._config, self._group, self._model = config, group, model
        self._own = SharedTransport(config.pieces)
        self._engines: dict[tuple[int, StreamName], Engine] = {}

    def open(self, opened: Open) -> None:
        for key in [key for key in self._engines if key[0] in opened.ended]:
            del self._engines[key]
        transport = GroupTransport(self._own, self._group)
        sequence = self._config.sequence
        engines = _engines(self._model, opened.plan, transport, self._group, sequence)
        for role, engine in engines.items():
            self._engines[opened.owner, role] = engine

    def engine_of(self, order: Order) -> Engine:
        return self._engines[order.owner, order.role]
