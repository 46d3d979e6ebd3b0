"""Orders for pictures, carried out: painted, and given the record of how."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import neounify
from neounify.cli.checks import resolve_sampling
from neounify.cli.display import Display
from neounify.cli.options import EditOptions, GenerateOptions, SamplingOptions
from neounify.cli.previews import PreviewSheets
from neounify.cli.record import Picture
from neounify.cli.session import Session
from neounify.config import ModelConfig
from neounify.pipeline import PaintProgress, PaintResult


@dataclass(frozen=True, kw_only=True)
class Order:
    """One prompt to paint `options.count` pictures of; with `images` it is an edit.

    `job` names the work of a batch, so that a later run knows it again.
    """

    prompt: str
    options: GenerateOptions
    images: tuple[Path, ...] = ()
    job: str | None = None

    @property
    def task(self) -> str:
        return "edit" if isinstance(self.options, EditOptions) else "generate"


def paint(
    session: Session, orders: Sequence[Order], display: Display, *, previews: bool = False
) -> list[list[Picture]]:
    """The pictures of each order. Orders painted together have equal options but for the seed.

    Edits are painted one at a time.
    """
    sheets = PreviewSheets() if previews else None
    steps = resolve_sampling(orders[0].options, session.pipe.config).steps
    with display.bar(_label(orders), steps) as tick:

        def watch(progress: PaintProgress) -> None:
            tick(progress.step)
            if sheets is not None:
                sheets.add(progress)

        result = _call(session, orders, watch)
    images, count = result.images, orders[0].options.count
    done: list[list[Picture]] = []
    for number, order in enumerate(orders):
        pictures = []
        for index in range(count):
            place = number * count + index
            size = images[place].size
            record = make_record(session, order, size, index + 1, result.thoughts[number])
            sheet = None if sheets is None else sheets.sheet(place)
            pictures.append(Picture(images[place], record, sheet))
        done.append(pictures)
    return done


def make_record(
    session: Session, order: Order, size: tuple[int, int], index: int, thought: str | None
) -> dict[str, Any]:
    """Everything needed to paint the picture again."""
    record: dict[str, Any] = {
        "neounify": neounify.__version__,
        "task": order.task,
        "prompt": order.prompt,
        "seed": order.options.seed,
        "index": index,
        "count": order.options.count,
        "size": list(size),
        "settings": settings_record(order.options, session.pipe.config),
        "model": session.description,
        "created": now(),
    }
    if order.images:
        record["images"] = [image.name for image in order.images]
    if thought is not None:
        record["thought"] = thought
    if order.job is not None:
        record["job"] = order.job
    return record


def settings_record(options: SamplingOptions, config: ModelConfig) -> dict[str, Any]:
    """The settings under the names of the command line's options, defaults filled in.

    `system` null means the message that belongs to the model.
    """
    sampling = resolve_sampling(options, config)
    guidance = sampling.guidance
    settings: dict[str, Any] = {
        "steps": sampling.steps,
        "shift": sampling.shift,
        "guidance": guidance.text,
        "negative_prompt": options.negative_prompt or "",
        "interval": list(guidance.interval),
        "norm": guidance.norm,
        "solver": sampling.solver,
        "t_eps": sampling.effective_t_eps(),
        "think": options.think,
        "system": options.system,
    }
    if guidance.editing:
        settings["image_guidance"] = guidance.image
        settings["published_interval"] = guidance.published_interval
    return settings


def now() -> str:
    """The time, as records have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _call(session: Session, orders: Sequence[Order], watch: Any) -> PaintResult:
    first = orders[0]
    if first.task == "edit":
        return session.pipe.edit(
            first.prompt,
            first.images,
            seed=first.options.seed,
            callback=watch,
            **first.options.arguments(),
        )
    return session.pipe.generate(
        [order.prompt for order in orders],
        seed=[order.options.seed for order in orders],
        callback=watch,
        **first.options.arguments(),
    )


def _label(orders: Sequence[Order]) -> str:
    pictures = sum(order.options.count for order in orders)
    return "painting" if pictures == 1 else f"painting {pictures} pictures"
