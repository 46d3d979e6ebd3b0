"""`neounify chat`: one question, a JSONL file of questions, or an interactive chat."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.batch import (
    Batch,
    Outcome,
    Results,
    check_lines,
    finish,
    job_hash,
    settings_key,
)
from neounify.cli.batch_lines import Line
from neounify.cli.display import Display
from neounify.cli.errors import UsageError
from neounify.cli.files import writable_folder
from neounify.cli.models import LoadedModel, open_model, resolve_model
from neounify.cli.options import FILES, BatchOptions, ModelOptions, ReportOptions
from neounify.cli.task_options import ChatOptions
from neounify.files import locked_folder
from neounify.runtime import lasting_imports


def chat(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION",
            help="The question, in quotes. Without one, an interactive chat starts.",
        ),
    ] = None,
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Image to ask about. May be repeated; `<image>` in the question marks the "
            "position of each.",
            rich_help_panel=FILES,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Folder of what --input and /save write.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs"),
    model: ModelOptions,
    options: ChatOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Ask about images, or chat; answers are streamed.

    Without a question an interactive chat starts, which keeps its history: /image FILE adds an
    image, /help lists the other commands.

    \b
      neounify chat "What is in the image?" --image lake.png --model FOLDER
      neounify chat
      neounify chat --input questions.jsonl --output answers
    """
    resolve_model(model.model)
    if batch.input is not None:
        _answer_batch(question, image or (), output, model, options, batch, report)
    elif question is not None:
        _answer(question, image or (), model, options, report)
    else:
        _interactive(image or (), output, model, options, report)


def _answer(
    question: str,
    images: Sequence[Path],
    model: ModelOptions,
    options: ChatOptions,
    report: ReportOptions,
) -> None:
    """Stream the answer to one question on stdout."""
    with lasting_imports():
        from neounify.cli.chat_loop import NO_IMAGE, asks_about_image
        from neounify.cli.checks import check_chat, check_model
        from neounify.tasks.conversation import read_images

    check_model(model)
    inputs = read_images(images, colour_profiles=model.colour_profiles)
    check_chat(question, inputs, options)
    display = Display(quiet=report.quiet, json=report.json)
    if not images and asks_about_image(question, model.model):
        display.note(NO_IMAGE)
    loaded = open_model(model, display)
    stream = loaded.pipe.chat(question, inputs, stream=True, **options.arguments())
    for piece in stream:
        display.write(piece)
    display.write("\n")
    result = stream.result
    if result.finish_reason == "length":
        display.note(f"(cut off after {len(result.token_ids)} tokens; see --max-new-tokens)")
    display.emit(
        {
            "task": "chat",
            "question": question,
            "images": [str(image) for image in images],
            "answer": result.text,
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "answer_tokens": len(result.token_ids),
            "settings": options.arguments(),
            "model": loaded.description,
        }
    )


def _answer_batch(
    question: str | None,
    images: Sequence[Path],
    output: Path,
    model: ModelOptions,
    options: ChatOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Answer every line of a JSONL file that no earlier run has answered."""
    with lasting_imports():
        from neounify.cli.checks import check_chat, check_chat_options, check_jobs_file, check_model
        from neounify.tasks.conversation import read_images

    assert batch.input is not None
    if question is not None or images:
        raise UsageError("give a question and images on the command line or --input, not both")
    check_jobs_file(batch.input)
    check_model(model)
    check_chat_options(options)
    folder = writable_folder(output)
    display = Display(quiet=report.quiet, json=report.json)

    def check(line: Line[ChatOptions]) -> None:
        check_chat(line.prompt, read_images(line.paths), line.options)

    with locked_folder(folder):
        results = Results(folder)
        check_lines(batch.input, options, check, display, results, images=True)
        task = ChatLines(open_model(model, display), display)
        runner = Batch(task, results, display, batch_size=batch.batch_size, debug=report.debug)
        finish(runner.run(batch.input, options, images=True), results, display)


def _interactive(
    images: Sequence[Path],
    output: Path,
    model: ModelOptions,
    options: ChatOptions,
    report: ReportOptions,
) -> None:
    """Chat until the user leaves."""
    with lasting_imports():
        from neounify.cli.chat_loop import ChatLoop
        from neounify.cli.checks import check_chat_options, check_model
        from neounify.tasks.conversation import read_images

    if report.json:
        raise UsageError("--json needs QUESTION or --input; interactive chat has no JSON output")
    display = Display(quiet=report.quiet)
    check_model(model)
    check_chat_options(options)
    inputs = read_images(images, colour_profiles=model.colour_profiles)
    loop = ChatLoop(open_model(model, display), options, display, output)
    for path, image in zip(images, inputs, strict=True):
        loop.add_image(path, image)
    loop.run()


class ChatLines:
    """The batch task of `chat`: answers into the results file."""

    def __init__(self, model: LoadedModel, display: Display) -> None:
        self._model, self._display = model, display

    def job(self, line: Line[ChatOptions]) -> str:
        return job_hash(line, self._model)

    def group(self, line: Line[ChatOptions]) -> Hashable:
        # Sampled lines have different seeds, and a call takes one.
        return line.number if (line.options.temperature or 0) > 0 else settings_key(line.options)

    def do(self, lines: Sequence[Line[ChatOptions]]) -> list[Outcome]:
        arguments = lines[0].options.arguments()
        with self._display.bar("answering"):
            answers = self._model.pipe.chat_batch(
                [line.prompt for line in lines], [line.paths for line in lines], **arguments
            )
        return [
            {
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "answer_tokens": len(answer.token_ids),
                "settings": line.options.arguments(),
            }
            for line, answer in zip(lines, answers, strict=True)
        ]
