"""Encoder: a sample as one training document, by the rules of a model and of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from neounify.config import ModelConfig
from neounify.data.clips import read_clips
from neounify.data.document import GENERATION_TASKS, DocumentWriter, Encoded, pictured
from neounify.data.draws import FrameTargets, GuidanceDropout
from neounify.data.sample import DataError, Sample
from neounify.text.tokenizer import Tokenizer

__all__ = ["GENERATION_TASKS", "Encoded", "Encoder"]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encoder of samples as documents for one model.

    `noise_draws` noisy copies of every target share the document before them: the
    understanding stream never sees noise, so further draws cost the generation stream only.
    `target_buckets` are (width, height) pairs to crop targets to; without any, targets keep their
    shape within `target_pixels` = (least, greatest) area. `input_pixels` bounds the area of input
    images in the same way. None stands for the checkpoint's bounds. A document of more than
    `max_tokens` tokens is refused before its images are resized. `frame_targets` draws the frames
    that are targets, of clips that the model generates frame by frame.

    Raises DataError for buckets that are not multiples of the model's token, and for shares of
    frames where the model generates clips whole.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    system_message: str = ""
    dropout: GuidanceDropout = field(default_factory=GuidanceDropout)
    frame_targets: FrameTargets = field(default_factory=FrameTargets)
    noise_draws: int = 1
    target_pixels: tuple[int, int] | None = None
    target_buckets: tuple[tuple[int, int], ...] = ()
    input_pixels: tuple[int, int] | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.frame_targets != FrameTargets() and not self.config.frame_by_frame:
            raise DataError(
                "frame_targets is for models that generate clips frame by frame "
                "(video.frame_by_frame); leave it out"
            )
        side = self.config.token_size
        for width, height in self.target_buckets:
            if width < side or height < side or width % side or height % side:
                raise DataError(
                    f"target_buckets: both sides must be multiples of {side} pixels (one token), "
                    f"got {width}x{height}"
                )

    @property
    def _target_area(self) -> int:
        """Largest area of a target in pixels."""
        if self.target_buckets:
            return max(width * height for width, height in self.target_buckets)
        return self.target_pixels[1] if self.target_pixels else self.config.sampling.edit_max_pixels

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Encoded:
        """Encode one sample, after its clips are read; `rng` draws dropout and frames of clips.

        Raises DataError.
        """
        drop = self.dropout.draw(rng)
        sample = read_clips(sample, self.config, self._target_area)
        has_target = any(part.role == "target" for part in pictured(sample))
        writer = DocumentWriter(self, sample, rng)
        if has_target and drop != "none":
            # Guidance of clips frame by frame sees neither prompt nor frames.
            by_frame = self.config.frame_by_frame and any(clip.loss for clip in sample.clips)
            writer.without_text(images=drop == "text" and not by_frame)
        else:
            for turn in sample.turns:
                writer.turn(turn)
        return writer.finish()
