"""CheckpointDefaults, for requests that name no values, and TextSampling, the knobs of text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypedDict

from neounify.config.checks import require
from neounify.config.knobs import doc
from neounify.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOGPROBS = 20
"""Alternatives whose log-probability may be asked for with every token."""


@dataclass(frozen=True, kw_only=True)
class CheckpointDefaults:
    """Sizes and sampling values of a checkpoint; the defaults are the published models'.

    Areas are in pixels, sizes are (width, height) in pixels. A checkpoint may carry other values
    in the section `"neounify": {"sampling": {...}}` of its config.json. Raises ConfigError.
    """

    image_size: tuple[int, int] = (2048, 2048)
    """Size of a generated image, multiples of the token side."""
    chat_min_pixels: int = 256**2
    """Smaller input images of a chat are enlarged to this area."""
    chat_max_pixels: int = 2048**2
    """Larger input images of a chat are reduced to this area."""
    edit_min_pixels: int = 512**2
    """Smaller input images of an edit are enlarged to this area."""
    edit_max_pixels: int = 2048**2
    """Larger input images of an edit are reduced to this area."""
    edit_max_total_pixels: int = 4096**2
    """Area of all input images of an edit together."""
    steps: int = 50
    """Denoising steps; at least 1."""
    guidance: float = 4.0
    """Guidance scale of the prompt; 0 to 1 is none."""
    image_guidance: float = 1.0
    """Guidance scale of the input images of an edit; 1 is none."""
    shift: float = 3.0
    """Timestep shift towards noise; above 0, 1 is none."""
    trained_sizes: tuple[tuple[int, int], ...] = ()
    """Sizes the model was trained to generate; empty: not recorded."""
    trained_pixels: tuple[int, int] | None = None
    """(least, greatest) area of training images of any shape; None: not recorded."""

    def __post_init__(self) -> None:
        for low, high in (
            (self.chat_min_pixels, self.chat_max_pixels),
            (self.edit_min_pixels, self.edit_max_pixels),
            (self.edit_min_pixels, self.edit_max_total_pixels),
        ):
            require(1 <= low <= high, f"sampling: pixel bounds {low}..{high} are not a range")
        low, high = self.trained_pixels or (1, 1)
        require(1 <= low <= high, f"sampling.trained_pixels {low}..{high} is not a range")
        require(self.steps >= 1, f"sampling.steps must be at least 1, got {self.steps}")
        require(self.shift > 0, f"sampling.shift must be positive, got {self.shift}")

    def edit_bounds(self, num_images: int) -> tuple[int, int]:
        """(minimum, maximum) area of each of the `num_images` input images of an edit."""
        share = self.edit_max_total_pixels // max(1, num_images)
        return self.edit_min_pixels, min(self.edit_max_pixels, share)

    def check_sizes(self, token_size: int) -> None:
        """ConfigError unless all sizes are multiples of the token side."""

        def fits(size: tuple[int, ...]) -> bool:
            sides = [side >= token_size and side % token_size == 0 for side in size]
            return len(sides) == 2 and all(sides)

        require(
            fits(self.image_size),
            f"sampling.image_size {self.image_size} must be (width, height), multiples of "
            f"{token_size}",
        )
        require(
            all(fits(size) for size in self.trained_sizes),
            f"sampling.trained_sizes {self.trained_sizes} must be (width, height) pairs, "
            f"multiples of {token_size}",
        )


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
    """How tokens are drawn. Raises RequestError for values out of range.

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
