"""Public API: `Pipeline`, with every task of one loaded model."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from PIL.Image import Image
from torch import Tensor
from typing_extensions import Unpack

from neounify.checkpoint.dtypes import DtypeChoice
from neounify.checkpoint.residency import NullResidency, Residency
from neounify.checkpoint.save import save_model
from neounify.config import ModelConfig, TextSampling
from neounify.config.sampling import TextKnobs, check_keywords
from neounify.errors import RequestError, SizeWarning
from neounify.flow.sampling import EditKnobs, GenerateKnobs, ImageSampling, InterleaveKnobs
from neounify.image.io import ImageSource
from neounify.image.pixels import output_size, size_advice
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS
from neounify.pipeline.arguments import per_prompt, read_prompts
from neounify.pipeline.driver import Driver
from neounify.pipeline.results import (
    Callback,
    ChatResult,
    ChatRun,
    ChatStream,
    ImageResult,
    InterleavePart,
    run_images,
    run_interleaved,
)
from neounify.runtime.memory_rows import Kept
from neounify.runtime.plan import ExecutionPlan, measured_plan
from neounify.tasks.chat import (
    ChatKnobs,
    ChatRequest,
    Conversation,
    make_chat_request,
    read_images,
    read_request,
)
from neounify.tasks.clips import Frames
from neounify.tasks.image import MAX_THINK_TOKENS, ImageRequest, split_noise
from neounify.tasks.interleave import InterleaveRequest, output_sizes
from neounify.tasks.program import Processor
from neounify.tasks.video import OutputShape, after_clip, clip_shape
from neounify.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from neounify.pipeline.devices import DeviceGroup
    from neounify.pipeline.videos import ConditionInput, VideoInput

SYSTEM_MESSAGE_FILE = "system_message_generation.txt"


class Pipeline:
    """Chat, image generation, editing and interleaved answers with one model.

    Re-entrant: nothing of a call is stored, so threads may share a pipeline. Every call
    takes `cancel`, a threading.Event that makes it raise Cancelled within one step.
    Sampling values left None are the checkpoint's defaults (published models:
    2048×2048, 50 steps, guidance 4, image guidance 1, shift 3). All calls raise
    PromptError, ImageError or RequestError for input that cannot be used.
    """

    def __init__(
        self,
        model: NeoUnify,
        tokenizer: Tokenizer,
        *,
        system_message: str | None = None,
        residency: Residency | None = None,
        fingerprint: Callable[[], str] | None = None,
        colour_profiles: bool = True,
        loaded_dtype: DtypeChoice | None = None,
        attention: str = "auto",
        kept: Callable[[], Kept] | None = None,
    ) -> None:
        """`system_message` begins the prompts of images; None is the package default.

        `kept` counts the weights for errors of memory; None is for plain ones.
        """
        if tokenizer.vocab_size > model.config.vocab_size:
            raise RequestError(
                f"the tokenizer has ids up to {tokenizer.vocab_size - 1:,}, the model embeds "
                f"{model.config.vocab_size:,} tokens: ids must be below that"
            )
        self.model = model
        self.processor = Processor(model.config, tokenizer, system_message, model.compute_dtype)
        self._residency = None if isinstance(residency, NullResidency) else residency
        self._fingerprint, self._kept = fingerprint, kept
        self.loaded_dtype = loaded_dtype
        """The dtype of the weights and the reason for it; None for a model that was not loaded."""
        self.colour_profiles = colour_profiles
        self.attention = attention
        self.devices: DeviceGroup | None = None
        """The devices that the model is spread over; None for one."""

    @property
    def tokenizer(self) -> Tokenizer:
        return self.processor.tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.processor.config

    @cached_property
    def _plan(self) -> ExecutionPlan:
        """Limits of all calls, by the memory that is free at the first one."""
        model = self.model
        return measured_plan(self.config, model.device, model.compute_dtype, self.attention)

    @property
    def residency(self) -> Residency:
        """Residency of the weights of each stream."""
        return self._residency or NullResidency()

    @property
    def fingerprint(self) -> str | None:
        """Hash of the loaded weights; None for a model that was not loaded."""
        return None if self._fingerprint is None else self._fingerprint()

    @overload
    def chat(
        self,
        prompt: Conversation,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        video: VideoInput | Sequence[VideoInput] | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        tubes: bool = False,
        stream: Literal[False] = False,
        cancel: threading.Event | None = None,
        **options: Unpack[ChatKnobs],
    ) -> ChatResult: ...

    @overload
    def chat(
        self,
        prompt: Conversation,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        video: VideoInput | Sequence[VideoInput] | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        tubes: bool = False,
        stream: Literal[True],
        cancel: threading.Event | None = None,
        **options: Unpack[ChatKnobs],
    ) -> ChatStream: ...

    def chat(
        self,
        prompt: Conversation,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        video: VideoInput | Sequence[VideoInput] | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        tubes: bool = False,
        stream: bool = False,
        cancel: threading.Event | None = None,
        **options: Unpack[ChatKnobs],
    ) -> ChatResult | ChatStream:
        """Answer a question, or the last of several messages, about text and images.

        `prompt` is a text or a list of {"role", "content"} messages; `<image>` marks the
        positions of `images` (paths, bytes or PIL images), which otherwise go in front, and
        `<video>` those of `video`: paths, bytes or Videos, of which frames are seen as images, each
        after its time: `fps` a second, at most `max_frames`; None is the checkpoint's rule. With
        `tubes`, several of them are seen as one, by models that have an embedding of tubes.
        Options: `max_new_tokens` 512; `temperature` 0 (the likeliest token), `top_p` 1,
        `top_k` 0 (all), `min_p` 0 (all), `repetition_penalty` 1, `seed` None (a new draw
        each time); `stop` strings that end the answer; `system` message; `think` first. With
        `stream`, the result is iterated for pieces of text and then holds the whole answer.
        """
        videos: Sequence[Frames] = ()
        if video is not None:
            from neounify.pipeline.videos import read_inputs

            videos = read_inputs(video, self.config, fps, max_frames, tubes)
        elif fps is not None or max_frames is not None or tubes:
            raise RequestError(
                "fps, max_frames and tubes are of clips: give video too", param="fps"
            )
        request = self._chat_request(prompt, images, options, videos)
        run = ChatRun(self._driver(cancel), self.processor, [request])
        return ChatStream(run) if stream else run.finish()[0]

    def chat_batch(
        self,
        prompts: Sequence[Conversation],
        images: Sequence[ImageSource | Sequence[ImageSource]] | None = None,
        *,
        cancel: threading.Event | None = None,
        **options: Unpack[ChatKnobs],
    ) -> list[ChatResult]:
        """Answer conversations of any lengths together, each as `chat` would alone."""
        image_lists = [()] * len(prompts) if images is None else list(images)
        if len(image_lists) != len(prompts):
            raise RequestError(
                f"{len(image_lists)} lists of images for {len(prompts)} prompts; give one per "
                "prompt",
                param="images",
            )
        if not prompts:
            return []
        requests = [
            self._chat_request(prompt, prompt_images, options)
            for prompt, prompt_images in zip(prompts, image_lists, strict=True)
        ]
        return ChatRun(self._driver(cancel), self.processor, requests).finish()

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        width: int | None = None,
        height: int | None = None,
        frames: int | None = None,
        fps: float | None = None,
        condition: ConditionInput | None = None,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        images_per_prompt: int = 1,
        negative_prompt: str | Sequence[str] = "",
        think: bool = False,
        max_think_tokens: int = MAX_THINK_TOKENS,
        system: str | None = None,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[GenerateKnobs],
    ) -> ImageResult:
        """Generate images, or clips, of one prompt or of a list of different ones.

        `width` and `height` are in pixels, multiples of the token side; a size the model was not
        trained at is a SizeWarning, here and in all calls that generate images. `seed`, one for
        all prompts or one per prompt, is below 2^64; an image depends only on its prompt and seed.
        `noise` [prompts · images_per_prompt, 3, H, W], already times σ, replaces the draw.
        `negative_prompt`, one for all or one per prompt, is what guidance steers away from. With
        `think` the model first writes a plan. `system` None is the checkpoint's default message.
        `callback` is called after every step.

        With `frames`, a multiple of those of a tube, the result has `videos` of so many frames,
        `fps` a second. `condition` is the clip before them, a path, bytes, a Video or the list of
        its frames, for models trained to continue.

        The rest are fields of `flow.sampling.ImageSampling`, None for the checkpoint's default:
        `steps`; `guidance` (0 to 1: none), which acts for t inside `guidance_interval` (0 to 1),
        with `guidance_norm` none, global, channel or cfg_zero_star; `shift`; `solver` euler, ab2,
        dpm2m or unipc, and `published_solver`; `t_eps`; `fast` half or third of the steps;
        `guidance_reuse`, `guidance_stop` and `step_cache` save evaluations. TypeError for names
        that are unknown, or only edits have.
        """
        check_keywords("generate", sampling, GenerateKnobs)
        prompts = read_prompts(prompt)
        shape = self._shape(width, height, frames, fps, condition)
        request = ImageRequest(
            prompt=prompts[0],
            width=shape.width,
            height=shape.height,
            frames=shape.frames,
            fps=shape.fps,
            condition=shape.condition,
            sampling=ImageSampling(**sampling).resolve(
                self.config, editing=False, video=frames is not None
            ),
            count=images_per_prompt,
            think=think,
            max_think_tokens=max_think_tokens,
            system=system,
        )
        requests = self._each(request, prompts, seed, noise, negative_prompt)
        return self.generate_requests(requests, callback, cancel)

    def _each(
        self,
        request: ImageRequest,
        prompts: Sequence[str],
        seed: int | Sequence[int],
        noise: Tensor | None,
        negative_prompt: str | Sequence[str],
    ) -> list[ImageRequest]:
        """The request for every prompt, with its values of lists."""
        each = zip(
            prompts,
            per_prompt(seed, len(prompts), "seed"),
            split_noise(noise, len(prompts), self.config),
            per_prompt(negative_prompt, len(prompts), "negative_prompt"),
            strict=True,
        )
        return [
            replace(
                request,
                prompt=after_clip(request.condition, text),
                seed=one,
                noise=drawn,
                negative_prompt=negative,
            )
            for text, one, drawn, negative in each
        ]

    def _shape(
        self,
        width: int | None,
        height: int | None,
        frames: int | None,
        fps: float | None,
        condition: ConditionInput | None,
    ) -> OutputShape:
        """Size of what `generate` is asked for, checked."""
        if frames is not None:
            shown: list[Image] = []
            if condition is not None:
                from neounify.pipeline.videos import read_condition

                profiles = self.colour_profiles
                shown = read_condition(condition, self.config, fps, colour_profiles=profiles)
            return clip_shape(self.config, (width, height), frames, fps, shown)
        if fps is not None or condition is not None:
            raise RequestError("fps and condition are of clips: give frames too", param="frames")
        size = output_size(self.config, width, height)
        if advice := size_advice(self.config, *size):
            warnings.warn(advice, SizeWarning, stacklevel=3)
        return OutputShape(width=size[0], height=size[1])

    def edit(
        self,
        prompt: str,
        images: ImageSource | Sequence[ImageSource],
        *,
        width: int | None = None,
        height: int | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        images_per_prompt: int = 1,
        negative_prompt: str = "",
        think: bool = False,
        max_think_tokens: int = MAX_THINK_TOKENS,
        system: str | None = None,
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
        **sampling: Unpack[EditKnobs],
    ) -> ImageResult:
        """Generate a new image from one or more input images and an instruction.

        `<image>` in the prompt marks the positions of the input images; without marks they go in
        front. `guidance` pulls towards the instruction, `image_guidance` towards the
        input images, and both away from `negative_prompt`. Without a size, the first image's
        aspect ratio is kept at the area of the model's default size. `published_interval`
        reproduces the published code, where a guidance interval that starts at 0 never
        ends. The rest is as in `generate`.
        """
        check_keywords("edit", sampling, EditKnobs)
        inputs = read_images(images, colour_profiles=self.colour_profiles)
        if not inputs:
            raise RequestError(
                "edit needs at least one image; use generate without images", param="images"
            )
        size = output_size(self.config, width, height, inputs[0])
        _warn_untrained(self.config, *size)
        request = ImageRequest(
            prompt=prompt,
            width=size[0],
            height=size[1],
            sampling=ImageSampling(**sampling).resolve(self.config, editing=True),
            images=tuple(inputs),
            seed=seed,
            noise=split_noise(noise, 1, self.config)[0],
            count=images_per_prompt,
            think=think,
            max_think_tokens=max_think_tokens,
            system=system,
            negative_prompt=negative_prompt,
        )
        return self.generate_requests([request], callback, cancel)

    def interleave(
        self,
        prompt: Conversation,
        images: ImageSource | Sequence[ImageSource] = (),
        *,
        max_images: int = 10,
        max_new_tokens: int = 2048,
        width: int | Sequence[int] | None = None,
        height: int | Sequence[int] | None = None,
        seed: int = 0,
        negative_prompt: str = "",
        think: bool = False,
        system: str = "",
        cancel: threading.Event | None = None,
        **knobs: Unpack[InterleaveKnobs],
    ) -> Iterator[InterleavePart]:
        """Interleaved answer of text and images; an iterator of parts.

        `prompt` is a text or a list of messages as in `chat`, the last one a user's; earlier
        answers may hold images. Yields TextPart pieces as they are decoded, a PreviewPart
        after every denoising step and an ImagePart per finished image. `width` and `height`
        may be lists, one size per image in turn; the last is kept. `max_new_tokens` bounds
        the text, `max_images` the images: after the last one the text continues. Text is
        sampled as in `chat`, images as in `edit`, each by fields of the same names.
        """
        check_keywords("interleave", knobs, InterleaveKnobs)
        sampling: dict[str, Any] = dict(knobs)
        text_names = TextKnobs.__optional_keys__ & sampling.keys()
        text_sampling = {name: sampling.pop(name) for name in text_names}
        text, history, inputs = read_request(
            prompt,
            read_images(images, colour_profiles=self.colour_profiles),
            colour_profiles=self.colour_profiles,
        )
        new = inputs[sum(message.n_images for message in history) :]
        sizes = output_sizes(self.config, width, height, new[0] if new else None)
        for size in sizes:
            _warn_untrained(self.config, *size)
        request = InterleaveRequest(
            prompt=text,
            history=history,
            sizes=sizes,
            sampling=ImageSampling(**sampling).resolve(self.config, editing=True),
            images=inputs,
            negative_prompt=negative_prompt,
            max_images=max_images,
            max_new_tokens=max_new_tokens,
            seed=seed,
            think=think,
            system=system,
            text=TextSampling(seed=seed, **text_sampling),
        )
        return run_interleaved(self._driver(cancel), self.processor, request)

    def save(
        self, folder: str | Path, *, max_shard_bytes: int = 5 * 10**9, overwrite: bool = False
    ) -> None:
        """Write a checkpoint folder of the published layout, tokenizer and system message included.

        Raises CheckpointError when the folder holds something and `overwrite` is not set, and
        RequestError for a model on several devices, none of which has all weights.
        """
        if self.devices is not None:
            raise RequestError("a model on several devices cannot be saved; load it on one device")
        with ExitStack() as resident:
            for stream in STREAMS:
                resident.enter_context(self.residency.use(stream))
            save_model(
                self.model,
                folder,
                max_shard_bytes=max_shard_bytes,
                tokenizer=self.tokenizer,
                extra_files={SYSTEM_MESSAGE_FILE: self.processor.system_message},
                overwrite=overwrite,
            )

    def _chat_request(
        self,
        prompt: Conversation,
        images: ImageSource | Sequence[ImageSource],
        options: ChatKnobs,
        videos: Sequence[Frames] = (),
    ) -> ChatRequest:
        profiles = self.colour_profiles
        inputs = read_images(images, colour_profiles=profiles)
        form = self.processor.template
        return make_chat_request(prompt, inputs, videos, form, colour_profiles=profiles, **options)

    def generate_requests(
        self,
        requests: Sequence[ImageRequest],
        callback: Callback | None = None,
        cancel: threading.Event | None = None,
    ) -> ImageResult:
        """Generate the images of validated requests, all of one size, together."""
        return run_images(self._driver(cancel), self.processor, requests, callback)

    def _driver(self, cancel: threading.Event | None) -> Driver:
        return Driver(self.model, self._residency, self._plan, self._peaks, cancel, self.devices)

    def _peaks(self) -> str:
        from neounify.checkpoint.fit import peaks

        kept = None if self._kept is None else self._kept()
        return peaks(self.model, self._residency, self._plan, kept)


def _warn_untrained(config: ModelConfig, width: int, height: int) -> None:
    """Issue a SizeWarning at the caller's caller, unless the size is a trained one."""
    if advice := size_advice(config, width, height):
        warnings.warn(advice, SizeWarning, stacklevel=3)
