"""Rewards of other programs: a vision-language model behind OpenAI's chat route, and a command.

The prompt of a model is a text with {{prompt}}, {{category}} and {{record.FIELD}}; single braces
stay, as prompts often show JSON. It sees the input images of an edit, then the output. Its answer
is read as, in this order: a JSON object, also inside other text, whose numbers are the parts (lists
are numbered: score_1, score_2); lines "Name: number"; yes or no.

A command gets one JSON object per line on stdin: `image` and `inputs`, paths of PNG files, or
`text`, or `parts`, with `prompt`, `category` and `record`. It writes one JSON object of parts per
line to stdout, in the same order.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image

from neounify.errors import ConfigError
from neounify.files import read_text
from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_kinds import Output, Parts, png_base64
from neounify.services import BadAnswer, NoAnswer, at_once, chat_message, in_thread

CONCURRENCY = 8
"""Requests to a judge at once."""
MAX_JUDGE_PROMPT_BYTES = 2**20
MAX_VERDICT_TOKENS = 1024
_FIELD = re.compile(r"\{\{\s*(\w+)(?:\.(\w+))?\s*\}\}")
MAX_VERDICT_CHARACTERS = 20_000
MAX_COMMAND_BYTES = 2**24
"""What a command may write for a batch."""
_MARK = r"(?:[^\w\n]|_){0,20}"
_LINE = re.compile(
    rf"^{_MARK}([A-Za-z][A-Za-z &/_-]{{0,60}}?){_MARK}[:：][\W_]{{0,20}}?(-?\d+(?:\.\d+)?)\b",
    re.MULTILINE,
)
_YES = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class VlmReward:
    """A judge with OpenAI's chat route; `scale` is what 0 and 1 of a reward are for it.

    Raises NoAnswer if no request is answered; a row of another error is that error.
    """

    url: str
    model: str | None
    prompt: str
    scale: tuple[float, float]
    timeout: float
    retries: int
    key: str | None = None

    @staticmethod
    def read_prompt(path: Path) -> str:
        """The prompt in a file. Raises ConfigError, also for fields that no case has."""
        text = read_text(path, MAX_JUDGE_PROMPT_BYTES, ConfigError)
        for name, part in _FIELD.findall(text):
            if (name, bool(part)) not in (("prompt", False), ("category", False), ("record", True)):
                field = f"{name}.{part}" if part else name
                raise ConfigError(
                    f"{path}: {{{{{field}}}}} is none of {{{{prompt}}}}, {{{{category}}}} and "
                    "{{record.FIELD}}"
                )
        return text

    def __call__(self, outputs: Sequence[Output], cases: Sequence[PromptCase]) -> list[Any]:
        pairs = list(zip(outputs, cases, strict=True))
        rows = at_once(lambda pair: self._row(*pair), pairs, CONCURRENCY)
        silent = [row for row in rows if isinstance(row, NoAnswer)]
        if silent and len(silent) == len(rows):
            raise silent[0]
        return rows

    def _row(self, output: Output, case: PromptCase) -> Parts | Exception:
        try:
            return self._parts(output, case)
        except (BadAnswer, NoAnswer, LookupError, OverflowError) as error:
            return error

    def _parts(self, output: Output, case: PromptCase) -> Parts:
        shown: list[Any] = [np.asarray(image) for image in case.images]
        parts = output if isinstance(output, tuple) else (output,)
        shown += [part for part in parts if not isinstance(part, str)]
        prompt = fill_prompt(self.prompt, case)
        texts = [part for part in parts if isinstance(part, str)]
        fields: dict[str, Any] = {"temperature": 0, "max_tokens": MAX_VERDICT_TOKENS}
        message = chat_message(
            self.url,
            "\n\n".join([prompt, *texts]),
            [png_base64(image) for image in shown],
            fields | ({"model": self.model} if self.model else {}),
            timeout=self.timeout,
            retries=self.retries,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
        )
        low, high = self.scale
        numbers = read_verdict(str(message["content"]))
        # Yes and no are 1 and 0 already.
        scaled = {name: (value - low) / (high - low) for name, value in numbers.items()}
        return numbers if set(numbers) == {"yes"} else scaled


def fill_prompt(prompt: str, case: PromptCase) -> str:
    """A judge's prompt with the values of a case. LookupError for a field its record lacks."""

    def value(match: re.Match[str]) -> str:
        name, part = match.groups()
        if name != "record":
            return str(getattr(case, name))
        if part not in case.record:
            raise LookupError(f"the record has no {part!r}")
        item = case.record[part]
        return item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)

    return _FIELD.sub(value, prompt)


