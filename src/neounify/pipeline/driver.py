"""Driver of programs in the caller's thread: submit all, step until done."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neounify.checkpoint.residency import Residency
from neounify.distributed.group import ALONE
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import (
    Answer,
    Cancel,
    DecodedToken,
    Failed,
    ImageInput,
    LocalTransport,
    Prefill,
    Release,
    SequenceName,
    TensorRef,
    Transport,
    is_for_generation,
    refs_of,
)
from neounify.engine.orders import LedEngine
from neounify.engine.sequences import ContiguousCaches
from neounify.engine.spread import Spread
from neounify.engine.understanding import UnderstandingEngine
from neounify.errors import Cancelled, OutOfMemory, is_out_of_memory
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN, UND, StreamName
from neounify.runtime.plan import UNLIMITED, ExecutionPlan
from neounify.tasks.program import (
    Compute,
    NextAnswer,
    PackImage,
    PackTensors,
    Program,
    Returned,
    Take,
    TaskEvent,
    resume,
)

if TYPE_CHECKING:
    from neounify.pipeline.devices import DeviceGroup

Event = TaskEvent | DecodedToken


def call_engines(
    model: NeoUnify,
    plan: ExecutionPlan,
    transport: Transport,
    caches: ContiguousCaches,
    spread: Spread | None = None,
) -> tuple[UnderstandingEngine, GenerationEngine]:
    """The engines of one call, whose steps have no limit but the memory."""
    understanding = UnderstandingEngine(
        model,
        transport,
        replace(plan, prefill_step_rows=plan.prefill_rows),
        caches,
        ALONE if spread is None else spread.group,
    )
    generation = GenerationEngine(
        model,
        transport,
        replace(plan, denoise_step_rows=UNLIMITED, slice_seconds=float("inf")),
        spread,
    )
    return understanding, generation


class Driver:
    """Both engines over one model for the requests of one call, without any limit on them.

    `residency` None is for a model whose weights are all in memory.

    Understanding goes before generation: all prompts are prefilled and all thoughts decoded before
    images are denoised together, so that each stream's weights become resident once.
    """

    def __init__(
        self,
        model: NeoUnify,
        residency: Residency | None,
        plan: ExecutionPlan,
        peaks: Callable[[], str],
        cancel: threading.Event | None = None,
        devices: DeviceGroup | None = None,
    ) -> None:
        """`peaks` says for errors of memory what the plan predicted, and what the peak is.

        `devices` are those that the model is spread over, None for one.
        """
        self._model, self._residency, self._plan = model, residency, plan
        self._cancel, self._devices, self._peaks = cancel, devices, peaks
        self._transport: Transport = LocalTransport() if devices is None else devices.transport
        self._understanding: UnderstandingEngine | LedEngine
        self._generation: GenerationEngine | LedEngine
        self._packed: list[TensorRef] = []
        """What is left of a call on several devices, in shared memory."""

    def _open(self) -> None:
        """Make the engines: not before the call runs, since only its end frees them."""
        model, plan = self._model, self._plan
        engines: tuple[UnderstandingEngine | LedEngine, GenerationEngine | LedEngine]
        if self._devices is None:
            caches = ContiguousCaches(model, reserve=plan.kv_reserve)
            engines = call_engines(model, plan, self._transport, caches)
        else:
            engines = self._devices.open(model, plan)
        self._understanding, self._generation = engines

    def run(self, programs: Sequence[Program[Any]]) -> Iterator[list[tuple[int, Event]]]:
        """Run programs to their ends; yields (number of the program, event) lists, step by step.

        Raises what a program raises, and Cancelled.
        """
        self._open()
        runs = [_Run(number, program) for number, program in enumerate(programs)]
        calls: dict[int, _Run] = {}
        events: list[tuple[int, Event]] = []
        with ExitStack() as stack:
            stack.callback(self._free)
            for run in runs:
                stack.callback(run.program.close)
                self._advance(run, None, calls, events)
            resident = _ResidentStream(self._residency, stack)
            while True:
                self._deliver(runs, calls, events)
                if events:
                    yield list(events)
                    events.clear()
                if all(run.returned for run in runs):
                    return
                if self._cancel is not None and self._cancel.is_set():
                    raise Cancelled("the request was cancelled")
                self._step(resident)

    def _with_peaks(self, error: OutOfMemory) -> OutOfMemory:
        return OutOfMemory(f"{error}; {self._peaks()}")

    def _step(self, resident: _ResidentStream) -> None:
        if self._understanding.busy:
            self._bring(UND, resident)
            self._understanding.step()
        elif self._generation.busy:
            self._bring(GEN, resident)
            self._generation.step()
        else:
            raise RuntimeError("programs wait for answers, and both engines are idle")

    def _bring(self, stream: StreamName, resident: _ResidentStream) -> None:
        try:
            resident.use(stream)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            gone = OutOfMemory(f"no memory is left for the weights of the stream {stream!r}")
            raise self._with_peaks(gone) from error.with_traceback(None)

    def _deliver(
        self,
        runs: Sequence[_Run],
        calls: dict[int, _Run],
        events: list[tuple[int, Event]],
    ) -> None:
        """Pass replies on until none are left; programs may cause new ones."""
        while replies := self._understanding.replies + self._generation.replies:
            self._understanding.replies, self._generation.replies = [], []
            for reply in replies:
                self._hold(refs_of(reply.answer))
                run = calls.pop(reply.call) if reply.final else calls[reply.call]
                if run.call == reply.call:
                    run.answers.append(reply.answer)
            for run in runs:
                while run.answers and not run.returned:
                    answer = run.answers.popleft()
                    value = answer.exception() if isinstance(answer, Failed) else answer
                    self._advance(run, value, calls, events)

    def _advance(
        self,
        run: _Run,
        value: object,
        calls: dict[int, _Run],
        events: list[tuple[int, Event]],
    ) -> None:
        """Resume a program, up to the next answer that it waits for."""
        if isinstance(value, OutOfMemory):
            value = self._with_peaks(value)
        step = resume(run.program, value)
        while not isinstance(step, Returned):
            if isinstance(step, TaskEvent | DecodedToken):
                events.append((run.number, step))
                result: object = None
            elif isinstance(step, NextAnswer):
                return
            elif isinstance(step, Compute | PackTensors | PackImage | Take):
                result = self._effect(step)
            elif isinstance(step, Release):
                self._release(run, step.sequences)
                result = None
            else:
                assert not isinstance(step, Cancel)
                calls[step.call] = run
                run.call = step.call
                run.answers.clear()
                if isinstance(step, Prefill):
                    run.sequences.update(step.prompts)
                generates = is_for_generation(step)
                engine = self._generation if generates else self._understanding
                engine.submit(step)  # type: ignore[arg-type]
                return
            step = resume(run.program, result)
        run.returned = True
        self._release(run, tuple(run.sequences))

    def _effect(self, step: Compute | PackTensors | PackImage | Take) -> object:
        match step:
            case Compute(function):
                try:
                    return function()
                except Exception as error:
                    return error
            case PackTensors(tensors):
                return self._packed_ref(tensors)
            case PackImage(pixels, grid):
                # Contiguous caches share no prefixes, so that the digest is not used.
                return ImageInput(self._packed_ref({"pixels": pixels}), b"", grid)
            case Take(ref):
                return self._transport.take(ref)

    def _packed_ref(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        ref = self._transport.pack(tensors)
        self._hold((ref,))
        return ref

    def _hold(self, refs: Sequence[TensorRef]) -> None:
        """Free references at the end of the call, unless they are taken."""
        if self._transport.copies:
            self._packed += refs

    def _free(self) -> None:
        """Free what a call on several devices leaves there."""
        for ref in self._packed:
            ref.free()
        if self._devices is not None and isinstance(self._understanding, LedEngine):
            self._devices.end(self._understanding.owner)

    def _release(self, run: _Run, names: tuple[SequenceName, ...]) -> None:
        if names:
            run.sequences.difference_update(names)
            self._understanding.submit(Release(names))


class _Run:
    """A program in progress: the answers it has not taken, and its sequences."""

    def __init__(self, number: int, program: Program[Any]) -> None:
        self.number, self.program = number, program
        self.call = 0
        self.answers: deque[Answer] = deque()
        self.sequences: set[SequenceName] = set()
        self.returned = False


class _ResidentStream:
    """The stream whose weights are resident, until another one is used."""

    def __init__(self, residency: Residency | None, stack: ExitStack) -> None:
        self._residency, self._stack = residency, stack.enter_context(ExitStack())
        self._stream: StreamName | None = None

    def use(self, stream: StreamName) -> None:
        if self._residency is not None and stream != self._stream:
            self._stack.close()
            self._stack.enter_context(self._residency.use(stream))
            self._stream = stream
