"""Adapters: a benchmark as data, so that its prompts become cases and its images have their names.

Names of files are templates over the fields of a record, and over `index` (its position in its
file, from 0), `model` (the name of the model) and `sample` (from 0).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neounify.bench.cases import BenchError, Case, PromptFiles, Record, Task, safe_name


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A benchmark: how its prompts are read, and which files its scorer reads.

    Args:
        prompts: what is read, in words.
        read: the records of the prompts; each may carry fields added by the reader.
        id, category, file: templates; `file` is a path below the folder of images.
        prompt, images: the fields of the prompt, and of the input images: a path, or a list.
        samples: images per prompt of the published protocol.
        grid: whether a file holds all samples of a prompt, row by row in a square.
        count: prompts of the release, where its own pages state the number.
        sides: further files of a case by template, with what they hold.
        copies: templates of files that hold an image of the record, with the field of its path.
        document: whether `file` is the record with its output, as of interleaved answers.
        scorer: the command of the official scorer, with the folder of images as IMAGES.
    """

    name: str
    title: str
    task: Task
    source: str
    prompts: str
    read: Callable[[PromptFiles], Iterator[Record]]
    id: str
    category: str
    file: str
    prompt: str = "prompt"
    images: str = ""
    samples: int = 1
    grid: bool = False
    count: int | None = None
    sides: Mapping[str, Callable[[Record], str]] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    document: bool = False
    scorer: str = ""

    def cases(self, prompts: PromptFiles, model: str, samples: int | None = None) -> list[Case]:
        """The cases of some prompts.

        Raises BenchError for records that lack a field, names that leave the folder, two cases of
        one name, and numbers of samples that fill no square grid.
        """
        number = self.samples if samples is None else samples
        side = round(number**0.5)
        if number < 1 or (self.grid and side * side != number):
            wanted = "1, 4 or 9, a square grid" if self.grid else "at least 1"
            raise BenchError(f"{self.title}: samples must be {wanted}, not {number}")
        cases = [self._case(record, model, number) for record in self.read(prompts)]
        if not cases:
            raise BenchError(f"{prompts.root} holds no prompts of {self.title}")
        seen: set[str] = set()
        for case in cases:
            for name in (f"id {case.id}", *case.files, *case.sides, *case.copies):
                if name in seen:
                    raise BenchError(f"{prompts.root}: two prompts have {name}; it must be unique")
                seen.add(name)
        return cases

    def _case(self, record: Record, model: str, samples: int) -> Case:
        fields = _Fields(record, safe_name(model, "the name of the model"), self.title)
        files = [fields.fill(self.file, sample=n) for n in range(1 if self.grid else samples)]
        if len(set(files)) != len(files):  # the scorer reads one image of each prompt
            raise BenchError(f"{self.title} takes 1 image of each prompt, not {samples}")
        prompt = record.get(self.prompt)
        if not isinstance(prompt, str) or not prompt.strip():
            raise BenchError(f"{fields.place} has no text {self.prompt!r}")
        sides = {fields.fill(name): make(record) for name, make in self.sides.items()}
        images = fields.paths(self.images) if self.images else ()
        if len(images) < (self.task == "edit"):
            raise BenchError(f"{fields.place} has no input image {self.images!r}")
        return Case(
            id=fields.fill(self.id),
            category=fields.fill(self.category),
            prompt=prompt,
            record=record,
            files=tuple(files),
            samples=samples,
            images=images,
            sides=sides,
            copies={
                fields.fill(file): path
                for file, name in self.copies.items()
                for path in fields.paths(name)[:1]
            },
        )


class _Fields:
    """Values for templates of names: the fields of a record, checked where they are used."""

    def __init__(self, record: Record, model: str, title: str) -> None:
        self.record, self.model = record, model
        self.place = f"{title}: record {record.get('index', '?')} ({json.dumps(record)[:80]})"

    def fill(self, template: str, sample: int = 0) -> str:
        values = _Checked({**self.record, "model": self.model, "sample": sample}, self.place)
        try:
            return template.format_map(values)
        except KeyError as error:
            raise BenchError(f"{self.place} has no {error.args[0]!r}") from None
        except ValueError as error:
            raise BenchError(f"{self.place} does not fit {template!r}: {error}") from error

    def paths(self, name: str) -> tuple[str, ...]:
        """The paths of images in a field: one, or a list; none if it is missing or empty."""
        value = self.record.get(name) or []
        paths = value if isinstance(value, list) else [value]
        if not all(isinstance(path, str) for path in paths):
            raise BenchError(f"{self.place}: {name!r} must be a path or a list of paths")
        return tuple(paths)


class _Checked(dict[str, Any]):
    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place

    def __getitem__(self, key: str) -> Any:
        return safe_name(super().__getitem__(key), f"{self.place}: {key}")


def each_file(
    pattern: str, parse: Callable[[str, Path], Iterator[Record]]
) -> Callable[[PromptFiles], Iterator[Record]]:
    """A reader of one file, or of all files of a folder that fit a pattern.

    Records get `index`, their position in their file, and `stem`, the file's name without ending.
    """

    def read(prompts: PromptFiles) -> Iterator[Record]:
        for path in prompts.named(pattern):
            for index, record in enumerate(parse(prompts.text(path), path)):
                yield {"index": index, "stem": path.stem, **record}

    return read
