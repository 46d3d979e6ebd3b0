"""The next tokens of many sequences at once, from their logits.

Works on [B, vocab] on the device of the logits; each row has settings of its own. What comes back
to the processor is one number per row, and log-probabilities where they are asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from neounify.decode.sampling import SamplingState
from neounify.errors import NeounifyError, RequestError, not_finite

FIRST_CANDIDATES, GROWTH = 256, 8
"""How many of the likeliest tokens are looked at for `top_p` at first, and how much more of them
where they hold too little: sorting a whole vocabulary takes 50 times as long."""

NOT_FINITE, NOTHING_ALLOWED = -1, -2

Problem = Literal["not finite", "nothing allowed"]


@dataclass(frozen=True)
class LogProbs:
    """Log-probability of the chosen token, and of the likeliest ones as (id, value) in order."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """The token of a row, or the `problem` for which it has none.

    The logits hold NaN or infinite values, or the constraint allows no token.
    """

    token: int
    logprobs: LogProbs | None = None
    problem: Problem | None = None

    def error(self) -> NeounifyError:
        """What to raise for a problem."""
        if self.problem == "nothing allowed":
            return RequestError("the answer's constraint allows no token here, not even an end")
        return not_finite()


@torch.no_grad()
def sample(logits: Float[Tensor, "b vocab"], states: Sequence[SamplingState]) -> list[Choice]:
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
    return [_choice(token, found) for token, found in zip(tokens, probs, strict=True)]


def _choice(token: int, logprobs: LogProbs | None) -> Choice:
    if token >= 0:
        return Choice(token, logprobs)
    return Choice(token, None, "not finite" if token == NOT_FINITE else "nothing allowed")


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
    for place, n in enumerate(rows):
        constraint = states[n].constraint
        assert constraint is not None
        mask = _unpacked(constraint.mask())[: scores.shape[1]]
        allowed[place, : mask.shape[0]] = mask
    own = scores[rows].masked_fill(~allowed.to(scores.device), float("-inf"))
    return _with_rows(scores, rows, own)


def _unpacked(mask: Tensor) -> Bool[Tensor, " n"]:
    mask = mask.flatten()
    if mask.dtype == torch.bool:
        return mask
    bits = torch.arange(32, dtype=torch.int32, device=mask.device)
    return ((mask.to(torch.int32).unsqueeze(1) >> bits) & 1).bool().flatten()


def _with_rows(x: Tensor, rows: Sequence[int], own: Tensor) -> Tensor:
    if len(rows) == x.shape[0]:
        return own
    return x.index_copy(0, torch.tensor(rows, device=x.device), own)


def _column(values: Sequence[float], device: torch.device) -> Float[Tensor, "n 1"]:
    return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)


# --- drawing ---


def _draw_rows(
    scores: Float[Tensor, "b vocab"],
    ids: Int[Tensor, " b"],
    rows: Sequence[int],
    states: Sequence[SamplingState],
) -> Int[Tensor, " b"]:
    device = scores.device
    own = [states[n] for n in rows]
    index = torch.tensor(rows, device=device)
    p = probabilities(scores[index], own)
    u = torch.tensor([state.uniform() for state in own], dtype=torch.float64, device=device)
    found = draw(p, u)
    # A row with a problem has no distribution; it keeps the mark that says so.
    return ids.index_copy(0, index, torch.where(ids[index] < 0, ids[index], found))


def probabilities(
    scores: Float[Tensor, "n vocab"], states: Sequence[SamplingState]
) -> Float[Tensor, "n vocab"]:
    """Softmax at each row's temperature, cut to top_k, top_p and min_p; not rescaled to one."""
    device = scores.device
    settings = [state.settings for state in states]
    p = (scores / _column([s.temperature for s in settings], device)).softmax(dim=-1)
    cut = [n for n, s in enumerate(settings) if 0 < s.top_k < scores.shape[1] or s.top_p < 1]
    if cut:
        kept = _cut(p[cut], [settings[n].top_k for n in cut], [settings[n].top_p for n in cut])
        p = _with_rows(p, cut, kept)
    if any(s.min_p > 0 for s in settings):
        floor = _column([s.min_p for s in settings], device) * p.amax(dim=1, keepdim=True)
        p = p.masked_fill(p < floor, 0)
    return p


