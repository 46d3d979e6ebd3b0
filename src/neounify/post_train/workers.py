"""Rollouts in worker processes, the same to the bit as in the trainer.

The weights of the policy lie in shared memory, where the trainer puts them before an iteration. A
worker builds the stage's method on them, samples whole rollouts, and sends what a saved state holds
of each, and texts; the trainer restores them as it does on a resume.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing  # pipes then pass tensors in shared memory
from torch import Tensor

from neounify.errors import NeounifyError
from neounify.model.neo import NeoUnify
from neounify.post_train.policy import frozen_copy
from neounify.train.method import StageContext
from neounify.train.setup import StageSources

if TYPE_CHECKING:
    from neounify.post_train.group_config import GroupConfig

Place = tuple[int, int, int, int]
"""Iteration, draw, index of the draw's first rollout, and the rollout's number in the draw."""
Sampled = tuple[Mapping[str, Tensor], Any]
"""`tensors` and `shown` of a rollout."""


class RolloutFailure(NeounifyError):
    """A worker that samples rollouts failed or died."""


class RolloutWorkers:
    """`count` processes that sample rollouts of a stage's method with the weights of `policy`."""

    def __init__(self, count: int, context: StageContext, policy: NeoUnify) -> None:
        self._policy = policy
        # Frozen weights are moved into shared memory, not copied.
        self._shared = frozen_copy(policy).share_memory()
        theirs = replace(
            context,
            setup=context.setup.of_model(self._shared),
            sources=StageSources(context.recipe),
        )
        threads = max(1, torch.get_num_threads() // count)
        spawn = multiprocessing.get_context("spawn")
        self._processes: list[Any] = []
        self._connections: list[Connection] = []
        for number in range(count):
            ours, of_worker = spawn.Pipe()
            process = spawn.Process(
                target=_work,
                args=(of_worker, theirs, threads),
                name=f"rollout worker {number}",
                daemon=True,
            )
            self._connections.append(ours)
            self._processes.append(process)
            process.start()
            of_worker.close()

    def sample(self, places: Sequence[Place]) -> list[Sampled]:
        """Rollouts at some places, in order. Raises RolloutFailure."""
        self._publish()
        left = list(range(len(places)))[::-1]
        running: dict[int, int] = {}  # place by worker
        sampled: dict[int, Sampled] = {}
        for worker in range(len(self._processes)):
            self._next(worker, places, left, running)
        while running:
            owners = {self._connections[worker]: worker for worker in running}
            for ready in wait(list(owners)):  # a dead worker's pipe is at its end
                worker = owners[ready]  # type: ignore[index]
                sampled[running.pop(worker)] = self._answer(worker)
                self._next(worker, places, left, running)
        return [sampled[number] for number in range(len(places))]

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.kill()
            process.join()
            connection.close()

    @torch.no_grad()
    def _publish(self) -> None:
        """Copy the weights that are trained into shared memory."""
        shared = dict(self._shared.named_parameters())
        for name, parameter in self._policy.named_parameters():
            if shared[name] is not parameter:
                shared[name].copy_(parameter)

    def _next(
        self, worker: int, places: Sequence[Place], left: list[int], running: dict[int, int]
    ) -> None:
        if left:
            running[worker] = left.pop()
            try:
                self._connections[worker].send(places[running[worker]])
            except OSError as error:
                raise self._death(worker) from error

    def _answer(self, worker: int) -> Sampled:
        try:
            answer: Sampled | str = self._connections[worker].recv()
        except (EOFError, OSError) as error:
            raise self._death(worker) from error
        if isinstance(answer, str):
            raise RolloutFailure(f"{self._processes[worker].name} failed: {answer}")
        return answer

    def _death(self, worker: int) -> RolloutFailure:
        process = self._processes[worker]
        process.join(timeout=10)
        code = process.exitcode
        how = f"by signal {-code}" if code is not None and code < 0 else f"with status {code}"
        return RolloutFailure(
            f"{process.name} (process {process.pid}) ended {how}. If the system ended it for want "
            "of memory, lower rollout_workers or prompts_per_rollout; the run resumes from its "
            "last state"
        )


def _work(connection: Connection, context: StageContext, threads: int) -> None:
    """A worker: answer places with rollouts until the trainer closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer ends its workers
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    torch.set_num_threads(threads)
    config: GroupConfig = context.stage.method  # type: ignore[assignment]
    method = replace(config, rewards=(), rollout_workers=0).build(context)
    with suppress(EOFError, OSError):
        while True:
            iteration, draw, first, number = connection.recv()
            try:
                cases = method.rollout_cases(iteration, draw)[number]
                rollout = method.rollout(cases, iteration, first + number)
                answer: Sampled | str = rollout.tensors(), rollout.shown()
            except Exception as error:  # the trainer raises it
                answer = f"{type(error).__name__}: {error}"
            connection.send(answer)


def _end_with_trainer() -> None:
    """End this process once the trainer has ended in any way."""
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
    os._exit(1)
