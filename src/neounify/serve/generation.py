"""The generation engine: paints for many requests at once, one shared denoising step at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from neounify.cache import SequenceCache
from neounify.errors import not_finite
from neounify.model.neo import NeoUnify
from neounify.pipeline.denoise import PaintJob, make_job, to_pixels
from neounify.pipeline.denoiser import Denoiser
from neounify.serve.events import EngineDied
from neounify.serve.messages import Cancel, Done, Keep, Kept, Paint, Prefix, Reply, Seen, failed
from neounify.serve.scheduling import Waiting, choose, preview_steps
from neounify.serve.transport import Parcel, Transport


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """`step_tokens`: image tokens of a step, over all guidance branches, at most.

    `most_missed`: an image left out of that many steps in a row goes first. `beside_text_seconds`:
    about how long a step may take while text is being written in the same process.
    """

    step_tokens: int = 1024
    most_missed: int = 4
    beside_text_seconds: float = 0.011


@dataclass(eq=False)
class _Image:
    """One image under way."""

    call: int
    index: int
    job: PaintJob
    previews: frozenset[int]
    waiting: Waiting


class GenerationEngine:
    """Takes orders with `submit`, does a step's work with `step`, leaves `replies`."""

    def __init__(self, model: NeoUnify, settings: GenerationSettings, transport: Transport) -> None:
        self.model, self.settings, self.transport = model, settings, transport
        self.replies: list[Reply] = []
        self.counters: Counter[str] = Counter()
        self._denoiser = Denoiser(model)
        self._kept: dict[str, SequenceCache] = {}
        self._images: list[_Image] = []
        self._left: dict[int, int] = {}
        self._last_batch = 0
        self._row_seconds = 0.0

    @property
    def busy(self) -> bool:
        return bool(self._images)

    def gauges(self) -> Mapping[str, float]:
        """Images under way, and how many took part in the last step."""
        return {"gen_images": len(self._images), "gen_batch": self._last_batch}

    def submit(self, order: Keep | Paint | Cancel) -> None:
        """Take an order. What cannot be done is answered with Failed."""
        if isinstance(order, Cancel):
            self._drop(order.call)
            return
        try:
            if isinstance(order, Keep):
                self._kept[order.name] = self._cache(order.prefix)
                self.replies.append(Reply(order.call, Kept(), True))
            else:
                self._start(order)
        except Exception as error:  # whatever it is, it concerns this order alone
            self._drop(order.call)
            self.replies.append(failed(order.call, error))

    @torch.inference_mode()
    def step(self, *, beside_text: bool = False) -> None:
        """Move the images whose turn it is by one denoising step, a short one beside text.

        Raises what concerns all images; what fails for one is the answer to its call.
        """
        if not self._images:
            return
        start = time.perf_counter()
        for image in self._images:
            image.waiting.rows = image.job.z.shape[0] * len(image.job.branches())
            image.waiting.steps_left = image.job.steps - image.job.steps_done
        places = choose(
            [image.waiting for image in self._images],
            self._short_step() if beside_text else self.settings.step_tokens,
            self.settings.most_missed,
        )
        chosen = [self._images[place] for place in places]
        self._last_batch = len(chosen)
        self.counters["gen_image_steps"] += len(chosen)
        self._denoiser.step([image.job for image in chosen])
        for image in chosen:
            # An image before it in this step may have ended their call.
            if image.call in self._left:
                self._tell(image)
        rows = sum(image.waiting.rows for image in chosen)
        self._row_seconds += 0.2 * ((time.perf_counter() - start) / rows - self._row_seconds)

    def _short_step(self) -> int:
        """Image tokens of a step of the wanted length, by what recent steps took."""
        if not self._row_seconds:
            return self.settings.step_tokens
        fitting = int(self.settings.beside_text_seconds / self._row_seconds)
        return min(self.settings.step_tokens, max(1, fitting))

    def _start(self, order: Paint) -> None:
        prefixes = {branch: self._prefix(prefix) for branch, prefix in order.prefixes.items()}
        noise = self.transport.take(order.noise)["noise"]
        self._left[order.call] = noise.shape[0]
        for index, own in enumerate(noise):
            job = make_job(self.model, own, order.grid, prefixes, order.sampling)
            previews = preview_steps(job.steps, order.previews)
            self._images.append(_Image(order.call, index, job, previews, Waiting(0, 0)))

    def _prefix(self, prefix: Prefix | str) -> SequenceCache:
        if not isinstance(prefix, str):
            return self._cache(prefix)
        if prefix not in self._kept:
            raise EngineDied(f"the engine was started again and has no prefix {prefix!r} yet")
        return self._kept[prefix]

    def _cache(self, prefix: Prefix) -> SequenceCache:
        tensors, device = self.transport.take(prefix.parcel), self.model.device
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
        if not job.done:
            if job.steps_done in image.previews:
                seen = Seen(image.index, job.steps_done, job.steps, self._pack(job, job.clean))
                self.replies.append(Reply(image.call, seen, False))
            return
        if not torch.isfinite(job.z).all():
            raise not_finite()
        done = Done(image.index, self._pack(job, job.z))
        self._images.remove(image)
        self._left[image.call] -= 1
        last = not self._left[image.call]
        if last:
            self._drop(image.call)
        self.replies.append(Reply(image.call, done, last))

    def _pack(self, job: PaintJob, tokens: torch.Tensor) -> Parcel:
        pixels = to_pixels([tokens], job.grid, self.model.config.token_size)[0]
        return self.transport.pack({"pixels": pixels})

    def _drop(self, call: int) -> None:
        self._images = [image for image in self._images if image.call != call]
        self._left.pop(call, None)
        self._denoiser.forget()
