"""Choosing the next token from its logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.errors import RequestError

Choose = Callable[[Tensor, Sequence[int]], int]
"""(logits [vocab], ids of the context so far) -> id of the next token."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How tokens are drawn; `temperature` 0 takes the likeliest one.

    `top_p` in (0, 1] keeps the smallest set of tokens that holds that much
    probability, `top_k` (0: all) the k likeliest; `repetition_penalty` (1: none)
    divides positive and multiplies negative logits of tokens already in the context.
    Raises RequestError for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a positive number"),
            ("repetition_penalty", 0 < self.repetition_penalty <= 100, "above 0, 1 is none"),
        ):
            if not ok:
                raise RequestError(f"{name} must be {rule}, got {getattr(self, name)}")


def greedy(logits: Float[Tensor, " vocab"], context: Sequence[int]) -> int:
    """The likeliest token."""
    return int(logits.argmax())


def make_chooser(settings: SamplingSettings) -> Choose:
    """A chooser with a random state of its own, so a request draws the same in any company."""
    if settings.temperature == 0 and settings.repetition_penalty == 1:
        return greedy
    generator = torch.Generator()
    if settings.seed is None:
        generator.seed()
    else:
        generator.manual_seed(settings.seed)

    def choose(logits: Tensor, context: Sequence[int]) -> int:
        scores = penalise(logits.float().cpu(), context, settings.repetition_penalty)
        if settings.temperature == 0:
            return int(scores.argmax())
        return draw(probabilities(scores, settings), generator)

    return choose


def penalise(
    logits: Float[Tensor, " vocab"], context: Sequence[int], penalty: float
) -> Float[Tensor, " vocab"]:
    """Make every token of the context less likely (Keskar et al. 2019, CTRL, section 4.1)."""
    if penalty == 1 or not context:
        return logits
    seen = torch.tensor(sorted(set(context)))
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def probabilities(
    scores: Float[Tensor, " vocab"], settings: SamplingSettings
) -> Float[Tensor, " vocab"]:
    """Softmax at the temperature, cut to top_k and then to top_p, rescaled to sum to one."""
    ranked, order = (scores / settings.temperature).sort(descending=True, stable=True)
    p = ranked.softmax(dim=-1)
    if settings.top_k:
        p[settings.top_k :] = 0
    if settings.top_p < 1:
        p = p / p.sum()
        # A token stays while the mass before it has not reached top_p: the first always does.
        p[p.cumsum(0) - p >= settings.top_p] = 0
    return torch.zeros_like(p).index_copy(0, order, p / p.sum())


def draw(p: Float[Tensor, " vocab"], generator: torch.Generator) -> int:
    """One token from the distribution, by one uniform number."""
    u = torch.rand((), generator=generator, dtype=torch.float64)
    cumulative = p.double().cumsum(0)
    index = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return min(index, int(p.nonzero()[-1]))
