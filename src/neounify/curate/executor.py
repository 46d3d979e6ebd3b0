"""Executors: tasks over units, in this process, in a pool of processes, or on a Ray cluster.

A task is a module-level function and picklable arguments; results come with the task's number, in
any order. Nothing that a task returns depends on the executor.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from neounify.curate.recipe import CurateError
from neounify.errors import missing_extra
from neounify.runtime.process import private_ray

Result = TypeVar("Result")
Task = tuple[Any, ...]
"""Arguments of the function."""

QUEUED_PER_WORKER = 4
LOST_ATTEMPTS = 3
"""Times that a task may lose its worker before the run ends."""
OBJECT_STORE_BYTES = 512 * 2**20


class Executor(Protocol):
    """Runs tasks."""

    def run(
        self, function: Callable[..., Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        """(number, result) of every task as it ends. Raises what a task raises, and CurateError."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


class Inline:
    """Tasks one after the other in this process."""

    def run(
        self, function: Callable[..., Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        for number, task in enumerate(tasks):
            yield number, function(*task)

    def close(self) -> None:
        """There is nothing to end."""


class Pool:
    """Tasks in `workers` processes. Those of a worker that is killed are given to new ones."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(
        self, function: Callable[..., Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        waiting, suspects = list(range(len(tasks)))[::-1], list[int]()
        lost = dict.fromkeys(waiting, 0)
        running: dict[Future[Result], int] = {}
        while waiting or suspects or running:
            # After a loss its suspects run alone, so that the guilty one is known.
            queue, room = (suspects, 1) if suspects else (waiting, self.workers * QUEUED_PER_WORKER)
            while queue and len(running) < room:
                try:
                    future = self._started().submit(function, *tasks[queue[-1]])
                except BrokenProcessPool:  # an idle worker was killed; what runs has ended too
                    if running:
                        break
                    self.close()
                    continue
                running[future] = queue.pop()
            alone = len(running) == 1 and queue is suspects
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            ended: list[int] = []
            for future in done:
                number = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    ended.append(number)
                    continue
                yield number, result
            if ended:
                lost[ended[0]] += alone
                if lost[ended[0]] >= LOST_ATTEMPTS:
                    raise CurateError(_lost(tasks[ended[0]]))
                suspects += sorted({*ended, *running.values()}, reverse=True)
                running.clear()
                self.close()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_end_with_parent
            )
        return self._pool

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _end_with_parent() -> None:
    """End this worker when its parent is gone: killed, it closes no pipe that workers wait on."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _lost(task: Task) -> str:
    name = getattr(task[0], "name", None) if task else None
    return (
        f"the worker on {name or 'a task'} was killed {LOST_ATTEMPTS} times: it ran out of memory, "
        "or a hook or a library crashed on one of its samples; use fewer workers or smaller units, "
        "then run again: what is done stays"
    )


class RayActors:
    """Tasks in `workers` actors of a Ray cluster; `address` is "local" for one on this machine."""

    def __init__(self, workers: int, address: str) -> None:
        if address == "local" and "ray" not in sys.modules:
            os.environ.update(private_ray())
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise CurateError(missing_extra("workers on Ray", "ray", error)) from error
        try:
            if address == "local":
                ray.init(
                    address="local",
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    num_cpus=workers,
                )
            else:
                ray.init(address=address)
        except Exception as error:  # Ray raises plain exceptions, of many lines
            reason = str(error).partition("\n")[0]
            raise CurateError(f"Ray at {address} does not start or answer: {reason}") from error
        actor = ray.remote(max_restarts=-1, max_task_retries=LOST_ATTEMPTS)(_Actor)
        self._ray = ray
        self._pool = ActorPool([actor.remote() for _ in range(workers)])

    def run(
        self, function: Callable[..., Result], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Result]]:
        def submit(actor: Any, numbered: tuple[int, Task]) -> Any:
            return actor.run.remote(function, *numbered)

        try:
            yield from self._pool.map_unordered(submit, list(enumerate(tasks)))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause or error from None
        except self._ray.exceptions.RayActorError as error:
            raise CurateError(f"a worker on Ray was lost {LOST_ATTEMPTS} times: {error}") from error

    def close(self) -> None:
        self._ray.shutdown()


class _Actor:
    """One process of a Ray cluster; what a task loads stays for the next ones."""

    def run(self, function: Callable[..., Result], number: int, task: Task) -> tuple[int, Result]:
        return number, function(*task)


def build_executor(workers: int, ray: str | None = None) -> Executor:
    """An executor of `workers` processes; one works in this process. Raises CurateError."""
    if ray is not None:
        return RayActors(workers, ray)
    return Inline() if workers == 1 else Pool(workers)
