"""How one sequence's tokens are drawn: its settings, and the state it draws with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool
from torch import Tensor

from neounify.errors import RequestError

MAX_LOGPROBS = 20
"""Alternatives whose log-probability may be asked for with every token."""


class Constraint(Protocol):
    """Which tokens may come next in one sequence, for instance by a grammar; holds its state."""

    def mask(self) -> Tensor:
        """The tokens allowed next: bool [≤ vocab], or int32 [≤ vocab / 32] with one bit per token.

        Bit n % 32 of word n // 32 stands for token n. Tokens beyond its end are not allowed.
        """

    def accept(self, token: int) -> None:
        """Take in a token that was chosen. A token that ends the sequence is not passed."""


class ConstraintFactory(Protocol):
    """Plain data that a constraint is made from, so that it can travel to another process."""

    def start(self) -> Constraint:
        """A constraint at its beginning. Raises RequestError."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn; `temperature` 0 takes the likeliest one.

    `top_k` (0: all) keeps the k likeliest tokens, of those `top_p` in (0, 1] the smallest set that
    holds that much of their probability, of those `min_p` in [0, 1] the ones at least that
    fraction as likely as the likeliest. `repetition_penalty` (1: none) divides positive and
    multiplies negative logits of tokens already in the context. `logprobs` (None: none) asks for
    the log-probability of each token and of that many likeliest alternatives, 0 to 20, as the
    model gives them before all of the above. `constraint` says which tokens are allowed at all.
    Raises RequestError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    constraint: ConstraintFactory | None = None

    def __post_init__(self) -> None:
        count = self.logprobs
        for name, ok, rule in (
            ("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a positive number"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, 1 is none"),
            ("logprobs", count is None or 0 <= count <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        ):
            if not ok:
                raise RequestError(f"{name} must be {rule}, got {getattr(self, name)}", param=name)


class SamplingState:
    """What one sequence draws with: a random state of its own, and the tokens it has seen.

    `context` are the ids it begins with. With its own random state a request draws the same alone
    and in any company.
    """

    def __init__(self, settings: SamplingSettings, context: Sequence[int] = ()) -> None:
        self.settings = settings
        self.constraint = None if settings.constraint is None else settings.constraint.start()
        self._context = list(context) if settings.repetition_penalty != 1 else None
        self._seen: Tensor | None = None
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token of the logits as they are is taken."""
        s = self.settings
        return s.temperature == 0 and s.repetition_penalty == 1 and self.constraint is None

    def accept(self, token: int) -> None:
        """Take in a token that was chosen and is part of the text."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._context is None:
            return
        if self._seen is None:
            self._context.append(token)
        else:
            self._seen[token] = True

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def seen(self, vocab: int, device: torch.device) -> Bool[Tensor, " vocab"]:
        """The tokens of the context."""
        if self._seen is None:
            self._seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self._seen[torch.tensor(self._context or [], dtype=torch.int64, device=device)] = True
        return self._seen
