"""Image sampling: its settings, as a request names them and as they are used, and the solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

from neounify.config import CheckpointDefaults, ModelConfig
from neounify.config.sampling import MAX_GUIDANCE, MAX_SHIFT, MAX_STEPS, TextKnobs, doc, range_error
from neounify.errors import RequestError
from neounify.flow.guidance import Guidance, Norm

if TYPE_CHECKING:  # Command lines read the settings and do not wait for torch.
    from torch import Tensor


# --- solvers ---
#
# Integrators of dz/dt = v(z, t). A solver sees the velocity only, never the model. Each is stepped
# from outside (`step`), so that requests with different schedules can share the evaluations of v.

SolverName = Literal["euler", "ab2"]


class Solver(Protocol):
    """One trajectory's integrator."""

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        """The point at `t_next`, from z and its velocity at `t`."""

    def reset(self) -> None:
        """Forget earlier velocities: the next one belongs to another field."""


class Euler:
    """First order: z + h·v. The contract of the published models."""

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        return z + (t_next - t) * v

    def reset(self) -> None:
        """Nothing to forget."""


class AdamsBashforth2:
    """Second order from the velocity of the previous step, still one evaluation per step.

    With steps h and, before it, h': z + h·((1 + r/2)·v - r/2·v'), r = h / h'
    (Hairer, Nørsett, Wanner, Solving ODEs I, III.5). The first step, also after a `reset`, is
    Euler's: across a jump of v the extrapolation would be of first order.
    """

    def __init__(self) -> None:
        self._previous: tuple[Tensor, float] | None = None

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        h = t_next - t
        slope = v
        if self._previous is not None:
            old, old_h = self._previous
            r = h / old_h
            slope = (1 + r / 2) * v - (r / 2) * old
        self._previous = (v, h)
        return z + h * slope

    def reset(self) -> None:
        self._previous = None


SOLVERS: dict[SolverName, Callable[[], Solver]] = {
    "euler": Euler,
    "ab2": AdamsBashforth2,
}


def check_solver(name: str) -> None:
    """Raise RequestError for an unknown name."""
    if not isinstance(name, str) or name not in SOLVERS:
        known = ", ".join(SOLVERS)
        raise RequestError(f"solver {name!r} is unknown; known: {known}", param="solver")


def make_solver(name: str) -> Solver:
    """A fresh solver; RequestError for an unknown name."""
    check_solver(name)
    return SOLVERS[name]()  # type: ignore[index]


