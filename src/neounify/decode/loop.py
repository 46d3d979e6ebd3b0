"""The autoregressive loop over ids, for one sequence or many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from neounify.cache import Cache
from neounify.decode.forward import ModelInput, forward_und
from neounify.decode.sampler import Choice, LogProbs, sample
from neounify.decode.sampling import SamplingState
from neounify.model.layout import Text
from neounify.model.neo import NeoUnify

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


class Generation(Writing):
    """A sequence that is written into a cache of its own."""

    def __init__(
        self,
        cache: Cache,
        sampling: SamplingState,
        stop_ids: frozenset[int],
        max_new_tokens: int,
    ) -> None:
        super().__init__(sampling, stop_ids, max_new_tokens)
        self.cache = cache


def choose_tokens(logits: Tensor, writings: Sequence[Writing]) -> list[Choice]:
    """The next token of each sequence, for it to `take`; `logits` are [B, vocab]."""
    return sample(logits, [writing.sampling for writing in writings])


def decode(
    model: NeoUnify, generations: Sequence[Generation], hidden: Tensor
) -> Iterator[list[tuple[int, int]]]:
    """Write all sequences to their ends; `hidden` [B, D] are the states of their last tokens.

    Yields, per step, (number of the sequence, chosen token) of each that got one.
    """
    for generation in generations:
        if generation.max_new_tokens <= len(generation.ids):
            generation.finish_reason = "length"
    running = [n for n, g in enumerate(generations) if g.finish_reason is None]
    hidden = hidden[running]
    while running:
        choices = choose_tokens(model.logits(hidden), [generations[n] for n in running])
        taken: list[tuple[int, int]] = []
        for number, choice in zip(running, choices, strict=True):
            token = generations[number].take(choice)
            if token is not None:
                taken.append((number, token))
        if taken:
            yield taken
        taken = [(n, token) for n, token in taken if generations[n].finish_reason is None]
        if not taken:
            return
        running = [number for number, _ in taken]
        inputs = [ModelInput(generations[n].cache, (Text(1),), (token,)) for n, token in taken]
        hidden = forward_und(model, inputs)
        for number in running:
            generations[number].pending = []
