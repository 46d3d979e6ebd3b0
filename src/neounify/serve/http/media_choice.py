"""Field `media_io_kwargs` of chat bodies: how input media are read, in vLLM's words."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from neounify.serve.http.fields import unknown_field

MAX_FPS = 240.0
"""Greatest rate that a caller may name, at which nearly every clip shows all of its frames."""


class _MediaFields(BaseModel):
    """Fields of media: null means absent, unknown ones are refused, `without_effect` not read."""

    path: ClassVar[str]
    without_effect: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name in fields:
            if name not in cls.model_fields and name not in cls.without_effect:
                raise unknown_field(name, cls.model_fields, f"{cls.path}.")
        return {name: value for name, value in fields.items() if value is not None}


class VideoChoice(_MediaFields):
    """Which frames of clips are seen."""

    path = "media_io_kwargs.video"
    # vLLM's name of the library that decodes; it chooses no other frames.
    without_effect = frozenset(("video_backend",))

    fps: Annotated[float, Field(gt=0, le=MAX_FPS)] | None = None
    num_frames: Annotated[
        Annotated[int, Field(ge=1)] | Literal[-1] | None,
        Field(description="At most so many; -1: all, within the server's limit."),
    ] = None
    tubes: Annotated[bool, Field(description="Several are seen as one. Extension.")] = False

    @property
    def all_frames(self) -> bool:
        """Whether all frames are asked for, as far as the server shows them."""
        return self.num_frames == -1

    @property
    def max_frames(self) -> int:
        """The limit on frames that is asked for; 0 for none."""
        return max(0, self.num_frames or 0)

    @property
    def sampled_fps(self) -> float | None:
        """Frames per second that are taken of a file; None for the model's rule."""
        every = MAX_FPS if self.all_frames and not self.tubes else None
        return self.fps or every


class MediaChoice(_MediaFields):
    """How input media are read, in vLLM's words."""

    path = "media_io_kwargs"

    video: VideoChoice = VideoChoice()
