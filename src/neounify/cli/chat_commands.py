"""`chat`, carried out: one question, a file of questions, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neounify.cli.batch.check import check_lines
from neounify.cli.batch.lines import Line
from neounify.cli.batch.results import Results
from neounify.cli.batch.run import Batch, finish
from neounify.cli.batch.tasks import AnswerLines
from neounify.cli.checks import (
    check_chat,
    check_chat_options,
    check_jobs_file,
    check_model,
    writable_folder,
)
from neounify.cli.conversation import NO_IMAGE, Conversation, asks_about_image
from neounify.cli.display import Display
from neounify.cli.errors import UsageError
from neounify.cli.options import BatchOptions, ChatOptions, ModelOptions, ReportOptions
from neounify.cli.session import open_session
from neounify.lock import locked_folder
from neounify.pipeline.messages import read_pictures


def answer(
    question: str,
    images: Sequence[Path],
    model: ModelOptions,
    options: ChatOptions,
    report: ReportOptions,
) -> None:
    """Answer one question on stdout, streamed."""
    check_model(model)
    pictures = read_pictures(images, colour_profiles=model.colour_profiles)
    check_chat(question, pictures, options)
    display = Display(quiet=report.quiet, json=report.json)
    if not images and asks_about_image(question, model.model):
        display.note(NO_IMAGE)
    session = open_session(model, display)
    stream = session.pipe.chat(question, pictures, stream=True, **options.arguments())
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
            "model": session.description,
        }
    )


def answer_batch(
    question: str | None,
    images: Sequence[Path],
    output: Path,
    model: ModelOptions,
    options: ChatOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Answer every line of a JSONL file that has no answer yet."""
    assert batch.input is not None
    if question is not None or images:
        raise UsageError("give a question and images on the command line or --input, not both")
    check_jobs_file(batch.input)
    check_model(model)
    check_chat_options(options)
    folder = writable_folder(output)
    display = Display(quiet=report.quiet, json=report.json)

    def check(line: Line[ChatOptions]) -> None:
        check_chat(line.prompt, read_pictures(line.paths), line.options)

    with locked_folder(folder):
        results = Results(folder)
        check_lines(batch.input, options, check, display, results, images=True)
        task = AnswerLines(open_session(model, display), display)
        runner = Batch(task, results, display, batch_size=batch.batch_size, debug=report.debug)
        finish(runner.run(batch.input, options, images=True), results, display)


def converse(
    images: Sequence[Path],
    output: Path,
    model: ModelOptions,
    options: ChatOptions,
    report: ReportOptions,
) -> None:
    """Talk until the user leaves."""
    if report.json:
        raise UsageError("--json needs a QUESTION or --input: a conversation is for people")
    display = Display(quiet=report.quiet)
    check_model(model)
    check_chat_options(options)
    pictures = read_pictures(images, colour_profiles=model.colour_profiles)
    session = open_session(model, display)
    conversation = Conversation(session, options, display, output)
    for path, picture in zip(images, pictures, strict=True):
        conversation.show(path, picture)
    conversation.run()
