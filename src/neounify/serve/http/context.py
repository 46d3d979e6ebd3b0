"""Shared state of the routes of one server: the service, settings, metrics, limits of a request."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import partial
from typing import Annotated

import PIL.Image
from fastapi import Depends, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from neounify.flow.sampling import ImageSampling, ResolvedSampling
from neounify.serve.http.errors import ApiError, bad_request, blame
from neounify.serve.http.fields import ImageFields, RequestFields
from neounify.serve.http.image_urls import ImageFetcher
from neounify.serve.http.media import HttpHooks, ImageDecoder, RequestImages, ResultStore
from neounify.serve.http.settings import HttpSettings
from neounify.serve.http.streaming import answer, answers_in_groups
from neounify.serve.service import Service, ServiceRequest
from neounify.tasks.events import TaskEvent
from neounify.tasks.requests import output_size, size_of_shape

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class HttpMetrics:
    """Prometheus metrics of HTTP; those of the engines are collectors in the same `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "neounify_http_requests",
            "HTTP requests by route and status; 499 when the client went away.",
            ("method", "route", "status"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "neounify_http_in_flight", "HTTP requests being read or answered.", registry=registry
        )
        self.first_token = Histogram(
            "neounify_time_to_first_token_seconds",
            "From a request's hand-over to the engines to its first text, preview or image.",
            ("task",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.total = Histogram(
            "neounify_http_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )


@dataclass(frozen=True)
class Context:
    """One server: its service, settings, and what its routes share."""

    service: Service
    settings: HttpSettings
    hooks: HttpHooks
    metrics: HttpMetrics
    results: ResultStore
    fetcher: ImageFetcher
    decoder: ImageDecoder
    started: int
    """Start of the server, Unix time in seconds."""

    def answer(self, request: ServiceRequest, fields: RequestFields) -> AsyncGenerator[TaskEvent]:
        """The events of one request, within its own deadline and the server's."""
        max_seconds = self.settings.limits.deadline
        return answer(
            self.service,
            request,
            previews=fields.partial_images if isinstance(fields, ImageFields) else 0,
            deadline=min(fields.deadline or max_seconds, max_seconds),
            first_token=self.metrics.first_token,
        )

    def answers(
        self, groups: Sequence[Sequence[ServiceRequest]], fields: RequestFields
    ) -> AsyncGenerator[tuple[int, TaskEvent]]:
        """(number of the request, event) of several requests; those of a group have one prompt.

        Raises ApiError 400 at once for more than the service can ever admit together, instead of
        429 each time the caller tries again.
        """
        together = [request for group in groups for request in group]
        if len(together) > 1:
            with blame("n" if getattr(fields, "n", 1) > 1 else "prompt"):
                self.service.check_together(together)
        return answers_in_groups(
            [[partial(self.answer, request, fields) for request in group] for group in groups]
        )

    def input_images(self, count: int, field: str) -> RequestImages:
        """The reader of the `count` images of one request. Raises ApiError for too many."""
        max_count = self.settings.limits.images
        if count > max_count:
            raise bad_request(f"{count} images in one request; at most {max_count} are read", field)
        sampling = self.service.config.sampling
        max_pixels = max(sampling.chat_max_pixels, sampling.edit_max_pixels)
        # Up to four times the area that the model reads, less the more images there are.
        keep = max_pixels * max(1, min(4, 8 // max(1, count)))
        return RequestImages(self.decoder, self.fetcher, self.results, self.settings, keep)

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any model but the served one."""
        served = self.settings.model_name
        if name not in (None, "", served):
            raise ApiError(
                404,
                f"The model {name[:80]!r} is not served here; this is {served!r}.",
                param="model",
                code="model_not_found",
            )

    def check_n(self, n: int) -> None:
        """Raises ApiError for more answers than this server gives to one request."""
        max_n = self.settings.limits.n
        if n > max_n:
            raise bad_request(f"n: {n} is over this server's {max_n}", "n")

    def check_tokens(self, count: int, field: str) -> int:
        """`count`, a number of tokens to generate. Raises ApiError above the server's limit."""
        max_tokens = self.settings.limits.tokens
        if count > max_tokens:
            raise bad_request(f"{field}: {count} is over this server's {max_tokens}", field)
        return count

    async def check_prompt(self, texts: Iterable[str], images: Sequence[PIL.Image.Image]) -> None:
        """Raises ApiError for too much text, Refused where a hook refuses it.

        `texts` are iterated in a thread.
        """

        def check() -> None:
            text, max_chars = "\n".join(texts), self.settings.limits.prompt_chars
            if len(text) > max_chars:
                raise bad_request(
                    f"The text has {len(text)} characters; at most {max_chars} are read."
                )
            self.hooks.check_prompt(text, images)

        await asyncio.to_thread(check)

    def sampling(
        self, fields: ImageFields, *, editing: bool, steps: int | None
    ) -> ResolvedSampling:
        """Sampling of images. Raises RequestError for values out of range, ApiError over limits."""
        names = [field.name for field in dataclass_fields(ImageSampling)]
        wanted = ImageSampling(**{name: getattr(fields, name) for name in names} | {"steps": steps})
        sampling = wanted.resolve(self.service.config, editing=editing)
        max_steps = self.settings.limits.steps
        if sampling.steps > max_steps:
            raise bad_request(f"steps: {sampling.steps} is over this server's {max_steps}", "steps")
        return sampling

    def _requested_size(
        self, fields: ImageFields, reference: PIL.Image.Image | None
    ) -> tuple[int, int]:
        config, ratio = self.service.config, fields.ratio
        if fields.width_height is not None:
            width, height = fields.width_height
            if ratio is not None and width * ratio[1] != height * ratio[0]:
                raise bad_request(
                    f"size: {fields.size} has not the aspect_ratio {fields.aspect_ratio}; "
                    "give one of them alone",
                    "size",
                )
            with blame("size"):
                return output_size(config, width, height, reference)
        if ratio is None and fields.pixels is None:
            return output_size(config, None, None, reference)
        if ratio is None:
            ratio = config.sampling.image_size if reference is None else reference.size
        return size_of_shape(config, ratio, fields.pixels)

    def size(self, fields: ImageFields, reference: PIL.Image.Image | None) -> tuple[int, int]:
        """(width, height) of an image, by default in the shape of `reference`.

        Raises ImageError for a size that the model cannot have, ApiError over limits.
        """
        width, height = self._requested_size(fields, reference)
        max_pixels = self.settings.limits.output_pixels
        if width * height > max_pixels:
            raise bad_request(
                f"size: {width}x{height} is {width * height} pixels, "
                f"over this server's {max_pixels}",
                "size",
            )
        return width, height


def seed_or_random(seed: int | None) -> int:
    """The caller's seed, or a random one, which is reported with the answer."""
    return secrets.randbelow(2**32) if seed is None else seed


def _of_request(request: Request) -> Context:
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


Shared = Annotated[Context, Depends(_of_request)]
"""The Context as an argument of a route."""
