"""Generation engine: the denoising loop of many images, one shared step at a time."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from neounify.cache import SequenceCache
from neounify.engine.denoise import DenoiseJob, make_job, to_pixels
from neounify.engine.denoiser import Denoiser
from neounify.engine.messages import (
    Cancel,
    GenerateImages,
    ImageReady,
    KeepPrefix,
    Kept,
    Prefix,
    Reply,
    StepPreview,
    failed,
)
from neounify.engine.scheduling import Waiting, choose
from neounify.engine.tensors import LocalCache, TensorRef, Transport
from neounify.errors import EngineDied, not_finite
from neounify.model.neo import NeoUnify
from neounify.runtime.plan import ExecutionPlan, plan_execution


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """`step_tokens`: image tokens of a step, over all guidance branches; None: the plan's.

    `most_missed`: an image left out of that many steps in a row goes first. A step that takes
    longer than `slice_seconds`, `beside_text_seconds` while text is being written in the same
    process, is interrupted between two layers of the model for what else there is to do.
    """

    step_tokens: int | None = None
    most_missed: int = 4
    beside_text_seconds: float = 0.011
    slice_seconds: float = 0.05

    def adjust(self, plan: ExecutionPlan) -> ExecutionPlan:
        """The plan with the limits that are set here."""
        return replace(plan, denoise_step_rows=self.step_tokens or plan.denoise_step_rows)


@dataclass(eq=False)
class _Image:
    """One image under way."""

    call: int
    index: int
    job: DenoiseJob
    previews: frozenset[int]
    waiting: Waiting


@dataclass(eq=False)
class _Step:
    """A denoising step under way; `large` where one image has more tokens than a step should."""

    images: list[_Image]
    large: bool
    work: Iterator[None]
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        return sum(image.waiting.rows for image in self.images)


class GenerationEngine:
    """Takes orders with `submit`, does a step's work with `step`, leaves `replies`."""

    def __init__(self, model: NeoUnify, settings: GenerationSettings, transport: Transport) -> None:
        self.model, self.settings, self.transport = model, settings, transport
        self.replies: list[Reply] = []
        self.counters: Counter[str] = Counter()
        self.plan = settings.adjust(plan_execution(model.config, model.device, model.compute_dtype))
        self._denoiser = Denoiser(model, self.plan)
        self._kept: dict[str, SequenceCache] = {}
        self._images: list[_Image] = []
        self._left: dict[int, int] = {}
        """How many images of each call are not finished."""
        self._under_way: deque[_Step] = deque()
        self._last_batch = 0
        self._row_seconds = 0.0
        """Running mean of what steps took, in seconds per image token; 0 before the first."""

    @property
    def busy(self) -> bool:
        return bool(self._images)

    def gauges(self) -> Mapping[str, float]:
        """Images under way, and how many took part in the last step."""
        return {"gen_images": len(self._images), "gen_batch": self._last_batch}

    def submit(self, order: KeepPrefix | GenerateImages | Cancel) -> None:
        """Take an order. What cannot be done is answered with Failed."""
        if isinstance(order, Cancel):
            self._drop(order.call)
            return
        try:
            if isinstance(order, KeepPrefix):
                self._kept[order.name] = self._cache(order.prefix)
                self.replies.append(Reply(order.call, Kept(), True))
            else:
                self._start(order)
        except Exception as error:  # whatever it is, it concerns this order alone
            self._drop(order.call)
            self.replies.append(failed(order.call, error))

    @torch.inference_mode()
    def step(self, *, beside_text: bool = False) -> None:
        """Work on a denoising step for a bounded time, a short one beside text.

        Images whose turn it is share a step. One that alone has more tokens than a step is to
        have does not hold up the others: its step and those of the others alternate. Raises
        what concerns all images; what fails for one is the answer to its call.
        """
        most = self._short_step() if beside_text else self.plan.denoise_step_rows
        self._begin(most)
        if not self._under_way:
            return
        current = self._under_way.popleft()
        seconds = self.settings.beside_text_seconds if beside_text else self.settings.slice_seconds
        if self._work_on(current, seconds):
            self._end(current)
        else:
            self._under_way.append(current)

    def _begin(self, most: int) -> None:
        """Begin a step of the images that wait for one, unless one is under way."""
        taken = {image for step in self._under_way for image in step.images}
        if any(not step.large for step in self._under_way):
            return
        for image in self._images:
            image.waiting.rows = image.job.z.shape[0] * len(image.job.branches())
            image.waiting.steps_left = image.job.steps - image.job.steps_done
        limit = self.plan.denoise_step_rows
        free = [
            image
            for image in self._images
            if image not in taken and not (self._under_way and image.waiting.rows > limit)
        ]
        if not free:
            return
        places = choose([image.waiting for image in free], most, self.settings.most_missed)
        chosen = [free[place] for place in places]
        large = any(image.waiting.rows > limit for image in chosen)
        work = self._denoiser.slices([image.job for image in chosen])
        self._under_way.append(_Step(chosen, large, work))

    def _work_on(self, step: _Step, seconds: float) -> bool:
        """Compute layers for about that long; whether the step is done."""
        start = now = time.perf_counter()
        try:
            for _ in step.work:
                # On an accelerator the time is only known once the work is done; a step that
                # recently took less than a slice need not be waited for in between.
                if self._row_seconds * step.rows > seconds or not self._row_seconds:
                    self._synchronise()
                    now = time.perf_counter()
                    if now - start >= seconds:
                        return False
        finally:
            step.seconds += time.perf_counter() - start
        return True

    def _synchronise(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _end(self, step: _Step) -> None:
        self._last_batch = len(step.images)
        self.counters["gen_steps"] += 1
        self.counters["gen_image_steps"] += len(step.images)
        for image in step.images:
            # Its call may have been given up, or ended by an image before it in this step.
            if image.call in self._left:
                self._tell(image)
        self._row_seconds += 0.2 * (step.seconds / step.rows - self._row_seconds)

    def _short_step(self) -> int:
        """Image tokens of a step of the wanted length, by what recent steps took."""
        if not self._row_seconds:
            return self.plan.denoise_step_rows
        fitting = int(self.settings.beside_text_seconds / self._row_seconds)
        return min(self.plan.denoise_step_rows, max(1, fitting))

    def _start(self, order: GenerateImages) -> None:
        prefixes = {branch: self._prefix(prefix) for branch, prefix in order.prefixes.items()}
        noise = self.transport.take(order.noise)["noise"]
        self._left[order.call] = noise.shape[0]
        for index, own in enumerate(noise):
            job = make_job(self.model, own, order.grid, prefixes, order.sampling)
            self._images.append(_Image(order.call, index, job, order.preview_steps, Waiting(0, 0)))

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

    def _tell(self, image: _Image) -> None:
        """Send what an image has to show after its step; an image that is done leaves."""
        try:
            self._show(image)
        except Exception as error:
            self._drop(image.call)
            self.replies.append(failed(image.call, error))

    def _show(self, image: _Image) -> None:
        job = image.job
        if job.steps_done in image.previews:
            seen = StepPreview(image.index, job.steps_done, job.steps, self._pack(job, job.clean))
            self.replies.append(Reply(image.call, seen, False))
        if not job.done:
            return
        if not torch.isfinite(job.z).all():
            raise not_finite()
        done = ImageReady(image.index, self._pack(job, job.z))
        self._images.remove(image)
        self._left[image.call] -= 1
        last = not self._left[image.call]
        if last:
            self._drop(image.call)
        self.replies.append(Reply(image.call, done, last))

    def _pack(self, job: DenoiseJob, tokens: torch.Tensor) -> TensorRef:
        pixels = to_pixels([tokens], job.grid, self.model.config.token_size)[0]
        return self.transport.pack({"pixels": pixels})

    def _drop(self, call: int) -> None:
        self._images = [image for image in self._images if image.call != call]
        self._left.pop(call, None)
        # What nobody waits for is not finished.
        self._under_way = deque(
            step
            for step in self._under_way
            if any(image.call in self._left for image in step.images)
        )
        self._denoiser.forget()
