"""`neounify parity`: how far one model is from another of the same shape."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.display import Display
from neounify.cli.files import check_apart, check_new_folder
from neounify.cli.models import default_device, resolve_model
from neounify.cli.options import FILES, MODEL, ConfigFolder, OverwriteOptions, ReportOptions, option
from neounify.errors import RequestError
from neounify.files import atomic_folder, write_json
from neounify.runtime import keep_freed_memory, lasting_imports

if TYPE_CHECKING:
    import torch

    from neounify.checkpoint import CheckpointFolder
    from neounify.config import ModelConfig
    from neounify.evaluate.metrics import Rate
    from neounify.evaluate.parity import Parity
    from neounify.pipeline import Pipeline
    from neounify.quant.formats import WeightFormat

PROMPTS = (
    "a red circle",
    "a blue square above a green star",
    "two yellow triangles",
    "a purple ring left of a red cross",
    "three green circles",
    "a small blue star and a large red square",
    "a yellow cross",
    "a green triangle below a purple circle",
)
QUESTIONS = ("What is in the image?", "What colour is it?", "How many objects are there?")
SCENE_VOCABULARY = 10_000
"""Models with fewer tokens than this were trained on scenes; published ones have 150,000."""


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """Size and settings of a comparison."""

    images: Annotated[
        int,
        typer.Option(metavar="N", help="Images, and prompts of the comparison.", min=1),
    ] = 24
    cases: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="SceneBench cases per category, for models trained on scenes; 0 leaves it out.",
            min=0,
        ),
    ] = 32
    dtype: Annotated[
        str | None,
        option(MODEL, "TYPE", "Number format both models compute in. Default: the first one's."),
    ] = None
    device: Annotated[
        str | None,
        option(MODEL, "cpu|cuda:N|mps|xpu", "Where to compute. Default: a GPU if there is one."),
    ] = None
    backend: Annotated[
        str,
        option(MODEL, "NAME", "How quantised layers compute: auto, reference, torch or w8a8."),
    ] = "auto"


def parity(
    first: Annotated[Path, typer.Argument(metavar="MODEL", help="The model to compare with.")],
    second: Annotated[Path, typer.Argument(metavar="OTHER", help="The model compared.")],
    *,
    config: ConfigFolder = None,
    output: Annotated[
        Path, option(FILES, "DIR", "Folder of the report.", "--output", "--out", "-o")
    ] = Path("out/parity"),
    options: ParityOptions,
    overwrite: OverwriteOptions,
    report: ReportOptions,
) -> None:
    """Compare two models of one shape: weights, outputs, tokens, images, SceneBench.

    DIR gets report.md, report.json and images.png, with the images of both side by side.

    \b
      neounify parity FOLDER FOLDER-int8
    """
    display = Display(quiet=report.quiet, json=report.json)
    folder, other = resolve_model(first, "MODEL"), resolve_model(second, "OTHER")
    _check(folder, config, other, options)
    check_apart(output, folder, other, config)
    check_new_folder(output, "a report", overwrite=overwrite.overwrite)
    write_parity(folder, config, other, options, output, display)


def _check(first: Path, config: Path | None, second: Path, options: ParityOptions) -> None:
    """Check all options before anything is read. Raises the errors of loading."""
    with lasting_imports():
        from neounify.checkpoint import CheckpointFolder
        from neounify.checkpoint.load import check_backend_used
        from neounify.checkpoint.quantised_layers import kept_formats

    a, b = (CheckpointFolder.open(path, config) for path in (first, second))
    check_comparable(a.config)
    check_comparable(b.config)
    check_backend_used(b, None, options.backend)
    comparison_device(a, kept_formats(b).values(), options)


def check_comparable(config: ModelConfig, advice: str = "") -> None:
    """Raise RequestError for a model that cannot generate the images that are compared."""
    if "generate" not in config.capabilities:
        raise RequestError(f"the comparison generates images, which this model cannot{advice}")


def comparison_device(
    first: CheckpointFolder, formats: Iterable[WeightFormat], options: ParityOptions
) -> torch.device:
    """The device on which `first` is compared with a model of codes in `formats`.

    The one that is named, else a GPU that can hold the codes of both, else the CPU. Raises
    RequestError for a device, dtype or backend that cannot be used.
    """
    import torch

    from neounify.checkpoint import choose_dtype, resolve_device
    from neounify.checkpoint.dtypes import check_dtype
    from neounify.checkpoint.quantised_layers import kept_formats
    from neounify.quant.backends import ANY_SHAPE, DECODED, check_held, choose_backend

    device = resolve_device(options.device or default_device())
    theirs = [] if options.backend == DECODED else list(formats)
    try:
        for format in (*kept_formats(first).values(), *theirs):
            check_held(format, device)
    except RequestError:
        if options.device is not None:
            raise
        device = torch.device("cpu")
    check_dtype(choose_dtype(options.dtype, first, device.type).dtype, device)
    for format in theirs:
        choose_backend(options.backend, format, ANY_SHAPE, device)
    return device


def write_parity(
    first: Path,
    config: Path | None,
    second: Path,
    options: ParityOptions,
    output: Path,
    display: Display,
) -> None:
    """Compare two models and write the report. Raises the errors of loading."""
    with lasting_imports():
        from neounify.checkpoint import CheckpointFolder, choose_dtype
        from neounify.checkpoint.quantised_layers import kept_formats
        from neounify.evaluate.parity import weight_errors
        from neounify.pipeline import load

    keep_freed_memory()
    checkpoints = [CheckpointFolder.open(path, config) for path in (first, second)]
    number = len(checkpoints[0].tensors)
    with display.bar("comparing weights", total=number, unit="weight") as tick:
        weights, formats = weight_errors(checkpoints[0], checkpoints[1], tick)
    device = comparison_device(checkpoints[0], kept_formats(checkpoints[1]).values(), options)
    if options.device is None and device.type != default_device():
        display.note(f"compared on the CPU: {default_device()} cannot hold codes of these weights")
    dtype = choose_dtype(options.dtype, checkpoints[0], device.type).dtype
    ways = memory_of_both(checkpoints, dtype, device, options.backend)
    with display.bar("loading both models"):
        a = load(first, config=config, dtype=dtype, device=device, **ways[0])
        b = load(
            second, config=config, dtype=dtype, device=device, backend=options.backend, **ways[1]
        )
    result, sheet = _compare(a, b, options, display, weights, formats)
    about = asdict(options) | {
        "first": first.resolve().name,
        "second": second.resolve().name,
        "fingerprints": [checkpoint.fingerprint() for checkpoint in checkpoints],
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }
    with atomic_folder(output.resolve()) as aside:
        title = f"# {about['second']} against {about['first']}, {about['dtype']} on {device}\n\n"
        (aside / "report.md").write_text(title + result.to_markdown(), encoding="utf-8")
        write_json(aside / "report.json", {"about": about} | result.to_json())
        sheet.save(aside / "images.png")
    display.say(result.to_markdown())
    display.result(f"saved {output}", output)
    display.emit({"about": about} | result.to_json())


def memory_of_both(
    checkpoints: Sequence[CheckpointFolder],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
) -> list[dict[str, Any]]:
    """Arguments of `load` for two models that are there at once.

    Raises MemoryPlanError where they do not fit together.
    """
    from neounify.checkpoint.fit import fit_two
    from neounify.checkpoint.load import DECODED
    from neounify.checkpoint.sizes import kept_weights
    from neounify.runtime.plan import free_memory

    if free_memory(device) is None:
        return [{}, {}]  # nothing can be planned
    # The first one's codes compute as they do by default.
    backends = ("auto", backend)
    kept = [
        kept_weights(checkpoint, dtype, decoded=name == DECODED)
        for checkpoint, name in zip(checkpoints, backends, strict=True)
    ]
    return [
        {
            "memory": fitted.memory,
            "resident_layers": min(fitted.resident.values(), default=None),
            "plan": "ignore",  # planned here, for both at once
        }
        for fitted in fit_two(checkpoints, kept, device)
    ]


def _compare(
    a: Pipeline,
    b: Pipeline,
    options: ParityOptions,
    display: Display,
    weights: dict[str, float],
    formats: dict[str, int],
) -> tuple[Parity, Any]:
    import numpy as np

    from neounify.evaluate.parity import (
        Parity,
        greedy_agreement,
        image_pairs,
        image_psnr,
        output_errors,
    )
    from neounify.image.contact_sheet import contact_sheet

    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(options.images)]
    size = a.config.sampling.image_size
    with display.bar("comparing outputs"):
        logits, clean = output_errors(a, b, prompts[: len(PROMPTS)], size)
    with display.bar("comparing images"):
        pairs = image_pairs(a, b, prompts, size)
    tokens = None
    if a.config.lm_head:
        with display.bar("comparing answers"):
            shown = [(text, image) for image, _ in pairs for text in QUESTIONS]
            tokens = greedy_agreement(a, b, [*shown, *((prompt, None) for prompt in PROMPTS)])
    bench = _bench(a, b, options.cases, display)
    values = image_psnr(pairs)
    captions = [
        text
        for prompt, value in zip(prompts, values, strict=True)
        for text in (prompt, f"{value:.1f} dB")
    ]
    images = [np.asarray(image) for pair in pairs for image in pair]
    sheet = contact_sheet(images, captions, [True] * len(images), columns=8)
    return Parity(weights, formats, logits, clean, tokens, values, bench), sheet


def scene_tasks(config: ModelConfig) -> tuple[str, ...]:
    """What SceneBench asks a model: none for one that does not know scenes or cannot paint them."""
    from neounify.scenes.world import scene_config

    if config.vocab_size >= SCENE_VOCABULARY or scene_config("default").side % config.token_size:
        return ()
    painted = ("paint",) if "generate" in config.capabilities else ()
    asked = ("vqa",) if config.lm_head and "chat" in config.capabilities else ()
    return painted + asked


def _bench(a: Pipeline, b: Pipeline, cases: int, display: Display) -> dict[str, tuple[Rate, Rate]]:
    """SceneBench rates of both by category, and of all together, where the model knows scenes."""
    tasks = scene_tasks(a.config)
    if not cases or not tasks:
        return {}
    from neounify.evaluate.metrics import Rate
    from neounify.scenes.bench import measure

    scores: list[dict[str, Rate]] = []
    for number, pipe in enumerate((a, b), start=1):
        with display.bar(f"SceneBench of model {number}"):
            findings = measure(pipe, tasks=tasks, cases_per_category=cases)
        scores.append({score.category: score.strict for score in findings.report.scores})
    both = {name: (rate, scores[1][name]) for name, rate in scores[0].items()}
    sums = [
        Rate(sum(r.correct for r in rates.values()), sum(r.number for r in rates.values()))
        for rates in scores
    ]
    return both | {"all": (sums[0], sums[1])}
