"""`neounify story`: interleaved text and images, streamed into a folder."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import neounify
from neounify.cli.command import CliError, UsageError, WriteError
from neounify.cli.display import Display, Tick, printable
from neounify.cli.files import candidates, check_writable, make_folder, slug, write_whole
from neounify.cli.models import LoadedModel, open_model, resolve_model
from neounify.cli.options import (
    FILES,
    ImageFileOptions,
    ModelOptions,
    ReportOptions,
    StoryOptions,
    option,
)
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from PIL.Image import Image

    from neounify.pipeline import ImagePart

PAGE = """\
<!DOCTYPE html>
<html lang="">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.6;
  font-family: Georgia, serif; color: #222; background: #fff; }}
h1 {{ font-size: 1.4rem; }}
p {{ white-space: pre-wrap; }}
img {{ max-width: 100%; height: auto; display: block; margin: 1.5rem auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass(frozen=True, kw_only=True)
class _StoryTarget:
    output: Annotated[
        Path,
        option(
            FILES,
            "FOLDER",
            "Parent of the story's folder. The second story of a name gets the suffix -2.",
            "--output",
            "-o",
        ),
    ] = Path("outputs")


@dataclass(frozen=True, kw_only=True)
class StoryOutputOptions(ImageFileOptions, _StoryTarget):
    """Folder of stories."""


def story(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What the story is about, in quotes.")
    ],
    *,
    image: Annotated[
        list[Path] | None,
        option(FILES, "FILE", "Input image. May be repeated."),
    ] = None,
    model: ModelOptions,
    options: StoryOptions,
    output: StoryOutputOptions,
    report: ReportOptions,
) -> None:
    """Generate interleaved text and images.

    The answer is saved in a new folder in `outputs`: numbered PNGs, story.md, and story.html,
    a single file with the images inside.

    \b
      neounify story "How to fold a paper boat, with images" --model FOLDER
      neounify story "Tell the story of this boat" --image boat.png --max-images 4
    """
    resolve_model(model.model)
    _generate_story(prompt, image or (), model, options, output, report)


def _generate_story(
    prompt: str,
    images: Sequence[Path],
    model: ModelOptions,
    options: StoryOptions,
    output: StoryOutputOptions,
    report: ReportOptions,
) -> None:
    """Stream the text to stdout, save images as they are finished, and print the folder."""
    with lasting_imports():
        from neounify.cli.checks import check_model, check_story_request, note_size
        from neounify.tasks.chat import read_images

    if output.output.suffix.lower() in (".png", ".html", ".md"):
        raise UsageError(f"--output {output.output} names a file; a story is saved as a folder")
    config = check_model(model).config
    inputs = read_images(images, colour_profiles=model.colour_profiles)
    check_story_request(prompt, options, config, inputs)
    check_writable(output.output)
    display = Display(quiet=report.quiet, json=report.json)
    note_size(options, config, display, inputs)
    loaded = open_model(model, display)
    parts = loaded.pipe.interleave(prompt, inputs, seed=options.seed, **options.arguments())
    folder = StoryFolder(output.output, prompt, images, options, loaded, overwrite=output.overwrite)
    try:
        try:
            _save_parts(parts, folder, display, output.previews)
            folder.complete = True
        finally:
            folder.write()
    except WriteError as error:
        raise WriteError(
            f"{error}\nEarlier parts are saved in {folder.folder}. Free some space or choose "
            "another --output, and run the command again: the same seed gives the same story."
        ) from error
    noun = "image" if folder.count == 1 else "images"
    page = folder.folder / "story.html"
    display.end_line()
    display.result(f"saved {page}  ({folder.count} {noun})", folder.folder)
    display.emit({"task": "story", "folder": str(folder.folder), **folder.record()})


def _save_parts(parts: Any, folder: StoryFolder, display: Display, previews: bool) -> None:
    from neounify.cli.checks import resolve_sampling
    from neounify.cli.images import PreviewSheets
    from neounify.pipeline import ImagePart, PreviewPart, TextPart

    steps = resolve_sampling(folder.options, folder.model.pipe.config).steps
    with ExitStack() as bar:
        tick: Tick | None = None
        sheets = PreviewSheets()
        for part in parts:
            if isinstance(part, TextPart):
                folder.add_text(part.text)
                display.write(part.text)
            elif isinstance(part, PreviewPart):
                if tick is None:
                    display.end_line()
                    tick = bar.enter_context(display.bar(f"image {folder.count + 1}", steps))
                tick(part.progress.step)
                if previews:
                    sheets.add(part.progress)
            elif isinstance(part, ImagePart):
                bar.close()
                sheet = sheets.sheet(0) if previews else None
                path = folder.add_image(part, sheet)
                display.end_line()
                display.write(f"[{path}]\n")
                tick, sheets = None, PreviewSheets()


class StoryFolder:
    """Created with the first file that is saved.

    The text files are rewritten after every image and at the end, so an interrupted story is
    readable as far as it came. `parts` are interleaved {"text"} and {"image"} entries.
    """

    def __init__(
        self,
        outputs: Path,
        prompt: str,
        images: Sequence[Path],
        options: StoryOptions,
        model: LoadedModel,
        *,
        overwrite: bool,
    ) -> None:
        self.options, self.model = options, model
        self.parts: list[dict[str, str]] = []
        self.count = 0
        self.complete = False
        self._prompt, self._images, self._overwrite = prompt, images, overwrite
        self._wanted = outputs / f"{slug(prompt)}_s{options.seed}"
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The story's folder: a new one, unless overwriting."""
        if self._folder is None:
            self._folder = self._make()
        return self._folder

    def add_text(self, text: str) -> None:
        if self.parts and "text" in self.parts[-1]:
            self.parts[-1]["text"] += text
        else:
            self.parts.append({"text": text})

    def add_image(self, part: ImagePart, sheet: Image | None) -> Path:
        """Save the next image and the story so far; returns the image's path."""
        from neounify.cli.images import RecordedImage, save_image, sheet_path

        self.count += 1
        image = RecordedImage(part.image, self._image_record(part), sheet)
        wanted = self.folder / f"{self.count:02d}.png"
        path = save_image(image, wanted, overwrite=self._overwrite)
        self.parts.append({"image": path.name})
        if sheet is not None:
            self.parts[-1]["previews"] = sheet_path(path).name
        self.write()
        return path

    def write(self) -> None:
        """Write story.md, story.html and story.json, unless there are no parts."""
        if not self.parts:
            return
        record = json.dumps(self.record(), ensure_ascii=False, indent=2)
        for name, text in (
            ("story.md", self._markdown()),
            ("story.html", self._page()),
            ("story.json", record),
        ):
            write_whole(self.folder / name, f"{text.strip()}\n".encode("utf-8", "replace"))

    def record(self) -> dict[str, Any]:
        """The settings of the story, and its parts."""
        return {**self._origin(), "complete": self.complete, "parts": self.parts}

    def _origin(self) -> dict[str, Any]:
        from neounify.cli.images import now, settings_record

        options = self.options
        settings = {
            **settings_record(options, self.model.pipe.config),
            **options.text_arguments(),
        }
        if options.max_images is not None:
            settings["max_images"] = options.max_images
        return {
            "neounify": neounify.__version__,
            "task": "story",
            "prompt": self._prompt,
            "images": [image.name for image in self._images],
            "seed": options.seed,
            "settings": settings,
            "model": self.model.description,
            "created": now(),
        }

    def _image_record(self, part: ImagePart) -> dict[str, Any]:
        about = {"index": self.count, "size": list(part.image.size)}
        return {**self._origin(), **about, "evaluations": part.evaluations}

    def _make(self) -> Path:
        make_folder(self._wanted.parent)
        for folder in candidates(self._wanted):
            try:
                folder.mkdir(exist_ok=self._overwrite)
            except FileExistsError:
                continue
            except OSError as error:
                raise CliError(f"{folder} cannot be created: {error.strerror or error}") from error
            return folder
        raise AssertionError("names never run out")

    def _markdown(self) -> str:
        blocks = [f"# {self._title()}"]
        for part in self.parts:
            if "image" in part:
                blocks.append(f"![]({part['image']})")
            elif text := printable(part["text"]).strip():
                blocks.append(text)
        return "\n\n".join(blocks)

    def _page(self) -> str:
        blocks: list[str] = []
        for part in self.parts:
            if "image" in part:
                data = base64.b64encode((self.folder / part["image"]).read_bytes()).decode()
                blocks.append(f'<img alt="" src="data:image/png;base64,{data}">')
            elif text := printable(part["text"]).strip():
                blocks.append(f"<p>{html.escape(text)}</p>")
        return PAGE.format(title=html.escape(self._title()), body="\n".join(blocks))

    def _title(self) -> str:
        return " ".join(self._prompt.split())
