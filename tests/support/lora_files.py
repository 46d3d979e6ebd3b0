"""LoRA files for tests."""

import torch
from torch import Tensor

from neounify.config import ModelConfig
from support.checkpoint_folders import random_weights


def lora_tensors(
    config: ModelConfig,
    targets: list[str],
    *,
    rank: int = 3,
    alpha: float | None = 6.0,
    prefix: str = "",
    seed: int = 7,
) -> dict[str, Tensor]:
    """Random low-rank updates of published module names, in the published spelling."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tensor.shape for name, tensor in random_weights(config).items()}
    tensors = {}
    for target in targets:
        out, *rest = shapes[f"{target}.weight"]
        tensors[f"{prefix}{target}.lora_down.weight"] = torch.randn(
            rank, *rest, generator=generator
        )
        tensors[f"{prefix}{target}.lora_up.weight"] = torch.randn(
            out, rank, *(1 for _ in rest[1:]), generator=generator
        )
        if alpha is not None:
            tensors[f"{prefix}{target}.alpha"] = torch.tensor(alpha)
    return tensors
