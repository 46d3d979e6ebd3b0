"""`story`, carried out: parts as they come, into a folder that is complete at any time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from neounify.cli.checks import (
    check_model,
    check_story,
    check_writable,
    note_size,
    resolve_sampling,
)
from neounify.cli.display import Display, Tick
from neounify.cli.errors import UsageError, WriteError
from neounify.cli.options import ModelOptions, ReportOptions, StoryOptions, StoryOutputOptions
from neounify.cli.previews import PreviewSheets
from neounify.cli.session import open_session
from neounify.cli.story_folder import StoryFolder
from neounify.pipeline import ImagePart, PreviewPart, TextPart
from neounify.pipeline.messages import read_pictures


def tell_story(
    prompt: str,
    images: Sequence[Path],
    model: ModelOptions,
    options: StoryOptions,
    output: StoryOutputOptions,
    report: ReportOptions,
) -> None:
    """Stream the text to stdout, save pictures as they are done, and say where all of it is."""
    if output.output.suffix.lower() in (".png", ".html", ".md"):
        raise UsageError(f"--output {output.output}: a story becomes a folder, name one")
    config = check_model(model)
    pictures = read_pictures(images, colour_profiles=model.colour_profiles)
    check_story(prompt, options, config, pictures)
    check_writable(output.output)
    display = Display(quiet=report.quiet, json=report.json)
    note_size(options, config, display, pictures)
    session = open_session(model, display)
    parts = session.pipe.interleave(prompt, pictures, seed=options.seed, **options.arguments())
    story = StoryFolder(output.output, prompt, images, options, session, overwrite=output.overwrite)
    try:
        try:
            _follow(parts, story, display, output.previews)
            story.complete = True
        finally:
            story.write()
    except WriteError as error:
        raise WriteError(
            f"{error}\nWhat was saved before is in {story.folder}. Free some space or choose "
            "another --output, and run the command again: the same seed tells the same story."
        ) from error
    pictures_word = "picture" if story.count == 1 else "pictures"
    page = story.folder / "story.html"
    display.end_line()
    display.result(f"saved {page}  ({story.count} {pictures_word})", story.folder)
    display.emit({"task": "story", "folder": str(story.folder), **story.record()})


def _follow(parts: Any, story: StoryFolder, display: Display, previews: bool) -> None:
    steps = resolve_sampling(story.options, story.session.pipe.config).steps
    with ExitStack() as painting:
        tick: Tick | None = None
        sheets = PreviewSheets()
        for part in parts:
            if isinstance(part, TextPart):
                story.add_text(part.text)
                display.write(part.text)
            elif isinstance(part, PreviewPart):
                if tick is None:
                    display.end_line()
                    tick = painting.enter_context(display.bar(f"picture {story.count + 1}", steps))
                tick(part.progress.step)
                if previews:
                    sheets.add(part.progress)
            elif isinstance(part, ImagePart):
                painting.close()
                sheet = sheets.sheet(0) if previews else None
                path = story.add_image(part, sheet)
                display.end_line()
                display.write(f"[{path}]\n")
                tick, sheets = None, PreviewSheets()
