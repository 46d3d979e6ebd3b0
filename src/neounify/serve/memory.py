"""Memory of a server: the weights that its engines keep, and what step caches hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neounify.checkpoint.dtypes import Dtype, choose_dtype
from neounify.checkpoint.load import (
    DECODED,
    SPARE_BYTES,
    Memory,
    PlanUse,
    check_memory,
    expected_shapes,
    numbers_of,
    resolve_device,
)
from neounify.checkpoint.lora_file import LoraSpec, read_loras
from neounify.checkpoint.reader import CheckpointFolder, files_ending
from neounify.files import WEIGHT_FILES
from neounify.flow.sampling import ResolvedSampling
from neounify.model.parts import StreamName
from neounify.runtime.memory_plan import state_bytes, step_cache_bytes
from neounify.runtime.plan import free_memory
from neounify.tasks.program import Processor

SMALL = 16
"""Files of 8 bits may be decoded to float32, and half of the memory is left to the work."""


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Weights of the engines: "all", or "layers" with `resident_layers` of each stream.

    Both streams work at once in one process; in two, each has its own. None is as many as fit;
    "auto" the first that fits. `plan`: "ignore" refuses nothing.
    """

    memory: Memory = "auto"
    resident_layers: int | None = None
    plan: PlanUse = "check"

    def __post_init__(self) -> None:
        check_memory(self.memory, self.plan)

    def of_load(
        self,
        folder: Path,
        config: Path | None,
        dtype: Dtype,
        device: str,
        role: StreamName | None = None,
        *,
        lora: Sequence[LoraSpec] = (),
        quantise: str | None = None,
        backend: str = "auto",
        attention: str = "auto",
    ) -> dict[str, Any]:
        """Arguments of `load` for both engines, or for that of one stream; `lora` are its files.

        Raises the errors of loading, MemoryPlanError for what does not fit.
        """
        whole: Memory = "all" if role is None else "stream"
        if self.memory in ("auto", "all") and _is_small(folder, resolve_device(device)):
            return {"memory": whole, "plan": "ignore"}
        from neounify.checkpoint.fit import fit_engines
        from neounify.checkpoint.sizes import kept_weights

        checkpoint = CheckpointFolder.open(folder, config)
        target = resolve_device(device)
        chosen = choose_dtype(dtype, checkpoint, target.type).dtype
        shapes = expected_shapes(checkpoint.config)
        checkpoint.check(shapes)
        kept = kept_weights(
            checkpoint,
            chosen,
            decoded=backend == DECODED,
            quantise=quantise,
            updates=numbers_of(read_loras(lora, 1.0, shapes, checkpoint.config.family)),
            shapes=shapes,
        )
        fitted = fit_engines(
            checkpoint,
            kept,
            target,
            self.memory,
            self.resident_layers,
            role=role,
            attention=attention,
            ignore=self.plan == "ignore",
        )
        by_layers = fitted.memory == "layers"
        return {
            "memory": fitted.memory,
            "resident_layers": min(fitted.resident.values()) if by_layers else None,
            "plan": "ignore",  # planned here, for what engines do at once
        }


def _is_small(folder: Path, device: torch.device) -> bool:
    """Whether the files of a checkpoint are so small that no plan is needed."""
    files = [folder] if folder.is_file() else []
    if folder.is_dir():
        files = [file for ending in WEIGHT_FILES for file in files_ending(folder, ending)]
    size, free = sum(file.stat().st_size for file in files), free_memory(device)
    return free is None or SMALL * size + SPARE_BYTES < free


def cached_tokens(processor: Processor, sampling: ResolvedSampling, tokens: int) -> int:
    """Image tokens whose state in denoising is as large as the step cache of `tokens` others."""
    kept = step_cache_bytes(processor.config, tokens, processor.dtype.itemsize)
    return round(len(sampling.guidance.branches()) * kept / state_bytes(processor.config, 1))
