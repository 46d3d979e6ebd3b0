"""`neounify chat`: one question, a JSONL file of questions, or an interactive chat."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.bundled import bundled_model
from neounify.cli.batch import (
    BatchOptions,
    BatchRun,
    LineOutcome,
    Results,
    check_lines,
    finish,
    job_hash,
    settings_key,
)
from neounify.cli.command import UsageError
from neounify.cli.display import Display
from neounify.cli.files import candidates, make_folder, writable_folder, write_new
from neounify.cli.lines import IMAGES, VIDEOS, Line
from neounify.cli.models import LoadedModel, open_model, resolve_model
from neounify.cli.options import FILES, ModelOptions, ReportOptions, option
from neounify.cli.videos import QuestionOptions, VideoFiles, read_clips
from neounify.errors import Cancelled, NeounifyError
from neounify.files import locked_folder
from neounify.runtime import lasting_imports
from neounify.text.forms import TEMPLATES, has_numbers, unnumbered

if TYPE_CHECKING:
    from PIL.Image import Image

    from neounify.tasks.clips import Frames

HELP = """\
Type a question and press Enter. Commands:
  /image FILE   add an image to the next question
  /video FILE   add a video to the next question
  /clear        clear the history
  /save [FILE]  save the chat as JSON
  /exit         leave (also Ctrl-D)
Ctrl-C stops an answer."""

NO_IMAGE = "(no image is given: add one with --image FILE, or with /image FILE in a chat)"

# Words for images and for looking, in the languages of the published models.
_ABOUT_IMAGES = re.compile(
    r"\b(images?|pictures?|photos?|photographs?|drawings?|paintings?|screenshots?|shown?|see)\b|[图画照]",
    re.IGNORECASE,
)


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
        option(
            FILES,
            "FILE",
            "Image to ask about. May be repeated; `<image>` in the question marks the "
            "position of each.",
        ),
    ] = None,
    video: VideoFiles = None,
    output: Annotated[
        Path,
        option(FILES, "FOLDER", "Folder of what --input and /save write.", "--output", "-o"),
    ] = Path("outputs"),
    model: ModelOptions,
    options: QuestionOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Ask about images and videos, or chat; answers are streamed.

    Without a question an interactive chat starts, which keeps its history: /image FILE adds an
    image, /video FILE a video, /help lists the other commands.

    \b
      neounify chat "What is in the image?" --image lake.png --model FOLDER
      neounify chat "What happens?" --video clip.mp4 --fps 1 --max-frames 96 --model FOLDER
      neounify chat
      neounify chat --input questions.jsonl --output answers
    """
    resolve_model(model.model)
    images, videos = image or (), video or ()
    if batch.input is not None:
        _answer_batch(question, (*images, *videos), output, model, options, batch, report)
    elif question is not None:
        _answer(question, images, videos, model, options, report)
    else:
        _interactive(images, videos, output, model, options, report)


