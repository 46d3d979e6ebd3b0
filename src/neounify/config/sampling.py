"""TextSampling, the knobs of text generation, and what the knobs of text and images share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

from neounify.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

MAX_STEPS = 1000
MAX_SHIFT = 1000
"""Beyond it, and below its inverse, times run together: the last 1 - t would round to zero."""
MAX_GUIDANCE = 1000
"""Images are useless long before; far beyond it values overflow, which would look like damaged
weights."""
IMAGE_RANGES: Mapping[str, tuple[float, float]] = {
    "steps": (1, MAX_STEPS),
    "shift": (1 / MAX_SHIFT, MAX_SHIFT),
    "guidance": (0, MAX_GUIDANCE),
    "image_guidance": (0, MAX_GUIDANCE),
    "guidance_reuse": (1, MAX_STEPS),
    "guidance_stop": (0, 1),
    "step_cache": (0, 1),
    "step_cache_most": (1, MAX_STEPS),
    "step_cache_warm": (1, MAX_STEPS),
}
"""Least and greatest value of the numbers that an image is sampled with."""
_COUNTS = frozenset(("steps", "guidance_reuse", "step_cache_most", "step_cache_warm"))

SolverName = Literal["euler", "ab2", "dpm2m", "unipc"]
"""Solvers of images; `flow/sampling.py` has their classes."""

MAX_LOGPROBS = 20
"""Alternatives whose log-probability may be asked for with every token."""


def doc(sentence: str) -> dict[str, str]:
    """Metadata of a dataclass field: what it does, its unit, range and default."""
    return {"doc": sentence}


def knob_doc(config: type, name: str) -> str:
    """The sentence of one field."""
    sentences = {field.name: field.metadata["doc"] for field in fields(config)}
    return str(sentences[name])


def range_error(name: str, value: float) -> str | None:
    """Message about a value outside its range in IMAGE_RANGES, or a count that is not whole."""
    low, high = IMAGE_RANGES[name]
    message = f"{name} must be from {low:g} to {high:g}, got {value}"
    if name in _COUNTS and (isinstance(value, bool) or not hasattr(value, "__index__")):
        return f"{message}, which is no whole number"
    return None if low <= value <= high else message


def check_keywords(call: str, names: Collection[str], knobs: type) -> None:
    """Raise TypeError, as Python does, for names that are no key of a TypedDict of knobs."""
    known = knobs.__optional_keys__  # type: ignore[attr-defined]
    for name in names:
        if name not in known:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")


class Constraint(Protocol):
    """Which tokens may come next in one sequence, for instance by a grammar; with state."""

    def mask(self) -> Tensor:
        """The tokens allowed next: bool [≤ vocab], or int32 [≤ vocab / 32] with one bit per token.

        Bit n % 32 of word n // 32 stands for token n. Tokens beyond its end are not allowed.
        """

    def accept(self, token: int) -> None:
        """Take in a token that was chosen. A token that ends the sequence is not passed."""


class ConstraintFactory(Protocol):
    """Plain data to build a constraint from, picklable for another process."""

    def start(self) -> Constraint:
        """A constraint at its beginning. Raises RequestError."""


def check_seed(seed: int) -> None:
    """Raise RequestError unless torch's generators take the seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise RequestError(f"seed must be a whole number below 2^64, got {seed!r}", param="seed")


@dataclass(frozen=True, kw_only=True)
class TextSampling:
    """Sampling of text tokens. Raises RequestError for values out of range.

    The filters apply in the order of the fields; a field here has an option of the command line
    and a field of the HTTP API, described by the same sentence (`knob_doc`).

    Sources: top_p, Holtzman et al. 2020; min_p, Nguyen et al. 2024; repetition_penalty, Keskar et
    al. 2019.
    """

    repetition_penalty: float = field(
        default=1.0,
        metadata=doc(
            "Above 1, tokens already in the context become less likely: positive logits are "
            "divided by it, negative ones multiplied. 0.01 to 100; 1 is none."
        ),
    )
    temperature: float = field(
        default=0.0,
        metadata=doc("Sampling temperature, 0 to 100; 0 takes the most likely token (greedy)."),
    )
    top_k: int = field(
        default=0, metadata=doc("Sample from the k most likely tokens only; 0: all of them.")
    )
    top_p: float = field(
        default=1.0,
        metadata=doc(
            "Sample from the smallest set of most likely tokens that together have this "
            "probability; above 0, 1: all."
        ),
    )
    min_p: float = field(
        default=0.0,
        metadata=doc(
            "Sample from tokens at least this fraction as likely as the most likely one; 0: all, "
            "at most 1."
        ),
    )
    seed: int | None = field(
        default=None, metadata=doc("Random seed, below 2^64; None: another one each time.")
    )
    logprobs: int | None = field(
        default=None,
        metadata=doc(
            f"Report each token's log-probability and that of so many most likely alternatives, 0 "
            f"to {MAX_LOGPROBS}, before any of the above. None: nothing."
        ),
    )
    constraint: ConstraintFactory | None = field(
        default=None, metadata=doc("Which tokens are allowed at all, for instance by a grammar.")
    )

    def __post_init__(self) -> None:
        if self.seed is not None:
            check_seed(self.seed)
        count = self.logprobs
        for name, ok, rule in (
            ("temperature", 0 <= self.temperature <= 100, "from 0 (greedy) to 100"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or a positive number"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            (
                "repetition_penalty",
                0.01 <= self.repetition_penalty <= 100,
                "0.01 to 100; 1 is none",
            ),
            ("logprobs", count is None or 0 <= count <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        ):
            if not ok:
                value = getattr(self, name)
                raise RequestError(f"{name} must be {rule}, got {value}", param=name)


class TextKnobs(TypedDict, total=False):
    """Fields of TextSampling as keyword arguments, without those of one answer."""

    repetition_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