# --- settings ---


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """Sampling of images as a request names it. Raises RequestError for values out of range.

    None stands for the checkpoint's default (`config.sampling`); for `t_eps`, for the value that
    fits the times. `resolve` gives the values that are used. A field here has an option of the
    command line and a field of the HTTP API, described by the same sentence (`knob_doc`).

    Sources: guidance, Ho and Salimans 2022; with a scale for input images, Brooks et al. 2023; its
    interval, Kynkäänniemi et al. 2024; cfg_zero_star, Fan et al. 2025; shift, Esser et al. 2024.
    """

    steps: int | None = field(
        default=None,
        metadata=doc(f"Denoising steps, 1 to {MAX_STEPS}: more are slower and give finer images."),
    )
    shift: float | None = field(
        default=None,
        metadata=doc(
            f"Timestep shift, {1 / MAX_SHIFT:g} to {MAX_SHIFT}: above 1, more of the steps are "
            "spent at high noise; 1 is none."
        ),
    )
    guidance: float | None = field(
        default=None,
        metadata=doc(
            f"Classifier-free guidance scale, 0 to {MAX_GUIDANCE}; up to 1 is none, and twice as "
            "fast."
        ),
    )
    image_guidance: float | None = field(
        default=None,
        metadata=doc(
            f"Guidance scale of the input images of an edit, 0 to {MAX_GUIDANCE}; 1 is none."
        ),
    )
    guidance_interval: tuple[float, float] = field(
        default=(0.0, 1.0),
        metadata=doc(
            "Range of times t in which guidance acts; 0 is pure noise, 1 the image. Default: 0, 1."
        ),
    )
    guidance_norm: Norm = field(
        default="none",
        metadata=doc(
            "Rescaling of strong guidance: none, global, channel or cfg_zero_star. Default: none."
        ),
    )
    published_interval: bool = field(
        default=False,
        metadata=doc("As in the published code: a guidance interval of an edit from 0 never ends."),
    )
    solver: SolverName = field(
        default="euler",
        metadata=doc(
            f"ODE solver: {', '.join(SOLVERS)}. euler is as published; ab2 is of second order and "
            "needs fewer steps. Default: euler."
        ),
    )
    t_eps: float | None = field(
        default=None,
        metadata=doc(
            "Smallest 1 - t by which a velocity is divided, above 0 and at most 1. Default: "
            "0.02, or less where the last step is shorter."
        ),
    )

    def __post_init__(self) -> None:
        self._resolve(CheckpointDefaults(), editing=False)

    def resolve(self, config: ModelConfig, *, editing: bool) -> ResolvedSampling:
        """The values to sample with: those named here, else the checkpoint's.

        `editing`: whether there are input images, whose guidance follows another formula. Raises
        RequestError for what edits do not have.
        """
        return self._resolve(config.sampling, editing=editing)

    def _resolve(self, defaults: CheckpointDefaults, *, editing: bool) -> ResolvedSampling:
        def chosen(value: float | None, default: float) -> float:
            return default if value is None else value

        return ResolvedSampling(
            steps=defaults.steps if self.steps is None else self.steps,
            shift=chosen(self.shift, defaults.shift),
            guidance=Guidance(
                text=chosen(self.guidance, defaults.guidance),
                image=chosen(self.image_guidance, defaults.image_guidance),
                interval=self.guidance_interval,
                norm=self.guidance_norm,
                editing=editing,
                published_interval=self.published_interval,
            ),
            solver=self.solver,
            t_eps=self.t_eps,
        )


class GenerateKnobs(TypedDict, total=False):
    """The fields of ImageSampling that images without input images have, as keyword arguments."""

    steps: int | None
    shift: float | None
    guidance: float | None
    guidance_interval: tuple[float, float]
    guidance_norm: Norm
    solver: SolverName
    t_eps: float | None


class EditKnobs(GenerateKnobs, total=False):
    """All fields of ImageSampling as keyword arguments."""

    image_guidance: float | None
    published_interval: bool


class InterleaveKnobs(EditKnobs, TextKnobs, total=False):
    """The knobs of interleaved answers: of their images and of their text."""


@dataclass(frozen=True, kw_only=True)
class ResolvedSampling:
    """Sampling of an image with every value known. Raises RequestError for values out of range."""

    steps: int
    """Denoising steps, 1 to MAX_STEPS."""
    shift: float
    """S of the time schedule, 1 / MAX_SHIFT to MAX_SHIFT."""
    guidance: Guidance = field(default_factory=Guidance)
    """Classifier-free guidance: scales, interval and rescaling."""
    solver: SolverName = "euler"
    """ODE solver."""
    t_eps: float | None = None
    """The smallest 1 - t by which a velocity is divided; None: `flow.path.sampling_t_eps`."""

    def __post_init__(self) -> None:
        check_solver(self.solver)
        for name, value in (("steps", self.steps), ("shift", self.shift)):
            if (error := range_error(name, value)) is not None:
                raise RequestError(error, param=name)
        if self.t_eps is not None and not 0 < self.t_eps <= 1:
            raise RequestError(
                f"t_eps must be above 0 and at most 1, got {self.t_eps}", param="t_eps"
            )

    def times(self) -> list[float]:
        """`steps` + 1 times from 0 (noise) to 1 (data)."""
        from neounify.flow.path import timesteps  # imports torch, which reading the fields does not

        return timesteps(self.steps, self.shift).tolist()

    def effective_t_eps(self) -> float:
        """`t_eps`, or the default for these times."""
        from neounify.flow.path import sampling_t_eps

        return sampling_t_eps(self.times()[-2]) if self.t_eps is None else self.t_eps
