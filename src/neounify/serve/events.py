"""Contract between HTTP and the engines: requests, events, errors, the `Service` protocol.

The HTTP layer and the engines depend on each other only through the protocol `Service`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from neounify.config import ModelConfig
from neounify.errors import ServiceError
from neounify.tasks.chat import ChatRequest, CompletionRequest
from neounify.tasks.events import TaskEvent
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.requests import ImageRequest

ServiceRequest = ChatRequest | CompletionRequest | ImageRequest | InterleaveRequest
ServiceEvent = TaskEvent


class Overloaded(ServiceError):
    """More requests than the limits allow; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(ServiceError):
    """The request ran out of the time it was given."""


class Draining(ServiceError):
    """The service is shutting down and takes no new requests."""


class Service(Protocol):
    """A service that answers many requests at once."""

    @property
    def config(self) -> ModelConfig:
        """Config of the model."""

    def check_together(self, requests: Sequence[ServiceRequest]) -> None:
        """RequestError if the limits can never admit all of these requests at the same time.

        ImageError for an image that is too large by itself.
        """

    def answer(
        self, request: ServiceRequest, *, previews: int = 0, deadline: float | None = None
    ) -> AsyncIterator[ServiceEvent]:
        """Events of one request; `Finished` comes last.

        `previews` is how many previews of each image are wanted at most, evenly over its steps
        (the finished image not counted). `deadline` is in seconds from now. Closing the iterator
        frees the request's work within one step. Raises PromptError, ImageError and RequestError
        for requests the model cannot answer, and ServiceError.
        """
