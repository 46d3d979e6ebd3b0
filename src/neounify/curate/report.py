"""Report page of a curation: one file that needs no network."""

from __future__ import annotations

import base64
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from neounify.curate.recipe import CurateRecipe
from neounify.curate.rules import BOUNDS, ORDER, setting
from neounify.curate.seconds import ALL, Seconds
from neounify.curate.tally import SCALES, Tally
from neounify.curate.units import Unit, read_items
from neounify.errors import ImageError
from neounify.image import read_image

PAGE = "report.html"
THUMBNAIL = 128
"""Pixels of the long side of an example."""
MAX_NAMED_DAMAGE = 50

STYLE = """
body { margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #1f2937; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.2rem; font-size: 1.2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right;
  border-bottom: 1px solid #f0f1f3; } td:first-child, th:first-child { text-align: left; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; max-width: 16rem; }
figcaption { color: #4b5563; font-size: 12.5px; overflow-wrap: anywhere; max-width: 130px; }
.wide figcaption { max-width: none; font-weight: 600; } rect { fill: #4f46e5; }
line { stroke: #b42318; stroke-dasharray: 3 2; } svg text { font: 10px system-ui; fill: #6b7280; }
p.about { color: #6b7280; }
"""


def thumbnails(unit: Unit, numbers: tuple[int, ...], max_bytes: int) -> dict[int, list[bytes]]:
    """Small JPEGs of the images of some samples of a unit, by number; without unreadable ones."""
    results: dict[int, list[bytes]] = {}
    wanted = set(numbers)
    items = itertools.islice(read_items(unit, max_bytes), max(wanted, default=-1) + 1)
    for number, item in enumerate(items):
        if number in wanted:
            contents = [content for content in item.contents if isinstance(content, bytes)]
            results[number] = [small for content in contents for small in _thumbnail(content)]
    return results


def _thumbnail(content: bytes) -> Iterator[bytes]:
    try:
        image = read_image(content)
    except ImageError:
        return
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    yield buffer.getvalue()


