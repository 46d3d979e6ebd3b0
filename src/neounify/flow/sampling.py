"""Image sampling: its settings, as a request names them and as they are used, and the solvers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, get_args

from neounify.config import CheckpointDefaults, FlowConfig, ModelConfig
from neounify.config.sampling import (
    MAX_GUIDANCE,
    MAX_SHIFT,
    MAX_STEPS,
    SolverName,
    TextKnobs,
    doc,
    range_error,
)
from neounify.errors import RequestError
from neounify.flow.guidance import Guidance, Norm

if TYPE_CHECKING:  # Command lines read the settings and do not wait for torch.
    from torch import Tensor


# --- solvers ---
#
# Integrators of dz/dt = v(z, t). A solver sees the velocity only, never the model. Each is stepped
# from outside (`step`), so that requests with different schedules can share the evaluations of v.


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


class DpmSolver2M:
    """Second order in the clean prediction x̂ = z + (1 - t)·v, one evaluation per step.

    DPM-Solver++(2M) of Lu et al. 2022 for this path, u = 1 - t and λ = ln(t / u):
    z' = (u'/u)·z + (1 - u'/u)·(x̂ + (h / 2h')·(x̂ - x̂')) with steps h and, before it, h' of λ. With
    x̂ alone that is Euler's step, taken where h or h' is infinite: at t = 0, right after it, and to
    t = 1; also first and after a `reset`. `published` forms x̂ in float32 as the code of PixelUMM
    does, (z - u·(z - t·v)) / t, whose difference loses digits near t = 0.
    """

    _kept = 1

    def __init__(self, *, published: bool = False) -> None:
        self._published = published
        self._past: list[tuple[Tensor, float]] = []

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        if self._published and t > 0:
            return self._advance(z, (z - (1 - t) * (z - t * v)) / t, t, t_next)
        return self._advance(z, z + (1 - t) * v, t, t_next)

    def _advance(self, z: Tensor, clean: Tensor, t: float, t_next: float) -> Tensor:
        """The point at `t_next`; keeps x̂ and t of the last `_kept` steps."""
        target = clean
        if self._past and self._past[-1][1] > 0 and t_next < 1:
            old, old_t = self._past[-1]
            ratio = (_log_snr(t_next) - _log_snr(t)) / (_log_snr(t) - _log_snr(old_t))
            target = clean + (ratio / 2) * (clean - old)
        self._past = [*self._past, (clean, t)][-self._kept :]
        return _towards(target, z, t, t_next)

    def reset(self) -> None:
        self._past = []


class UniPC(DpmSolver2M):
    """dpm2m with a corrector, which moves the last step's end once x̂ there is known.

    UniPC of Zhao et al. 2023 for clean predictions, of order 2 and B(h) = e^h - 1 ("bh2"). With h
    from λ' to λ, E = e^-h - 1 and D = x̂ - x̂', the last step is taken again from its start y' with
    x̂' + D / 2 where it was of first order, and else with x̂' + ρ0·(x̂'' - x̂') / r + ρ1·D, where
    r = (λ'' - λ') / h, ρ0 + ρ1 = φ2 / E, r·ρ0 + ρ1 = 2·φ3 / E, φ2 = -E / h - 1, φ3 = -φ2 / h - 1/2.
    x̂ is not evaluated again at the corrected point.
    """

    _kept = 2

    def __init__(self) -> None:
        super().__init__()
        self._start: Tensor | None = None

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        clean = z + (1 - t) * v
        if self._start is not None:
            old, old_t = self._past[-1]
            z = _towards(old + self._correction(clean - old, t), self._start, old_t, t)
        self._start = z
        return self._advance(z, clean, t, t_next)

    def _correction(self, change: Tensor, t: float) -> Tensor:
        if len(self._past) < 2 or self._past[0][1] == 0:
            return change / 2
        (oldest, oldest_t), (old, old_t) = self._past
        h = _log_snr(t) - _log_snr(old_t)
        r = (_log_snr(oldest_t) - _log_snr(old_t)) / h
        e = math.expm1(-h)
        phi2 = -e / h - 1
        phi3 = -phi2 / h - 1 / 2
        rho0 = (phi2 - 2 * phi3) / e / (1 - r)
        return (rho0 / r) * (oldest - old) + (phi2 / e - rho0) * change

    def reset(self) -> None:
        super().reset()
        self._start = None


def _towards(clean: Tensor, z: Tensor, t: float, t_next: float) -> Tensor:
    """(u'/u)·z + (1 - u'/u)·x̂: Euler's step from t along the line to x̂, which it reaches at 1."""
    return z + ((t_next - t) / (1 - t)) * (clean - z)


def _log_snr(t: float) -> float:
    """λ = ln(t / (1 - t)) for t inside (0, 1)."""
    return math.log(t) - math.log1p(-t)


SOLVERS: dict[SolverName, Callable[[], Solver]] = {
    "euler": Euler,
    "ab2": AdamsBashforth2,
    "dpm2m": DpmSolver2M,
    "unipc": UniPC,
}


def check_solver(name: str) -> None:
    """Raise RequestError for an unknown name."""
    if not isinstance(name, str) or name not in SOLVERS:
        known = ", ".join(SOLVERS)
        raise RequestError(f"solver {name!r} is unknown; known: {known}", param="solver")


def make_solver(name: str, *, published: bool = False) -> Solver:
    """A fresh solver; RequestError for an unknown name.

    `published` is that of `DpmSolver2M`, and changes no other.
    """
    check_solver(name)
    if published and name == "dpm2m":
        return DpmSolver2M(published=True)
    return SOLVERS[name]()  # type: ignore[index]


# --- settings ---

Fast = Literal["half", "third"]


def fast_steps(fast: Fast, steps: int) -> int:
    """Steps instead of the checkpoint's: half of them, or 30 %, which takes a third of the time."""
    return max(1, round(steps * (0.5 if fast == "half" else 0.3)))


@dataclass(frozen=True, kw_only=True)
class StepCache:
    """Reuse of what the layers computed, from step to step, for each image and guidance branch.

    The first layer always runs. Where its residual differs from that of the last computed step by
    less than `threshold` (mean absolute difference over mean absolute value; 0: never), the
    residual of all other layers is that step's too: at most `most` times in a row, never in the
    first `warm` steps. Source: first-block caching, after TeaCache, Liu et al. 2024. Raises
    RequestError.
    """

    threshold: float = 0.0
    most: int = 2
    warm: int = 3

    def __post_init__(self) -> None:
        _check_ranges(
            step_cache=self.threshold, step_cache_most=self.most, step_cache_warm=self.warm
        )


def _check_ranges(**values: float) -> None:
    """Raise RequestError for the first value outside its range in IMAGE_RANGES."""
    for name, value in values.items():
        if (error := range_error(name, value)) is not None:
            raise RequestError(error, param=name)


@dataclass(frozen=True, kw_only=True)
class ImageSampling:
    """Sampling of images as a request names it. Raises RequestError for values out of range.

    None stands for the checkpoint's default (`config.sampling`); for `t_eps`, where the checkpoint
    has none, for the value that fits the times. `resolve` gives the values that are
    used. A field here has an option of the command line and a field of the HTTP API, described by
    the same sentence (`knob_doc`).

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
    solver: SolverName | None = field(
        default=None,
        metadata=doc(
            f"ODE solver: {', '.join(SOLVERS)}. euler is of first order, the others need fewer "
            "steps. Default: the checkpoint's; with fast third ab2 in place of euler."
        ),
    )
    published_solver: bool = field(
        default=False,
        metadata=doc(
            "As in the published code of PixelUMM: dpm2m loses digits in its first step, and the "
            "levels of pixels are cut, not rounded."
        ),
    )
    t_eps: float | None = field(
        default=None,
        metadata=doc(
            "Smallest 1 - t by which a velocity is divided, above 0 and at most 1. Default: the "
            "checkpoint's, else 0.02, or less where the last step is shorter."
        ),
    )
    fast: Fast | None = field(
        default=None,
        metadata=doc(
            "Fewer steps than the checkpoint's: half, or third, which is 30 % of them with solver "
            "ab2. Instead of steps. Default: all steps."
        ),
    )
    guidance_reuse: int = field(
        default=1,
        metadata=doc(
            f"Evaluate the unguided image in every k-th guided step only, 1 to {MAX_STEPS}; "
            "between, its distance from the conditional one is kept. 1 is every step."
        ),
    )
    guidance_stop: float = field(
        default=0.0,
        metadata=doc(
            "Stop guidance for good once it changes the predicted image by less than this share, 0 "
            "to 1, and t is at least 0.1; 0 is never."
        ),
    )
    step_cache: float = field(
        default=0.0,
        metadata=doc(
            "Reuse the later layers of an earlier step where the first layer changed by less than "
            "this share, 0 to 1; 0 is never."
        ),
    )
    step_cache_most: int = field(
        default=2,
        metadata=doc(f"Steps in a row that the step cache may reuse, 1 to {MAX_STEPS}."),
    )
    step_cache_warm: int = field(
        default=3,
        metadata=doc(f"First steps in which the step cache reuses nothing, 1 to {MAX_STEPS}."),
    )

    def __post_init__(self) -> None:
        self._resolve(CheckpointDefaults(), FlowConfig(), editing=False)

    def resolve(
        self, config: ModelConfig, *, editing: bool, video: bool = False
    ) -> ResolvedSampling:
        """The values to sample with: those named here, else the checkpoint's.

        `editing`: whether there are input images, whose guidance follows another formula. `video`:
        whether a clip is sampled, which has other defaults, by solver. Raises RequestError for what
        edits do not have.
        """
        defaults = config.sampling.of_video(self.solver) if video else config.sampling
        return self._resolve(defaults, config.flow, editing=editing)

    def _resolve(
        self, defaults: CheckpointDefaults, flow: FlowConfig, *, editing: bool
    ) -> ResolvedSampling:
        def chosen(value: float | None, default: float) -> float:
            return default if value is None else value

        if self.fast is not None:
            if self.fast not in get_args(Fast):
                known = ", ".join(get_args(Fast))
                raise RequestError(f"fast {self.fast!r} is unknown; known: {known}", param="fast")
            if self.steps is not None:
                raise RequestError(
                    f"fast {self.fast!r} sets the number of steps, so steps {self.steps} cannot be "
                    "given beside it",
                    param="fast",
                )
        steps = defaults.steps if self.fast is None else fast_steps(self.fast, defaults.steps)
        solver = defaults.solver
        if self.fast == "third" and solver == "euler":
            solver = "ab2"
        return ResolvedSampling(
            steps=steps if self.steps is None else self.steps,
            shift=chosen(self.shift, defaults.shift),
            guidance=Guidance(
                text=chosen(self.guidance, defaults.guidance),
                image=chosen(self.image_guidance, defaults.image_guidance),
                interval=self.guidance_interval,
                norm=self.guidance_norm,
                editing=editing,
                published_interval=self.published_interval,
                open_end=flow.guidance_end_open,
                reuse=self.guidance_reuse,
                stop=self.guidance_stop,
            ),
            solver=solver if self.solver is None else self.solver,
            published_solver=self.published_solver,
            t_eps=flow.t_eps_sampling if self.t_eps is None else self.t_eps,
            flow=flow,
            cache=StepCache(
                threshold=self.step_cache, most=self.step_cache_most, warm=self.step_cache_warm
            ),
        )


class GenerateKnobs(TypedDict, total=False):
    """The fields of ImageSampling that images without input images have, as keyword arguments."""

    steps: int | None
    shift: float | None
    guidance: float | None
    guidance_interval: tuple[float, float]
    guidance_norm: Norm
    solver: SolverName | None
    published_solver: bool
    t_eps: float | None
    fast: Fast | None
    guidance_reuse: int
    guidance_stop: float
    step_cache: float
    step_cache_most: int
    step_cache_warm: int


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
    published_solver: bool = False
    """Whether dpm2m rounds as the published code does, and levels of pixels are cut."""
    t_eps: float | None = None
    """The smallest 1 - t by which a velocity is divided; None: `flow.path.sampling_t_eps`."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    """Noise and time conventions of the checkpoint."""
    cache: StepCache = field(default_factory=StepCache)
    """Reuse of layers from step to step."""

    def __post_init__(self) -> None:
        check_solver(self.solver)
        _check_ranges(steps=self.steps, shift=self.shift)
        if self.t_eps is not None and not 0 < self.t_eps <= 1:
            raise RequestError(
                f"t_eps must be above 0 and at most 1, got {self.t_eps}", param="t_eps"
            )

    def times(self) -> list[float]:
        """`steps` + 1 times from noise to data (1)."""
        from neounify.flow.path import timesteps  # imports torch, which reading the fields does not

        return timesteps(self.steps, self.shift, self.flow.first_time).tolist()

    def network_times(self) -> list[float]:
        """The `times` that the network and the velocity take: those of unipc may be cut."""
        from neounify.flow.path import cut_times

        return cut_times(self.times(), self.flow.unipc_grid if self.solver == "unipc" else 0)

    def effective_t_eps(self) -> float:
        """`t_eps`, or the default for these times."""
        from neounify.flow.path import sampling_t_eps

        return sampling_t_eps(self.times()[-2]) if self.t_eps is None else self.t_eps
