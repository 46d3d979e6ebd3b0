"""Writer of training documents: spans, token ids, labels and sized images, part by part.

The text is laid out exactly as the prompts of inference are (`text/template.py`), and split for
the tokenizer at the same places, so training and inference see the same tokens. A target image is
first a noisy block, which carries the image loss, and then, if anything with a loss follows, a
clean copy at the same positions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PilImage
from typing_extensions import TypeIs

from neounify.data.clips import tube_frames
from neounify.data.sample import (
    ClipFile,
    DataError,
    Sample,
    SampleClip,
    SampleImage,
    SampleText,
    Turn,
)
from neounify.data.sizes import Pixels, crop_to, nearest_bucket, resized
from neounify.image.pixels import fit_size
from neounify.model.layout import Document, Grid, Image, Noise, Span, Text
from neounify.tasks.clips import frame_bounds
from neounify.text.clips import frame_order, time_stamp
from neounify.text.forms import TEMPLATES
from neounify.text.tokens import IM_END, IM_START, THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from neounify.data.encode import Encoder

GENERATION_TASKS = ("t2i", "t2i_think", "edit", "edit_think", "t2v", "next_frames")
"""Tasks whose answer is one image or clip; inference inserts `<img>`, so it carries no loss."""

_THINK_MARKS = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")


@dataclass(frozen=True, eq=False)
class Encoded:
    """One document. U counts its understanding rows.

    `ids` are its text tokens; `label_rows` (0..U-1) and `label_ids` say which rows must predict
    which token; `images` the clean images and `targets` one image per noisy block, uint8
    [height, width, 3], with frames in front where they are tubes and clips.
    """

    sample: str
    task: str
    document: Document
    ids: tuple[int, ...]
    label_rows: tuple[int, ...]
    label_ids: tuple[int, ...]
    images: tuple[Pixels, ...]
    targets: tuple[Pixels, ...]

    @property
    def length(self) -> int:
        """Tokens of both streams."""
        return sum(span.length for span in self.document.spans)


def pictured(sample: Sample) -> list[SampleImage | SampleClip]:
    """The images and clips of a sample, in order."""
    parts = [part for turn in sample.turns for part in turn.parts]
    return [part for part in parts if isinstance(part, SampleImage | SampleClip)]


class DocumentWriter:
    """Builds the spans, ids and labels of one document from the parts of its sample."""

    def __init__(self, encoder: Encoder, sample: Sample, rng: np.random.Generator) -> None:
        self.encoder, self.sample, self.rng = encoder, sample, rng
        self.tokenizer = encoder.tokenizer
        self.template = TEMPLATES[encoder.config.template]
        self.spans: list[Span] = []
        self.ids: list[int] = []
        self.labels: list[tuple[int, int]] = []
        self.images: list[Pixels] = []
        self.targets: list[Pixels] = []
        self._plain = ""
        self._loss = False
        self._row = 0
        self._tokens = 0
        self._opens_thought = False
        self._shown_images = 0
        self._shown_frames = 0
        if sample.turns[0].role != "system":
            generates = sample.task in GENERATION_TASKS
            self._system(encoder.system_message if generates else self.template.chat_system)

    # --- turns ---

    def turn(self, turn: Turn) -> None:
        if turn.role == "system":
            self._system("".join(p.text for p in turn.parts if isinstance(p, SampleText)))
        elif turn.role == "user":
            self._open("user")
            self._check_prompt(turn)
            for part in turn.parts:
                if isinstance(part, SampleText):
                    self._text(part.text, loss=False)
                elif not isinstance(part, ClipFile):  # its frames have been read
                    self._input(part)
            self._close(loss=False)
        else:
            self._answer(turn)

    def _check_prompt(self, turn: Turn) -> None:
        """Raise DataError for a prompt that is too long at inference."""
        most = self.template.max_prompt_tokens
        if most is None or self.sample.task not in GENERATION_TASKS:
            return
        tokens = len(self.tokenizer.encode(turn.value))
        if tokens > most:
            raise DataError(
                f"the prompt has {tokens:,} tokens, this model reads {most:,} at most; shorten it"
            )

    def _answer(self, turn: Turn) -> None:
        self._open("assistant")
        self._flush()
        first = turn.parts[0] if turn.parts else None
        thinks = isinstance(first, SampleText) and first.text.startswith(THINK_OPEN)
        has_image = any(not isinstance(part, SampleText) for part in turn.parts)
        if has_image and not thinks and self.template.thinks:
            self._no_thought()
        self._opens_thought = thinks and self.sample.task in GENERATION_TASKS
        for part in turn.parts:
            if isinstance(part, SampleText):
                self._answer_text(part)
            elif not isinstance(part, ClipFile):
                self._target(part)
        if self.sample.task not in GENERATION_TASKS:
            self._close(loss=any(part.loss for part in turn.parts))

    def _answer_text(self, part: SampleText) -> None:
        """Text of an answer, thought marks as tokens; what inference inserts carries no loss."""
        for piece in _THINK_MARKS.split(part.text):
            inserted = self._opens_thought
            if piece == THINK_OPEN:
                self._special(piece, loss=part.loss and not inserted)
            elif piece == THINK_CLOSE:
                self._special(piece, loss=part.loss)
            elif inserted and piece.startswith("\n") and self._after(THINK_OPEN):
                self._text("\n", loss=False)
                self._text(piece[1:], loss=part.loss)
            else:
                forced = inserted and self._after(THINK_CLOSE)
                self._text(piece, loss=part.loss and not forced)

    def _after(self, name: str) -> bool:
        return not self._plain and bool(self.ids) and self.ids[-1] == self.tokenizer.id(name)

    def without_text(self, *, images: bool) -> None:
        """The prefix of guidance: the input images alone, or nothing, then `<img>`."""
        self.spans, self.ids, self.labels, self._plain = [], [], [], ""
        self._row = self._tokens = self._shown_images = self._shown_frames = 0
        inputs = [part for part in pictured(self.sample) if part.role == "input"]
        targets = [part for part in pictured(self.sample) if part.role == "target"]
        self._open("user")
        for part in inputs if images else ():
            self._input(part)
        self._close(loss=False)
        self._open("assistant")
        if images:
            for part in targets:
                self._target(part, loss=False)
        else:
            self._open_target()
            for part in targets:
                if self._by_frame(part):
                    self._frames(part, context=False)
                else:
                    self._noise(self._sized_target(part, copies=self.encoder.noise_draws), part)

    # --- pieces ---

    def _system(self, text: str) -> None:
        if text:
            self._open("system")
            self._text(text, loss=False)
            self._close(loss=False)

    def _open(self, role: str) -> None:
        self._special(IM_START, loss=False)
        self._text(f"{role}\n", loss=False)

    def _close(self, *, loss: bool) -> None:
        self._special(IM_END, loss=loss)
        self._text("\n", loss=False)

    def _no_thought(self) -> None:
        for name in (THINK_OPEN, THINK_CLOSE):
            self._special(name, loss=False)
            self._text("\n\n", loss=False)
        self._flush()

    def _text(self, text: str, *, loss: bool) -> None:
        if loss != self._loss or not self.template.one_piece:
            self._flush()
            self._loss = loss
        self._plain += text

    def _special(self, name: str, *, loss: bool) -> None:
        self._flush()
        self._write([self.tokenizer.id(name)], loss)

    def _flush(self) -> None:
        if self._plain:
            ids = self.tokenizer.encode(self._plain)
            self._plain = ""
            self._write(ids, self._loss)

    def _reserve(self, tokens: int, what: str, remedy: str) -> None:
        """Count tokens; DataError when the document no longer fits a pack."""
        self._tokens += tokens
        limit = self.encoder.max_tokens
        if limit is not None and self._tokens > limit:
            raise DataError(
                f"the sample has at least {self._tokens:,} tokens ({what}), more than a pack "
                f"holds (tokens_per_pack {limit:,}). Raise tokens_per_pack to at least "
                f"{self._tokens:,}, or {remedy}"
            )

    def _write(self, ids: list[int], loss: bool) -> None:
        self._reserve(len(ids), "of text and images", "split the record")
        if loss:
            if self._row == 0:
                raise DataError("the first token of a document cannot be predicted")
            self.labels += [(self._row - 1 + n, token) for n, token in enumerate(ids)]
        self.ids += ids
        self._row += len(ids)
        last = self.spans[-1] if self.spans else None
        if isinstance(last, Text):
            self.spans[-1] = Text(last.length + len(ids))
        else:
            self.spans.append(Text(len(ids)))

    def _input(self, part: SampleImage | SampleClip) -> None:
        if isinstance(part, SampleClip):
            self._input_clip(part)
            return
        sampling = self.encoder.config.sampling
        if self.encoder.input_pixels is not None:
            bounds = self.encoder.input_pixels
        elif any(p.role == "target" for p in self.sample.images):
            bounds = sampling.edit_bounds(sum(p.role == "input" for p in self.sample.images))
        else:
            bounds = sampling.chat_min_pixels, sampling.chat_max_pixels
        pixels = part.pixels()
        size = self._fit(pixels, bounds)
        self._reserve_image(size, 1, "input_pixels")
        self._shown_images += 1
        several = len(self.sample.images) > 1 and self.sample.task not in GENERATION_TASKS
        if several and self.template.numbered:
            self._text(self.template.numbered.format(self._shown_images), loss=False)
        self._shown(resized(pixels, size))

    def _input_clip(self, part: SampleClip) -> None:
        """A clip to look at: the time of each tube or frame, and its tokens."""
        per_tube = tube_frames(self.encoder.config, und=True) if part.tubes else 1
        frames = part.pixels()
        bounds = self.encoder.input_pixels or frame_bounds(self.encoder.config, len(frames))
        size = self._fit(frames[0], bounds)
        self._reserve_image(size, 1, "input_pixels", math.ceil(len(frames) / per_tube))
        shown = np.stack([resized(frame, size) for frame in frames])
        self._shown_frames += len(frames)
        missing = -len(shown) % per_tube
        shown = np.concatenate([shown, np.repeat(shown[-1:], missing, axis=0)])
        for first in range(0, len(shown), per_tube):
            self._text(time_stamp(part.seconds(first)), loss=False)
            self._shown(shown[first : first + per_tube] if part.tubes else shown[first])

    def _shown(self, pixels: Pixels) -> None:
        """A clean image or tube between its marks."""
        self._special(self.template.image_open, loss=False)
        self._clean(pixels)
        self._special(self.template.image_close, loss=False)

    def _open_target(self) -> None:
        """What inference writes between an answer's head and its image."""
        for name in self.template.paint_open:
            self._special(name, loss=False)

    def _target(self, part: SampleImage | SampleClip, *, loss: bool = True) -> None:
        """A target image or clip: noisy blocks, and of an image a clean copy for what follows.

        With `loss` the token that opens an image with a clean copy is predicted.
        """
        continues = self.sample.task not in GENERATION_TASKS
        if not part.loss:
            raise DataError("an image in an answer must be a target")
        if isinstance(part, SampleClip) and continues:
            raise DataError(
                f"task {self.sample.task}: a clip to generate ends its sample, which "
                "t2v and next_frames have"
            )
        if self._by_frame(part):
            self._frames(part)
            return
        if continues:
            self._special(self.template.image_open, loss=loss)
        else:
            self._open_target()
        pixels = self._sized_target(part, copies=self.encoder.noise_draws + continues)
        self._noise(pixels, part)
        if continues:
            self._clean(pixels)
            self._special(self.template.image_close, loss=False)

    def _by_frame(self, part: SampleImage | SampleClip) -> TypeIs[SampleClip]:
        """Whether a target is a clip whose frames are generated as images, one after another."""
        return isinstance(part, SampleClip) and self.encoder.config.frame_by_frame

    def _frames(self, part: SampleClip, *, context: bool = True) -> None:
        """A target clip as images in the order of their generation, each behind its time.

        Without `context` only the noisy blocks, as guidance sees them.
        """
        follows = any(clip.role == "input" for clip in self.sample.clips)
        order = frame_order(len(part.frames), follows=follows)
        targets = self.encoder.frame_targets.draw(self.rng, len(order), follows=follows)
        for place, frame in enumerate(order[: targets.stop]):
            carries, seen = place in targets, context and place + 1 < targets.stop
            if not carries and not seen:
                continue
            image = SampleImage(part.frames[frame], "target")
            pixels = self._sized_target(image, copies=self.encoder.noise_draws * carries + seen)
            if context:
                self._text(time_stamp((self._shown_frames + frame) / part.fps), loss=False)
                self._special(self.template.image_open, loss=False)
            if carries:
                self._noise(pixels, image)
            if seen:
                self._clean(pixels)
                self._special(self.template.image_close, loss=False)

    def _noise(self, pixels: Pixels, part: SampleImage | SampleClip) -> None:
        block = Noise.of(self._grid(pixels))
        if isinstance(part, SampleClip) and self.encoder.config.video is not None:
            step = self.encoder.config.video.position_fps / part.fps
            block = replace(block, step=step)
        for _ in range(self.encoder.noise_draws):
            self.spans.append(block)
            self.targets.append(pixels)

    def _clean(self, pixels: Pixels) -> None:
        image = Image.of(self._grid(pixels))
        self.spans.append(image)
        self.images.append(pixels)
        self._row += image.length

    def _grid(self, pixels: Pixels) -> Grid:
        config = self.encoder.config
        grid = Grid.of_pixels(pixels.shape[-3], pixels.shape[-2], config.token_size)
        if pixels.ndim == 3 or config.video is None:
            return grid
        return replace(grid, tubes=len(pixels) // config.video.tube_frames)

    def _sized_target(self, part: SampleImage | SampleClip, *, copies: int) -> Pixels:
        """A target in its size for training; the document holds it `copies` times."""
        pixels, encoder, tubes = part.pixels(), self.encoder, 0
        frames = list(pixels) if isinstance(part, SampleClip) else [pixels]
        if isinstance(part, SampleClip):
            per_tube = tube_frames(self.encoder.config)
            if len(frames) % per_tube:
                raise DataError(
                    f"a clip to generate has {len(frames)} frames, not a multiple of {per_tube}"
                )
            tubes = len(frames) // per_tube
        height, width = frames[0].shape[:2]
        if encoder.target_buckets:
            bucket = nearest_bucket(width, height, encoder.target_buckets)
            self._reserve_image((bucket[1], bucket[0]), copies, "target_buckets", tubes)
            if bucket == (width, height):
                return pixels
            sized = [np.asarray(crop_to(PilImage.fromarray(one), bucket)) for one in frames]
        else:
            sampling = encoder.config.sampling
            bounds = encoder.target_pixels or (sampling.edit_min_pixels, sampling.edit_max_pixels)
            size = self._fit(frames[0], bounds)
            self._reserve_image(size, copies, "target_pixels", tubes)
            sized = [resized(one, size) for one in frames]
        return np.stack(sized) if isinstance(part, SampleClip) else sized[0]

    def _reserve_image(
        self, size: tuple[int, int], copies: int, setting: str, pieces: int = 0
    ) -> None:
        """Count the tokens of an image of `size` = (height, width) pixels, before it is resized.

        Of a clip `pieces` are its tubes or frames.
        """
        height, width = size
        tokens = max(1, pieces) * (height * width // self.encoder.config.token_size**2)
        what, remedy = "an image", f"bound images by {setting}"
        if pieces:
            what = f"a clip of {pieces} tubes or frames"
            remedy = f"take fewer frames, or bound their size by {setting}"
        times = f" {copies} times (noise_draws {self.encoder.noise_draws})" if copies > 1 else ""
        self._reserve(
            copies * tokens, f"{what} of {width}x{height} pixels has {tokens:,}{times}", remedy
        )

    def _fit(self, pixels: Pixels, bounds: tuple[int, int]) -> tuple[int, int]:
        """(height, width) within bounds of the area, in pixels."""
        return fit_size(
            pixels.shape[0],
            pixels.shape[1],
            multiple=self.encoder.config.token_size,
            min_pixels=bounds[0],
            max_pixels=bounds[1],
        )

    def finish(self) -> Encoded:
        # Text after the last label or noisy block has no effect on the loss.
        self._plain = ""
        document = Document(tuple(self.spans))
        limit = self.encoder.config.max_positions
        if document.bound_t > limit:
            raise DataError(
                f"the sample is {document.bound_t} positions long, the model has {limit}"
            )
        rows, ids = zip(*self.labels, strict=True) if self.labels else ((), ())
        return Encoded(
            self.sample.id,
            self.sample.task,
            document,
            tuple(self.ids),
            rows,
            ids,
            tuple(self.images),
            tuple(self.targets),
        )
