"""Batched token sampling from logits, and the state of each sequence that is being decoded.

`sample` works on [B, vocab] on the device of the logits, with separate settings per row. Only one
number per row is copied to the host, and log-probabilities where requested. Drawing takes float64,
so rows are drawn on the host where the device is not of `FLOAT64_DEVICES`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neounify.config import Constraint, TextSampling
from neounify.errors import NeounifyError, RequestError, not_finite

MAX_RANKED = 1024
"""Up to this `top_k` the likeliest tokens are ranked; beyond it, and for `top_p` alone, the
probability of the last one that stays is found by histograms of the bits of all, which takes about
1 ms a row of 151,936 tokens, whatever the distribution. Sorting takes 12 ms."""
DIGITS = ((20, 11), (10, 10), (0, 10))
"""(lowest bit, width) of the parts of a positive float32 that a histogram is made of, in order."""

MIN_TEMPERATURE = 1e-6
"""Lower ones are this one: the quotients of a smaller one would be infinite."""

NOT_FINITE, NOTHING_ALLOWED = -1, -2

FLOAT64_DEVICES = ("cpu", "cuda")
"""Types of devices that compute in float64; mps and some of xpu do not."""

Problem = Literal["not finite", "nothing allowed"]
FinishReason = Literal["stop", "length"]


# --- state ---


@functools.cache
def _constraint_thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="constraints")


def compile_constraint(settings: TextSampling) -> Future[Constraint] | None:
    """Start the constraint of the settings once in a thread; None if there is none.

    A grammar is compiled then, 2 to 60 ms for 150,000 tokens, and the next start is fast.
    """
    factory = settings.constraint
    return None if factory is None else _constraint_thread().submit(factory.start)


class SamplingState:
    """Random state of one sequence, and the tokens in its context.

    `context` are the token ids it begins with. With a random state per sequence, the sampled tokens
    do not depend on what else is in the batch.
    """

    def __init__(self, settings: TextSampling, context: Sequence[int] = ()) -> None:
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
        """Whether sampling is the argmax of the unchanged logits."""
        s = self.settings
        return s.temperature == 0 and s.repetition_penalty == 1 and self.constraint is None

    def accept(self, token: int) -> None:
        """Record a chosen token that is part of the text."""
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
        """Mask of the tokens in the context."""
        if self._seen is None:
            self._seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self._seen[torch.tensor(self._context or [], dtype=torch.int64, device=device)] = True
        return self._seen


@dataclass(frozen=True)
class LogProbs:
    """Log-probability of the chosen token, and of the likeliest ones as (id, value) in order."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SampledToken:
    """Token of a row, or the `problem` that left it without one.

    The logits hold NaN or infinite values, or the constraint allows no token.
    """

    token: int
    logprobs: LogProbs | None = None
    problem: Problem | None = None

    def error(self) -> NeounifyError:
        """The error of a problem."""
        if self.problem == "nothing allowed":
            return RequestError("the answer's constraint allows no token here, not even an end")
        return not_finite()


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

    def take(self, choice: SampledToken) -> int | None:
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


# --- sampling ---


@torch.no_grad()
def sample(logits: Float[Tensor, "b vocab"], states: Sequence[SamplingState]) -> list[SampledToken]:
    """Choose a token for every row; its state draws one random number where it draws."""
    finite = torch.isfinite(logits.sum(dim=1, dtype=torch.float32))
    scores = logits
    if not all(state.plain for state in states):
        scores = _constrained(_penalised(logits.float(), states), states)
    ids = scores.argmax(dim=1)
    if scores is not logits and any(state.constraint is not None for state in states):
        nothing = scores.gather(1, ids.unsqueeze(1)).squeeze(1) == float("-inf")
        ids = ids.masked_fill(nothing, NOTHING_ALLOWED)
    ids = ids.masked_fill(~finite, NOT_FINITE)
    drawn = [row for row, state in enumerate(states) if state.settings.temperature > 0]
    if drawn:
        ids = _draw_rows(scores, ids, drawn, states)
    tokens: list[int] = ids.tolist()
    probs = _log_probs(logits, ids, states)
    return [_choice(token, prob) for token, prob in zip(tokens, probs, strict=True)]


def _choice(token: int, logprobs: LogProbs | None) -> SampledToken:
    if token >= 0:
        return SampledToken(token, logprobs)
    return SampledToken(token, None, "not finite" if token == NOT_FINITE else "nothing allowed")


# --- scores ---


def _penalised(
    logits: Float[Tensor, "b vocab"], states: Sequence[SamplingState]
) -> Float[Tensor, "b vocab"]:
    """Make the tokens of each context less likely (Keskar et al. 2019, CTRL, section 4.1)."""
    rows = [n for n, state in enumerate(states) if state.settings.repetition_penalty != 1]
    if not rows:
        return logits
    device = logits.device
    values = logits if len(rows) == len(states) else logits[rows]
    seen = torch.stack([states[n].seen(logits.shape[1], device) for n in rows])
    penalty = _column([states[n].settings.repetition_penalty for n in rows], device)
    less = torch.where(values > 0, values / penalty, values * penalty)
    return _with_rows(logits, rows, torch.where(seen, less, values))


