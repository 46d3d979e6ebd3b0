"""Models under test: a pipeline of ours, or an endpoint with OpenAI's routes."""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import PIL.Image

from neounify.bench.cases import Record
from neounify.errors import ConfigError, ImageError, NeounifyError
from neounify.flow.sampling import ImageSampling
from neounify.image import read_image
from neounify.image.pixels import output_size
from neounify.pipeline import ImagePart, Pipeline, TextPart
from neounify.services import (
    HTTP,
    BadAnswer,
    at_once,
    chat_message,
    parse_answer,
    post,
    post_json,
)
from neounify.tasks.image import ImageRequest

Image = PIL.Image.Image
Size = tuple[int, int]
MAX_ANSWER_TOKENS, MAX_STORY_TOKENS, MAX_STORY_IMAGES = 1024, 4096, 10
MAX_IMAGE_ANSWER_BYTES = 2**28
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One output to make: an image of a prompt, an edit of `images`, or an answer about them."""

    prompt: str
    seed: int
    images: tuple[Image, ...] = ()


class Subject(Protocol):
    """A model under test. Every call gives one result per job, in order.

    What fails is the error of its job, or raised if the jobs fail together: NoAnswer for a model
    that cannot be reached, another NeounifyError for what it refuses.
    """

    def describe(self) -> Record:
        """The model and its settings, as plain data."""

    def images(self, jobs: Sequence[Job]) -> Sequence[Image | NeounifyError]:
        """One image per job; edits where the job has images."""

    def answers(self, jobs: Sequence[Job]) -> Sequence[str | NeounifyError]:
        """The text of an answer per job."""

    def stories(self, jobs: Sequence[Job]) -> Sequence[list[str | Image] | NeounifyError]:
        """Texts and images in turn, per job."""


class LocalSubject:
    """A pipeline; `sampling` are fields of ImageSampling, `size` None the checkpoint's default.

    Raises RequestError for sampling out of range. Texts are the likeliest ones.
    """

    def __init__(
        self,
        pipe: Pipeline,
        model: Mapping[str, Any],
        *,
        size: Size | None = None,
        think: bool = False,
        sampling: Mapping[str, Any] | None = None,
        max_new_tokens: int = MAX_ANSWER_TOKENS,
    ) -> None:
        self._pipe, self._model = pipe, dict(model)
        self._size, self._think, self._tokens = size, think, max_new_tokens
        self._knobs = dict(sampling or {})
        self._sampling = {
            editing: ImageSampling(**self._knobs).resolve(pipe.config, editing=editing)
            for editing in (False, True)
        }

    def describe(self) -> Record:
        sampling = self._sampling[True]
        return {
            "model": self._model,
            "size": None if self._size is None else list(self._size),
            "think": self._think,
            "max_new_tokens": self._tokens,
            "sampling": {
                "steps": sampling.steps,
                "guidance": sampling.guidance.text,
                "image_guidance": sampling.guidance.image,
                "shift": sampling.shift,
            },
        }

    def images(self, jobs: Sequence[Job]) -> list[Image]:
        requests = [self._request(job) for job in jobs]
        results: dict[int, Image] = {}
        for size in dict.fromkeys((r.width, r.height) for r in requests):
            numbers = [n for n, r in enumerate(requests) if (r.width, r.height) == size]
            together = self._pipe.generate_requests([requests[n] for n in numbers])
            results.update(zip(numbers, together.images, strict=True))
        return [results[number] for number in range(len(jobs))]

    def answers(self, jobs: Sequence[Job]) -> list[str]:
        results = self._pipe.chat_batch(
            [job.prompt for job in jobs],
            [job.images for job in jobs],
            max_new_tokens=self._tokens,
            think=self._think,
        )
        return [result.text for result in results]

    def stories(self, jobs: Sequence[Job]) -> list[list[str | Image]]:
        return [self._story(job) for job in jobs]

    def _story(self, job: Job) -> list[str | Image]:
        width, height = self._size or (None, None)
        parts: list[str | Image] = []
        for part in self._pipe.interleave(
            job.prompt,
            job.images,
            max_images=MAX_STORY_IMAGES,
            max_new_tokens=MAX_STORY_TOKENS,
            width=width,
            height=height,
            seed=job.seed,
            think=self._think,
            **self._knobs,
        ):
            if isinstance(part, ImagePart):
                parts.append(part.image)
            elif isinstance(part, TextPart) and parts and isinstance(parts[-1], str):
                parts[-1] += part.text
            elif isinstance(part, TextPart):
                parts.append(part.text)
        return parts

    def _request(self, job: Job) -> ImageRequest:
        width, height = self._size or (None, None)
        first = job.images[0] if job.images else None
        width, height = output_size(self._pipe.config, width, height, first)
        return ImageRequest(
            prompt=job.prompt,
            width=width,
            height=height,
            sampling=self._sampling[first is not None],
            images=job.images,
            seed=job.seed,
            think=self._think,
        )


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An OpenAI-compatible service: `url` ends with /v1, `fields` are added to every request.

    `timeout` in seconds per request, `retries` further attempts, `concurrency` requests at once,
    `max_new_tokens` of an answer, None for the service's own limit. The key is no part of what a
    run records. Raises ConfigError for a URL of another kind.
    """

    url: str
    model: str | None = None
    key: str | None = None
    timeout: float = 600.0
    retries: int = 4
    concurrency: int = 8
    size: Size | None = None
    max_new_tokens: int | None = None
    fields: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(HTTP):
            raise ConfigError(f"an endpoint begins with http:// or https://, not {self.url[:80]!r}")

    def describe(self) -> Record:
        return {
            "model": {"endpoint": self.url, "model": self.model},
            "size": None if self.size is None else list(self.size),
            "max_new_tokens": self.max_new_tokens,
            "fields": dict(self.fields or {}),
        }

    def images(self, jobs: Sequence[Job]) -> list[Image | NeounifyError]:
        return self._each(self._image, jobs)

    def answers(self, jobs: Sequence[Job]) -> list[str | NeounifyError]:
        return self._each(self._answer, jobs)

    def stories(self, jobs: Sequence[Job]) -> list[list[str | Image] | NeounifyError]:
        return self._each(self._story, jobs)

    def _each(self, call: Callable[[Job], R], jobs: Sequence[Job]) -> list[R | NeounifyError]:
        def one(job: Job) -> R | NeounifyError:
            try:
                return call(job)
            except NeounifyError as error:
                return error

        return at_once(one, jobs, self.concurrency)

    def _image(self, job: Job) -> Image:
        fields: Record = {"prompt": job.prompt, "n": 1, "response_format": "b64_json"}
        if self.size is not None:
            fields["size"] = f"{self.size[0]}x{self.size[1]}"
        fields |= self._common(job)
        if job.images:
            body, content_type = _form(fields, job.images)
            options = self._options({"Content-Type": content_type})
            document = parse_answer(post(f"{self.url}/images/edits", body, **options))
        else:
            document = post_json(f"{self.url}/images/generations", fields, **self._options())
        try:
            encoded = document["data"][0]["b64_json"]
        except (KeyError, IndexError, TypeError) as error:
            raise BadAnswer(f"the answer has no data[0].b64_json: {str(document)[:80]}") from error
        return _decoded(encoded)

    def _answer(self, job: Job) -> str:
        most = {} if self.max_new_tokens is None else {"max_tokens": self.max_new_tokens}
        content = self._message(job, most)["content"]
        if not isinstance(content, str):
            raise BadAnswer(f"the answer's content is no text: {str(content)[:80]}")
        return content

    def _story(self, job: Job) -> list[str | Image]:
        extra = {"modalities": ["text", "image"], "content_format": "parts"}
        content = self._message(job, extra)["content"]
        if isinstance(content, str):
            return [content]
        try:
            return [
                "" + part["text"]
                if part["type"] == "text"
                else _decoded(part["image_url"]["url"].partition(",")[2])
                for part in content
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise BadAnswer(f"the answer's content has no parts: {str(content)[:80]}") from error

    def _message(self, job: Job, extra: Mapping[str, Any]) -> Record:
        return chat_message(
            self.url,
            job.prompt,
            [base64.b64encode(png(image)).decode() for image in job.images],
            {"temperature": 0, **self._common(job), **extra},
            **self._options(),
        )

    def _common(self, job: Job) -> Record:
        named = {} if self.model is None else {"model": self.model}
        return {"seed": job.seed, **named, **(self.fields or {})}

    def _options(self, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        keys = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        return {
            "timeout": self.timeout,
            "retries": self.retries,
            "headers": {**keys, **(headers or {})},
            "max_bytes": MAX_IMAGE_ANSWER_BYTES,
        }


def png(image: Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _decoded(encoded: Any) -> Image:
    """The image of an answer, in base64. Raises BadAnswer."""
    try:
        return read_image(base64.b64decode(encoded, validate=True))
    except (TypeError, ValueError, ImageError) as error:
        raise BadAnswer(f"the answer's image cannot be read: {error}") from error


def _form(fields: Mapping[str, Any], images: Sequence[Image]) -> tuple[bytes, str]:
    """A multipart form of fields and PNG files, and its content type."""
    boundary = f"neounify-{secrets.token_hex(16)}"
    name = "image" if len(images) == 1 else "image[]"
    parts = [
        f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}'.encode()
        for key, value in fields.items()
    ]
    parts += [
        f'Content-Disposition: form-data; name="{name}"; filename="{number}.png"\r\n'
        "Content-Type: image/png\r\n\r\n".encode()
        + png(image)
        for number, image in enumerate(images)
    ]
    body = b"".join(f"--{boundary}\r\n".encode() + part + b"\r\n" for part in parts)
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
