"""`neounify plan`: memory and time of inference, or the memory of a training run, from formulas."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from neounify.cli.command import UsageError, parse_size
from neounify.cli.display import Display
from neounify.cli.models import VARIABLE
from neounify.cli.options import NamedModel, ReportOptions, option
from neounify.config.presets import PRESETS
from neounify.runtime import lasting_imports
from neounify.runtime.memory_plan import TaskKind

if TYPE_CHECKING:
    import torch

    from neounify.checkpoint import CheckpointFolder
    from neounify.config import ModelConfig
    from neounify.runtime.memory_plan import Task
    from neounify.runtime.memory_rows import Kept, PlanRow
    from neounify.runtime.rates import Machine

GB = 1e9
PANEL = "Inference"
TRAINING = "Training"
STREAM_NAMES = {"und": "understanding", "gen": "generation"}


@dataclass(frozen=True, kw_only=True)
class PlanOptions(NamedModel):
    """What is to be planned: model, machine, task."""

    preset: Annotated[
        str | None,
        option(PANEL, "NAME", "Plan for the sizes of this preset, as 8b or pixelumm, not --model."),
    ] = None
    gpu: Annotated[
        str | None,
        option(
            PANEL,
            "24G|NAME",
            'Memory of a GPU in GiB, or its name, as "RTX 4090"; none for the CPU. Default: that '
            "of this machine.",
        ),
    ] = None
    ram: Annotated[
        str | None,
        option(PANEL, "32G", "Memory of the host in GiB. Default: what is free here."),
    ] = None
    task: Annotated[
        str, option(PANEL, "|".join(get_args(TaskKind)), "What the model is asked for.")
    ] = "t2i"
    size: Annotated[
        str | None,
        option(PANEL, "WIDTHxHEIGHT", "Pixels of the image or video. Default: the checkpoint's."),
    ] = None
    frames: Annotated[
        int | None,
        option(
            PANEL,
            "N",
            "Frames of the video: of the one that --task t2v generates (default: the "
            "checkpoint's), or of one that --task chat looks at.",
        ),
    ] = None
    tubes: Annotated[
        bool, option(PANEL, None, "The video of --task chat is looked at in tubes.", "--tubes")
    ] = False
    references: Annotated[
        int, option(PANEL, "N", "Images before the one that is generated.", min=0, max=64)
    ] = 0
    think: Annotated[
        int, option(PANEL, "N", "Tokens of a thought, or of the answer of a chat.", min=0)
    ] = 0


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """A recipe and its devices."""

    train: Annotated[
        Path | None,
        option(TRAINING, "RECIPE", "TOML file of a run: plan its stages instead of inference."),
    ] = None
    gpus: Annotated[
        int | None, option(TRAINING, "N", "Devices of the run, one rank each.", min=1)
    ] = None
    device_gb: Annotated[
        float, option(TRAINING, "GB", "Memory of each device of the run, 10⁹ bytes.", min=1)
    ] = 79


def plan(*, options: PlanOptions, training: TrainingOptions, report: ReportOptions) -> None:
    """Print the memory and time that a model needs, and whether it fits.

    Only headers are read, nothing is loaded. Without --train, a table of the ways to keep the
    weights of a model in memory; a mark stands at the first that fits. With --train, the memory of
    each stage of a recipe on every device. Exit code 1 if nothing fits.

    \b
      neounify plan --preset 8b --gpu 24G --ram 32G
      neounify plan --model FOLDER --task edit --references 2
      neounify plan --preset pixelumm --task chat --frames 96 --tubes
      neounify plan --train recipes/published.toml --gpus 64 --preset 8b
    """
    display = Display(quiet=report.quiet, json=report.json)
    if options.preset is not None and options.preset not in PRESETS:
        raise UsageError(f"--preset must be one of {', '.join(PRESETS)}, got {options.preset!r}")
    named = options.model is not None and os.environ.get(VARIABLE) != str(options.model)
    if options.preset is not None and named:
        raise UsageError(f"give --preset {options.preset} or --model {options.model}, not both")
    if training.train is None:
        if training.gpus is not None:
            raise UsageError("--gpus is for a training run: name its recipe with --train")
        _plan_inference(options, display)
        return
    if training.gpus is None:
        raise UsageError("--train needs --gpus, the number of devices")
    from neounify.cli.plan_train import plan_training

    plan_training(training.train, training.gpus, options.preset, training.device_gb * GB, display)


# --- inference ---


def _plan_inference(options: PlanOptions, display: Display) -> None:
    """Print the table. Raises Exit 1 where nothing fits."""
    with lasting_imports():
        from neounify.runtime.memory_rows import first_fit, plan_rows

    config, kept, dtype, name, notes = _forms(options)
    task = _task(config, options)
    machine, host = _machine(options, dtype)
    rows = plan_rows(config, kept, task, machine)
    chosen = first_fit([row for row in rows if row.weights == kept[0].name])
    display.say(f"{name}, {_described(task, config)}       {host}")
    display.say(HEADER)
    for row in rows:
        display.say(_line(row, mark=row is chosen))
    for note in notes:
        display.say(note)
    if chosen is None:
        display.say(advice(rows, task, machine))
    display.emit(
        {
            "model": name,
            "task": asdict(task),
            "machine": asdict(machine),
            "rows": [{**asdict(row), "fits": row.fits, "chosen": row is chosen} for row in rows],
            "notes": notes,
            "advice": None if chosen else advice(rows, task, machine),
        }
    )
    if not any(row.fits for row in rows):
        raise typer.Exit(1)


HEADER = (
    f"{'weights':<9}{'mode':<21}{'peak':>10}{'locked':>9}{'per step':>10}{'s/step':>9}"
    + f"{'image':>9}   text"
)


def _line(row: PlanRow, *, mark: bool) -> str:
    mode: str = row.mode
    if row.mode == "layers":
        kept = dict.fromkeys(row.resident.values())
        mode += f", r={'/'.join(map(str, kept))}"
    start = f"{row.weights:<9}{mode:<19}{'✓' if mark else '':<2}{_gb(row.peak):>10}"
    start += f"{_gb(row.locked):>9}{_gb(row.streamed):>10}"
    if not row.fits:
        return f"{start}{'–':>9}   does not fit"
    step = "–" if row.step is None else _seconds(row.step)
    image = "–" if row.image is None else _duration(row.image)
    text = "" if row.text is None else f"≤ {row.text:.{0 if row.text >= 10 else 1}f} tokens/s"
    return f"{start}{step:>9}{image:>9}   {text}"


def _gb(size: float) -> str:
    return f"{size / GB:.{1 if size >= 0.1 * GB else 2}f} GB" if size else "–"


def _seconds(value: float) -> str:
    digits = 0 if value >= 10 else 2 if value >= 0.1 else 4
    return f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{_seconds(seconds)} s"


def _forms(
    options: PlanOptions,
) -> tuple[ModelConfig, list[Kept], torch.dtype, str, list[str]]:
    """Config, forms of the weights (those of the model first), its dtype, name, notes on files."""
    import torch

    from neounify.runtime.memory_plan import weight_bytes
    from neounify.runtime.memory_rows import Kept

    if options.preset is not None:
        config = PRESETS[options.preset]
        dtype = torch.bfloat16
        kept = Kept(name="bf16", weights=weight_bytes(config, 2), itemsize=dtype.itemsize)
        name, notes = options.preset.upper(), []
    else:
        from neounify.checkpoint import CheckpointFolder, choose_dtype
        from neounify.checkpoint.sizes import kept_weights
        from neounify.cli.models import resolve_model

        checkpoint = CheckpointFolder.open(resolve_model(options.model), options.config)
        dtype = choose_dtype(None, checkpoint, _device_type(options)).dtype
        config, name = checkpoint.config, checkpoint.path.name
        kept = kept_weights(checkpoint, dtype)
        notes = _notes(checkpoint, dtype)
    int8 = Kept(name="int8", weights=weight_bytes(config, kept.itemsize, 8), itemsize=kept.itemsize)
    return config, [kept, int8], dtype, name, notes


def _notes(checkpoint: CheckpointFolder, dtype: torch.dtype) -> list[str]:
    from neounify.checkpoint.sizes import wider_streams

    return [
        f"the {STREAM_NAMES[stream]} stream is stored in {wide}: reading it takes "
        f"{size / GB:.1f} GB of cache; `neounify convert` halves that"
        for stream, (wide, size) in wider_streams(checkpoint, dtype).items()
    ]


def _task(config: ModelConfig, options: PlanOptions) -> Task:
    """The task of the options, with the checkpoint's defaults. Raises UsageError."""
    task = _asked_task(config, options)
    if task.writes and not config.lm_head:
        raise UsageError("this model has no lm_head, so it writes no text: leave out the text")
    return task


