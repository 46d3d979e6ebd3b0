"""Made samples for curation: textured images, one known fault each, and files that hold them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from neounify.curate import CurateRecipe, recipe_from_table

SIDE = 320


def textured(seed: int, width: int = SIDE, height: int = SIDE) -> Image.Image:
    """An image of random patches of several sizes, with fine grain: unlike any other seed's."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for side, weight in ((3, 1.0), (5, 0.8), (9, 0.6), (17, 0.5), (40, 0.4)):
        patch = (rng.random((side, side, 3)) * 255).astype(np.uint8)
        grown = Image.fromarray(patch).resize((width, height), Image.Resampling.BICUBIC)
        total += weight * np.asarray(grown, np.float32)
    total += rng.normal(0, 12, total.shape)
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_samples(
    folder: Path, samples: Sequence[tuple[str, bytes | None, str]], role: str = "target"
) -> Path:
    """JSON lines of (id, image or None, text): text to image, or questions, or text alone."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, content, text in samples:
        record: dict[str, Any] = {"id": name}
        if content is None:
            turns = [("human", text), ("gpt", "Yes.")]
        else:
            (folder / f"{name}.img").write_bytes(content)
            record["image"] = f"{name}.img"
            turns = (
                [("human", text), ("gpt", "<image>")]
                if role == "target"
                else [("human", f"<image>\n{text}"), ("gpt", "Yes.")]
            )
        record["conversations"] = [{"from": who, "value": value} for who, value in turns]
        lines.append(json.dumps(record))
    path = folder / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_of(
    sources: dict[str, Path], folder: Path | None = None, **settings: Any
) -> CurateRecipe:
    """A recipe of JSON lines by name."""
    tables = [{"name": name, "path": str(path)} for name, path in sources.items()]
    return recipe_from_table({"sources": tables, **settings}, folder)


def table_of(out: Path) -> list[dict[str, Any]]:
    """The rows of a curation's table, in order of input."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = []
    for path in sorted((out / "table").glob("*.parquet")):
        rows += pq.read_table(path).to_pylist()
    return rows


def reasons_of(out: Path) -> dict[str, str | None]:
    """The reason of every sample by id; None for kept ones."""
    return {row["id"]: row["reason"] for row in table_of(out)}


def bytes_of(out: Path) -> dict[str, bytes]:
    """All files of a curation's shards, table and report by name."""
    paths = [*(out / "shards").iterdir(), *(out / "table").iterdir()]
    return {path.name: path.read_bytes() for path in paths}