def _constrained(
    scores: Float[Tensor, "b vocab"], states: Sequence[SamplingState]
) -> Float[Tensor, "b vocab"]:
    """-inf for every token that a row's constraint does not allow."""
    rows = [n for n, state in enumerate(states) if state.constraint is not None]
    if not rows:
        return scores
    allowed = torch.zeros(len(rows), scores.shape[1], dtype=torch.bool)
    for index, n in enumerate(rows):
        constraint = states[n].constraint
        assert constraint is not None
        mask = _unpacked(constraint.mask())[: scores.shape[1]]
        allowed[index, : mask.shape[0]] = mask
    masked = scores[rows].masked_fill(~allowed.to(scores.device), float("-inf"))
    return _with_rows(scores, rows, masked)


def _unpacked(mask: Tensor) -> Bool[Tensor, " n"]:
    mask = mask.flatten()
    if mask.dtype == torch.bool:
        return mask
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask.to(torch.int32).unsqueeze(1) >> bits) & 1).bool().flatten()


def _with_rows(x: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
    if len(rows) == x.shape[0]:
        return values
    return x.index_copy(0, torch.tensor(rows, device=x.device), values)


def _rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    if len(rows) == x.shape[0]:
        return x
    return x.index_select(0, torch.tensor(rows, device=x.device))


def _column(
    values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n 1"]:
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(1)


# --- drawing ---


def _draw_rows(
    scores: Float[Tensor, "b vocab"],
    ids: Int[Tensor, " b"],
    rows: Sequence[int],
    states: Sequence[SamplingState],
) -> Int[Tensor, " b"]:
    device = scores.device if scores.device.type in FLOAT64_DEVICES else torch.device("cpu")
    drawing = [states[n] for n in rows]
    index = torch.tensor(rows, device=scores.device)
    p = probabilities(scores[index].to(device), drawing)
    u = torch.tensor([state.uniform() for state in drawing], dtype=torch.float64, device=device)
    tokens = draw(p, u).to(ids.device)
    # A row with a problem has no distribution; it keeps its negative code.
    return ids.index_copy(0, index, torch.where(ids[index] < 0, ids[index], tokens))


def probabilities(
    scores: Float[Tensor, "n vocab"], states: Sequence[SamplingState]
) -> Float[Tensor, "n vocab"]:
    """Softmax at each row's temperature, cut to top_k, top_p and min_p; not rescaled to one."""
    device = scores.device
    settings = [state.settings for state in states]
    temperatures = [max(s.temperature, MIN_TEMPERATURE) for s in settings]
    p = (scores / _column(temperatures, device)).softmax(dim=-1)
    p = _cut(p, [s.top_k for s in settings], [s.top_p for s in settings])
    if any(s.min_p > 0 for s in settings):
        floor = _column([s.min_p for s in settings], device) * p.amax(dim=1, keepdim=True)
        p = p.masked_fill(p < floor, 0)
    return p


def _cut(
    p: Float[Tensor, "n vocab"], top_ks: Sequence[int], top_ps: Sequence[float]
) -> Float[Tensor, "n vocab"]:
    """The `top_k` (0: all) likeliest tokens of each row, of those the fewest that hold `top_p`."""
    vocab = p.shape[1]
    ks = [k if 0 < k < vocab else vocab for k in top_ks]
    ranked = [n for n, k in enumerate(ks) if k <= MAX_RANKED]
    many = [n for n, k in enumerate(ks) if MAX_RANKED < k < vocab]
    mass = [n for n, k in enumerate(ks) if k > MAX_RANKED and top_ps[n] < 1]
    if ranked:
        chosen = [ks[n] for n in ranked], [top_ps[n] for n in ranked]
        p = _with_rows(p, ranked, _by_rank(_rows(p, ranked), *chosen))
    if many:
        need = _column([ks[n] for n in many], p.device).double()
        cut = _rows(p, many)
        p = _with_rows(p, many, _fewest(cut, torch.ones_like(cut), need))
    if mass:
        cut = _rows(p, mass)
        total = cut.sum(dim=1, keepdim=True, dtype=torch.float64)
        share = _column([top_ps[n] for n in mass], p.device, torch.float64)
        p = _with_rows(p, mass, _fewest(cut, cut, share * total))
    return p


def _by_rank(
    p: Float[Tensor, "n vocab"], ks: Sequence[int], top_ps: Sequence[float]
) -> Float[Tensor, "n vocab"]:
    """The `k` likeliest tokens of each row, of those the fewest that hold `top_p` of their mass."""
    ranked = p.topk(max(ks), dim=1).values
    inside = torch.arange(ranked.shape[1], device=p.device) < torch.tensor(
        ks, device=p.device
    ).unsqueeze(1)
    mass = (ranked * inside).cumsum(dim=1)
    share = _column(top_ps, p.device)
    # A token stays while the mass before it has not reached top_p: the first always does.
    stays = inside & ((mass - ranked < share * mass[:, -1:]) | (share >= 1))
    stays[:, 0] = True
    kept = stays.sum(dim=1, keepdim=True)
    least = ranked.gather(1, kept - 1)
    return _from_least(p, least, kept - (p > least).sum(dim=1, keepdim=True))


def _fewest(
    p: Float[Tensor, "n vocab"],
    weights: Float[Tensor, "n vocab"],
    need: Float[Tensor, "n 1"],
) -> Float[Tensor, "n vocab"]:
    """The fewest likeliest tokens of each row whose weights add up to `need`, by radix selection.

    The bits of positive numbers are ordered as the numbers are. Histograms of their digits, highest
    first, give the bits of the least likely token that stays, digit by digit.
    """
    shift, width = DIGITS[0]
    bits = p.view(torch.int32)
    high = bits >> shift
    sums = need.new_zeros(p.shape[0], 2**width).scatter_add_(1, high.long(), weights.double())
    prefix, above = _digit(sums, torch.zeros_like(need), need)
    # Only tokens that share the highest digit of the last one that stays are looked at again.
    row, column = (high == prefix).nonzero(as_tuple=True)
    bits, weights = bits[row, column], weights[row, column].double()
    for shift, width in DIGITS[1:]:
        same = (bits >> (shift + width)) == prefix[row, 0]
        bucket = row * 2**width + ((bits >> shift) & (2**width - 1))
        sums = need.new_zeros(p.shape[0] * 2**width).scatter_add_(0, bucket, weights * same)
        digit, above = _digit(sums.view(p.shape[0], -1), above, need)
        prefix = (prefix << width) | digit
    least = prefix.int().view(torch.float32)
    ones = weights * (bits == prefix[row, 0])
    one = need.new_zeros(p.shape[0]).scatter_reduce_(0, row, ones, "amax").unsqueeze(1)
    equal = torch.where(one > 0, ((need - above) / one).ceil(), p.shape[1])
    return _from_least(p, least, equal.clamp_min(1).long())


def _digit(
    sums: Float[Tensor, "n digits"], above: Float[Tensor, "n 1"], need: Float[Tensor, "n 1"]
) -> tuple[Int[Tensor, "n 1"], Float[Tensor, "n 1"]]:
    """The highest digit down to which the sums reach `need`, and the sum above it."""
    upwards = sums.flip(1).cumsum(dim=1).flip(1)
    digit = ((above + upwards >= need).sum(dim=1, keepdim=True) - 1).clamp_min(0)
    return digit, above + (upwards - sums).gather(1, digit)


def _from_least(
    p: Float[Tensor, "n vocab"], least: Float[Tensor, "n 1"], equal: Int[Tensor, "n 1"]
) -> Float[Tensor, "n vocab"]:
    """Zero for tokens below `least`, and for all but the first `equal` of those that have it."""
    same = p == least
    stays = p >= least
    if (same.sum(dim=1, keepdim=True) > equal).any():
        stays &= ~same | (same.cumsum(dim=1) <= equal)
    return p.masked_fill(~stays, 0)


def draw(p: Float[Tensor, "n vocab"], u: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """One token per row by a uniform number of [0, 1], never one of probability zero."""
    cumulative = p.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    # Below the total, so that the sum passes it at a token of some probability.
    target = torch.minimum(u.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp_max(p.shape[1] - 1)


# --- log-probabilities ---


def _log_probs(
    logits: Float[Tensor, "b vocab"], ids: Int[Tensor, " b"], states: Sequence[SamplingState]
) -> list[LogProbs | None]:
    """Log-probabilities of the rows that request them, before temperature and constraints."""
    results: list[LogProbs | None] = [None] * len(states)
    wanted = {n: s.settings.logprobs for n, s in enumerate(states)}
    rows = [n for n, count in wanted.items() if count is not None]
    if not rows:
        return results
    index = torch.tensor(rows, device=logits.device)
    values = logits[index].float().log_softmax(dim=1)
    chosen = values.gather(1, ids[index].clamp_min(0).unsqueeze(1)).squeeze(1).tolist()
    count = min(max(wanted[n] or 0 for n in rows), logits.shape[1])
    best, tokens = (x.tolist() for x in values.topk(count, dim=1))
    for row, n in enumerate(rows):
        top = list(zip(tokens[row], best[row], strict=True))[: wanted[n]]
        results[n] = LogProbs(chosen[row], tuple(top))
    return results
