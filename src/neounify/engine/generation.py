"""Generation engine: the denoising loop of many images, one shared step at a time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from neounify.cache import SequenceCache
from neounify.distributed.group import ALONE
from neounify.engine.denoiser import DenoiseJob, Denoiser, make_job
from neounify.engine.messages import (
    Cancel,
    FramesReady,
    GenerateImages,
    ImageReady,
    KeepPrefix,
    Kept,
    LocalCache,
    Prefix,
    Reply,
    StepMemory,
    StepPreview,
    TensorRef,
    Transport,
    failed,
)
from neounify.engine.pixels import to_pixels, tube_frames
from neounify.engine.spread import Spread
from neounify.errors import EngineDied, not_finite
from neounify.image.clips import cut_levels, frame_levels
from neounify.model.neo import NeoUnify
from neounify.runtime.plan import ExecutionPlan, measured_plan

# --- scheduling ---


@dataclass
class Waiting:
    """An image in progress: tokens of its next step over all branches, steps left, steps missed."""

    rows: int
    steps_left: int
    missed: int = 0


def select_images(waiting: Sequence[Waiting], max_rows: int, max_missed: int) -> list[int]:
    """Indices in `waiting` of the images of the next step.

    Shortest remaining work first; but images that missed `max_missed` steps go before all others,
    the longest waiting first. At most `max_rows` tokens take part, or one image that alone has
    more. Updates `missed` of all.
    """

    def urgency(index: int) -> tuple[bool, int, int, int]:
        item = waiting[index]
        late = item.missed >= max_missed
        return not late, -item.missed if late else 0, item.steps_left * item.rows, index

    chosen: list[int] = []
    rows = 0
    for index in sorted(range(len(waiting)), key=urgency):
        if not chosen or rows + waiting[index].rows <= max_rows:
            chosen.append(index)
            rows += waiting[index].rows
    selected = set(chosen)
    for index, item in enumerate(waiting):
        item.missed = 0 if index in selected else item.missed + 1
    return chosen


def preview_steps(steps: int, previews: int | None) -> frozenset[int]:
    """Steps of 1..`steps` - 1 after which a preview is sent, evenly spread.

    None stands for all steps, the last one included.
    """
    if previews is None:
        return frozenset(range(1, steps + 1))
    wanted = (round(steps * (n + 1) / (previews + 1)) for n in range(previews))
    return frozenset(step for step in wanted if 0 < step < steps)


# --- the loop ---


@dataclass(eq=False)
class _Image:
    """One image in progress."""

    call: int
    index: int
    job: DenoiseJob
    previews: frozenset[int]
    waiting: Waiting


@dataclass(eq=False)
class _Ending:
    """A finished clip, of which `tubes` have not been sent yet."""

    call: int
    tubes: int
    frames: Iterator[FramesReady]


@dataclass(eq=False)
class _Step:
    """A denoising step in progress; `large` if one image exceeds the token limit of a step."""

    images: list[_Image]
    large: bool
    work: Iterator[None]
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return sum(image.waiting.rows for image in self.images)


def running_mean(mean: float, value: float) -> float:
    """Mean that gives the newest value a weight of 0.2; 0 stands for none yet."""
    return value if mean == 0 else mean + 0.2 * (value - mean)


class GenerationEngine:
    """Denoising loop: `submit` accepts commands, `step` runs them, `replies` collects."""

    def __init__(
        self,
        model: NeoUnify,
        transport: Transport,
        plan: ExecutionPlan | None = None,
        spread: Spread | None = None,
    ) -> None:
        """`plan` None is that of the free memory of now; `spread` is that of a rank of a group."""
        self.model, self.transport = model, transport
        self.group = ALONE if spread is None else spread.group
        self._alone = self.group.size == 1
        self.replies: list[Reply] = []
        self.counters: Counter[str] = Counter()
        self.plan = plan or measured_plan(model.config, model.device, model.compute_dtype)
        self._denoiser = Denoiser(model, self.plan, spread)
        self._kept: dict[str, SequenceCache] = {}
        self._images: list[_Image] = []
        self._ending: deque[_Ending] = deque()
        self._unfinished: dict[int, int] = {}
        """Number of unfinished images of each call."""
        self._running: deque[_Step] = deque()
        self._last_batch = 0
        self._row_seconds = 0.0
        """Running mean of what steps took, in seconds per image token; 0 before the first."""

    @property
    def busy(self) -> bool:
        return bool(self._images or self._ending)

    def gauges(self) -> Mapping[str, float]:
        """Images in progress, and the batch size of the last step."""
        return {"gen_images": len(self._images), "gen_batch": self._last_batch}

    def submit(self, command: KeepPrefix | GenerateImages | Cancel) -> None:
        """Accept a command; a command that fails is answered with Failed."""
        if isinstance(command, Cancel):
            self._drop(command.call)
            return
        try:
            if isinstance(command, KeepPrefix):
                self._kept[command.name] = self._cache(command.prefix)
                self.replies.append(Reply(command.call, Kept(), True))
            else:
                self._start(command)
        except Exception as error:  # any error concerns this command alone
            self._drop(command.call)
            self.replies.append(failed(command.call, error, alone=self._alone))

    @torch.inference_mode()
    def step(self, *, beside_text: bool = False) -> None:
        """Send a tube of a finished clip, or else work on a denoising step.

        For a bounded time, a short one beside text. Selected images share a step. An image that
        alone exceeds the token limit of a step does not delay the others: its steps alternate with
        theirs. Raises errors that concern all images; an error of one is the answer to its call,
        and a step that finds no memory that to the calls of its images.
        """
        if self._ending:
            self._send_frames()
            return
        if not self._alone:
            # What depends on time is the choice of one rank.
            self._row_seconds = self.group.choose(lambda: self._row_seconds)
        max_rows = self._short_step() if beside_text else self.plan.denoise_step_rows
        self._begin(max_rows)
        if not self._running:
            return
        current = self._running.popleft()
        seconds = self.plan.text_slice_seconds if beside_text else self.plan.slice_seconds
        done = False
        work = f"denoise {current.rows} image tokens in a step"
        with StepMemory(work, alone=self._alone) as memory:
            done = self._advance(current, seconds)
        if memory.error is not None:
            self._fail(current, memory.error)
        elif done:
            self._end(current)
        else:
            self._running.append(current)

    def _fail(self, step: _Step, error: Exception) -> None:
        """Answer all calls that have an image in a step with its error."""
        for call in {image.call: None for image in step.images}:
            if call in self._unfinished:
                self._drop(call)
                self.replies.append(failed(call, error))

    def _begin(self, max_rows: int) -> None:
        """Begin a step of waiting images, unless one is in progress."""
        running = {image for step in self._running for image in step.images}
        if any(not step.large for step in self._running):
            return
        for image in self._images:
            image.waiting.rows = image.job.z.shape[0] * len(image.job.branches())
            image.waiting.steps_left = image.job.steps - image.job.steps_done
        limit = self.plan.denoise_step_rows
        free = [
            image
            for image in self._images
            if image not in running and not (self._running and image.waiting.rows > limit)
        ]
        if not free:
            return
        indices = select_images([image.waiting for image in free], max_rows, self.plan.max_missed)
        chosen = [free[index] for index in indices]
        large = any(image.waiting.rows > limit for image in chosen)
        work = self._denoiser.slices([image.job for image in chosen])
        self._running.append(_Step(chosen, large, work))

    def _advance(self, step: _Step, seconds: float) -> bool:
        """Compute layers for about `seconds`; returns whether the step is done."""
        start = time.perf_counter()
        left = self._slices(step, seconds)
        try:
            for _ in step.work:
                if left is not None:
                    left -= 1
                    if left == 0:
                        return False
                elif time.perf_counter() - start >= seconds:
                    return False
        finally:
            self._synchronise()
            step.seconds += time.perf_counter() - start
        return True

    def _slices(self, step: _Step, seconds: float) -> int | None:
        """Layers that fit into the time, by the mean of recent steps; None where time is measured.

        In a group, ranks that measure would part ways. On an accelerator the time is only known
        once the work is done, and the host does not wait for it between layers.
        """
        if self._alone and self.model.device.type == "cpu":
            return None
        layer = self._row_seconds * step.rows / self.model.config.num_layers
        return max(1, int(min(seconds, 1e9) / layer)) if layer else -1

    def _synchronise(self) -> None:
        """Wait for the work of a slice, whose time is measured."""
        if self.model.device.type != "cpu":
            torch.accelerator.synchronize(self.model.device)

    def _end(self, step: _Step) -> None:
        self._last_batch = len(step.images)
        self.counters["gen_steps"] += 1
        self.counters["gen_image_steps"] += len(step.images)
        for image in step.images:
            # Its call may have been cancelled, or ended by an image before it in this step.
            if image.call in self._unfinished:
                self._report(image)
        self._row_seconds = running_mean(self._row_seconds, step.seconds / step.rows)

    def _short_step(self) -> int:
        """Image tokens of a step of `text_slice_seconds`, estimated from recent steps."""
        if not self._row_seconds:
            return self.plan.denoise_step_rows
        fitting = int(self.plan.text_slice_seconds / self._row_seconds)
        return min(self.plan.denoise_step_rows, max(1, fitting))

    def _start(self, command: GenerateImages) -> None:
        prefixes = {branch: self._prefix(prefix) for branch, prefix in command.prefixes.items()}
        noise = self.transport.take(command.noise)["noise"]
        self._unfinished[command.call] = noise.shape[0]
        for index, image_noise in enumerate(noise):
            previews = command.preview_steps
            job = make_job(
                self.model, image_noise, command.grid, prefixes, command.sampling, previews
            )
            self._images.append(_Image(command.call, index, job, previews, Waiting(0, 0)))

    def _prefix(self, prefix: Prefix | str) -> SequenceCache:
        if not isinstance(prefix, str):
            return self._cache(prefix)
        if prefix not in self._kept:
            raise EngineDied(f"the engine was started again and has no prefix {prefix!r} yet")
        return self._kept[prefix]

    def _cache(self, prefix: Prefix) -> SequenceCache:
        if isinstance(prefix.ref, LocalCache):
            return prefix.ref.cache
        tensors, device = self.transport.take(prefix.ref), self.model.device
        keys, values = tensors["keys"].to(device), tensors["values"].to(device)
        return SequenceCache.holding(keys, values, prefix.next_t)

    def _report(self, image: _Image) -> None:
        """Send the preview or result of an image after its step; a finished image is removed."""
        try:
            self._send_results(image)
        except Exception as error:
            self._drop(image.call)
            self.replies.append(failed(image.call, error, alone=self._alone))

    def _send_results(self, image: _Image) -> None:
        job = image.job
        if job.steps_done in image.previews:
            assert job.clean is not None
            preview = StepPreview(
                image.index, job.steps_done, job.steps, self._pack(job, job.clean)
            )
            job.clean = None
            self.replies.append(Reply(image.call, preview, False))
        if not job.done:
            return
        if not torch.isfinite(job.z).all():
            raise not_finite()
        self._images.remove(image)
        evaluations = job.layers_run / self.model.config.num_layers
        if job.grid.tubes:
            frames = self._frames(image.index, job, evaluations)
            self._ending.append(_Ending(image.call, job.grid.tubes, frames))
        else:
            pixels = to_pixels(job.z, job.grid, self.model.config)
            ref = self.transport.pack({"pixels": cut_levels(pixels) if job.cuts_levels else pixels})
            self._finish(image.call, ImageReady(image.index, ref, evaluations))

    def _finish(self, call: int, answer: ImageReady | FramesReady) -> None:
        """Reply with an image, or with the last frames of a clip; the call may end with it."""
        self._unfinished[call] -= 1
        last = not self._unfinished[call]
        if last:
            self._drop(call)
        self.replies.append(Reply(call, answer, last))

    def _pack(self, job: DenoiseJob, tokens: torch.Tensor) -> TensorRef:
        """The pixels of an image, or of the frame in the middle of a clip."""
        if job.grid.tubes:
            middle = tube_frames(tokens, job.grid, job.grid.tubes // 2, self.model.config)
            return self.transport.pack({"pixels": middle[0].clone()})
        pixels = to_pixels(tokens, job.grid, self.model.config)
        return self.transport.pack({"pixels": pixels})

    def _frames(self, index: int, job: DenoiseJob, evaluations: float) -> Iterator[FramesReady]:
        """The frames of a finished clip, tube by tube; as levels they take a quarter of z."""
        for number in range(job.grid.tubes):
            frames = tube_frames(job.z, job.grid, number, self.model.config)
            if job.cuts_levels:
                frames = cut_levels(frames)
            ref = self.transport.pack({"frames": frame_levels(frames)})
            first, total = number * len(frames), job.grid.tubes * len(frames)
            yield FramesReady(index, first, total, ref, evaluations)

    def _send_frames(self) -> None:
        """Send the next tube of a finished clip; the one before it may be gone by then."""
        ending = self._ending[0]
        try:
            answer = next(ending.frames)
        except Exception as error:
            self._drop(ending.call)
            self.replies.append(failed(ending.call, error, alone=self._alone))
            return
        ending.tubes -= 1
        if ending.tubes:
            self.replies.append(Reply(ending.call, answer, False))
            return
        self._ending.popleft()
        self._finish(ending.call, answer)

    def _drop(self, call: int) -> None:
        self._images = [image for image in self._images if image.call != call]
        self._ending = deque(ending for ending in self._ending if ending.call != call)
        self._unfinished.pop(call, None)
        # Steps without an image of a live call are dropped.
        self._running = deque(
            step
            for step in self._running
            if any(image.call in self._unfinished for image in step.images)
        )
        self._denoiser.forget()
