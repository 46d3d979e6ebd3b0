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
class Writing:
    """What is written of one sequence, wherever its keys and values lie.

    `ids` are the tokens chosen so far, `logprobs` what was asked for with each. A token of
    `stop_ids` ends the sequence: it is recorded in `stopped_by`, neither in `ids` nor in the
    cache. `pending` is the last of `ids` as long as it is not in the cache, which is so when a
    limit ended the sequence.
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
        """Take in the next token; None if it ends the sequence. Raises a choice's `error`."""
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
        """End the sequence from outside, for instance at a stop string."""
        self.finish_reason = "stop"

    def resume(self) -> None:
        """Go on after a stop token that the caller has dealt with."""
        self.stopped_by = self.finish_reason = None


def choose_tokens(logits: Tensor, writings: Sequence[Writing]) -> list[Choice]:
    """The next token of each sequence, for it to `take`; `logits` are [B, vocab]."""
    return sample(logits, [writing.sampling for writing in writings])
