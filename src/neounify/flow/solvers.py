"""Integrators of dz/dt = v(z, t). A solver sees the velocity only, never the model.

Each is stepped from outside (`step`), so that requests with different schedules
can share the evaluations of v.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, get_args

from neounify.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

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


SOLVERS: dict[SolverName, type[Euler] | type[AdamsBashforth2]] = {
    "euler": Euler,
    "ab2": AdamsBashforth2,
}


def check_solver(name: str) -> None:
    """Raise RequestError for an unknown name."""
    if name not in get_args(SolverName):
        known = ", ".join(SOLVERS)
        raise RequestError(f"solver {name!r} is unknown; known: {known}", param="solver")


def make_solver(name: str) -> Solver:
    """A fresh solver; RequestError for an unknown name."""
    check_solver(name)
    return SOLVERS[name]()  # type: ignore[index]
