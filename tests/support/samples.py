"""Samples on disk: records with their images, and shards; mixtures of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from neounify.data.configs import DataConfig
from neounify.data.records import sample_to_record
from neounify.data.sample import Sample
from neounify.data.sources import Mixture


def build_mixture(data: Sequence[DataConfig], seed: int) -> Mixture:
    """The mixture of a stage's sources, which never ends. Raises DataError."""
    return Mixture([(item.build(), item.weight) for item in data], seed)


def write_sample(sample: Sample, folder: Path, stem: str) -> dict[str, Any]:
    """Write the images to `folder` as PNG, named `stem`-0.png, …, and return the record.

    Paths in the record are relative to `folder`; images that are files already keep theirs.
    """
    paths = []
    for number, part in enumerate(sample.images):
        if isinstance(part.image, Path):
            paths.append(part.image.as_posix())
            continue
        name = f"{stem}-{number}.png"
        Image.fromarray(part.pixels()).save(folder / name)
        paths.append(name)
    return sample_to_record(sample, paths)


def write_shard(samples: Iterable[Sample], path: Path) -> None:
    """Write samples, whose images have been read, as one shard."""
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            _write(archive, f"{number:08d}", sample)


def _write(archive: tarfile.TarFile, key: str, sample: Sample) -> None:
    names = [f"{key}.{index}.png" for index in range(len(sample.images))]
    record = json.dumps(sample_to_record(sample, names), ensure_ascii=False)
    _add(archive, f"{key}.json", record.encode())
    for name, part in zip(names, sample.images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(part.pixels()).save(buffer, "PNG")
        _add(archive, name, buffer.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
