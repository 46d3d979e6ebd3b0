"""LoRA config: the linear layers that get adapters, rank and scale."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from neounify.checkpoint.lora_file import MAX_RANK
from neounify.config.ranges import STRICT, BelowOne, Positive, Range
from neounify.model.parts import STREAMS, StreamName

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
"""Of dense MLPs and of experts alike."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Adapters of rank `rank` on chosen linear layers; `scale` is the factor of B A.

    `modules` chooses by the last part of a module's name (q_proj, k_proj, v_proj, o_proj,
    gate_proj, up_proj, down_proj, router, linear1, linear2, lm_head) or by the part of the model
    it is (attention, mlp, experts, router, timestep, noise scale, image head, lm head: see
    model/parts.py), among those of `streams`; lm_head belongs to neither stream.
    `layers` = (first, stop) narrows the choice inside the layers; None takes all of them.
    `rslora` scales by alpha / √rank instead of alpha / rank. Raises ValueError.
    """

    rank: Annotated[int, AfterValidator(Range(1, MAX_RANK))] = 16
    alpha: Positive = 32.0
    dropout: BelowOne = 0.0
    rslora: bool = False
    streams: tuple[StreamName, ...] = tuple(STREAMS)
    modules: tuple[str, ...] = (*ATTENTION, *MLP)
    layers: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.modules:
            raise ValueError("lora: modules must name at least one kind of layer")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError(f"lora: layers {self.layers} must be (first, stop), first below stop")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
