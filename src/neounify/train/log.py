"""What a run tells: a line in the terminal, JSON lines always, TensorBoard where it is there."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from neounify.train.loop import Progress
    from neounify.train.recipe import StageRecipe


class Log:
    """Writes log.jsonl, skipped.txt and nonfinite.jsonl into a run's folder.

    After a resume at some step, later lines of log.jsonl are dropped: each step stands once.
    """

    def __init__(self, folder: Path, console: Console | None = None, *, tensorboard: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.console = console or Console()
        self.file = folder / "log.jsonl"
        self.nonfinite_file = folder / "nonfinite.jsonl"
        self._since = (time.monotonic(), 0, 0)
        self._board = _board(folder) if tensorboard else None

    def rewind(self, step: int) -> None:
        """Forget lines of steps after `step`."""
        if not self.file.is_file():
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        aside = self.file.with_suffix(".new")
        aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        aside.replace(self.file)

    def stage(self, stage: StageRecipe, progress: Progress) -> None:
        self._since = (time.monotonic(), progress.tokens, progress.images)
        frozen = f", frozen: {', '.join(stage.freeze)}" if stage.freeze else ""
        self.console.print(
            f"[bold]stage {stage.name}[/]: {stage.steps:,} steps{frozen}"
            + (f", from step {progress.stage_step:,}" if progress.stage_step else "")
        )

    def step(self, progress: Progress, stage: StageRecipe, rate: float, norm: float) -> None:
        """After every step; the command line's progress bar hooks in here."""

    def report(
        self,
        progress: Progress,
        stage: StageRecipe,
        metrics: dict[str, float],
        rate: float,
        norm: float,
    ) -> None:
        """The means since the last report."""
        now = time.monotonic()
        then, tokens, images = self._since
        self._since = (now, progress.tokens, progress.images)
        speed = {
            "tokens_per_second": (progress.tokens - tokens) / max(1e-9, now - then),
            "images_per_second": (progress.images - images) / max(1e-9, now - then),
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        record = {
            **asdict(progress),
            "stage": stage.name,
            "learning_rate": rate,
            "gradient_norm": norm,
            **speed,
            **metrics,
        }
        self._write("train", record)
        left = (stage.steps - progress.stage_step) * progress.seconds / max(1, progress.step)
        self.console.print(
            f"{progress.stage_step:>7,}/{stage.steps:,}  "
            f"text {metrics.get('text/loss', float('nan')):.4f}  "
            f"image {metrics.get('image/loss', float('nan')):.4f}  "
            f"clean {metrics.get('image/clean', float('nan')):.4f}  "
            f"norm {norm:.2f}  lr {rate:.1e}  {speed['tokens_per_second']:,.0f} tokens/s  "
            f"{progress.samples:,} samples  {_clock(left)} left",
            highlight=False,
            soft_wrap=True,
        )

    def evaluation(self, progress: Progress, found: dict[str, float]) -> None:
        self._write("evaluation", {**asdict(progress), **found})
        scores = "  ".join(f"{name} {value:.3f}" for name, value in found.items())
        if scores:
            self.console.print(f"[bold]evaluation[/] {scores}", highlight=False, soft_wrap=True)

    def damaged(self, messages: Sequence[str]) -> None:
        if messages:
            with (self.folder / "skipped.txt").open("a", encoding="utf-8") as file:
                file.writelines(message + "\n" for message in messages)

    def nonfinite(self, progress: Progress, samples: Sequence[str]) -> None:
        with self.nonfinite_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": progress.step, "samples": list(samples)}) + "\n")
        self.console.print(
            f"[yellow]step {progress.step:,}: loss or gradient not finite, step skipped[/]"
        )

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **record}) + "\n")
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{kind}/{name}", value, record["step"])


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard")


def _clock(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"
