"""State of a sequence that is being decoded, and the next tokens of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from neounify.decode.sampler import Choice, LogProbs, sample
from neounify.decode.sampling import SamplingState

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class DecodeState:
    """Decoded tokens of one sequence, its sampling state and why it ended.

    `ids` are the tokens so far, `logprobs` their log-probabilities if requested. Stop tokens are
    recorded in `stopped_by`; they enter neither `ids` nor the cache. `pending` is the last of
    `ids` while it is not in the cache, as when a limit ended the sequence.
    """

    sampling: SamplingState
    stop_ids: frozenset[int]
    max_new_tokens: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[LogProbs] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    stopped_by: int | None = None
    finish_reason: FinishReason | None = None

    def take(self, choice: Choice) -> int | None:
        """Record the next token; None if it ends the sequence. Raises a choice's `error`."""
        if choice.problem is not None:
            raise choice.error()
        token = choice.token
        if token in self.stop_ids:
            self.stopped_by, self.finish_reason = token, "stop"
            return None
        self.ids.append(token)
        self.sampling.accept(token)
        if choice.logprobs is not None:
            self.logprobs.append(choice.logprobs)
        self.pending = [token]
        if len(self.ids) >= self.max_new_tokens:
            self.finish_reason = "length"
        return token

    def stop(self) -> None:
        """End the sequence, for instance at a stop string."""
        self.finish_reason = "stop"

    def resume(self) -> None:
        """Continue after a stop token that the caller has handled."""
        self.stopped_by = self.finish_reason = None


def choose_tokens(logits: Tensor, states: Sequence[DecodeState]) -> list[Choice]:
    """The next token of each sequence, for it to `take`; `logits` are [B, vocab]."""
    return sample(logits, [state.sampling for state in states])
