"""Batched token sampling from logits, and the state of each sequence that is being decoded.

A `SamplingBatch` works on [B, vocab] on the device of the logits, with separate settings per row.
The host waits for the device once a step, for one number per row and log-probabilities where
requested. Drawing takes float64, so rows are drawn on the host where the device is not of
`FLOAT64_DEVICES`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from neounify.config import Constraint, TextSampling
from neounify.errors import NeounifyError, RequestError, not_finite
from neounify.model.layout import to_device

MAX_RANKED = 1024
"""Up to this `top_k` the likeliest tokens are ranked; beyond it, and for `top_p` alone, the
probability of the last one that stays is found by histograms of the bits of all, whatever the
distribution (docs/log.md). Sorting 151,936 tokens takes 12 ms."""
DIGITS = ((20, 11), (10, 10), (0, 10))
"""(lowest bit, width) of the parts of a positive float32 that a histogram is made of, in order."""

MASS_BITS = 52
"""Probabilities are added as whole numbers of 2^-52, so that a row's sum stays below 2^63."""

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
            seen = np.zeros(vocab, dtype=bool)
            seen[self._context or []] = True
            self._seen = to_device(seen, device)
        return self._seen

    def take_seen(self, seen: Bool[Tensor, " vocab"]) -> None:
        """Mark tokens in this mask from now on, a row of the batch's."""
        self._seen = seen


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


