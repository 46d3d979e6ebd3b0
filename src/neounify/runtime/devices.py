"""Abilities of devices: what each can run, asked here alone, and before anything is loaded.

Choices that a device cannot run are refused in one sentence, or fall back by the rules in
docs/tasks.md. What torch offers on a type of device is known; how new a GPU is, it is asked.
"""

from __future__ import annotations

import functools
import os
import shutil
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Capability = tuple[int, int]
"""Compute capability of a CUDA device, as (8, 9)."""


@dataclass(frozen=True, kw_only=True)
class Abilities:
    """What a type of device ("cpu", "cuda", "mps", "xpu") can run.

    `capability` is that of a CUDA device, (0, 0) elsewhere; under ROCm, whose type is "cuda" too,
    the numbers mean something else. `compiler` is what `torch.compile` lacks, empty if nothing.
    """

    type: str
    capability: Capability = (0, 0)
    rocm: bool = False
    float64: bool = True
    """Whether it computes in float64."""
    compiler: str = ""

    def __str__(self) -> str:
        if self.rocm:
            return "ROCm"
        number = ".".join(map(str, self.capability))
        return f"cuda of compute capability {number}" if self.type == "cuda" else self.type

    def _cuda_from(self, least: Capability) -> bool:
        return self.type == "cuda" and not self.rocm and self.capability >= least

    @property
    def float8(self) -> bool:
        """Whether it holds tensors of float8, the codes of fp8 and the scales of 4 bits."""
        return self.type != "mps"

    @property
    def float8_products(self) -> bool:
        """Whether it multiplies e4m3fn by `scaled_mm`; of ROCm some hold another float8."""
        return self.type == "cpu" or self._cuda_from((8, 9))

    @property
    def int8_products(self) -> bool:
        """Whether it multiplies int8 by `_int_mm`."""
        return self.type == "cpu" or self._cuda_from((7, 5)) or (self.type == "cuda" and self.rocm)

    @property
    def flash(self) -> bool:
        """Whether it has the kernels of `varlen_attn`."""
        return self._cuda_from((8, 0))

    @property
    def by_layers(self) -> bool:
        """Whether layers can come one by one: from mapped files, or by streams of copies."""
        return self.type in ("cpu", "cuda")

    @property
    def unified(self) -> bool:
        """Whether it computes in the host's memory."""
        return self.type in ("cpu", "mps")


@functools.cache
def abilities(device: torch.device) -> Abilities:
    """The abilities of a device that is here."""
    return ask(device)


def ask(device: torch.device) -> Abilities:
    """`abilities`, asked anew."""
    import torch

    rocm = device.type == "cuda" and torch.version.hip is not None
    capability = (0, 0)
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    float64 = device.type != "mps"
    if device.type == "xpu":
        float64 = bool(torch.xpu.get_device_properties(device).has_fp64)
    return Abilities(
        type=device.type,
        capability=capability,
        rocm=rocm,
        float64=float64,
        compiler=_missing_compiler(device.type, capability, rocm=rocm),
    )


def _missing_compiler(kind: str, capability: Capability, *, rocm: bool) -> str:
    """What `torch.compile` lacks for a type of device, in words; empty if nothing."""
    if kind == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        name = os.environ.get("CXX", usual)
        return "" if shutil.which(name) else f"a C++ compiler ({name})"
    if kind not in ("cuda", "xpu"):
        return f"kernels for {kind} devices"
    if find_spec("triton") is None:
        return "the package triton"
    old = kind == "cuda" and not rocm and capability < (7, 0)
    return "a GPU of compute capability 7.0 or more" if old else ""
