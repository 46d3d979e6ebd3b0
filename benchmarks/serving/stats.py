"""From outcomes and samples to the numbers of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.serving.sending import Outcome


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds."""

    p50: float
    p95: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Requests of one kind, or of all. Rates are per second and count what was answered.

    `first_text` is the time to the first text of streamed answers, `total` that to the end;
    `mean_tokens` are those of one answer, `known_share` the part of the prompts' tokens that
    the server knew already. `errors` are counted by status and code.
    """

    requests: int
    errors: dict[str, int]
    request_rate: float
    token_rate: float
    image_rate: float
    mean_tokens: float
    known_share: float
    first_text: Latency | None
    total: Latency | None


def latency(values: Sequence[float]) -> Latency | None:
    """Percentiles, interpolated; None of nothing."""
    if not values:
        return None
    p50, p95 = np.percentile(values, (50, 95))
    return Latency(p50=float(p50), p95=float(p95))


def error_name(outcome: Outcome) -> str:
    """Status and code of a request that failed."""
    return f"{outcome.status or 'no status'} {outcome.error or ''}".strip()


def span(outcomes: Sequence[Outcome]) -> float:
    """Seconds from the first start to the last end."""
    return max(o.end for o in outcomes) - min(o.start for o in outcomes)


def summarise(outcomes: Sequence[Outcome], seconds: float) -> Summary:
    """What came of requests that took `seconds` together."""
    good = [o for o in outcomes if o.ok]
    texts = [o for o in good if o.tokens]
    tokens, prompts = sum(o.tokens for o in good), sum(o.prompt_tokens for o in good)
    return Summary(
        requests=len(outcomes),
        errors=dict(Counter(error_name(o) for o in outcomes if not o.ok)),
        request_rate=len(good) / seconds,
        token_rate=tokens / seconds,
        image_rate=sum(o.images for o in good) / seconds,
        mean_tokens=tokens / len(texts) if texts else 0.0,
        known_share=sum(o.cached_tokens for o in good) / prompts if prompts else 0.0,
        first_text=latency([s for o in good if (s := o.seconds_to_text) is not None]),
        total=latency([o.seconds for o in good]),
    )


def by_kind(outcomes: Sequence[Outcome]) -> dict[str, Summary]:
    """All requests, and those of each kind, over the same time."""
    seconds = span(outcomes)
    by_kind = {"all": summarise(outcomes, seconds)}
    for kind in sorted({o.kind for o in outcomes}):
        by_kind[kind] = summarise([o for o in outcomes if o.kind == kind], seconds)
    return by_kind


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the straight line with the least squares; 0 for fewer than two points."""
    if len(points) < 2:
        return 0.0
    x, y = np.array(points).T
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
