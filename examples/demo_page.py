"""One self-contained HTML page of pictures and words."""

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
    """What was asked, the pictures that came, and what was said."""

    asked: str
    pictures: list[Image.Image]
    said: list[str] = field(default_factory=list)


def write_page(entries: list[Entry], path: Path) -> None:
    """Write the page; the pictures are inside it."""
    body = "\n".join(_figure(entry) for entry in entries)
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>neounify</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>Painted, read and edited by one small model</h1><main>{body}</main></html>\n",
        encoding="utf-8",
    )


def _figure(entry: Entry) -> str:
    pictures = "".join(_picture(picture, entry.asked) for picture in entry.pictures)
    said = "".join(f"<p>{html.escape(text)}</p>" for text in entry.said)
    return f"<figure>{pictures}<figcaption>{html.escape(entry.asked)}{said}</figcaption></figure>"


def _picture(picture: Image.Image, text: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'
