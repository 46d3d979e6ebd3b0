"""Stochastic denoising steps: their Gaussians, log-probabilities and divergences.

At time t, with s = 1 - t, the noise scale σ of the image and a predicted clean image x̂, the
predicted noise is n̂ = (z - t·x̂) / s, σ included. For any g(t) the equation

    dz = [x̂ - (1 + g² / (2sσ²))·n̂] dt + g dW

has the marginals of the sampler's ODE. A step t → t' (s' = 1 - t') of each kind is a Gaussian
N(μ, w²) whose mean is affine in x̂ and z, μ = q·x̂ + p·z:

    ode       κ = 1                  Euler's step, w = 0
    cps       κ = cos(ηπ/2)          the same share of the noise is replaced in every step
    precise   κ = (s't/(st'))^(η²/2) exact for a frozen x̂ and g = ση·√(s/t)
              with μ = t'·x̂ + s'·κ·n̂, w = σ·s'·√(1 - κ²)
    flow      Euler-Maruyama for the same g, as Flow-GRPO publishes it

Sources: Flow-GRPO (arXiv 2505.05470), Flow-CPS (2509.05952), Precise (2605.23522). All of them
write σ = 1; here σ multiplies the noise that is added and divides the score. The step into t = 1 is
always `ode`: there w of cps and precise is 0, and that of flow would stay in the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from neounify.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    SampleNoise = Callable[[int], Tensor]

StepKind = Literal["ode", "cps", "precise", "flow"]
STEP_KINDS: tuple[StepKind, ...] = get_args(StepKind)
MAX_ETA = 4.0


@dataclass(frozen=True, kw_only=True)
class GaussianStep:
    """One step t → t' as N(q·x̂ + p·z, w²), of z and x̂ of any shape.

    Log-probabilities and divergences are means over the D values of an image (all dimensions but
    the first) and not sums, so they do not grow with its size; they are float32 or float64.
    """

    q: float
    """∂μ/∂x̂."""
    p: float
    """∂μ/∂z."""
    w: float
    """Standard deviation; 0 for a deterministic step."""
    sigma: float
    """Noise scale of the image."""

    @property
    def is_random(self) -> bool:
        return self.w > 0

    def mean(self, z: Tensor, clean: Tensor) -> Tensor:
        """μ."""
        return self.q * clean + self.p * z

    def sample(self, z: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
        """z' = μ + w·ε, for standard normal `noise`."""
        mean = self.mean(z, clean)
        return mean + self.w * noise if self.is_random else mean

    def log_prob(self, z_next: Tensor, z: Tensor, clean: Tensor) -> Tensor:
        """ℓ = -‖z' - μ‖²/(2w²D) - log w - ½ log 2π, [images]."""
        self._check_random()
        square = _mean((z_next - self.mean(z, clean)).square())
        return -square / (2 * self.w**2) - math.log(self.w) - math.log(2 * math.pi) / 2

    def divergence(self, clean: Tensor, other: Tensor) -> Tensor:
        """b = q²·‖x̂ - x̂_other‖²/(2w²D), the KL divergence per value of two policies, [images]."""
        self._check_random()
        return _mean((clean - other).square()) * (self.q**2 / (2 * self.w**2))

    def log_ratio(self, noise: Tensor, clean: Tensor, old: Tensor) -> Tensor:
        """ℓ_θ - ℓ_old = (q/w)·⟨ε, x̂_θ - x̂_old⟩/D - b, [images].

        `noise` is the ε with which the old policy drew z'. The difference of two `log_prob` is the
        same number; in float32 its rounding is as large as the ratios of late steps.
        """
        drift = self.guarded_log_ratio(noise, clean, old) * (self.sigma / self.w)
        return drift - self.divergence(clean, old)

    def guarded_log_ratio(self, noise: Tensor, clean: Tensor, old: Tensor) -> Tensor:
        """(ℓ_θ - ℓ_old + b)·w/σ = q·⟨ε, x̂_θ - x̂_old⟩/(σD), [images].

        GRPO-Guard (arXiv 2510.22319): its mean is 0 and its spread no longer depends on the step.
        The division by σ keeps it the same when the pixels and σ are rescaled together.
        """
        self._check_random()
        return _mean(noise * (clean - old)) * (self.q / self.sigma)

    def _check_random(self) -> None:
        if not self.is_random:
            raise ValueError("a deterministic step has no density")


