"""One model on several devices: a process for each, of which the caller's is the first."""

from __future__ import annotations

import itertools
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref
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
from neounify.engine.shared_memory import (
    GroupTransport,
    SharedSpace,
    SharedTransport,
    remove_after_end,
)
from neounify.engine.spread import Spread
from neounify.errors import ConfigError, EngineDied, NeounifyError, RequestError
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


def check_names(devices: Sequence[str]) -> None:
    """Raise ConfigError for what is no list of names, RequestError for devices that are not here.

    None is touched, as `resolve_device` does: each is for its own process.
    """
    if isinstance(devices, str) or not all(isinstance(name, str) for name in devices):
        raise ConfigError(f"devices {devices!r} must be a list of names, as ['cuda:0', 'cuda:1']")
    for name in devices:
        try:
            device = torch.device(name)
        except RuntimeError as error:
            known = "a device is cpu, cuda:N, mps or xpu"
            raise RequestError(f"device {name!r} cannot be used here: {known}") from error
        if device.type == "cpu":
            continue
        here = torch.accelerator.current_accelerator(check_available=True)
        number = torch.accelerator.device_count() if here and here.type == device.type else 0
        if (device.index or 0) >= number:
            raise RequestError(
                f"device {name!r} cannot be used here: this machine has {number} of its type"
            )


# --- rank 0 ---


class DeviceGroup:
    """The processes that a model is spread over, as the first of them sees them.

    One that dies, or an error inside a step, ends the calls in progress with EngineDied; the next
    call starts the others again. They end with this object, with `close`, or with the program.
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
        # What it gets must not refer to this object, whose end it waits for.
        self._closing = weakref.finalize(
            self, _close, self._processes, self.group, self._space, os.getpid()
        )
        self.transport = SharedTransport(f"{self._space.prefix}front_")
        self._own = SharedTransport(f"{self._space.prefix}r0_")

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
            except BaseException as error:
                reasons = self._give_up()
                if isinstance(error, ConnectionError):
                    raise self._died("while starting", reasons, error) from error
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
        """Engines of a call, on all ranks. Raises EngineDied after `close`."""
        with self._lock:
            if not self._closing.alive:
                raise EngineDied("the devices of the model are closed; load it again")
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
            reasons = self._give_up()
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, ConnectionError):
                reasons.insert(0, f"{self._devices[0]} (rank 0): {_described(error)}")
            raise self._died("while it worked on the call", reasons, error) from error

    def _died(self, when: str, reasons: list[str], error: Exception) -> EngineDied:
        devices, why = ", ".join(self._devices), "; ".join(reasons) or error
        return EngineDied(f"a process of the devices {devices} ended, or failed, {when}: {why}")

    def _give_up(self) -> list[str]:
        """End the other processes; the errors that they ended by."""
        self._open.clear()
        self._ended.clear()
        reports = _end(self._processes, self.group)
        return [
            f"{device} (rank {rank}): {report}"
            for rank, (device, report) in enumerate(
                zip(self._devices[1:], reports, strict=False), 1
            )
            if report
        ]

    def close(self) -> None:
        """End the other processes. The model cannot be used any more."""
        with self._lock:
            self._open.clear()
            self._closing()


def _end(processes: list[subprocess.Popen[bytes]], group: Group) -> list[str]:
    """End the other ranks; what each says of an error that it ended by."""
    for process in processes:
        process.kill()
    reports = []
    for process in processes:
        process.wait()
        said = b""
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    said = pipe.read() if pipe is process.stdout else b""
                    pipe.close()
        reports.append(said.removeprefix(HERE).decode(errors="replace"))
    if processes:
        group.leave()
    processes.clear()
    return reports


def _close(
    processes: list[subprocess.Popen[bytes]], group: Group, space: SharedSpace, owner: int
) -> None:
    if os.getpid() == owner:  # not a fork of it, which ends too
        _end(processes, group)
        space.close()


def _described(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


# --- the other ranks ---


def main() -> None:
    """Work of rank 1 and the following, until rank 0 ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    first = os.getppid()
    config: RankConfig = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_first, args=(first, config.pieces), daemon=True).start()
    # The pipe is for what rank 0 reads; what anything prints joins the messages.
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        _work(config, answers)
    except NeounifyError:
        pass  # rank 0 raises the same
    except ConnectionError:
        remove_after_end(config.pieces)  # rank 0 is gone, or it ends this process
    except Exception as error:
        traceback.print_exc()
        os.write(answers, _described(error).encode())
    os._exit(1)  # threads of the group may abort an orderly end


def _work(config: RankConfig, answers: int) -> None:
    from neounify.pipeline.loading import load_rank

    torch.set_num_threads(config.threads)
    os.write(answers, HERE)
    group = Group.meet(config.store, config.rank, config.devices)
    group.part(config.sequence)
    device = config.devices[config.rank]
    pipe = group.together(lambda: load_rank(config.options, group, device))
    work = _Followed(config, group, pipe.model)
    with torch.inference_mode():
        follow(group, work.engine_of, work.open)


def _end_with_first(first: int, pieces: str) -> None:
    """End this process, in a step too, when that of rank 0 (its number) has ended.

    The pipe from it may be kept open, by a process that it forked.
    """
    while os.getppid() == first and not select.select([sys.stdin], [], [], 1.0)[0]:
        pass
    remove_after_end(pieces)
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