def read_verdict(text: str) -> dict[str, float]:
    """The numbers of a judge's answer by name. Raises BadAnswer for an answer without any."""
    text = text[:MAX_VERDICT_CHARACTERS]
    for start in [match.start() for match in re.finditer(r"\{", text)][:20]:
        try:
            document, _ = json.JSONDecoder().raw_decode(text[start:])
        except (ValueError, RecursionError):
            continue
        if numbers := _numbers(document):
            return numbers
    if lines := _LINE.findall(text):
        return {re.sub(r"\W+", "_", name.strip().lower()): float(value) for name, value in lines}
    if match := _YES.match(text):
        return {"yes": float(match[1].lower() == "yes")}
    raise BadAnswer(f"no number, and no yes or no, in the answer {text[:80]!r}")


def _numbers(document: Any) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for name, value in document.items() if isinstance(document, dict) else ():
        values = value if isinstance(value, list) else [value]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            names = [f"{name}_{n}" for n in range(1, len(values) + 1)]
            numbers |= zip(names if len(values) > 1 else [name], map(float, values), strict=True)
    return numbers


@dataclass(frozen=True)
class CommandReward:
    """A command that is run for each batch, without a shell; `timeout` in seconds ends it.

    Raises NoAnswer for one that cannot be run or takes too long, BadAnswer for one that fails,
    writes no JSON, or more than `MAX_COMMAND_BYTES`.
    """

    command: str
    timeout: float

    def __call__(self, outputs: Sequence[Output], cases: Sequence[PromptCase]) -> list[Parts]:
        with tempfile.TemporaryDirectory(prefix="neounify-") as name:
            folder = Path(name)
            lines = [
                json.dumps(_item(output, case, folder, number), ensure_ascii=False)
                for number, (output, case) in enumerate(zip(outputs, cases, strict=True))
            ]
            written = self._run("\n".join(lines) + "\n")
        rows = []
        for line in filter(str.strip, written.split("\n")):
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise BadAnswer(f"the command wrote no JSON: {line[:80]!r}") from error
        return rows

    def _run(self, text: str) -> str:
        try:
            process = subprocess.Popen(
                shlex.split(self.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise NoAnswer(f"{self.command[:80]!r} cannot be run: {error}") from error
        deadline = time.monotonic() + self.timeout
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said = bytearray()
        in_thread(partial(_feed, process.stdin, text.encode()))
        all_said = in_thread(partial(_keep_last, process.stderr, said))
        try:
            written = in_thread(partial(_first, process.stdout)).result(self.timeout)
            if len(written) <= MAX_COMMAND_BYTES:
                process.wait(max(0.0, deadline - time.monotonic()))
        except (FutureTimeout, subprocess.TimeoutExpired) as error:
            raise NoAnswer(f"the command takes more than {self.timeout:g} s") from error
        finally:
            with suppress(ProcessLookupError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if len(written) > MAX_COMMAND_BYTES:
            raise BadAnswer(f"the command writes more than {MAX_COMMAND_BYTES} bytes")
        if process.returncode:
            wait([all_said], 1.0)  # not for what it may have left behind
            reason = said.decode("utf-8", "replace").strip()[-300:]
            raise BadAnswer(f"the command ended with {process.returncode}: {reason}")
        return written.decode("utf-8", "replace")


def _feed(stream: IO[bytes], data: bytes) -> None:
    with suppress(OSError), stream:  # a command may end without reading
        stream.write(data)


def _first(stream: IO[bytes]) -> bytes:
    """What a command writes, up to one byte more than is allowed."""
    with stream:
        return stream.read(MAX_COMMAND_BYTES + 1)


def _keep_last(stream: IO[bytes], kept: bytearray) -> None:
    """Read all that a command says of itself, and keep the end."""
    with stream:
        while piece := os.read(stream.fileno(), 2**16):
            kept[:] = (kept + piece)[-(2**12) :]


def _item(output: Output, case: PromptCase, folder: Path, number: int) -> dict[str, Any]:
    """The line of an output; images are written to the folder."""

    def saved(image: Any, name: str) -> str:
        path = folder / f"{number}-{name}.png"
        PIL.Image.fromarray(np.asarray(image)).save(path)
        return str(path)

    item: dict[str, Any] = {
        "prompt": case.prompt,
        "category": case.category,
        "record": dict(case.record),
        "inputs": [saved(image, f"input-{n}") for n, image in enumerate(case.images)],
    }
    if isinstance(output, str):
        return item | {"text": output}
    if isinstance(output, tuple):
        parts = [
            {"text": part} if isinstance(part, str) else {"image": saved(part, f"part-{n}")}
            for n, part in enumerate(output)
        ]
        return item | {"parts": parts}
    return item | {"image": saved(output, "image")}


def judge_key(variable: str | None) -> str | None:
    """The key in an environment variable. Raises ConfigError if it is not set."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable)):
        raise ConfigError(f"the environment variable {variable} holds no key")
    return key
