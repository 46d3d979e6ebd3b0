"""Classifier-free guidance: which prefixes a step needs and how their velocities combine.

Velocities are those of single images, [tokens, token_width], or of several at one time of one
size, [images, tokens, token_width]. v_c sees the whole prompt, v_i only its images, v_u nothing.
`GuidanceRun` follows one trajectory and saves evaluations of v_i and v_u.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING, Literal, get_args

from neounify.config.sampling import range_error
from neounify.errors import RequestError

if TYPE_CHECKING:  # `flow.sampling` is read by command lines, which do not wait for torch.
    from torch import Tensor

Branch = Literal["cond", "image", "uncond"]
Norm = Literal["none", "global", "channel", "cfg_zero_star"]
Velocities = dict[Branch, "Tensor"]
EPS = 1e-8
STOP_FROM = 0.1
"""Time from which guidance may stop: before it the predictions are too coarse to tell."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of one request. Raises RequestError for values out of range.

    `text` is g, `image` is m (1 means none), both from 0 to MAX_GUIDANCE. Without input images
    nothing is guided at g ≤ 1: every value from 0 to 1 gives the conditional image. An edit
    follows its formula at any g; below 1 the text pulls less than in the conditional image.

    `interval` = (lo, hi) is the range of t in which guidance acts. Text-to-image (`editing`
    false) acts for lo ≤ t ≤ hi, with `open_end` for lo ≤ t < hi, editing for lo < t < hi and at
    t = 0 when lo = 0.
    `published_interval` reproduces the published code, where an editing interval that starts
    at 0 never ends.

    `reuse` = k evaluates the branches besides the conditional one in every k-th guided step only;
    between, their clean predictions keep their distance from the conditional one. `stop` = θ ends
    guidance for good once that distance is small, see `GuidanceRun`; 0 is never.
    """

    text: float = 4.0
    image: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    norm: Norm = "none"
    editing: bool = False
    published_interval: bool = False
    open_end: bool = False
    reuse: int = 1
    stop: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise RequestError(
                f"guidance_interval {self.interval} must be 0 <= low <= high <= 1",
                param="guidance_interval",
            )
        if self.norm not in get_args(Norm):
            raise RequestError(
                f"guidance_norm {self.norm!r} is unknown; known: {', '.join(get_args(Norm))}",
                param="guidance_norm",
            )
        if self.editing and self.norm == "cfg_zero_star":
            raise RequestError(
                "guidance_norm 'cfg_zero_star' is for text-to-image only", param="guidance_norm"
            )
        for name, value in (
            ("guidance", self.text),
            ("image_guidance", self.image),
            ("guidance_reuse", self.reuse),
            ("guidance_stop", self.stop),
        ):
            if (error := range_error(name, value)) is not None:
                raise RequestError(error, param=name)

    def branches(self) -> tuple[Branch, ...]:
        """The prefixes a guided step needs, the conditional one first."""
        g, m = self.text, self.image
        if not self.editing:
            return ("cond", "uncond") if g > 1 else ("cond",)
        if g == 1 and m == 1:
            return ("cond",)
        if m == 1:
            return ("cond", "image")
        if g == m:
            return ("cond", "uncond")
        return ("cond", "image", "uncond")

    def acts_at(self, t: float) -> bool:
        """Whether the step that starts at t is guided."""
        if len(self.branches()) == 1:
            return False
        low, high = self.interval
        if not self.editing:
            return low <= t < high or (t == high and not self.open_end)
        if self.published_interval:
            return low == 0 or low < t < high
        return (low == 0 or t > low) and t < high

    def zeroes(self, *, first_step: bool) -> bool:
        """Whether a guided step stands still: the first one of cfg_zero_star."""
        return self.norm == "cfg_zero_star" and first_step

    @property
    def by_row(self) -> bool:
        """Whether the guided velocity of a token follows from the velocities of that token."""
        return self.norm in ("none", "channel")

    def combine(self, v: Velocities, *, first_step: bool) -> Tensor:
        """The guided velocity of each image from those of its branches."""
        cond = v["cond"]
        if self.zeroes(first_step=first_step):
            return cond.new_zeros(cond.shape)
        if self.norm == "cfg_zero_star":
            uncond = v["uncond"] * _projection(cond, v["uncond"])
            return uncond + self.text * (cond - uncond)
        mixed = self._mix(v)
        return _rescale(mixed, cond, self.norm) if max(self.text, self.image) > 1 else mixed

    def _mix(self, v: Velocities) -> Tensor:
        g, m = self.text, self.image
        cond = v["cond"]
        match self.branches():
            case ("cond", "image"):
                return v["image"] + g * (cond - v["image"])
            case ("cond", "uncond"):
                return v["uncond"] + g * (cond - v["uncond"])
            case ("cond", "image", "uncond"):
                return v["uncond"] + g * (cond - v["image"]) + m * (v["image"] - v["uncond"])
        return cond


def _projection(cond: Tensor, uncond: Tensor) -> Tensor:
    """⟨v_c, v_u⟩ / (‖v_u‖² + ε) over the whole image."""
    inner, square = ((x * uncond).sum((-2, -1), keepdim=True) for x in (cond, uncond))
    return inner / (square + EPS)


def _rescale(v: Tensor, cond: Tensor, norm: Norm) -> Tensor:
    """Never longer than the conditional velocity: over the image, or token by token."""
    if norm == "none":
        return v
    dims = (-2, -1) if norm == "global" else (-1,)
    ratio = cond.norm(dim=dims, keepdim=True) / (v.norm(dim=dims, keepdim=True) + EPS)
    return v * ratio.clamp(max=1)


class GuidanceRun:
    """Guidance along the trajectory of one image, decided from that image alone.

    `reuse`: with Δ_b = x̂_c - x̂_b of the last step that evaluated branch b, a step between takes
    x̂_b = x̂_c - Δ_b. `stop`: guidance ends for good after an evaluated step at t ≥ STOP_FROM with
    ‖Δ_b‖ < θ·‖x̂_c‖ for every b. It is measured in x̂, because velocities in the noise are mostly -z
    whatever the prompt. Both unset, nothing but the steps is counted.
    """

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance
        self._guided_steps = 0
        self._small: Tensor | None = None
        self._stopped = False
        self._differences: dict[Branch, Tensor] = {}

    def acts_at(self, t: float) -> bool:
        """Whether the step that starts at t is guided."""
        if self._small is not None:
            self._stopped, self._small = bool(self._small), None
        return not self._stopped and self.guidance.acts_at(t)

    def branches(self, t: float) -> tuple[Branch, ...]:
        """The branches that the step at t evaluates, the conditional one first."""
        if not self.acts_at(t):
            return ("cond",)
        evaluates = self._guided_steps % self.guidance.reuse == 0
        return self.guidance.branches() if evaluates else ("cond",)

    def complete(self, t: float, clean: dict[Branch, Tensor]) -> dict[Branch, Tensor]:
        """x̂ of all branches of a guided step at t, from those it evaluated; takes the step in."""
        self._guided_steps += 1
        cond = clean["cond"]
        if len(clean) == 1:
            return clean | {b: cond - apart for b, apart in self._differences.items()}
        if self.guidance.reuse > 1 or self.guidance.stop > 0:
            apart: dict[Branch, Tensor] = {b: cond - x for b, x in clean.items() if b != "cond"}
            if self.guidance.reuse > 1:
                self._differences = apart
            if self.guidance.stop > 0 and t >= STOP_FROM:
                least = self.guidance.stop * cond.norm()
                # Read by the next step, so that the host need not wait inside this one.
                self._small = reduce(and_, (x.norm() < least for x in apart.values()))
        return clean
