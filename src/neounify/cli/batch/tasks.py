"""What one line of a batch means for each command."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from neounify.cli.batch.lines import Line
from neounify.cli.batch.results import job_hash
from neounify.cli.display import Display
from neounify.cli.files import slug
from neounify.cli.options import ChatOptions, GenerateOptions
from neounify.cli.painting import Order, paint, settings_record
from neounify.cli.record import save_picture, sheet_path
from neounify.cli.session import Session

_LATER_OPTIONS = ("min_p",)
"""Options that came after batches were first recorded: not part of a job unless they are set."""

Outcome = dict[str, Any]
"""What the results file says of a line besides its number and job."""

T_contra = TypeVar("T_contra", bound=GenerateOptions | ChatOptions, contravariant=True)


class Task(Protocol[T_contra]):
    """Does lines. Lines of equal `group` may be done together."""

    def job(self, line: Line[T_contra]) -> str:
        """The hash that a later run knows the line by."""

    def group(self, line: Line[T_contra]) -> Hashable: ...

    def do(self, lines: Sequence[Line[T_contra]]) -> list[Outcome]:
        """One outcome per line; an exception says that none of them was done."""


class PaintLines:
    """`generate` and `edit`: pictures with their records into a folder."""

    def __init__(
        self, session: Session, display: Display, folder: Path, *, previews: bool, overwrite: bool
    ) -> None:
        self._session, self._display, self._folder = session, display, folder
        self._previews, self._overwrite = previews, overwrite

    def job(self, line: Line[GenerateOptions]) -> str:
        return _job_hash(line, self._session)

    def group(self, line: Line[GenerateOptions]) -> Hashable:
        # Pictures make an edit, and those are painted one by one.
        return line.number if line.paths else _settings_key(line.options)

    def do(self, lines: Sequence[Line[GenerateOptions]]) -> list[Outcome]:
        orders = [
            Order(prompt=n.prompt, options=n.options, images=n.paths, job=self.job(n))
            for n in lines
        ]
        painted = paint(self._session, orders, self._display, previews=self._previews)
        outcomes: list[Outcome] = []
        for line, pictures in zip(lines, painted, strict=True):
            files: list[str] = []
            for picture in pictures:
                wanted = self._folder / f"{_stem(line)}_{picture.record['index']}.png"
                path = save_picture(picture, wanted, overwrite=self._overwrite)
                files.append(path.name)
                if picture.sheet is not None:
                    files.append(sheet_path(path).name)
            settings = settings_record(line.options, self._session.pipe.config)
            size = pictures[0].record["size"]
            outcomes.append(
                {"files": files, "seed": line.options.seed, "size": size, "settings": settings}
            )
        return outcomes


class AnswerLines:
    """`chat`: answers into the results file."""

    def __init__(self, session: Session, display: Display) -> None:
        self._session, self._display = session, display

    def job(self, line: Line[ChatOptions]) -> str:
        return _job_hash(line, self._session)

    def group(self, line: Line[ChatOptions]) -> Hashable:
        # Lines that draw at random have seeds of their own, and a call takes one.
        return line.number if (line.options.temperature or 0) > 0 else _settings_key(line.options)

    def do(self, lines: Sequence[Line[ChatOptions]]) -> list[Outcome]:
        arguments = lines[0].options.arguments()
        with self._display.bar("answering"):
            answers = self._session.pipe.chat_batch(
                [line.prompt for line in lines], [line.paths for line in lines], **arguments
            )
        return [
            {
                "answer": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "answer_tokens": len(answer.token_ids),
                "settings": line.options.arguments(),
            }
            for line, answer in zip(lines, answers, strict=True)
        ]


def _job_hash(line: Line[Any], session: Session) -> str:
    model, keys = session.description, ("fingerprint", "dtype", "lora", "colour_profiles")
    options = dataclasses.asdict(line.options)
    for name in _LATER_OPTIONS:
        if options.get(name) is None:
            options.pop(name, None)
    return job_hash(
        {
            "id": line.id,
            "prompt": line.prompt,
            "images": line.images,
            "task": type(line.options).__name__,
            "options": options,
            "model": [model[key] for key in keys if key in model],
        }
    )


def _settings_key(options: GenerateOptions | ChatOptions) -> Hashable:
    return repr(dataclasses.replace(options, seed=0))


def _stem(line: Line[GenerateOptions]) -> str:
    name = f"{line.number:04d}-{slug(line.prompt)}" if line.id is None else slug(str(line.id))
    return f"{name}_s{line.options.seed}"
