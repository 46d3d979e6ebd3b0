"""Run public benchmarks against a model or an endpoint, score their outputs, compare results.

The prompts are yours: download the benchmark, and give its file or folder.

\b
  neounify bench list
  neounify bench run geneval --prompts evaluation_metadata.jsonl --output out/geneval
  neounify bench score out/geneval --hook mine:judge
  neounify bench compare out/geneval out/other
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.command import CliError, UsageError, parse_interval, parse_size
from neounify.cli.display import Display
from neounify.cli.files import check_writable
from neounify.cli.models import default_device, open_model, resolve_model
from neounify.cli.options import FILES, ModelOptions, ReportOptions, image_knob, option
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from neounify.bench import Adapter, Case, PromptFiles, Result, Subject
    from neounify.post_train.rewards import RewardConfig

ENDPOINT, JUDGE, RUN = "Endpoint", "Judge", "Run"
MAX_SHOWN = 5
"""Reasons of failed cases that a command shows."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Prompts, samples and shards of a run."""

    prompts: Annotated[
        Path, option(FILES, "PATH", "File or folder of the benchmark's prompts.", "--prompts")
    ]
    output: Annotated[
        Path, option(FILES, "DIR", "Folder of the run.", "--output", "--out", "-o")
    ] = Path("out/bench")
    name: Annotated[
        str,
        option(RUN, "NAME", "Name of the model in names of folders that the scorer reads."),
    ] = "neounify"
    metric: Annotated[
        str | None,
        option(RUN, "choice|exact|contains|anls|relaxed", "Metric of a set of questions."),
    ] = None
    instruction: Annotated[
        str | None,
        option(RUN, "TEXT", "Last line of every question; '' for none. Default: the metric's."),
    ] = None
    samples: Annotated[
        int | None,
        option(RUN, "N", "Images per prompt. Default: the benchmark's.", min=1),
    ] = None
    seed: Annotated[
        int, option(RUN, "N", "Random seed; those of the images derive from it.", min=0)
    ] = 0
    limit: Annotated[
        int | None, option(RUN, "N", "Only the first N prompts, for a trial.", min=1)
    ] = None
    batch_size: Annotated[
        int, option(RUN, "N", "Prompts at once; affects speed and memory.", min=1)
    ] = 8
    shard: Annotated[
        str | None,
        option(
            RUN,
            "I/N",
            "Only every Nth prompt from the Ith, counted from 0: one process for each I. "
            "Default under torchrun: its rank, on the device of its local rank.",
        ),
    ] = None
    size: Annotated[str | None, option(RUN, "WxH", "Size of the images. Default: the model's.")] = (
        None
    )
    steps: Annotated[int | None, image_knob("steps", "N")] = None
    guidance: Annotated[float | None, image_knob("guidance", "G")] = None
    think: Annotated[bool, option(RUN, None, "Let the model write a thought first.", "--think")] = (
        False
    )
    max_new_tokens: Annotated[
        int | None,
        option(
            RUN,
            "N",
            "Longest answer to a question, in tokens. Default: 1024, or the endpoint's.",
            min=1,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """A service in place of a model on this machine."""

    endpoint: Annotated[
        str | None,
        option(ENDPOINT, "URL", "OpenAI-compatible service, up to /v1, in place of --model."),
    ] = None
    endpoint_model: Annotated[
        str | None, option(ENDPOINT, "NAME", "Name of the model in its requests.")
    ] = None
    key_variable: Annotated[
        str | None, option(ENDPOINT, "NAME", "Environment variable that holds its key.")
    ] = None
    timeout: Annotated[
        float, option(ENDPOINT, "S", "Time limit of a request in seconds.", min=0.1)
    ] = 600.0
    retries: Annotated[
        int,
        option(ENDPOINT, "N", "Further attempts after no answer, 429 or 500.", min=0, max=10),
    ] = 4
    concurrency: Annotated[int, option(ENDPOINT, "N", "Requests at once.", min=1)] = 8


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """One judge, or the results of an official scorer."""

    hook: Annotated[
        str | None,
        option(JUDGE, "MODULE:NAME", "Python callable of (outputs, cases), also of this folder."),
    ] = None
    command: Annotated[
        str | None, option(JUDGE, "COMMAND", "Program that reads and writes JSON lines.")
    ] = None
    service: Annotated[str | None, option(JUDGE, "URL", "Reward service, as of post-training.")] = (
        None
    )
    vlm: Annotated[
        str | None, option(JUDGE, "URL", "OpenAI-compatible model that judges, up to /v1.")
    ] = None
    vlm_model: Annotated[str | None, option(JUDGE, "NAME", "Name of that model.")] = None
    judge_prompt: Annotated[
        str | None,
        option(
            JUDGE,
            "FILE",
            "Its prompt, with {{prompt}}, {{category}} and {{record.FIELD}}.",
        ),
    ] = None
    scale: Annotated[str, option(JUDGE, "LO,HI", "Lowest and highest score, such as 0,10.")] = "0,1"
    weights: Annotated[
        str | None,
        option(JUDGE, "PART=W,…", "Weights of the parts in the total. Default: alike."),
    ] = None
    results: Annotated[
        Path | None,
        option(JUDGE, "FILE", "Results of an official scorer, JSON lines or CSV."),
    ] = None
    key_variable: Annotated[
        str | None, option(JUDGE, "NAME", "Environment variable that holds the judge's key.")
    ] = None
    timeout: Annotated[float, option(JUDGE, "S", "Time limit of a batch in seconds.", min=0.1)] = (
        120.0
    )
    retries: Annotated[int, option(JUDGE, "N", "Further attempts of a service.", min=0, max=10)] = 2
    batch_size: Annotated[int, option(JUDGE, "N", "Outputs per batch.", min=1)] = 8
    prompts: Annotated[
        Path | None,
        option(FILES, "PATH", "Prompts of an editing benchmark, if they were moved."),
    ] = None


def list_benchmarks(*, report: ReportOptions) -> None:
    """List the benchmarks: prompts, images per prompt, names of files, official scorer."""
    with lasting_imports():
        from neounify.bench import ADAPTERS

    if report.json:
        rows = [
            {
                "name": a.name,
                "title": a.title,
                "task": a.task,
                "prompts": a.prompts,
                "samples": a.samples,
                "file": a.file,
                "scorer": a.scorer,
                "source": a.source,
            }
            for a in ADAPTERS.values()
        ]
        Display(json=True).emit({"benchmarks": rows})
        return
    for adapter in ADAPTERS.values():
        typer.echo(f"{adapter.name:10} {adapter.title} ({adapter.source})")
        typer.echo(f"  prompts: {adapter.prompts}")
        if adapter.file:
            number = f"{adapter.samples} in a grid" if adapter.grid else str(adapter.samples)
            typer.echo(f"  images per prompt: {number}, images/{adapter.file}")
            typer.echo(f"  scorer: {adapter.scorer}")


def run_benchmark(
    benchmark: Annotated[str, typer.Argument(metavar="BENCHMARK", help="A name of `bench list`.")],
    *,
    options: RunOptions,
    model: ModelOptions,
    endpoint: EndpointOptions,
    report: ReportOptions,
) -> None:
    """Make the outputs of a benchmark under the names that its scorer reads.

    Run the same command again to continue after an interruption, and with several --shard to use
    several devices; seeds depend on --seed and the prompt alone. A set of questions is scored at
    once by --metric.

    \b
      neounify bench run dpg --prompts prompts --output out/dpg --shard 0/2 --device cuda:0
      neounify bench run questions --metric choice --prompts MMMU_DEV_VAL.tsv --output out/mmmu
    """
    with lasting_imports():
        from neounify.bench import ADAPTERS, Plan, PromptFiles, begin, run, score_answers
        from neounify.bench.result import RESULT, versions
        from neounify.bench.runner import IMAGES

    if benchmark not in ADAPTERS:
        raise UsageError(f"there is no benchmark {benchmark!r}; known are {', '.join(ADAPTERS)}")
    _check_subject(model, endpoint)
    adapter, prompts = ADAPTERS[benchmark], PromptFiles(options.prompts)
    cases = _cases(adapter, prompts, options)
    plan = Plan(folder=prompts.folder, batch_size=options.batch_size, shard=_shard(options.shard))
    check_writable(options.output)
    display = Display(quiet=report.quiet, json=report.json)
    _note_count(adapter, cases, prompts, display)
    subject = _subject(options, model, endpoint, display)
    about = {
        "benchmark": benchmark,
        "prompts": {"sha256": prompts.sha256, "number": len(cases)},
        "seed": options.seed,
        "samples": cases[0].samples,
        "metric": options.metric,
        **subject.describe(),
        "made_with": versions(),
    }
    begin(options.output, about, cases, prompts.root)
    number, count = plan.shard
    with display.bar(benchmark, total=len(cases[number::count]), unit="prompt") as tick:
        summary = run(adapter, cases, subject, options.output, options.seed, plan, tick)
    for case, reason in list(summary.failures.items())[:MAX_SHOWN]:
        display.note(f"{case}: {reason}")
    left = summary.total - summary.finished - len(summary.failures)
    said = f"{summary.finished} of {summary.total} prompts finished"
    said += f", {len(summary.failures)} failed" * bool(summary.failures)
    said += f", {left} left to other shards" * bool(left)
    display.note(said)
    if adapter.task == "question" and summary.finished:
        _finish(score_answers(cases, options.output, str(options.metric)), options.output, display)
        display.result(f"saved {options.output / RESULT}", options.output / RESULT)
    else:
        display.result(f"saved {options.output / IMAGES}", options.output / IMAGES)
    if report.json:
        display.emit(
            {
                "output": str(options.output),
                "prompts": summary.total,
                "finished": summary.finished,
                "failed": dict(summary.failures),
            }
        )
    if summary.failures:
        raise CliError(f"{len(summary.failures)} prompts failed; the same command tries them again")


def score_run(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `bench run`.")],
    *,
    options: JudgeOptions,
    report: ReportOptions,
) -> None:
    """Score the outputs of a run with a judge, or read the results of the official scorer.

    What is judged is kept: the same command asks the judge for the rest alone. Writes result.json
    and result.md into the folder.

    \b
      neounify bench score out/geneval --results results.jsonl
      neounify bench score out/wise --vlm URL --vlm-model NAME --judge-prompt judge.txt --scale 0,2
      neounify bench score out/mine --command "python score.py"
    """
    with lasting_imports():
        from neounify.bench import ADAPTERS, judge, load_about, load_cases, read_results
        from neounify.bench.result import RESULT
        from neounify.bench.runner import PATH

    about = load_about(folder)
    if (adapter := ADAPTERS.get(about["benchmark"])) is None:
        raise CliError(f"{folder} is of {about['benchmark']!r}, which is none of `bench list`")
    if adapter.task == "question":
        raise CliError(f"{folder} holds answers, which `bench run` has scored: see {RESULT}")
    display = Display(quiet=report.quiet, json=report.json)
    judges = [
        name
        for name in ("hook", "command", "service", "vlm", "results")
        if getattr(options, name) is not None
    ]
    if len(judges) != 1:
        raise UsageError(
            "give one judge: --hook, --command, --service, --vlm or --results; "
            f"got {', '.join(judges) or 'none'}"
        )
    cases = load_cases(folder)
    if options.results is not None:
        scale, weights = parse_interval(options.scale), _weights(options.weights)
        result = read_results(cases, folder, options.results, scale, weights)
    else:
        prompts = Path(options.prompts or about[PATH])
        total = sum(case.samples for case in cases)
        with display.bar("judging", total=total, unit="output") as tick:
            result = judge(
                adapter,
                cases,
                folder,
                _judge(options),
                prompts=prompts if prompts.is_dir() else prompts.parent,
                programs=Path(),
                progress=tick,
                note=display.note,
            )
    _finish(result, folder, display)
    display.result(f"saved {folder / RESULT}", folder / RESULT)
    if report.json:
        display.emit({"scores": result.scores(), "failures": dict(result.failures)})


def compare_results(
    first: Annotated[Path, typer.Argument(metavar="A", help="A result, or its folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one of the benchmark.")],
    *,
    report: ReportOptions,
) -> None:
    """Compare two results case by case, as a Markdown table.

    Differences A - B of the cases that both have, with 95 % intervals and p values of paired tests:
    McNemar's exact test for cases that are right or wrong, a permutation of signs for grades.
    """
    with lasting_imports():
        from neounify.bench import Result, compare

    comparison = compare(Result.read(first), Result.read(second))
    if report.json:
        Display(json=True).emit(comparison.to_json())
    else:
        typer.echo(comparison.to_markdown(), nl=False)


COMMANDS = {
    "list": list_benchmarks,
    "run": run_benchmark,
    "score": score_run,
    "compare": compare_results,
}
"""The functions of the group by command."""


def _cases(adapter: Adapter, prompts: PromptFiles, options: RunOptions) -> list[Case]:
    from neounify.bench import question_cases

    if (adapter.task == "question") != (options.metric is not None):
        verb = "needs" if adapter.task == "question" else "has no"
        raise UsageError(f"{adapter.name} {verb} --metric")
    if adapter.task == "question":
        cases = question_cases(prompts, str(options.metric), options.instruction)
    else:
        cases = adapter.cases(prompts, options.name, options.samples)
    return cases[: options.limit]


def _check_subject(model: ModelOptions, endpoint: EndpointOptions) -> None:
    """Raise UsageError for options of a model and of a service that contradict each other."""
    if endpoint.endpoint is None:
        if endpoint.endpoint_model or endpoint.key_variable:
            raise UsageError("--endpoint-model and --key-variable need --endpoint")
        resolve_model(model.model)
    elif model.model is not None:
        raise UsageError("give --model or --endpoint, not both")


def _note_count(
    adapter: Adapter, cases: list[Case], prompts: PromptFiles, display: Display
) -> None:
    note = f"{len(cases)} prompts, SHA-256 {prompts.sha256[:16]}"
    if adapter.count is not None and adapter.count != len(cases):
        note += f"; the release has {adapter.count}: scores of another number do not compare"
    display.note(note)


def _shard(text: str | None) -> tuple[int, int]:
    """(number, count) of "0/4"; without it the rank of torchrun, else all. Raises UsageError."""
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, slash, count = text.partition("/")
    if not slash or not (number.isdecimal() and count.isdecimal()):
        raise UsageError(f"--shard {text!r} is not I/N, such as 0/4")
    return int(number), int(count)


def _subject(
    options: RunOptions, model: ModelOptions, endpoint: EndpointOptions, display: Display
) -> Subject:
    from neounify.bench import Endpoint, LocalSubject
    from neounify.bench.subjects import MAX_ANSWER_TOKENS
    from neounify.post_train.reward_judges import judge_key

    size = None if options.size is None else parse_size(options.size)
    sampling = {
        name: value
        for name, value in {"steps": options.steps, "guidance": options.guidance}.items()
        if value is not None
    }
    if endpoint.endpoint is not None:
        fields: dict[str, Any] = dict(sampling) | ({"think": True} if options.think else {})
        return Endpoint(
            url=endpoint.endpoint.rstrip("/"),
            model=endpoint.endpoint_model,
            key=judge_key(endpoint.key_variable),
            timeout=endpoint.timeout,
            retries=endpoint.retries,
            concurrency=endpoint.concurrency,
            size=size,
            max_new_tokens=options.max_new_tokens,
            fields=fields,
        )
    if model.device is None and model.devices is None and (rank := os.environ.get("LOCAL_RANK")):
        device = default_device()
        model = replace(model, device=f"{device}:{rank}" if device == "cuda" else device)
    loaded = open_model(model, display)
    return LocalSubject(
        loaded.pipe,
        loaded.description,
        size=size,
        think=options.think,
        sampling=sampling,
        max_new_tokens=options.max_new_tokens or MAX_ANSWER_TOKENS,
    )


def _judge(options: JudgeOptions) -> RewardConfig:
    from pydantic import ValidationError

    from neounify.post_train.rewards import RewardConfig

    kinds = {"hook": "program", "command": "command", "service": "http", "vlm": "vlm"}
    kind = next(kind for name, kind in kinds.items() if getattr(options, name) is not None)
    try:
        return RewardConfig(
            kind=kind,  # type: ignore[arg-type]
            name=options.hook,
            command=options.command,
            url=options.service or options.vlm,
            model=options.vlm_model,
            prompt_file=options.judge_prompt,
            scale=parse_interval(options.scale),
            weights=_weights(options.weights),
            key_variable=options.key_variable,
            timeout=options.timeout,
            retries=options.retries,
            batch=options.batch_size,
        )
    except ValidationError as error:
        reasons = "; ".join(item["msg"] for item in error.errors())
        raise UsageError(f"the judge cannot be used: {reasons}") from error


def _weights(text: str | None) -> dict[str, float] | None:
    """Weights by part from "a=0.7,b=0.3". Raises UsageError."""
    if text is None:
        return None
    pairs = [item.partition("=") for item in text.split(",")]
    try:
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise UsageError(f"--weights {text!r} is not PART=WEIGHT,…, such as a=0.7,b=0.3") from None


def _finish(result: Result, folder: Path, display: Display) -> None:
    """Write a result beside its run, and show its table."""
    from neounify.bench.result import RESULT
    from neounify.files import write_bytes

    if not result.cases:
        reason = next(iter(result.failures.values()), "no output")
        raise CliError(f"no case has a score: {reason}")
    result.write(folder / RESULT)
    write_bytes((folder / RESULT).with_suffix(".md"), result.to_markdown().encode())
    display.say(result.to_markdown())
    for case, reason in list(result.failures.items())[:MAX_SHOWN]:
        display.note(f"{case}: {reason}")
    if result.failures:
        display.note(f"{len(result.failures)} cases have no score and are left out")
