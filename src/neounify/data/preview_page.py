"""Page of a preview: samples with their images, clips and marks of loss, in one HTML file."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from neounify.data.preview import Piece, Preview, Shown
from neounify.data.sizes import Pixels
from neounify.image.contact_sheet import strip

MAX_SIDE = 384
"""Longer side of an image or frame on the page, in pixels."""
STRIP_WIDTH = 960
"""Width of the frames of a clip side by side, at most."""
MAX_MESSAGES = 50

STYLE = """
body { margin: 2rem auto; max-width: 1000px; padding: 0 1rem; color: #1f2937; background: #fff;
  font: 15px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
article { margin: 1rem 0; padding: .8rem 1rem; border: 1px solid #e5e7eb; border-radius: 6px;
  overflow-wrap: anywhere; }
article p { margin: 0 0 .5rem; color: #6b7280; } .text { white-space: pre-wrap; }
mark { background: #bbf7d0; } figure { display: inline-block; margin: .3rem; vertical-align: middle;
  padding: 4px; border: 3px solid #d1d5db; } figure.loss { border-color: #22c55e; }
figcaption { font-size: 12px; color: #6b7280; } img { display: block; max-width: 100%; }
td { padding: .1rem 1rem .1rem 0; vertical-align: top; } td.n { text-align: right; }
"""


def preview_page(title: str, facts: list[tuple[str, str]], preview: Preview) -> str:
    """The HTML of a preview; `facts` are lines of its table. It loads nothing and runs nothing."""
    rows = "".join(f"<tr><td>{escape(name)}<td>{escape(text)}" for name, text in facts)
    reasons = "".join(
        f"<tr><td class=n>{count:,}<td>{escape(reason)}"
        for reason, count in preview.reasons.most_common()
    )
    messages = "".join(f"<li>{escape(s.message)}</li>" for s in preview.skipped[:MAX_MESSAGES])
    skipped = f"<h2>Skipped</h2><table>{reasons}</table><ul>{messages}</ul>" if reasons else ""
    samples = "".join(_sample(shown) for shown in preview.shown)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f'</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1><table>{rows}</table>"
        f"{skipped}<h2>Samples as the model sees them</h2><p>Green: the model learns to predict "
        f"it.</p>{samples}</body></html>\n"
    )


def _sample(shown: Shown) -> str:
    body = "".join(map(_piece, shown.pieces))
    about = (
        f"{shown.location} · {shown.task} · {shown.tokens:,} tokens, {shown.with_loss:,} with loss"
    )
    return f"<article><p>{escape(about)}</p><div class=text>{body}</div></article>\n"


def _piece(piece: Piece) -> str:
    if piece.pixels is None:
        text = escape(piece.text)
        return f"<mark>{text}</mark>" if piece.loss else text
    kind, what = (" class=loss", "to generate") if piece.loss else ("", "input")
    image = _image(strip(piece.pixels), STRIP_WIDTH) if piece.frames else _image(piece.pixels)
    return f"<figure{kind}>{image}<figcaption>{piece.about}, {what}</figcaption></figure>"


def _image(pixels: Pixels, width: int = MAX_SIDE) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((width, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="" src="data:image/png;base64,{data}">'