def gaussian_step(
    kind: StepKind, eta: float, times: Sequence[float], index: int, sigma: float
) -> GaussianStep:
    """Step `index` of a schedule of times from 0 to 1, for images of noise scale σ.

    `eta` is the amount of noise, from 0 (none) to MAX_ETA, for cps at most 1.
    """
    t, t_next = times[index], times[index + 1]
    s, s_next = 1 - t, 1 - t_next
    if kind == "flow" and eta > 0 and s_next > 0:
        h = t_next - t
        # The rate is infinite at t = 0; the published sampler takes the next time instead.
        divisor = t if t > 0 else times[1]
        c = 1 + eta**2 / (2 * divisor)
        w = sigma * eta * math.sqrt(s / divisor) * math.sqrt(h)
        return GaussianStep(q=h * (1 + c * t / s), p=1 - h * c / s, w=w, sigma=sigma)
    kappa = _kappa(kind, eta, t, t_next)
    w = sigma * s_next * math.sqrt(1 - kappa**2)
    return GaussianStep(q=t_next - s_next * kappa * t / s, p=s_next * kappa / s, w=w, sigma=sigma)


def check_step_kind(kind: str, eta: float) -> None:
    """Raise ConfigError for an unknown kind of step or an `eta` out of its range."""
    if kind not in STEP_KINDS:
        raise ConfigError(f"step kind {kind!r} is unknown; known: {', '.join(STEP_KINDS)}")
    limit = 1.0 if kind == "cps" else MAX_ETA
    if not 0 <= eta <= limit:
        raise ConfigError(f"eta of {kind} steps must be from 0 to {limit:g}, got {eta}")


class StochasticSolver:
    """A solver (`flow.sampling`) whose steps inside a window are random, Euler's outside.

    `random_steps` are indices into `times`; `sample_noise(index)` is the standard normal ε of a
    step, in the shape of z. `record` has, for each random step taken, its z, x̂ and ε. The
    velocities must not be clamped: t_eps at most 1 - t of the last step, as samplers have it.
    """

    def __init__(
        self,
        kind: StepKind,
        eta: float,
        times: Sequence[float],
        sigma: float,
        *,
        random_steps: Sequence[int],
        sample_noise: SampleNoise,
    ) -> None:
        check_step_kind(kind, eta)
        self.steps = [
            gaussian_step(kind if index in random_steps else "ode", eta, times, index, sigma)
            for index in range(len(times) - 1)
        ]
        self.sample_noise = sample_noise
        self.record: dict[int, RandomStep] = {}
        self._index = {t: index for index, t in enumerate(times)}

    def step(self, z: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        """The point at `t_next`, from z and its velocity at `t`."""
        index = self._index[t]
        step = self.steps[index]
        if not step.is_random:
            return z + (t_next - t) * v
        clean = z + (1 - t) * v
        noise = self.sample_noise(index)
        self.record[index] = RandomStep(z=z, clean=clean, noise=noise)
        return step.sample(z, clean, noise)

    def reset(self) -> None:
        """Nothing to forget: a step looks at one velocity."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomStep:
    """A random step as it was taken: z, the predicted clean image and ε, of one shape."""

    z: Tensor
    clean: Tensor
    noise: Tensor


def _kappa(kind: StepKind, eta: float, t: float, t_next: float) -> float:
    if kind == "ode" or eta == 0 or t_next >= 1:
        return 1.0
    if kind == "cps":
        return math.cos(eta * math.pi / 2)
    rho = (1 - t_next) * t / ((1 - t) * t_next)
    return rho ** (eta**2 / 2)


def _mean(values: Tensor) -> Tensor:
    """Means over all dimensions but the first, at least in float32, [images]."""
    wide = values if values.element_size() >= 4 else values.float()
    return wide.flatten(1).mean(1)
