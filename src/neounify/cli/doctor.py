"""`neounify doctor`: checks of a training stage before a long run."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neounify.cli.command import UsageError
from neounify.cli.display import Display
from neounify.cli.options import DeviceOptions, ReportOptions
from neounify.cli.ranks import all_ranks, device_of
from neounify.runtime import keep_freed_memory, lasting_imports

if TYPE_CHECKING:
    from neounify.config import ModelConfig
    from neounify.distributed.ranks import Ranks
    from neounify.train.method import Finding

MARKS = {True: "ok  ", False: "BAD ", None: "note"}


def doctor(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file of the run.")],
    *,
    stage: Annotated[
        str | None, typer.Option(metavar="NAME", help="Stage to check. Default: the first.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="S", help="Time for overfitting samples.", min=1)
    ] = 90,
    where: DeviceOptions,
    report: ReportOptions,
) -> None:
    """Check a training stage before a long run: model, data, gradients, losses, images.

    Overfits one sample of every task and says what is wrong and how to fix it. Exit code 1 if
    something is. A check that needs more time than --seconds gets no verdict.

    \b
      neounify doctor recipes/scenes.toml
      torchrun --nproc-per-node 2 -m neounify doctor recipes/miniature.toml
    """
    if not math.isfinite(seconds):
        raise UsageError(f"--seconds must be a number of seconds, got {seconds}")
    with all_ranks() as ranks:
        _examine(recipe, stage, seconds, where, report, ranks)


def _examine(
    recipe: Path,
    stage: str | None,
    seconds: float,
    where: DeviceOptions,
    report: ReportOptions,
    ranks: Ranks,
) -> None:
    with lasting_imports():
        from neounify.train.keeping import setup_for
        from neounify.train.method import NO_TIME, StageContext
        from neounify.train.parallel import check_parallel
        from neounify.train.recipe import read_recipe
        from neounify.train.setup import StageSources, build_setup

    # The first rank speaks for all.
    display = Display(quiet=report.quiet or not ranks.first, json=report.json or not ranks.first)
    with display.deprecations():
        parsed = ranks.together(lambda: read_recipe(recipe))
    ranks.together(lambda: check_parallel(parsed, ranks.size))
    stages = {item.name: item for item in parsed.stages}
    if stage is not None and stage not in stages:
        raise UsageError(f"no stage {stage}; the recipe has {', '.join(stages)}")
    chosen = parsed.stages[0] if stage is None else stages[stage]
    device = ranks.together(lambda: device_of(where.device, ranks))
    sources = StageSources(parsed)
    # Unreadable data is reported before a model is loaded.
    ranks.together(lambda: sources.list(chosen))
    keep_freed_memory()
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = setup_for(chosen, build_setup(parsed, device, folder, ranks), parsed.seed)
        context = StageContext(
            recipe=parsed, stage=chosen, setup=setup, sources=sources, folder=folder
        )
        model = _about_model(setup.model.config)
        for finding in chain(model, chosen.method.examine(context, seconds)):
            findings.append(finding)
            display.say(f"{MARKS[finding.good]} {finding.name:20} {finding.what}")
            if finding.advice:
                display.say(f"     {finding.advice}")
    wrong = [finding.name for finding in findings if finding.good is False]
    undecided = [finding.name for finding in findings if finding.advice.startswith(NO_TIME)]
    if ranks.first:
        display.emit({"stage": chosen.name, "findings": [asdict(f) for f in findings]})
    if wrong:
        display.say(f"\nnot healthy: {', '.join(wrong)}")
        raise typer.Exit(1)
    if undecided:
        display.say(f"\nno problem found; {NO_TIME}: {', '.join(undecided)}")
        return
    display.say("\nhealthy")


def _about_model(config: ModelConfig) -> Iterator[Finding]:
    """The family of a model and what it is trained to; of one of videos, whether files are read."""
    from neounify.config.capabilities import CAPABILITIES
    from neounify.config.families import title_of
    from neounify.train.method import Finding
    from neounify.video.library import describe_library

    able = ", ".join(CAPABILITIES[name] for name in config.capabilities)
    yield Finding("model", True, f"{title_of(config.family)}; it can {able}")
    if config.video is not None or "chat_video" in config.capabilities:
        readable, what = describe_library()
        yield Finding("video files", readable or None, what)
