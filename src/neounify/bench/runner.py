"""Running a benchmark: outputs of all cases under their names, in shards, resumed where they ended.

A run is a folder:

    bench.json                benchmark, prompts, model, settings: the same for all its processes
    cases.jsonl               the cases, whose SHA-256 bench.json has
    images/                   what the scorer reads
    log/0-of-4/log.jsonl      a line for each case that a process has finished, or why it could not
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from neounify.bench.adapter import Adapter
from neounify.bench.cases import (
    READ_BY_US,
    BenchError,
    Case,
    Record,
    Task,
    image_bytes,
    jsonl,
)
from neounify.bench.subjects import Image, Job, Subject, png
from neounify.errors import Cancelled, ImageError, NeounifyError
from neounify.files import (
    atomic_file,
    locked_folder,
    read_json,
    read_text,
    write_bytes,
    write_new,
)
from neounify.image import read_image
from neounify.services import NoAnswer

FORMAT = "neounify-bench-1"
ABOUT, CASES, IMAGES, LOG = "bench.json", "cases.jsonl", "images", "log"
PATH = "prompts_path"
OF_STORIES = ("prompt", "images")
"""Fields that the reader of interleaved answers adds."""
MAX_RUN_BYTES = 2**31
MAX_SEED = 2**63
MAX_SIDES = {"WEBP": 16_383, "JPEG": 65_500}
"""Longest sides of images in formats that have a limit, in pixels."""
MAX_DOWN = 3
"""Batches in a row without an answer after which a model counts as unreachable."""
Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run is driven: none of it changes an output.

    `shard` (i, n) takes cases i, i + n, i + 2n, …; `batch_size` cases are asked at once. `folder`
    is that of the prompts, which input images are read from.
    """

    folder: Path
    batch_size: int = 8
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        number, count = self.shard
        if not 0 <= number < count:
            raise BenchError(f"shard {number}/{count}: the first number is from 0 to {count - 1}")
        if self.batch_size < 1:
            raise BenchError(f"the batch size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class Summary:
    """What a run has: cases in all, finished ones, and the reasons of those that failed."""

    total: int
    finished: int
    failures: Mapping[str, str]


def sample_seed(seed: int, case: str, sample: int) -> int:
    """The seed of an output, a function of the run's seed, the case and the sample alone."""
    digest = hashlib.sha256(f"{seed}/{case}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % MAX_SEED


def begin(folder: Path, about: Record, cases: Sequence[Case], prompts: Path) -> None:
    """Write what a run is, or check that the folder holds the same run.

    `about` has benchmark, prompts, seed, samples and the subject's description; `prompts`, the
    place of the prompts, may change. Raises BenchError, which names what differs, also for a
    folder of outputs that no run has made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    for case in cases:
        digest.update(_line(case.to_json()))
    about = {"format": FORMAT, **about, "cases": digest.hexdigest(), PATH: str(prompts.resolve())}
    about = json.loads(json.dumps(about))
    strange = [name for name in (IMAGES, LOG, CASES) if (folder / name).exists()]
    if strange and not (folder / ABOUT).exists():  # which every process of a run writes first
        raise BenchError(
            f"{folder} has {', '.join(strange)} of something else; choose another folder"
        )
    if not write_new(folder / ABOUT, json.dumps(about, indent=1, ensure_ascii=False).encode()):
        _check_same(folder, about)
    if not (folder / CASES).exists():
        with atomic_file(folder / CASES) as aside, aside.open("wb") as file:
            file.writelines(_line(case.to_json()) for case in cases)


def _check_same(folder: Path, about: Record) -> None:
    before = load_about(folder)
    keys = [key for key in {**before, **about} if key != PATH]
    differing = [key for key in keys if before.get(key) != about.get(key)]
    if differing:
        raise BenchError(
            f"{folder} holds another run: {', '.join(differing)} differ; continue it with the same "
            "prompts, model and settings, or choose another folder"
        )


def load_about(folder: Path) -> Record:
    """What a run is. Raises BenchError for a folder that holds none."""
    about = read_json(folder / ABOUT, MAX_RUN_BYTES, BenchError)
    if about.get("format") != FORMAT:
        raise BenchError(f"{folder / ABOUT}: format {about.get('format')!r} is not {FORMAT!r}")
    return about


def load_cases(folder: Path) -> list[Case]:
    """The cases of a run. Raises BenchError."""
    path = folder / CASES
    try:
        text = read_text(path, MAX_RUN_BYTES, BenchError)
        return [Case.from_json(line) for line in jsonl(text, path)]
    except (KeyError, TypeError) as error:
        raise BenchError(f"{path}: not the cases of a run: {error!r}") from error


def finished(folder: Path) -> dict[str, Record]:
    """The records of finished cases whose files are all there, by case, from all processes."""
    return {
        name: record
        for name, record in _logged(folder).items()
        if "error" not in record
        and all((folder / IMAGES / file).is_file() for file in record["files"])
    }


def failures(folder: Path) -> dict[str, str]:
    """Reasons of the cases that failed and were not finished since, by case."""
    done = finished(folder)
    logged = _logged(folder)
    return {n: r["error"] for n, r in logged.items() if "error" in r and n not in done}


def _logged(folder: Path) -> dict[str, Record]:
    """The last finished record of each case; of one that never finished, its last failure."""
    records: dict[str, Record] = {}
    for path in sorted((folder / LOG).glob("*/log.jsonl")):
        for line in path.read_bytes().splitlines():
            try:
                record = json.loads(line)
                name, failed = record["id"], "error" in record
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a kill: the case runs again
            if not failed or "error" in records.get(name, {"error": ""}):
                records[name] = record
    return records


def run(
    adapter: Adapter,
    cases: Sequence[Case],
    subject: Subject,
    folder: Path,
    seed: int,
    plan: Plan,
    progress: Progress = lambda done: None,
) -> Summary:
    """Finish the cases of a shard; those of earlier processes are kept.

    A case that fails is recorded with its reason and tried again by the next run, after those that
    were not tried yet. Raises BenchError when the model answers no case of `MAX_DOWN` batches in a
    row, FolderInUse when another process has the shard, OSError for a disk that is full: what is
    finished stays.
    """
    number, count = plan.shard
    log = folder / LOG / f"{number}-of-{count}"
    with locked_folder(log):
        done, failed = finished(folder), failures(folder)
        mine = list(cases)[number::count]
        left = [case for case in mine if case.id not in done]
        left.sort(key=lambda case: case.id in failed)  # stable
        writer = _Writer(adapter, subject, folder, seed, plan.folder)
        down = 0
        with (log / "log.jsonl").open("ab") as file:
            if file.tell():
                file.write(b"\n")  # ends a line that a kill has cut off
            for start in range(0, len(left), plan.batch_size):
                records = writer.take(left[start : start + plan.batch_size])
                for record in records:
                    file.write(_line(record))
                file.flush()
                os.fsync(file.fileno())
                down = down + 1 if all(r.get("unreachable") for r in records) else 0
                if down == MAX_DOWN:
                    raise BenchError(
                        f"the model gives no answer ({records[-1]['error']}); "
                        f"{len(finished(folder))} of {len(cases)} cases are finished: the same "
                        "command continues the run"
                    )
                progress(len(mine) - len(left) + start + len(records))
    return Summary(len(cases), len(finished(folder)), failures(folder))


class _Writer:
    """Asks a subject for the outputs of some cases, and writes them under their names."""

    def __init__(
        self, adapter: Adapter, subject: Subject, folder: Path, seed: int, prompts: Path
    ) -> None:
        self.adapter, self.subject, self.seed, self.prompts = adapter, subject, seed, prompts
        self.images = folder / IMAGES

    def take(self, cases: Sequence[Case]) -> list[Record]:
        """The records of some cases; those that fail together are tried again one by one."""
        started = time.monotonic()
        try:
            outputs = self._outputs(cases)
        except Cancelled:
            raise
        except NeounifyError as error:
            if len(cases) > 1 and not isinstance(error, NoAnswer):
                return [record for case in cases for record in self.take([case])]
            return [_failure(case, error) for case in cases]
        seconds = round((time.monotonic() - started) / len(cases), 3)
        return [self._record(*pair, seconds) for pair in zip(cases, outputs, strict=True)]

    def _record(self, case: Case, outputs: list[Any], seconds: float) -> Record:
        """The record of a case whose outputs are saved, or of one that failed."""
        for output in outputs:
            if isinstance(output, NeounifyError):
                return _failure(case, output)
        try:
            saved = self._save(case, outputs)
        except NeounifyError as error:
            return _failure(case, error)
        return {"id": case.id, "seeds": self._seeds(case), "seconds": seconds, **saved}

    def _seeds(self, case: Case) -> list[int]:
        return [sample_seed(self.seed, case.id, sample) for sample in range(case.samples)]

    def _outputs(self, cases: Sequence[Case]) -> list[list[Any]]:
        calls: dict[Task, Callable[[Sequence[Job]], Sequence[Any]]] = {
            "image": self.subject.images,
            "edit": self.subject.images,
            "story": self.subject.stories,
            "question": self.subject.answers,
        }
        jobs = [
            Job(prompt=case.prompt, seed=seed, images=images)
            for case in cases
            for images in [input_images(case, self.prompts)]
            for seed in self._seeds(case)
        ]
        outputs = iter(calls[self.adapter.task](jobs))
        return [[next(outputs) for _ in range(case.samples)] for case in cases]

    def _save(self, case: Case, outputs: list[Any]) -> Record:
        if self.adapter.task == "question":
            return {"files": [], "answers": outputs}
        if self.adapter.document:
            files = self._save_document(case, outputs[0])
        elif self.adapter.grid:
            files = {case.files[0]: grid(outputs)}
        else:
            files = dict(zip(case.files, outputs, strict=True))
        for name, image in files.items():
            self._write(name, image)
        for name, text in case.sides.items():
            self._write(name, text)
        for name, source in case.copies.items():
            self._write(name, _input_image(source, self.prompts))
        return {"files": list(files)}

    def _write(self, name: str, content: Image | str) -> None:
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            write_bytes(path, content.encode())
        elif path.suffix == ".png":
            write_bytes(path, png(content))
        else:
            with atomic_file(path) as aside, aside.open("wb") as file:
                options: Record = {"lossless": True} if path.suffix == ".webp" else {"quality": 95}
                kind = PIL.Image.registered_extensions()[path.suffix]
                if max(content.size) > MAX_SIDES[kind]:
                    raise BenchError(f"{name}: {kind} has no image of {content.size} pixels")
                content.save(file, kind, **options)

    def _save_document(self, case: Case, parts: list[str | Image]) -> dict[str, Image | str]:
        """The record of an interleaved answer, and its images beside it."""
        name = case.files[0]
        files: dict[str, Image | str] = {}
        steps: list[Record] = []
        for part in parts:
            if isinstance(part, str):
                steps.append({"text": part.strip(), "image": None})
                continue
            if not steps or steps[-1]["image"] is not None:
                steps.append({"text": "", "image": None})
            image = f"{name.removesuffix('.json')}-o-{len(files)}.jpg"
            steps[-1]["image"] = image.rpartition("/")[2]
            files[image] = part
        record = {
            name: v for name, v in case.record.items() if name not in {*READ_BY_US, *OF_STORIES}
        }
        conversations = [case.record["conversations"][0], {"output": steps}]
        document = json.dumps(
            record | {"conversations": conversations}, ensure_ascii=False, indent=4
        )
        return {**files, name: document}


def _failure(case: Case, error: NeounifyError) -> Record:
    """The record of a case that failed."""
    gone = {"unreachable": True} if isinstance(error, NoAnswer) else {}
    return {"id": case.id, "error": str(error)[:500], **gone}


def _line(record: Record) -> bytes:
    """A line of JSON; ASCII, so that no mark of Unicode ends it."""
    return json.dumps(record).encode() + b"\n"


def input_images(case: Case, folder: Path) -> tuple[Image, ...]:
    """The input images of a case, from the folder of its prompts. Raises BenchError, ImageError."""
    return tuple(_input_image(source, folder) for source in case.images)


def _input_image(source: str, folder: Path) -> Image:
    try:
        return read_image(image_bytes(source, folder))
    except ImageError as error:
        raise ImageError(f"{source[:80]}: {error}") from error


def grid(images: Sequence[Image]) -> Image:
    """A square grid of images of one size, row by row, without a border."""
    side = round(len(images) ** 0.5)
    if side * side != len(images) or len({image.size for image in images}) != 1:
        raise BenchError(f"{len(images)} images of sizes {[i.size for i in images]} make no grid")
    rows = [
        np.concatenate([np.asarray(i) for i in images[n * side :][:side]], 1) for n in range(side)
    ]
    return PIL.Image.fromarray(np.concatenate(rows))


def sample(adapter: Adapter, case: Case, folder: Path, number: int) -> Any:
    """One output of a finished case, as it is judged.

    Images are uint8 [h, w, 3], stories tuples of texts and images. Raises BenchError, ImageError.
    """
    path = folder / IMAGES / case.files[0 if adapter.grid else number]
    if adapter.document:
        return _story(path)
    pixels = _pixels(path)
    if not adapter.grid:
        return pixels
    side = round(case.samples**0.5)
    height, width = (length // side for length in pixels.shape[:2])
    row, column = divmod(number, side)
    cell = pixels[row * height :][:height, column * width :][:, :width]
    return np.ascontiguousarray(cell)


def _story(path: Path) -> tuple[Any, ...]:
    document = read_json(path, MAX_RUN_BYTES, BenchError)
    parts: list[Any] = []
    try:
        for step in document["conversations"][1]["output"]:
            parts += [step["text"]] if step["text"] else []
            parts += [_pixels(path.parent / step["image"])] if step["image"] else []
    except (LookupError, TypeError) as error:
        raise BenchError(f"{path}: not an interleaved answer: {error!r}") from error
    return tuple(parts)


def _pixels(path: Path) -> Any:
    return np.asarray(read_image(path))
