"""FlowConfig: the noise and time conventions that the weights were trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from neounify.config.checks import require

NoiseScaleMode = Literal["fixed", "resolution", "dynamic", "dynamic_sqrt"]
"""How σ depends on the number of image tokens; the formulas are in `flow/path.py`."""


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Noise and time conventions of a checkpoint. Raises ConfigError."""

    noise_scale: float = 1.0
    """s, the noise scale at `noise_scale_base_tokens` tokens; above 0."""
    noise_scale_mode: NoiseScaleMode = "resolution"
    """How σ grows with the number of image tokens."""
    noise_scale_base_tokens: int = 64
    """n0, the number of image tokens at which σ equals `noise_scale`."""
    noise_scale_max: float = 8.0
    """Upper bound of σ in sampling; training does not apply it."""
    noise_scale_embedding: bool = True
    """Whether σ is embedded beside t."""
    t_eps_training: float = 0.05
    """The smallest 1 - t by which training divides a velocity."""

    def __post_init__(self) -> None:
        require(
            self.noise_scale_mode in get_args(NoiseScaleMode),
            f"noise_scale_mode {self.noise_scale_mode!r} is unknown; known are "
            f"{', '.join(get_args(NoiseScaleMode))}",
        )
        for name in ("noise_scale", "noise_scale_base_tokens", "noise_scale_max", "t_eps_training"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")
