"""A self-contained HTML page of images and texts."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
main { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)) }
figure { margin: 0 } figcaption { margin-top: .4rem }
img { image-rendering: pixelated; width: 8rem; margin-right: .3rem; border: 1px solid #ddd }
p { color: #555; margin: .2rem 0; white-space: pre-line }
"""


@dataclass
class Entry:
    """A prompt, its images, and the model's texts."""

    prompt: str
    images: list[Image.Image]
    texts: list[str] = field(default_factory=list)


def write_page(entries: list[Entry], path: Path) -> None:
    """Write the page with the images embedded."""
    body = "\n".join(_figure(entry) for entry in entries)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>neounify</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>Images, answers and edits of one small model</h1><main>{body}</main></html>\n",
        encoding="utf-8",
    )


def _figure(entry: Entry) -> str:
    images = "".join(_img(image, entry.prompt) for image in entry.images)
    texts = "".join(f"<p>{html.escape(text)}</p>" for text in entry.texts)
    return f"<figure>{images}<figcaption>{html.escape(entry.prompt)}{texts}</figcaption></figure>"


def _img(image: Image.Image, text: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