class SamplingBatch:
    """The sampling of some sequences, with their settings as tensors on the device of the logits.

    Made once for as long as the same sequences are decoded together; `states` are theirs. A step
    is one set of tensor operations for all rows and one read of the results. A row draws the same
    tokens in any batch.
    """

    @torch.no_grad()
    def __init__(self, states: Sequence[SamplingState], vocab: int, device: torch.device) -> None:
        self.states = tuple(states)
        settings = [state.settings for state in states]
        self._plain = all(state.plain for state in states)
        self._penalties = _Penalties(states, vocab, device)
        constrained = [n for n, state in enumerate(states) if state.constraint is not None]
        self._constrained = _Rows(constrained, len(states), device)
        self._drawn = _Rows(
            [n for n, s in enumerate(settings) if s.temperature > 0], len(states), device
        )
        # Where the device has no float64, rows are drawn on the host.
        self._draw_on = device if device.type in FLOAT64_DEVICES else torch.device("cpu")
        drawn = [settings[n] for n in self._drawn.numbers]
        self._distribution = Distribution(drawn, vocab, self._draw_on)
        counts = {n: s.logprobs for n, s in enumerate(settings) if s.logprobs is not None}
        self._logprobs = _Rows(list(counts), len(states), device)
        self._counts = {n: min(count, vocab) for n, count in counts.items()}

    @torch.no_grad()
    def sample(self, logits: Float[Tensor, "b vocab"]) -> list[SampledToken]:
        """Choose a token for every row; its state draws one random number where it draws."""
        return self._read(logits, self.choose(logits))

    @torch.no_grad()
    def choose(self, logits: Float[Tensor, "b vocab"]) -> Int[Tensor, " b"]:
        """The tokens on the device, or NOT_FINITE or NOTHING_ALLOWED; the host does not wait."""
        finite = torch.isfinite(logits.sum(dim=1, dtype=torch.float32))
        scores = logits if self._plain else self._constrain(self._penalties.apply(logits.float()))
        ids = scores.argmax(dim=1)
        if self._constrained.numbers:
            nothing = scores.gather(1, ids.unsqueeze(1)).squeeze(1) == float("-inf")
            ids = ids.masked_fill(nothing, NOTHING_ALLOWED)
        ids = ids.masked_fill(~finite, NOT_FINITE)
        if self._drawn.numbers:
            ids = self._draw(scores, ids)
        return ids

    def _constrain(self, scores: Float[Tensor, "b vocab"]) -> Float[Tensor, "b vocab"]:
        """-inf for every token that a row's constraint does not allow."""
        rows = self._constrained
        if not rows.numbers:
            return scores
        allowed = torch.zeros(len(rows.numbers), scores.shape[1], dtype=torch.bool)
        for index, n in enumerate(rows.numbers):
            constraint = self.states[n].constraint
            assert constraint is not None
            mask = _unpacked(constraint.mask())[: scores.shape[1]]
            allowed[index, : mask.shape[0]] = mask
        forbidden = ~to_device(allowed, scores.device)
        return rows.put(scores, rows.of(scores).masked_fill(forbidden, float("-inf")))

    def _draw(self, scores: Float[Tensor, "b vocab"], ids: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        rows = self._drawn
        numbers = np.array([self.states[n].uniform() for n in rows.numbers])
        p = self._distribution(rows.of(scores).to(self._draw_on))
        tokens = draw(p, to_device(numbers, self._draw_on)).to(ids.device)
        # A row with a problem has no distribution; it keeps its negative code.
        greedy = rows.of(ids)
        return rows.put(ids, torch.where(greedy < 0, greedy, tokens))

    def _read(self, logits: Float[Tensor, "b vocab"], ids: Int[Tensor, " b"]) -> list[SampledToken]:
        """The tokens and, before temperature and constraints, the log-probabilities asked for."""
        rows, parts = self._logprobs, [ids.int()]
        most = max(self._counts.values(), default=0)
        if rows.numbers:
            values = rows.of(logits).float().log_softmax(dim=1)
            chosen = values.gather(1, rows.of(ids).clamp_min(0).unsqueeze(1))
            best = values.topk(most, dim=1)
            for tensor in (chosen, best.values):
                parts.append(tensor.view(torch.int32).flatten())
            parts.append(best.indices.int().flatten())
        # Numbers travel as their bits, so that the host waits for the device once.
        read = torch.cat(parts).cpu().numpy()
        count, width = len(rows.numbers), most * len(rows.numbers)
        numbers = np.split(read, np.cumsum([len(ids), count, width]))
        tokens, likeliest = numbers[0].tolist(), numbers[3].reshape(count, most).tolist()
        chosen_values, best_values = (x.view(np.float32) for x in numbers[1:3])
        logprobs: dict[int, LogProbs] = {}
        for row, (n, wanted) in enumerate(self._counts.items()):
            pairs = zip(likeliest[row], best_values.reshape(count, most)[row].tolist(), strict=True)
            logprobs[n] = LogProbs(float(chosen_values[row]), tuple(pairs)[:wanted])
        return [_choice(token, logprobs.get(n)) for n, token in enumerate(tokens)]


def _choice(token: int, logprobs: LogProbs | None) -> SampledToken:
    if token >= 0:
        return SampledToken(token, logprobs)
    return SampledToken(token, None, "not finite" if token == NOT_FINITE else "nothing allowed")


class _Rows:
    """Some rows of a batch of `total`, by `numbers`."""

    def __init__(self, numbers: Sequence[int], total: int, device: torch.device) -> None:
        self.numbers, self._all = tuple(numbers), len(numbers) == total
        self._index = to_device(np.array(numbers, dtype=np.int64), device)

    def of(self, x: Tensor) -> Tensor:
        return x if self._all else x.index_select(0, self._index)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """`x` with these values in the rows."""
        return values if self._all else x.index_copy(0, self._index, values)


def _column(
    values: Sequence[float], device: torch.device, dtype: type = np.float32
) -> Shaped[Tensor, "n 1"]:
    return to_device(np.array(values, dtype=dtype), device).unsqueeze(1)


class _Penalties:
    """Makes the tokens of each context less likely (Keskar et al. 2019, CTRL, section 4.1)."""

    def __init__(self, states: Sequence[SamplingState], vocab: int, device: torch.device) -> None:
        rows = [n for n, state in enumerate(states) if state.settings.repetition_penalty != 1]
        self._rows = _Rows(rows, len(states), device)
        if rows:
            self._penalty = _column([states[n].settings.repetition_penalty for n in rows], device)
            self._seen = torch.stack([states[n].seen(vocab, device) for n in rows])
            # From here on each state marks its tokens in its row.
            for n, seen in zip(rows, self._seen, strict=True):
                states[n].take_seen(seen)

    def apply(self, logits: Float[Tensor, "b vocab"]) -> Float[Tensor, "b vocab"]:
        if not self._rows.numbers:
            return logits
        values = self._rows.of(logits)
        less = torch.where(values > 0, values / self._penalty, values * self._penalty)
        return self._rows.put(logits, torch.where(self._seen, less, values))


def _unpacked(mask: Tensor) -> Bool[Tensor, " n"]:
    mask = mask.flatten()
    if mask.dtype == torch.bool:
        return mask
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask.to(torch.int32).unsqueeze(1) >> bits) & 1).bool().flatten()


# --- drawing ---