def _asked_task(config: ModelConfig, options: PlanOptions) -> Task:
    from neounify.flow.guidance import Guidance
    from neounify.image.pixels import output_size
    from neounify.runtime.memory_plan import Task

    if options.task not in get_args(TaskKind):
        raise UsageError(
            f"--task must be one of {', '.join(get_args(TaskKind))}, got {options.task!r}"
        )
    if options.tubes and (options.task != "chat" or options.frames is None):
        raise UsageError("--tubes is of a video to look at: give --task chat --frames N")
    if options.task == "t2v":
        return _clip_task(config, options)
    if options.frames is not None:
        if options.task != "chat":
            raise UsageError("--frames is of videos: give --task t2v, or --task chat")
        return _seen_clip_task(config, options, options.frames)
    sampling, kind = config.sampling, options.task
    references = max(options.references, 1) if kind == "edit" else options.references
    asked = parse_size(options.size) if options.size else (None, None)
    width, height = output_size(config, *asked)
    editing = kind in ("edit", "interleave")
    guidance = Guidance(text=sampling.guidance, image=sampling.image_guidance, editing=editing)
    bounds = sampling.edit_bounds(references) if editing else (0, sampling.chat_max_pixels)
    return Task(
        kind=kind,  # type: ignore[arg-type]
        width=width,
        height=height,
        steps=sampling.steps,
        branches=len(guidance.branches()),
        references=references,
        reference_tokens=bounds[1] // config.token_size**2,
        think=options.think,
    )


