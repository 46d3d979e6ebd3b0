"""One text answer under way: the events that concern it, summed up."""

from __future__ import annotations

from neounify.serve.events import Finished, ServiceEvent, TextPiece, TokenLogProb, ToolCallPiece

_LOG_PROB_BYTES = 60
"""About what one token takes in JSON."""


class Choice:
    """One of the answers to a request, as far as it has come."""

    def __init__(self) -> None:
        self.log_probs: list[TokenLogProb] = []
        self._finished: Finished | None = None

    def count(self, event: ServiceEvent) -> None:
        """Take in what the rest of a stream depends on."""
        if isinstance(event, Finished):
            self._finished = event

    def add(self, event: ServiceEvent) -> None:
        """Take in an event for an answer that is sent as a whole."""
        self.count(event)
        if isinstance(event, TextPiece | ToolCallPiece):
            self.log_probs += event.log_probs

    @property
    def finished(self) -> Finished:
        """The last event of the answer."""
        if self._finished is None:
            raise RuntimeError("the engines ended an answer without Finished")
        return self._finished

    @property
    def size(self) -> int:
        """About the bytes of its log-probabilities as JSON."""
        return _LOG_PROB_BYTES * sum(1 + len(token.top) for token in self.log_probs)