def _cut(
    p: Float[Tensor, "n vocab"], top_ks: Sequence[int], top_ps: Sequence[float]
) -> Float[Tensor, "n vocab"]:
    """The `top_k` (0: all) likeliest tokens of each row, of those the fewest that hold `top_p`."""
    vocab = p.shape[1]
    pending = list(range(p.shape[0]))
    count = max(FIRST_CANDIDATES, *top_ks)
    out = p.clone()
    while True:
        count = min(count, vocab)
        own = p if len(pending) == p.shape[0] else p[pending]
        ks = [min(top_ks[n] or vocab, vocab) for n in pending]
        ranked = own.topk(count, dim=1).values
        kept, enough = _kept(ranked, own, ks, [top_ps[n] for n in pending])
        done = [place for place, ok in enumerate(enough.tolist()) if ok]
        if done:
            out[[pending[place] for place in done]] = _likeliest(
                own[done], ranked[done], kept[done]
            )
        pending = [n for place, n in enumerate(pending) if place not in done]
        if not pending:
            return out
        count *= GROWTH


def _kept(
    ranked: Float[Tensor, "n count"],
    p: Float[Tensor, "n vocab"],
    ks: Sequence[int],
    top_ps: Sequence[float],
) -> tuple[Int[Tensor, "n 1"], Bool[Tensor, " n"]]:
    """How many of the ranked tokens stay in each row, and whether enough of them are known."""
    device, count = p.device, ranked.shape[1]
    k = torch.tensor(ks, device=device).unsqueeze(1)
    inside = torch.arange(count, device=device) < k
    mass = (ranked * inside).cumsum(dim=1)
    # Without top_k it is a share of everything, which the ranked ones are only a part of.
    everything = p.sum(dim=1, keepdim=True)
    total = torch.where(k <= count, mass[:, -1:], everything)
    share = _column(top_ps, device)
    # A token stays while the mass before it has not reached top_p: the first always does.
    stays = inside & ((mass - ranked < share * total) | (share >= 1))
    stays[:, 0] = True
    enough = (k <= count).squeeze(1) | (mass[:, -1:] >= share * total).squeeze(1)
    if count == p.shape[1]:
        enough = torch.ones_like(enough)
    return stays.sum(dim=1, keepdim=True), enough


def _likeliest(
    p: Float[Tensor, "n vocab"], ranked: Float[Tensor, "n count"], kept: Int[Tensor, "n 1"]
) -> Float[Tensor, "n vocab"]:
    """Zero but for the `kept` likeliest tokens of each row; of equal ones the first stay."""
    least = ranked.gather(1, kept - 1)
    stays = p >= least
    if (stays.sum(dim=1, keepdim=True) != kept).any():
        above = p > least
        equal = stays & ~above
        left = kept - above.sum(dim=1, keepdim=True)
        stays = above | (equal & (equal.cumsum(dim=1) <= left))
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
    """Of the rows that ask for them, by the model's own distribution."""
    found: list[LogProbs | None] = [None] * len(states)
    wanted = {n: s.settings.logprobs for n, s in enumerate(states)}
    rows = [n for n, count in wanted.items() if count is not None]
    if not rows:
        return found
    index = torch.tensor(rows, device=logits.device)
    values = logits[index].float().log_softmax(dim=1)
    chosen = values.gather(1, ids[index].clamp_min(0).unsqueeze(1)).squeeze(1).tolist()
    count = min(max(wanted[n] or 0 for n in rows), logits.shape[1])
    best, tokens = (x.tolist() for x in values.topk(count, dim=1))
    for place, n in enumerate(rows):
        top = list(zip(tokens[place], best[place], strict=True))[: wanted[n]]
        found[n] = LogProbs(chosen[place], tuple(top))
    return found
