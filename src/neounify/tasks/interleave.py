"""Interleaved answers of text and images: request, prompts, program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import ModelConfig, TextSampling
from neounify.config.sampling import check_seed
from neounify.engine.messages import (
    Append,
    Decode,
    Release,
    SequenceName,
    TextInput,
    new_number,
)
from neounify.errors import ContextFullError, RequestError
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ResolvedSampling
from neounify.image.pixels import image_tokens, normalise_und, output_size
from neounify.model.layout import Grid
from neounify.tasks.answer import AnswerEvents, decode_text
from neounify.tasks.image import (
    KeptPrefixes,
    branch_prefixes,
    branches_to_prefill,
    check_negative_prompt,
    denoise,
    draw_noise,
    prefill_branches,
)
from neounify.tasks.program import Compute, Processor, Program, pack_images
from neounify.text.template import (
    Message,
    Prompt,
    images_only_prompt,
    interleave_prompt,
    place_images,
    unconditional_prompt,
)
from neounify.text.tokens import IM_END, IMAGE_CLOSE, IMAGE_OPEN

MAX_IMAGES = 100


@dataclass(frozen=True, kw_only=True)
class InterleaveRequest:
    """Interleaved answer to generate; `sizes` are (width, height) in pixels per image.

    Images beyond the last size have that size.

    `max_new_tokens` counts text over the whole answer. `history` are earlier turns, whose
    images come first in `images`. `negative_prompt` is as in a ImageRequest.
    """

    prompt: str
    sizes: Sequence[tuple[int, int]]
    sampling: ResolvedSampling
    images: Sequence[PIL.Image.Image] = ()
    max_images: int = 10
    max_new_tokens: int = 2048
    seed: int = 0
    think: bool = False
    system: str = ""
    text: TextSampling = field(default_factory=TextSampling)
    history: Sequence[Message] = ()
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 0 <= self.max_images <= MAX_IMAGES:
            raise RequestError(
                f"max_images must be from 0 to {MAX_IMAGES}, got {self.max_images}",
                param="max_images",
            )
        if self.max_new_tokens < 1:
            raise RequestError(
                f"max_new_tokens must be at least 1, got {self.max_new_tokens}",
                param="max_new_tokens",
            )
        check_negative_prompt(self.negative_prompt, self.sampling)

    @property
    def prompt_images(self) -> int:
        """Number of `images` that belong to the prompt, not to the history."""
        return len(self.images) - sum(message.n_images for message in self.history)


def output_sizes(
    config: ModelConfig,
    width: int | Sequence[int] | None,
    height: int | Sequence[int] | None,
    reference: PIL.Image.Image | None,
) -> list[tuple[int, int]]:
    """Sizes of several images in turn; a number stands for a list of one."""
    widths = list(width) if isinstance(width, Sequence) else [width]
    heights = list(height) if isinstance(height, Sequence) else [height]
    if not widths or len(widths) != len(heights):
        raise RequestError(
            f"{len(widths)} widths for {len(heights)} heights; give one of each for every size",
            param="size",
        )
    return [output_size(config, w, h, reference) for w, h in zip(widths, heights, strict=True)]


def turn_prompt(processor: Processor, request: InterleaveRequest, branch: Branch) -> Prompt:
    """Prompt of an interleaved answer for one guidance branch."""
    tokenizer, negative = processor.tokenizer, request.negative_prompt
    if branch == "uncond":
        return unconditional_prompt(tokenizer, negative)
    if branch == "image":
        # One turn with all images, those of earlier answers too: it never holds any text.
        count = len(request.images)
        return images_only_prompt(tokenizer, count, open_image=False, negative=negative)
    text = place_images(request.prompt, request.prompt_images, numbered=True)
    return interleave_prompt(
        tokenizer, text, system=request.system, think=request.think, history=request.history
    )


def to_und_input(pixels: Float[Tensor, "c h w"], dtype: torch.dtype) -> Float[Tensor, "c h w"]:
    """A generated image, normalised for the understanding stream, not clamped."""
    return normalise_und((pixels + 1) / 2).to(dtype)


def append_generated(
    processor: Processor, pixels: Float[Tensor, "c h w"], sequences: Sequence[SequenceName]
) -> Program[None]:
    """Append a generated image, and the token that closes it, to sequences that opened one."""
    clean: Tensor = yield Compute(partial(to_und_input, pixels, processor.dtype))
    (image,) = yield from pack_images([clean], processor.config.token_size)
    closes = TextInput((processor.token(IMAGE_CLOSE),))
    yield Append(new_number(), dict.fromkeys(sequences, (image, closes)))


def interleave(
    processor: Processor,
    request: InterleaveRequest,
    kept: KeptPrefixes,
    previews: int | None,
    *,
    thoughts: bool = True,
) -> Program[None]:
    """Decode until an image opens, generate it, append it to the context, repeat.

    The answer ends where the model's context ends, as text does. At most `previews` of each image
    are events, None for one after every step; `thoughts` separates them from the answer's text.
    """
    processor.check_writes_text("interleave", think=request.think)
    prefilled = branches_to_prefill(request.sampling, request.negative_prompt, kept)
    # Room for one image; further ones are allocated as the answer grows.
    tokens = max(image_tokens(processor.config, *size) for size in request.sizes) + 2
    room: dict[str, int] = {
        b: tokens if request.max_images and b != "uncond" else 0 for b in prefilled
    }
    room["cond"] += request.max_new_tokens
    names, usage, _ = yield from prefill_branches(
        processor, request, request.images, turn_prompt, prefilled, room
    )
    generator = torch.Generator().manual_seed(request.seed)
    opens = processor.token(IMAGE_OPEN)
    stops = frozenset((processor.token(IM_END), opens))
    text = AnswerEvents(processor, processor.tokenizer.stream, thoughts=thoughts)
    try:
        for index in range(request.max_images + 1):
            first = yield Decode(
                new_number(), names["cond"], request.text, stops, request.max_new_tokens
            )
            answer = yield from decode_text(first, text, usage)
            assert answer is not None  # the text has no stop strings
            reason = answer.finish_reason
            if answer.stopped_by != opens or index == request.max_images:
                break
            visible = [branch for branch in names if branch != "uncond"]
            yield Append(new_number(), {names[b]: (TextInput((opens,)),) for b in visible})
            prefixes = yield from branch_prefixes(
                request.sampling, request.negative_prompt, names, kept
            )
            if index + 1 == request.max_images and len(names) > 1:
                # Only text may follow, which the conditional sequence alone continues.
                yield Release(tuple(name for b, name in names.items() if b != "cond"))
                names = {"cond": names["cond"]}
                visible = ["cond"]
            width, height = request.sizes[min(index, len(request.sizes) - 1)]
            draw = partial(draw_noise, processor.config, width, height, generator)
            grid = Grid.of_pixels(height, width, processor.config.token_size)
            (pixels,) = yield from denoise(
                draw, grid, request.sampling, prefixes, previews, usage, first=index
            )
            yield from append_generated(processor, pixels, [names[b] for b in visible])
    except ContextFullError:
        reason = "length"
    yield usage.finished(reason)
