"""Images of stored data: endings of any case, colour profiles by the recipe."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from neounify.data.configs import read_data
from neounify.data.sources import SampleSource
from support.colour_profiles import DISPLAY_P3, rgb_profile
from support.samples import build_mixture

RECORD = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}]}
COLOUR = (200, 100, 50)


def photo() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), COLOUR).save(file, "PNG", icc_profile=rgb_profile(DISPLAY_P3))
    return file.getvalue()


def source(path: Path, kind: str, **fields: object) -> SampleSource:
    return build_mixture([read_data({"kind": kind, "path": str(path), **fields})], 0)


def write(folder: Path, kind: str) -> Path:
    """One sample with the photo, every ending in capitals."""
    if kind == "jsonl":
        (folder / "DATA.JSONL").write_text(json.dumps(RECORD | {"image": "a.PNG"}))
        (folder / "a.PNG").write_bytes(photo())
        return folder
    members = {"1.PNG": photo(), "1.TXT": b"x"}
    if kind == "record in a shard":
        members = {"1.0.PNG": photo(), "1.JSON": json.dumps(RECORD | {"image": "1.0.png"}).encode()}
    with tarfile.open(folder / "A.TAR", "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder / "*.tar"


@pytest.mark.parametrize("kind", ["jsonl", "pair in a shard", "record in a shard"])
def test_endings_in_capitals_and_profiles(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    kind = "jsonl" if kind == "jsonl" else "shards"
    plain = source(path, kind, colour_profiles=False)[0].images[0].pixels()
    assert plain[0, 0].tolist() == list(COLOUR)
    converted = source(path, kind)[0].images[0].pixels()
    assert abs(converted[0, 0].astype(int) - (213, 94, 33)).max() <= 4


def test_synthetic_scenes_have_no_profiles() -> None:
    with pytest.raises(ValueError, match="has no colour_profiles"):
        read_data({"colour_profiles": False})
