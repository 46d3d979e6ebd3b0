"""Interactive chat at the terminal: keeps its history, streams answers, Ctrl-C stops one."""

from __future__ import annotations

import json
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import PIL.Image

from neounify.bundled import bundled_model
from neounify.cli.display import Display
from neounify.cli.files import candidates, make_folder, write_new
from neounify.cli.models import LoadedModel
from neounify.cli.task_options import ChatOptions
from neounify.errors import Cancelled, NeounifyError
from neounify.image import read_image
from neounify.text import place_images

HELP = """\
Type a question and press Enter. Commands:
  /image FILE   add an image to the next question
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


def asks_about_image(question: str, model: Path | None) -> bool:
    """Whether a question without an image probably means one.

    Always for the bundled model, which answers about images only; for others, by the words.
    """
    bundled = model is None or model.resolve() == bundled_model().resolve()
    return bundled or _ABOUT_IMAGES.search(question) is not None


class ChatLoop:
    """The history of a chat and the loop that adds to it.

    `_messages` mark each of `_images` with `<image>`; `_pending` images belong to the next
    question.
    """

    def __init__(
        self, model: LoadedModel, options: ChatOptions, display: Display, folder: Path
    ) -> None:
        self._model, self._options, self._display = model, options, display
        self._folder = folder
        self._messages: list[dict[str, str]] = []
        self._images: list[tuple[Path, PIL.Image.Image]] = []
        self._pending: list[tuple[Path, PIL.Image.Image]] = []

    def add_image(self, path: Path, image: PIL.Image.Image) -> None:
        """Keep an image for the next question."""
        self._pending.append((path, image))

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
        commands = {"/image": self._read_image, "/clear": self._clear, "/save": self._save}
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
        text = place_images(question, len(self._pending), numbered=False)
        messages = [*self._messages, {"role": "user", "content": text}]
        images = [*self._images, *self._pending]
        if not images and not self._messages and asks_about_image(question, self._model.folder):
            self._display.note(NO_IMAGE)
        pieces: list[str] = []
        with stoppable() as cancel:
            try:
                stream = self._model.pipe.chat(
                    messages,
                    [image for _, image in images],
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
        self._images, self._pending = images, []

    def _read_image(self, name: str) -> None:
        path = Path(name.strip("'\"")).expanduser()
        image = read_image(path, colour_profiles=self._model.pipe.colour_profiles)
        self.add_image(path, image)
        self._display.note(f"({image.width}x{image.height}; now ask about it)")

    def _clear(self, _: str) -> None:
        self._messages, self._images, self._pending = [], [], []
        self._display.note("(history cleared)")

    def _save(self, name: str) -> None:
        wanted = Path(name).expanduser() if name else make_folder(self._folder) / "chat.json"
        text = json.dumps(self._document(), ensure_ascii=False, indent=2) + "\n"
        for path in candidates(wanted):
            if write_new(path, text.encode("utf-8", "replace")):
                self._display.note(f"saved {path}")
                return

    def _document(self) -> dict[str, Any]:
        """The chat as JSON: `messages` and `images` as `Pipeline.chat` takes them."""
        return {
            "model": self._model.description,
            "settings": self._options.arguments(),
            "messages": self._messages,
            "images": [str(path) for path, _ in self._images],
        }

    def _enable_line_editing(self) -> None:
        if sys.stdin.isatty():
            try:
                import readline  # noqa: F401
            except ImportError:  # not on every system
                return


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