class Distribution:
    """Softmax at each row's temperature, cut to top_k, top_p and min_p; not rescaled to one.

    Of each row the `top_k` (0: all) likeliest tokens stay, of those the fewest that hold `top_p`.
    """

    def __init__(self, settings: Sequence[TextSampling], vocab: int, device: torch.device) -> None:
        total = len(settings)
        temperatures = [max(s.temperature, MIN_TEMPERATURE) for s in settings]
        ks = [s.top_k if 0 < s.top_k < vocab else vocab for s in settings]
        ranked = [n for n, k in enumerate(ks) if k <= MAX_RANKED]
        many = [n for n, k in enumerate(ks) if MAX_RANKED < k < vocab]
        mass = [n for n, k in enumerate(ks) if k > MAX_RANKED and settings[n].top_p < 1]
        self._temperature = _column(temperatures, device)
        self._ranked, self._many, self._mass = (
            _Rows(rows, total, device) for rows in (ranked, many, mass)
        )
        self._longest = max((ks[n] for n in ranked), default=0)
        self._ranks = _column([ks[n] for n in ranked], device, np.int64)
        self._ranked_share = _column([settings[n].top_p for n in ranked], device)
        self._number = _column([ks[n] for n in many], device, np.int64)
        self._share = _column([settings[n].top_p for n in mass], device, np.float64)
        self._floor = None
        if any(s.min_p > 0 for s in settings):
            self._floor = _column([s.min_p for s in settings], device)

    def __call__(self, scores: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        p = (scores / self._temperature).softmax(dim=-1)
        if self._ranked.numbers:
            p = self._ranked.put(p, self._by_rank(self._ranked.of(p)))
        if self._many.numbers:
            cut = self._many.of(p)
            p = self._many.put(
                p, _fewest(cut, torch.ones_like(cut, dtype=torch.int64), self._number)
            )
        if self._mass.numbers:
            cut = self._mass.of(p)
            # Whole numbers, whose sums are the same in any order of the additions.
            weights = (cut.double() * 2**MASS_BITS).long()
            need = (self._share * weights.sum(dim=1, keepdim=True)).ceil().long()
            p = self._mass.put(p, _fewest(cut, weights, need))
        if self._floor is not None:
            p = p.masked_fill(p < self._floor * p.amax(dim=1, keepdim=True), 0)
        return p

    def _by_rank(self, p: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:
        """The likeliest tokens of rows with a small `top_k`."""
        ranked = p.topk(self._longest, dim=1).values
        inside = torch.arange(self._longest, device=p.device) < self._ranks
        mass = (ranked * inside).cumsum(dim=1)
        share = self._ranked_share
        # A token stays while the mass before it has not reached top_p: the first always does.
        stays = inside & ((mass - ranked < share * mass[:, -1:]) | (share >= 1))
        stays[:, 0] = True
        kept = stays.sum(dim=1, keepdim=True)
        least = ranked.gather(1, kept - 1)
        return _from_least(p, least, kept - (p > least).sum(dim=1, keepdim=True))


def _fewest(
    p: Float[Tensor, "n vocab"], weights: Int[Tensor, "n vocab"], need: Int[Tensor, "n 1"]
) -> Float[Tensor, "n vocab"]:
    """The fewest likeliest tokens of each row whose weights add up to `need`, by radix selection.

    The bits of positive numbers are ordered as the numbers are. Histograms of their digits, highest
    first, give the bits of the least likely token that stays, digit by digit. No shape depends on
    values, so that the host need not wait for the device.
    """
    bits = p.view(torch.int32)
    prefix, above = torch.zeros_like(need), torch.zeros_like(need)
    for shift, width in DIGITS:
        # The high digits of a positive number, of which the first ones must be those found so far.
        high = bits >> shift
        counted = weights * ((high >> width) == prefix)
        sums = need.new_zeros(p.shape[0], 2**width)
        sums.scatter_add_(1, (high & (2**width - 1)).long(), counted)
        digit, above = _digit(sums, above, need)
        prefix = (prefix << width) | digit
    one = (weights * (bits == prefix)).amax(dim=1, keepdim=True)
    equal = (need - above + one - 1) // one.clamp_min(1)
    equal = torch.where(one > 0, equal.clamp_min(1), p.shape[1])
    return _from_least(p, prefix.int().view(torch.float32), equal)


def _digit(
    sums: Int[Tensor, "n digits"], above: Int[Tensor, "n 1"], need: Int[Tensor, "n 1"]
) -> tuple[Int[Tensor, "n 1"], Int[Tensor, "n 1"]]:
    """The highest digit down to which the sums reach `need`, and the sum above it."""
    upwards = sums.flip(1).cumsum(dim=1).flip(1)
    digit = ((above + upwards >= need).sum(dim=1, keepdim=True) - 1).clamp_min(0)
    return digit, above + (upwards - sums).gather(1, digit)


def _from_least(
    p: Float[Tensor, "n vocab"], least: Float[Tensor, "n 1"], equal: Int[Tensor, "n 1"]
) -> Float[Tensor, "n vocab"]:
    """Zero for tokens below `least`, and for all but the first `equal` of those that have it."""
    same = p == least
    stays = (p > least) | (same & (same.cumsum(dim=1, dtype=torch.int32) <= equal))
    return p.masked_fill(~stays, 0)


def draw(p: Float[Tensor, "n vocab"], u: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """One token per row by a uniform number of [0, 1], never one of probability zero."""
    cumulative = p.double().cumsum(dim=1)
    total = cumulative[:, -1:]
    # Below the total, so that the sum passes it at a token of some probability.
    target = torch.minimum(u.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return index.clamp_max(p.shape[1] - 1)
