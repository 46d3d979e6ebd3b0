"""Judging: a measured part as arrays, with the reasons that need no other sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neounify.curate.near import HASH_BYTES, Words, hash_words
from neounify.curate.parts import read_table
from neounify.curate.recipe import CurateRecipe
from neounify.curate.rules import (
    COPIES,
    EVALUATION,
    HOOK_BOUNDS,
    IMAGE_BOUNDS,
    KNOWN,
    READABLE,
    TEXT_BOUNDS,
    TEXTS,
    image_reasons,
    text_reasons,
)
from neounify.curate.texts import BANDS, ROWS

HOOKS = ("safety.bound", "safety.never", "embeddings.bound")
FAILED = tuple(f"{stage}.failed" for stage in ("safety", "watermark", "beauty", "match"))
REASONS = (
    "",
    *READABLE,
    *KNOWN,
    *(bound.reason for bound in (*IMAGE_BOUNDS, *TEXT_BOUNDS, *HOOK_BOUNDS)),
    *COPIES,
    *TEXTS,
    *EVALUATION,
    *HOOKS,
    *FAILED,
    "embeddings.failed",
)
"""All reasons; a reason's number is its place here, 0 is none."""
NUMBERS = {reason: number for number, reason in enumerate(REASONS)}
SIGNATURE = BANDS * ROWS
NO_ROLE, INPUT, TARGET = 0, 1, 2
"""Images that copies are compared by: none, the inputs, or the targets where there are some."""


@dataclass
class Judged:
    """Samples as arrays, [n] each. Hashes are [m, 4], those of sample i from `first[i]` on.

    `early` are reasons before stage 5, `late` those of the text's length, `signatures` [n, 112].
    """

    ids: list[str]
    early: NDArray[np.int16]
    late: NDArray[np.int16]
    role: NDArray[np.int8]
    area: NDArray[np.int64]
    file_bytes: NDArray[np.int64]
    keys: NDArray[np.uint64]
    count: NDArray[np.int32]
    hashes: Words
    qualities: NDArray[np.int16]
    has_text: NDArray[np.bool_]
    signatures: NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.early)

    @property
    def first(self) -> NDArray[np.int64]:
        """The first hash of every sample, [n]."""
        return np.cumsum(self.count, dtype=np.int64) - self.count

    def digest(self) -> str:
        """A digest of all values."""
        digest = hashlib.sha256(json.dumps(self.ids).encode())
        for field in fields(self)[1:]:
            digest.update(getattr(self, field.name).tobytes())
        return digest.hexdigest()

    @classmethod
    def joined(cls, several: Sequence[Judged]) -> Judged:
        """The samples of several units, in their order."""
        values: dict[str, Any] = {}
        for field in fields(cls):
            parts = [getattr(judged, field.name) for judged in several]
            joined = [name for part in parts for name in part]
            values[field.name] = joined if field.name == "ids" else np.concatenate(parts)
        return cls(**values)


def judge_part(path: Path, recipe: CurateRecipe) -> Judged:
    """The samples of a measured part. Raises CurateError."""
    columns = ("id", "reason", "images", "text")
    return judge_rows(read_table(path, columns).to_pylist(), recipe)


def judge_rows(rows: Sequence[dict[str, Any]], recipe: CurateRecipe) -> Judged:
    """Rows of the table as arrays."""
    stages, size = recipe.stages, len(rows)
    judged = Judged(
        ids=[row["id"] for row in rows],
        early=np.zeros(size, np.int16),
        late=np.zeros(size, np.int16),
        role=np.zeros(size, np.int8),
        area=np.zeros(size, np.int64),
        file_bytes=np.zeros(size, np.int64),
        keys=np.zeros((size, 2), np.uint64),
        count=np.zeros(size, np.int32),
        hashes=np.zeros((0, HASH_BYTES // 8), np.uint64),
        qualities=np.zeros(0, np.int16),
        has_text=np.zeros(size, np.bool_),
        signatures=np.zeros((size, SIGNATURE), np.uint32),
    )
    hashes: list[bytes] = []
    qualities: list[int] = []
    for number, row in enumerate(rows):
        reason = row["reason"] or next(image_reasons(stages, row["images"]), "")
        text = row["text"]
        judged.early[number] = NUMBERS[reason if not _is_late(reason) else ""]
        if text is not None:
            judged.late[number] = NUMBERS[next(text_reasons(stages, text), "")]
            if text["signature"] is not None:
                judged.has_text[number] = True
                judged.signatures[number] = np.frombuffer(text["signature"], "<u4")
        looked = _looked(row["images"])
        if not looked or any(image["hash"] is None for image in looked):
            continue
        judged.role[number] = TARGET if looked[0]["role"] == "target" else INPUT
        judged.area[number] = sum(image["width"] * image["height"] for image in looked)
        judged.file_bytes[number] = sum(image["file_bytes"] for image in looked)
        joined = ",".join(image["pixels_sha256"] for image in looked)
        judged.keys[number] = np.frombuffer(hashlib.sha256(joined.encode()).digest()[:16], "<u8")
        judged.count[number] = len(looked)
        hashes += [image["hash"] for image in looked]
        qualities += [image["hash_quality"] for image in looked]
    judged.hashes, judged.qualities = hash_words(hashes), np.array(qualities, np.int16)
    return judged


def _is_late(reason: str) -> bool:
    return reason.startswith("text.")


def _looked(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The targets, or else the inputs."""
    targets = [image for image in images if image["role"] == "target"]
    return targets or list(images)
