"""The folder of one story: numbered pictures, and the text around them as Markdown and HTML."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image

import neounify
from neounify.cli.display import printable
from neounify.cli.errors import CliError
from neounify.cli.files import candidates, make_folder, slug, write_whole
from neounify.cli.options import StoryOptions
from neounify.cli.painting import now, settings_record
from neounify.cli.record import Picture, save_picture, sheet_path
from neounify.cli.session import Session
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


class StoryFolder:
    """Made with the first thing that is saved.

    The texts are written anew after every picture and at the end, so an interrupted story
    is readable up to where it came. `parts` are {"text"} and {"image"} by turns.
    """

    def __init__(
        self,
        outputs: Path,
        prompt: str,
        images: Sequence[Path],
        options: StoryOptions,
        session: Session,
        *,
        overwrite: bool,
    ) -> None:
        self.options, self.session = options, session
        self.parts: list[dict[str, str]] = []
        self.count = 0
        self.complete = False
        self._prompt, self._images, self._overwrite = prompt, images, overwrite
        self._wanted = outputs / f"{slug(prompt)}_s{options.seed}"
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The story's own folder: a new one, unless overwriting."""
        if self._folder is None:
            self._folder = self._make()
        return self._folder

    def add_text(self, text: str) -> None:
        if self.parts and "text" in self.parts[-1]:
            self.parts[-1]["text"] += text
        else:
            self.parts.append({"text": text})

    def add_image(self, part: ImagePart, sheet: PIL.Image.Image | None) -> Path:
        """Save the next picture, and the story so far; the picture's path."""
        self.count += 1
        picture = Picture(part.image, self._picture_record(part.image.size), sheet)
        wanted = self.folder / f"{self.count:02d}.png"
        path = save_picture(picture, wanted, overwrite=self._overwrite)
        self.parts.append({"image": path.name})
        if sheet is not None:
            self.parts[-1]["previews"] = sheet_path(path).name
        self.write()
        return path

    def write(self) -> None:
        """Write story.md, story.html and story.json, if there is anything to tell."""
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
        """How the story was made, and its parts."""
        return {**self._origin(), "complete": self.complete, "parts": self.parts}

    def _origin(self) -> dict[str, Any]:
        options = self.options
        settings = {
            **settings_record(options, self.session.pipe.config),
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
            "model": self.session.description,
            "created": now(),
        }

    def _picture_record(self, size: tuple[int, int]) -> dict[str, Any]:
        return {**self._origin(), "index": self.count, "size": list(size)}

    def _make(self) -> Path:
        make_folder(self._wanted.parent)
        for folder in candidates(self._wanted):
            try:
                folder.mkdir(exist_ok=self._overwrite)
            except FileExistsError:
                continue
            except OSError as error:
                raise CliError(f"{folder} cannot be made: {error.strerror or error}") from error
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