def _clip_task(config: ModelConfig, options: PlanOptions) -> Task:
    """A video, with the checkpoint's defaults. Raises the errors of a request for it."""
    from neounify.runtime.memory_plan import Task
    from neounify.tasks.video import clip_shape

    defaults = config.sampling.video
    frames = defaults.frames if options.frames is None else options.frames
    size = parse_size(options.size) if options.size else (None, None)
    shape = clip_shape(config, size, frames)
    return Task(
        kind="t2v",
        width=shape.width,
        height=shape.height,
        frames=frames,
        steps=defaults.steps,
        branches=2 if defaults.guidance > 1 else 1,
    )


def _seen_clip_task(config: ModelConfig, options: PlanOptions, frames: int) -> Task:
    """A question about a video. Raises the errors of a request for it."""
    from neounify.tasks.clips import clip_question

    size = parse_size(options.size) if options.size else None
    return clip_question(config, frames, size, tubes=options.tubes, answer=options.think)


def _described(task: Task, config: ModelConfig) -> str:
    if not task.paints:
        clip = f" with {task.frames} frames of a video" if task.frames else ""
        clip += " in tubes" if task.tubes else ""
        return f"chat{clip}, {task.prefix:,} tokens"
    kinds = {"t2i": "generate", "edit": "edit to", "interleave": "interleave"}
    kinds["t2v"] = f"generate {task.frames} frames of"
    text = f"{kinds[task.kind]} {task.width}×{task.height}, {task.steps} steps"
    guidance = (config.sampling.video if task.frames else config.sampling).guidance
    text += f", guidance {guidance:g}" if task.branches > 1 else ""
    return text + (f", images before it: {task.references}" if task.references else "")