def _answer(
    question: str,
    images: Sequence[Path],
    clips: Sequence[Path],
    model: ModelOptions,
    options: QuestionOptions,
    report: ReportOptions,
) -> None:
    """Stream the answer to one question on stdout."""
    with lasting_imports():
        from neounify.cli.checks import check_chat_request, check_model
        from neounify.tasks.chat import read_images

    if options.of_videos and not clips:
        raise UsageError("--fps, --max-frames and --tubes need --video FILE")
    checkpoint = check_model(model)
    inputs = read_images(images, colour_profiles=model.colour_profiles)
    display = Display(quiet=report.quiet, json=report.json)
    videos = read_clips(clips, options, checkpoint.config, display)
    template = TEMPLATES[checkpoint.config.template]
    check_chat_request(question, inputs, options, videos, template=template)
    if not images and not videos and asks_about_image(question, model.model):
        display.note(NO_IMAGE)
    loaded = open_model(model, display)
    stream = loaded.pipe.chat(question, inputs, video=videos, stream=True, **options.arguments())
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
            "videos": [str(path) for path in clips],
            "frames": [len(video.images) for video in videos],
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
    files: Sequence[Path],
    output: Path,
    model: ModelOptions,
    options: QuestionOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Answer every line of a JSONL file that no earlier run has answered."""
    with lasting_imports():
        from neounify.cli.checks import (
            check_chat_options,
            check_chat_request,
            check_jobs_file,
            check_model,
        )
        from neounify.tasks.chat import read_images

    assert batch.input is not None
    if question is not None or files:
        raise UsageError("give a question and files on the command line or --input, not both")
    check_jobs_file(batch.input)
    config = check_model(model).config
    check_chat_options(options)
    folder = writable_folder(output)
    display = Display(quiet=report.quiet, json=report.json)

    def check(line: Line[QuestionOptions]) -> None:
        videos, images = read_clips(line.paths(VIDEOS), line.options, config), line.paths(IMAGES)
        template = TEMPLATES[config.template]
        check_chat_request(
            line.prompt, read_images(images), line.options, videos, template=template
        )

    with locked_folder(folder):
        results = Results(folder)
        check_lines(batch.input, options, check, display, results, (IMAGES, VIDEOS))
        task = ChatLines(open_model(model, display), display)
        runner = BatchRun(task, results, display, batch_size=batch.batch_size, debug=report.debug)
        finish(runner.run(batch.input, options, (IMAGES, VIDEOS)), results, display)


def _interactive(
    images: Sequence[Path],
    videos: Sequence[Path],
    output: Path,
    model: ModelOptions,
    options: QuestionOptions,
    report: ReportOptions,
) -> None:
    """Chat until the user leaves."""
    with lasting_imports():
        from neounify.cli.checks import check_chat_options, check_model
        from neounify.tasks.chat import read_images

    if report.json:
        raise UsageError("--json needs QUESTION or --input; interactive chat has no JSON output")
    display = Display(quiet=report.quiet)
    config = check_model(model).config
    check_chat_options(options)
    inputs = read_images(images, colour_profiles=model.colour_profiles)
    clips = read_clips(videos, options, config, display)
    loop = ChatLoop(open_model(model, display), options, display, output)
    for path, image in zip(images, inputs, strict=True):
        loop.add_image(path, image)
    for path, clip in zip(videos, clips, strict=True):
        loop.add_video(path, clip)
    loop.run()


def asks_about_image(question: str, model: Path | None) -> bool:
    """Whether a question without an image probably means one.

    Always for the bundled model, which answers about images only; for others, by the words.
    """
    bundled = model is None or model.resolve() == bundled_model().resolve()
    return bundled or _ABOUT_IMAGES.search(question) is not None


# --- batch ---


class ChatLines:
    """The batch task of `chat`: answers into the results file."""

    def __init__(self, model: LoadedModel, display: Display) -> None:
        self._model, self._display = model, display

    def job(self, line: Line[QuestionOptions]) -> str:
        return job_hash(line, self._model)

    def group(self, line: Line[QuestionOptions]) -> Hashable:
        # Sampled lines have different seeds, and a call takes one.
        return line.number if (line.options.temperature or 0) > 0 else settings_key(line.options)

    def do(self, lines: Sequence[Line[QuestionOptions]]) -> list[LineOutcome]:
        from neounify.tasks.clips import place_videos

        arguments, config = lines[0].options.arguments(), self._model.pipe.config
        prompts: list[Any] = []
        for line in lines:
            videos = read_clips(line.paths(VIDEOS), line.options, config)
            prompts.append(place_videos(line.prompt, videos) if videos else line.prompt)
        with self._display.bar("answering"):
            answers = self._model.pipe.chat_batch(
                prompts, [line.paths(IMAGES) for line in lines], **arguments
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


# --- interactive ---


class ChatLoop:
    """The history of a chat and the loop that adds to it.

    `_messages` mark each of `_images` with `<image>` and each of `_videos` with `<video>`; the
    last ones, from `_asked` on (images, videos), belong to the next question.
    """

    def __init__(
        self, model: LoadedModel, options: QuestionOptions, display: Display, folder: Path
    ) -> None:
        self._model, self._options, self._display = model, options, display
        self._folder = folder
        self._messages: list[dict[str, str]] = []
        self._images: list[tuple[Path, Image]] = []
        self._videos: list[tuple[Path, Frames]] = []
        self._asked = (0, 0)

    def add_image(self, path: Path, image: Image) -> None:
        """Keep an image for the next question."""
        self._images.append((path, image))

    def add_video(self, path: Path, video: Frames) -> None:
        """Keep a video for the next question."""
        self._videos.append((path, video))

    def run(self) -> None:
        """Read lines until /exit or the end of the input."""
        self._enable_line_editing()
        self._display.note(
            f"Chatting with {self._model.folder.resolve().name}. /help for help, /exit to leave."
        )
        while True:
            try:
                line = self._ask()
            except EOFError:
                break
            except KeyboardInterrupt:
                self._display.note("\n(/exit or Ctrl-D to leave)")
                continue
            if line in ("/exit", "/quit"):
                return
            if line:
                self._react(line)
        if sys.stdin.isatty():
            self._display.say("")

    def _ask(self) -> str:
        return input("> " if sys.stdin.isatty() else "").strip()

    def _react(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        commands = {
            "/image": self._read_image,
            "/video": self._read_video,
            "/clear": self._clear,
            "/save": self._save,
        }
        try:
            if name in commands:
                commands[name](rest.strip())
            elif name == "/help":
                self._display.note(HELP)
            elif name.startswith("/"):
                self._display.note(f"{name} is no command; see /help")
            else:
                self._answer(line)
        except (NeounifyError, OSError) as error:
            self._display.note(f"error: {error}")

    def _answer(self, question: str) -> None:
        from neounify.text import place_images
        from neounify.text.clips import mark_videos

        images = len(self._images) - self._asked[0]
        videos = len(self._videos) - self._asked[1]
        template, text = TEMPLATES[self._model.pipe.config.template], question
        numbered = template.number_marks and has_numbers(question)
        if not numbered:
            text = unnumbered(question) if template.number_marks else question
            text = place_images(text, images, numbered=False, line=template.image_line)
        text = mark_videos(text, videos)
        messages = [*self._messages, {"role": "user", "content": text}]
        shown = self._images or self._videos
        if not shown and not self._messages and asks_about_image(question, self._model.folder):
            self._display.note(NO_IMAGE)
        pieces: list[str] = []
        with stoppable() as cancel:
            try:
                stream = self._model.pipe.chat(
                    messages,
                    [image for _, image in self._images],
                    video=[video for _, video in self._videos],
                    stream=True,
                    cancel=cancel,
                    **self._options.arguments(),
                )
                for piece in stream:
                    pieces.append(piece)
                    self._display.write(piece)
            except Cancelled:
                self._display.write(" (stopped)")
        self._display.write("\n")
        self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        self._asked = (len(self._images), len(self._videos))

    def _read_image(self, name: str) -> None:
        from neounify.image import read_image

        path = _path_of(name)
        image = read_image(path, colour_profiles=self._model.pipe.colour_profiles)
        self.add_image(path, image)
        self._display.note(f"({image.width}x{image.height}; now ask about it)")

    def _read_video(self, name: str) -> None:
        path = _path_of(name)
        [video] = read_clips([path], self._options, self._model.pipe.config, self._display)
        self.add_video(path, video)
        self._display.note("(now ask about it)")

    def _clear(self, _: str) -> None:
        self._messages, self._images, self._videos, self._asked = [], [], [], (0, 0)
        self._display.note("(history cleared)")

    def _save(self, name: str) -> None:
        wanted = Path(name).expanduser() if name else make_folder(self._folder) / "chat.json"
        text = json.dumps(self._document(), ensure_ascii=False, indent=2) + "\n"
        for path in candidates(wanted):
            if write_new(path, text.encode("utf-8", "replace")):
                self._display.note(f"saved {path}")
                return

    def _document(self) -> dict[str, Any]:
        """The chat as JSON: `messages`, `images` and `video` as `Pipeline.chat` takes them."""
        return {
            "model": self._model.description,
            "settings": self._options.arguments(),
            "messages": self._messages,
            "images": [str(path) for path, _ in self._images[: self._asked[0]]],
            "video": [str(path) for path, _ in self._videos[: self._asked[1]]],
        }

    def _enable_line_editing(self) -> None:
        if sys.stdin.isatty():
            try:
                import readline  # noqa: F401
            except ImportError:  # not on every system
                return


def _path_of(name: str) -> Path:
    """The file that a command of the chat names, perhaps in quotes."""
    return Path(name.strip("'\"")).expanduser()


@contextmanager
def stoppable() -> Iterator[threading.Event]:
    """While the block runs, Ctrl-C sets the event; a second Ctrl-C interrupts as usual."""
    cancel = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            raise KeyboardInterrupt
        cancel.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
