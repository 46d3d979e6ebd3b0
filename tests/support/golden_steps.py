"""Looking inside the tasks while they run, to compare with the recorded steps."""

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neounify
from neounify.engine import understanding
from neounify.engine.denoiser import DenoiseJob
from neounify.flow.path import velocity
from neounify.model import Document, Layout, Noise
from support.golden import golden_path

NAMES = ("tiny-dense", "tiny-moe", "tiny-pixelhead")
SINGLE_PASS = 2e-5
TRAJECTORY = 1e-4
DPM = 5e-4
"""Of trajectories of dpm2m without `published_solver`, whose rounding the recording has."""


def error(ours: Tensor, recorded: Tensor) -> float:
    """max|a - b| / max|b|."""
    assert ours.shape == recorded.shape
    return ((ours - recorded).abs().max() / recorded.abs().max()).item()


def image_file(name: str) -> Path:
    return golden_path("fixtures", "images", f"{name}.png")


@cache
def pipeline(folder: Path) -> neounify.Pipeline:
    return neounify.load(folder)


class Script:
    """Chooses the recorded tokens, and keeps the logits it was shown."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.seen: list[Tensor] = []

    def __call__(self, logits: Tensor) -> int:
        self.seen.append(logits.clone())
        return self.ids[len(self.seen) - 1]

    def logits(self) -> Tensor:
        return torch.stack(self.seen)


class Steps:
    """Records z, the velocities and the positions of every denoising step of single jobs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.z: list[Tensor] = []
        self.t: list[float] = []
        self.v: list[dict[str, Tensor]] = []
        self.positions: list[dict[str, Tensor]] = []
        original = DenoiseJob.move

        def move(job: DenoiseJob, predictions: dict[Any, Tensor]) -> None:
            self.z.append(job.z)
            self.t.append(job.t)
            self.v.append({b: velocity(x, job.z, job.t, job.t_eps) for b, x in predictions.items()})
            self.positions.append({b: _positions(job, b) for b in predictions})
            original(job, predictions)

        monkeypatch.setattr(DenoiseJob, "move", move)


class PromptPositions:
    """Records (t, h, w) of every prompt that is read, [3, L] each, in the order of reading."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        recorder = self

        class Recording(Layout):
            def __init__(self, documents: Iterable[Document]) -> None:
                super().__init__(documents)
                for start, stop in self["und"].ranges:
                    recorder.seen.append(self["und"].positions[start:stop].T)

        monkeypatch.setattr(understanding, "Layout", Recording)


def visibility(layout: Layout) -> Tensor:
    """1 where a row sees a column, uint8 [N, N]: rows of `und`, then those of `gen`."""
    und, gen = layout["und"], layout["gen"]
    seen = torch.zeros((und.length + gen.length,) * 2, dtype=torch.uint8)
    for block in und.blocks:
        first = und.ranges[block.document][0]
        for row in range(block.start, block.stop):
            seen[row, first : row + 1 if block.causal else first + block.visible] = 1
    for block in gen.blocks:
        first = und.ranges[block.document][0]
        rows = slice(und.length + block.start, und.length + block.stop)
        seen[rows, first : first + block.visible] = 1
        seen[rows, rows] = 1
    return seen


def _positions(job: DenoiseJob, branch: Any) -> Tensor:
    return Layout([job.prefixes[branch].document(Noise.of(job.grid))])["gen"].positions.T