# --- the machine ---


def _device_type(options: PlanOptions) -> str:
    """The type of device that is planned for; a GPU that is named is of "cuda"."""
    from neounify.cli.models import default_device

    if options.gpu is None:
        return default_device()
    return "cpu" if options.gpu == "none" else "cuda"


def _machine(options: PlanOptions, dtype: torch.dtype) -> tuple[Machine, str]:
    """The machine of the options, and its description; this one where they name none.

    Its rate of products is that in `dtype`.
    """
    import torch

    from neounify.runtime.devices import abilities
    from neounify.runtime.plan import free_memory
    from neounify.runtime.process import available_bytes, own_memory
    from neounify.runtime.rates import CARDS, Machine, rates_here, rates_of_size, this_machine

    host = available_bytes() if options.ram is None else _gibibytes("--ram", options.ram)
    if host is None:
        raise UsageError("this system does not say how much memory is free: name it with --ram")
    memory = f"{host / 2**30:.0f} GB memory"
    device = torch.device(_device_type(options))
    if options.gpu in (None, "none"):
        own_memory()  # measured before the rates, whose probe takes memory
        if not abilities(device).unified and free_memory(device) is None:
            raise UsageError(f"{device} does not say how much memory is free: name it with --gpu")
        rates = rates_here(device, dtype)
        machine = this_machine(device, rates, None if options.ram is None else host)
        if device.type == "cpu":
            return machine, f"CPU, {memory}"
        return machine, f"{machine.rates.name} {machine.device / 2**30:.0f} GB free · {memory}"
    if options.gpu in CARDS:
        size, rates = CARDS[options.gpu]
        size *= 2**30
    else:
        size = _gibibytes("--gpu", options.gpu)
        rates = rates_of_size(size / 2**30)
    card = f"{rates.name} {size / 2**30:.0f} GB, {rates.bus} · {memory}"
    return Machine(device=size, host=host, rates=rates), card


def _gibibytes(name: str, text: str) -> int:
    """Bytes of a number of GiB, as 24G. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(?:[Gg](?:i?[Bb])?)?", text)
    if match is None or not float(match[1]):
        from neounify.runtime.rates import CARDS

        cards = f", or one of {', '.join(CARDS)}" if name == "--gpu" else ""
        raise UsageError(f"{name} must be a number of GiB, as 24G{cards}; got {text!r}")
    return int(float(match[1]) * 2**30)


def advice(rows: list[PlanRow], task: Task, machine: Machine) -> str:
    """What to change where the weights as they are fit in no mode."""
    from neounify.runtime.memory_rows import nearest

    others = [row for row in rows if row.fits]
    if others:
        best = others[0]
        ours = nearest([row for row in rows if row.weights == rows[0].weights])
        why = f" in {machine.device / GB:.1f} GB"
        if ours.only_locks:
            why = f": {ours.mode} lock {_locked(ours, machine)}"
        return (
            f"{rows[0].weights} weights do not fit{why}; {best.weights} with --memory {best.mode} "
            f"does, with a peak of {_gb(best.peak)}"
        )
    least = nearest(rows)
    if least.only_locks:
        what = f"{least.weights} with --memory {least.mode}"
        return f"nothing fits: {what} locks {_locked(least, machine)}; take a host with more memory"
    less = ", or ask for a smaller --size" if task.paints else ""
    return (
        f"nothing fits in {machine.device / GB:.1f} GB: the least is {_gb(least.peak)}, "
        f"{least.weights} with --memory {least.mode}; take a device or host of that size{less}"
    )


def _locked(row: PlanRow, machine: Machine) -> str:
    free = f"{machine.host / GB:.1f} GB"
    return f"{_gb(row.locked)} of the host's memory, of which {free} are free"
