"""A disk that fills up: the error names the file, what was saved, and how to resume."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from neounify.pipeline import Pipeline, TextPart

Run = Callable[..., Any]
SMALL = ("--size", "64x32", "--steps", "1")


@pytest.fixture
def full_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets so many files be written, and no more."""
    write = Path.write_bytes

    def fill(count: int) -> None:
        left = [count]

        def write_bytes(path: Path, data: bytes) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return fill


@contextmanager
def tiny_files() -> Iterator[None]:
    """Files of this process end at 200 bytes, as on a disk that is full.

    Only around a command: the test run itself writes to files too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_of_three_images(run: Run, full_after: Callable[[int], None]) -> None:
    full_after(3)  # an image and its record, and the record of the next
    ran = run("generate", "one", "[two]", 'the "third"', *SMALL)
    assert ran.code == 1
    assert "error: outputs/two_s0_1.png could not be written: No space left on device" in ran.err
    assert "1 of 3 images are saved, outputs/one_s0_1.png last" in ran.err
    assert r'remaining prompts: "[two]" "the \"third\""' in ran.err
    assert "saved outputs/one_s0_1.png" in ran.out
    assert left_over(Path("outputs")) == ["one_s0_1.json", "one_s0_1.png"]


def test_nothing_could_be_saved(run: Run, full_after: Callable[[int], None]) -> None:
    full_after(0)
    ran = run("generate", "one", *SMALL, "-o", "x.png")
    assert ran.code == 1
    assert "x.json could not be written: No space left on device" in ran.err
    assert "No image was saved" in ran.err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_real_limit(run: Run, command: str) -> None:
    options = SMALL if command == "generate" else ("--max-new-tokens", "3")
    Path("jobs.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n', encoding="utf-8")
    with tiny_files():
        ran = run(command, "--input", "jobs.jsonl", *options)
    assert ran.code == 1
    assert "could not be written: File too large" in ran.err
    assert "run the same command again to resume" in ran.err
    assert not [name for name in left_over(Path("outputs")) if name.endswith(".saving")]


def test_a_batch_resumes_where_it_stopped(run: Run, full_after: Callable[[int], None]) -> None:
    lines = [json.dumps({"prompt": name}) for name in ("one", "two", "three")]
    Path("jobs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    command = ("generate", "--input", "jobs.jsonl", *SMALL, "--batch-size", 1)
    full_after(3)
    ran = run(*command)
    assert ran.code == 1
    assert "0002-two_s1_1.png could not be written" in ran.err
    assert "1 lines were done in this run" in ran.err
    full_after(10**6)
    ran = run(*command)
    assert "2 done, 1 done in an earlier run" in ran.out


def test_a_story(
    run: Run, full_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(self: Pipeline, *_: object, **__: object) -> Iterator[TextPart]:
        yield TextPart("Once.")

    monkeypatch.setattr(Pipeline, "interleave", tell)
    full_after(1)
    ran = run("story", "A boat", *SMALL)
    assert ran.code == 1
    assert "a-boat_s0/story.html could not be written: No space left on device" in ran.err
    assert "Earlier parts are saved in outputs/a-boat_s0" in ran.err


def test_scores_are_shown_even_if_the_report_is_lost(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_bytes(path: Path, _: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    ran = run("eval", "--tasks", "caption", "--cases", 1)
    assert ran.code == 1
    assert "report.json: No space left on device" in ran.err
    assert "caption" in ran.out


def test_models(run: Run, toy: Path) -> None:
    for command in (("toy", "mine"), ("convert", toy, "mine")):
        with tiny_files():
            ran = run(*command)
        assert ran.code == 1
        assert "mine could not be saved: " in ran.err
        assert not Path("mine").exists()


def test_a_conversation_that_cannot_be_saved_continues(
    run: Run, full_after: Callable[[int], None]
) -> None:
    full_after(0)
    ran = run("chat", "--max-new-tokens", 2, input="hello\n/save c.json\nhello\n")
    assert ran.code == 0
    assert "error: c.json could not be written: No space left on device" in ran.err
