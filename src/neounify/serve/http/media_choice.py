"""Field `media_io_kwargs` of chat bodies: how input media are read, in vLLM's words."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field, model_validator

from neounify.serve.http.errors import bad_request


class _MediaFields(BaseModel):
    """Fields of media, of which unknown ones are refused; `without_effect` are not read."""

    path: ClassVar[str]
    without_effect: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        for name in fields:
            if name not in known and name not in cls.without_effect:
                path = f"{cls.path}.{name}"[:80]
                message = f"{path}: this field is not known; the fields are {', '.join(known)}"
                raise bad_request(message, path, "invalid_value")
        return fields


class VideoChoice(_MediaFields):
    """Which frames of clips are seen."""

    path = "media_io_kwargs.video"
    # vLLM's name of the library that decodes; it chooses no other frames.
    without_effect = frozenset(("video_backend",))

    fps: Annotated[float, Field(gt=0, le=240)] | None = None
    num_frames: Annotated[int, Field(ge=1, description="At most so many.")] | None = None
    tubes: Annotated[bool, Field(description="Several are seen as one. Extension.")] = False


class MediaChoice(_MediaFields):
    """How input media are read, in vLLM's words."""

    path = "media_io_kwargs"

    video: VideoChoice = VideoChoice()