def report_page(
    recipe: CurateRecipe,
    tally: Tally,
    seconds: Mapping[str, Seconds],
    images: Mapping[tuple[int, int], Sequence[bytes]],
    damage: Sequence[str],
) -> str:
    """The page; `images` are the thumbnails of examples by (unit, number)."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>{escape(recipe.name)}</title>",
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>',
        f"<h1>Curation {escape(recipe.name)}</h1>",
        *_sources(tally),
        *_stages(tally, seconds),
        *_reasons(tally),
        *_bounds(recipe, tally),
        *_histograms(recipe, tally),
        *_damage(damage),
        *_examples(tally, images),
        "</html>\n",
    ]
    return "\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = [f"<tr>{cells}</tr>"]
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{escape(_shown(cell))}</td>" for cell in row) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return f"{cell:g}"
    return f"{cell:,}" if isinstance(cell, int) else str(cell)


def _sources(tally: Tally) -> Iterator[str]:
    head = ("source", "in", "out", "kept", "bytes of images", "tokens of images", "words")
    rows = [
        (
            name,
            c.samples,
            c.kept,
            f"{c.kept / max(1, c.samples):.1%}",
            c.image_bytes,
            c.image_tokens,
            c.words,
        )
        for name, c in tally.sources.items()
    ]
    yield "<h2>Sources</h2>"
    yield '<p class="about">Bytes, tokens (32 × 32 pixels) and words are of kept samples.</p>'
    yield _table(head, rows)


def _stages(tally: Tally, seconds: Mapping[str, Seconds]) -> Iterator[str]:
    """What went in and came out of every stage, by source."""
    head, left = ["stage"], {name: counts.samples for name, counts in tally.sources.items()}
    for name in left:
        head += [f"{name}: in", "out", "seconds"]
    rows = []
    for stage in (*ORDER, "writing"):
        row: list[object] = [stage]
        for name, counts in tally.sources.items():
            dropped = sum(n for r, n in counts.reasons.items() if r.partition(".")[0] == stage)
            spent = seconds.get(name, Counter())[stage]
            row += [left[name], left[name] - dropped, f"{spent:,.1f}"]
            left[name] -= dropped
        rows.append((*row, f"{seconds.get(ALL, Counter())[stage]:,.1f}"))
    yield "<h2>Stages</h2>"
    yield (
        '<p class="about">Seconds of the workers, also of earlier runs whose parts are used; the '
        "last column is work over all sources, evaluation sets among it.</p>"
    )
    yield _table([*head, "seconds, all"], rows)


def _reasons(tally: Tally) -> Iterator[str]:
    names = {reason for counts in tally.sources.values() for reason in counts.reasons}
    reasons = sorted(names, key=lambda r: (ORDER.index(r.partition(".")[0]), r))
    rows = [(reason, *(c.reasons[reason] for c in tally.sources.values())) for reason in reasons]
    totals = ("all", *(c.reasons.total() for c in tally.sources.values()))
    yield "<h2>Dropped, by stage and reason</h2>"
    yield _table(("stage.reason", *tally.sources), [*rows, totals])


def _bounds(recipe: CurateRecipe, tally: Tally) -> Iterator[str]:
    rows = []
    for bound in BOUNDS:
        limit = setting(recipe.stages, bound)
        if limit is not None and bound.reason in tally.tighter | tally.looser:
            tight, loose = bound.looser(limit, -1), bound.looser(limit)
            name = bound.reason
            rows.append((name, limit, tight, tally.tighter[name], loose, tally.looser[name]))
    yield "<h2>One step tighter or looser</h2>"
    yield (
        '<p class="about">A tighter bound drops so many more of the kept samples. A looser one '
        "lets so many pass that end here now; later stages may still drop them.</p>"
    )
    yield _table(("bound", "now", "tighter", "drops", "looser", "lets pass"), rows)


def _histograms(recipe: CurateRecipe, tally: Tally) -> Iterator[str]:
    yield '<h2>Measured values</h2><div class="row wide">'
    for bound in BOUNDS:
        counts = tally.histograms.get(bound.reason)
        if counts is not None and counts.sum():
            limit = setting(recipe.stages, bound)
            yield _histogram(bound.reason, counts, SCALES[bound.reason], limit)
    yield "</div>"


def _histogram(
    name: str, counts: NDArray[np.int64], scale: tuple[float, float], limit: float | None
) -> str:
    """Bars by the square root of their count; the bound is a dashed line."""
    heights = np.sqrt(counts / counts.max()) * 80
    width = 240 / len(counts)
    bars = "".join(
        f'<rect x="{at * width:.1f}" y="{90 - height:.1f}" width="{width - 0.5:.1f}" '
        f'height="{height:.1f}"/>'
        for at, height in enumerate(heights)
    )
    low, high = scale
    line = ""
    if limit is not None and low <= limit <= high:
        at = (limit - low) / (high - low) * 240
        line = f'<line x1="{at:.1f}" x2="{at:.1f}" y1="5" y2="90"/>'
    return (
        f'<figure><figcaption>{escape(name)}</figcaption><svg viewBox="0 0 240 105" width="240">'
        f'{bars}{line}<text x="0" y="102">{low:g}</text>'
        f'<text x="240" y="102" text-anchor="end">{high:g}</text></svg></figure>'
    )


def _damage(damage: Sequence[str]) -> Iterator[str]:
    if damage:
        yield f"<h2>Not indexed: {len(damage):,} files or parts of files</h2><ul>"
        yield from (f"<li>{escape(text)}</li>" for text in damage[:MAX_NAMED_DAMAGE])
        yield "</ul>"


def _examples(tally: Tally, images: Mapping[tuple[int, int], Sequence[bytes]]) -> Iterator[str]:
    yield "<h2>Examples by reason</h2>"
    yield '<p class="about">None of known bad and unsafe samples, which are only counted.</p>'
    for reason in sorted(tally.examples, key=lambda r: (ORDER.index(r.partition(".")[0]), r)):
        yield f'<h3>{escape(reason)}</h3><div class="row">'
        for unit, example in tally.examples[reason]:
            shown = "".join(_image(content) for content in images.get((unit, example.number), ()))
            text = escape(f"{example.id} {example.note}".strip())
            yield f"<figure>{shown}<figcaption>{text}</figcaption></figure>"
        yield "</div>"


def _image(content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{data}">'
