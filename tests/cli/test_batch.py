"""JSONL batches: bad lines named, good ones done, interrupted ones resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import neounify
from neounify.cli.batch import Results, job_hash
from neounify.cli.lines import (
    CONDITION,
    IMAGES,
    MAX_LINE_BYTES,
    VIDEOS,
    BadLine,
    Line,
    count_lines,
    read_lines,
)
from neounify.cli.options import ChatOptions, ClipOptions, EditOptions, GenerateOptions
from neounify.cli.videos import QuestionOptions
from neounify.pipeline import Pipeline
from support.clips import clip_bytes, numbered

SMALL = ("--size", "64x32", "--steps", "2", "--device", "cpu")
GENERATE = ("generate", "--input", "jobs.jsonl", "--output", "out", *SMALL)


def write(*lines: object) -> Path:
    path = Path("jobs.jsonl")
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def records() -> list[dict[str, Any]]:
    text = Path("out/results.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def pngs() -> list[str]:
    return sorted(path.name for path in Path("out").glob("*.png"))


def test_good_lines_are_done_and_bad_ones_named(run: Callable[..., Any], toy: Path) -> None:
    write(
        {"prompt": "a boat"},
        {"prompt": "a cat", "id": "cat", "seed": 7},
        "not json",
        "",
        {"prompt": "two", "count": 2, "size": [32, 32]},
        {"prompt": "odd", "width": 33, "height": 64},
        {"prompt": "", "id": "empty"},
        {"promt": "typo"},
    )
    ran = run(*GENERATE)
    assert ran.code == 1
    for words in ("line 3: ", "line 6: ", "nearest: 32x64", "line 7 (id empty): ", "'promt'"):
        assert words in ran.err
    assert "3 done, 4 failed" in ran.out
    assert pngs() == [
        "0001-a-boat_s0_1.png",
        "0005-two_s4_1.png",
        "0005-two_s4_2.png",
        "cat_s7_1.png",
    ]
    status = {r["line"]: r["status"] for r in records()}
    assert [n for n, s in status.items() if s == "done"] == [1, 2, 5]
    assert sorted(n for n, s in status.items() if s == "failed") == [3, 6, 7, 8]
    want = neounify.load(toy, device="cpu").generate("a cat", width=64, height=32, steps=2, seed=7)
    with Image.open("out/cat_s7_1.png") as image:
        got = np.array(image).astype(int)
    assert np.abs(got - np.array(want.images[0])).max() <= 1


def test_a_second_run_does_only_what_is_left(run: Callable[..., Any]) -> None:
    write({"prompt": "a boat"}, {"prompt": "odd", "size": "33x33"}, {"prompt": "a boat"})
    run(*GENERATE)
    first = pngs()
    assert len(first) == 2
    write({"prompt": "a boat"}, {"prompt": "odd", "size": "32x32"}, {"prompt": "a boat"})
    ran = run(*GENERATE, "--json")
    assert ran.code == 0
    assert (ran.json["done"], ran.json["skipped"], ran.json["failed"]) == (1, 2, [])
    assert pngs() == sorted([*first, "0002-odd_s1_1.png"])


def test_other_settings_are_another_job(run: Callable[..., Any]) -> None:
    write({"prompt": "a boat"})
    run(*GENERATE)
    assert run(*GENERATE, "--guidance", 2, "--json").json["done"] == 1
    assert run(*GENERATE, "--guidance", 2, "--json").json["skipped"] == 1
    assert pngs() == ["0001-a-boat_s0_1-2.png", "0001-a-boat_s0_1.png"]


def test_equal_lines_are_as_many_jobs(run: Callable[..., Any]) -> None:
    write(*[{"prompt": "a boat", "seed": 1}] * 2)
    assert run(*GENERATE, "--json").json["done"] == 2
    assert run(*GENERATE, "--json").json["skipped"] == 2
    assert len(records()) == 2


def test_a_torn_results_file_is_mended(run: Callable[..., Any]) -> None:
    write({"prompt": "a boat"}, {"prompt": "a cat"})
    run(*GENERATE)
    results, whole = Path("out/results.jsonl"), pngs()
    data = results.read_bytes()
    results.write_bytes(data[:-40])
    Path("out/0002-a-cat_s1_1.png").unlink()  # killed between the record and the image
    ran = run(*GENERATE, "--json")
    assert (ran.json["done"], ran.json["skipped"]) == (1, 1)
    assert pngs() == whole
    assert [r["line"] for r in records()] == [1, 2]


def test_a_lost_image_is_generated_again(run: Callable[..., Any]) -> None:
    write({"prompt": "a boat"})
    run(*GENERATE)
    Path("out/0001-a-boat_s0_1.png").unlink()
    assert run(*GENERATE, "--json").json["done"] == 1
    assert pngs() == ["0001-a-boat_s0_1.png"]


def test_one_line_does_not_take_its_batch_along(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = Pipeline.generate

    def generate(self: Pipeline, prompt: Any, **options: Any) -> Any:
        calls.append(len(prompt))
        if "bad" in prompt:
            raise ZeroDivisionError("inside")
        return real(self, prompt, **options)

    monkeypatch.setattr(Pipeline, "generate", generate)
    write(*({"prompt": p} for p in ("a", "b", "bad", "c", "d")))
    ran = run(*GENERATE, "--batch-size", 4)
    assert ran.code == 1
    assert calls == [4, 1, 1, 1, 1, 1]
    assert "line 3: unexpected error: ZeroDivisionError: inside" in ran.err
    assert sorted(r["line"] for r in records() if r["status"] == "done") == [1, 2, 4, 5]


def test_a_full_disk_ends_the_batch(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: object, **__: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("neounify.cli.images.save_image", save)
    write({"prompt": "a"})
    ran = run(*GENERATE)
    assert ran.code == 1
    assert "No space left" in ran.err
    assert not Path("out/results.jsonl").exists()


def test_edits_read_images_beside_the_file(run: Callable[..., Any], image_file: Path) -> None:
    Path("bad.png").write_bytes(b"no image")
    write(
        {"prompt": "bluer", "images": ["image.png"]},
        {"prompt": "bluer", "images": ["bad.png"]},
        {"prompt": "bluer", "images": ["nowhere.png"]},
        {"prompt": "bluer"},
    )
    ran = run("edit", "--input", "jobs.jsonl", "--output", "out", *SMALL)
    assert ran.code == 1
    lines = ran.err.splitlines()
    assert lines[0] == "3 lines of jobs.jsonl cannot be processed, the first is line 2"
    named = [line.split(":")[0] for line in lines if line.startswith("line")]
    assert named == ["line 2", "line 3", "line 4"]
    assert pngs() == ["0001-bluer_s0_1.png"]


def test_answers_go_into_the_results(run: Callable[..., Any], toy: Path, image_file: Path) -> None:
    write(
        {"prompt": "what?", "images": ["image.png"]},
        {"prompt": "who are you?", "max_new_tokens": 3},
        {"prompt": "draw", "temperature": 1, "stop": "x"},
        {"prompt": "<image>"},
    )
    arguments = ("chat", "--input", "jobs.jsonl", "--output", "out", "--max-new-tokens", 5)
    ran = run(*arguments, "--device", "cpu", "--seed", 40)
    assert ran.code == 1
    assert "line 4: " in ran.err
    answers = {r["line"]: r.get("answer") for r in records()}
    pipe = neounify.load(toy, device="cpu")
    assert answers[1] == pipe.chat("what?", image_file, max_new_tokens=5).text
    assert answers[2] == pipe.chat("who are you?", max_new_tokens=3).text
    drawn = pipe.chat("draw", max_new_tokens=5, temperature=1.0, seed=42, stop="x")
    assert answers[3] == drawn.text
    assert run(*arguments, "--device", "cpu", "--seed", 40, "--json").json["skipped"] == 3


def test_a_batch_can_be_stopped_and_resumed(run: Callable[..., Any], toy: Path) -> None:
    slow = {"prompt": "boat 1", "steps": 1000, "width": 768, "height": 768}
    write({"prompt": "boat 0", "steps": 1}, slow)
    command = [sys.executable, "-m", "neounify", *GENERATE, "--model", str(toy)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not Path("out/results.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.decode().splitlines()[-1] == "interrupted; run the same command again to resume"
    assert pngs() == ["0001-boat-0_s0_1.png"]
    assert not list(Path("out").glob(".*"))
    write({"prompt": "boat 0", "steps": 1}, {"prompt": "boat 1", "steps": 1})
    ran = run(*GENERATE, "--json")
    assert (ran.json["done"], ran.json["skipped"]) == (1, 1)


def test_a_batch_needs_a_file(run: Callable[..., Any]) -> None:
    ran = run(*GENERATE)
    assert ran.code == 1
    assert "jobs.jsonl: no such file" in ran.err
    assert not Path("out").exists()


def test_questions_about_clips(run: Callable[..., Any], toy: Path, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(clip_bytes(numbered(20)))
    write(
        {"prompt": "what moves?", "videos": ["clip.mp4"]},
        {"prompt": "and in <video>?", "videos": ["clip.mp4"], "fps": 2, "max_frames": 3},
        {"prompt": "hello?"},
        {"prompt": "what?", "videos": ["nowhere.mp4"]},
        {"prompt": "what?", "videos": "clip.mp4"},
        {"prompt": "<video>"},
    )
    arguments = ("chat", "--input", "jobs.jsonl", "--output", "out", "--max-new-tokens", 5)
    ran = run(*arguments, "--device", "cpu")
    assert ran.code == 1
    done = {record["line"]: record for record in records() if record["status"] == "done"}
    pipe = neounify.load(toy, device="cpu")
    wanted = [
        pipe.chat("what moves?", video=clip, max_new_tokens=5),
        pipe.chat("and in <video>?", video=clip, fps=2, max_frames=3, max_new_tokens=5),
        pipe.chat("hello?", max_new_tokens=5),
    ]
    assert [done[n]["answer"] for n in (1, 2, 3)] == [answer.text for answer in wanted]
    assert [done[n]["prompt_tokens"] for n in (1, 2, 3)] == [w.prompt_tokens for w in wanted]
    assert "nowhere.mp4: no such file" in ran.err
    assert "videos must be a list of file names, found 'clip.mp4'" in ran.err


def test_options_of_clips_leave_the_jobs_of_earlier_batches_done(tmp_path: Path) -> None:
    model: Any = SimpleNamespace(description={"fingerprint": "0"})
    text = '{"prompt": "a", "seed": 3}'
    pairs: list[tuple[Any, Any, tuple[str, ...]]] = [
        (GenerateOptions(), ClipOptions(), (CONDITION,)),
        (ChatOptions(), QuestionOptions(), (IMAGES, VIDEOS)),
    ]
    for before, now, files in pairs:
        assert job_hash(line_of(tmp_path, text, before), model) == job_hash(
            line_of(tmp_path, text, now, files), model
        )
    clip = line_of(tmp_path, text, ClipOptions(frames=8), (CONDITION,))
    assert job_hash(clip, model) != job_hash(line_of(tmp_path, text), model)
    named = line_of(tmp_path, '{"prompt": "a", "seed": 3, "condition": "x"}', None, (CONDITION,))
    assert job_hash(named, model) != job_hash(line_of(tmp_path, text), model)


# --- reading lines -------------------------------------------------------------------------------


def line_of(
    tmp_path: Path, text: str | bytes, defaults: Any = None, files: tuple[str, ...] = ()
) -> Any:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    (line,) = read_lines(path, defaults or GenerateOptions(), files)
    return line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"prompt": "\xff"}', "UTF-8"),
        ("[1]", "not a JSON object"),
        ('{"prompt": "a", "steps": 2.5}', "steps must be a whole number"),
        ('{"prompt": "a", "steps": true}', "steps must be a whole number"),
        ('{"prompt": "a", "think": 1}', "think must be true or false"),
        ('{"prompt": "a", "guidance": NaN}', "not JSON"),
        ('{"prompt": "a", "guidance": 1e400}', "guidance must be a number"),
        ('{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "not JSON"),
        ('{"prompt": "a", "norm": 3}', "norm must be a text"),
        ('{"prompt": "a", "images": ["x.png"]}', "unknown field 'images'"),
        ('{"prompt": "a", "image_guidance": 2}', "unknown field 'image_guidance'"),
        ('{"prompt": ["a"]}', "prompt must be a text"),
        ('{"prompt": "a", "id": 1.5}', "id must be"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines(tmp_path: Path, text: str | bytes, words: str) -> None:
    line = line_of(tmp_path, text)
    assert isinstance(line, BadLine)
    assert words in line.reason
    assert len(line.reason) < 400


def test_a_line_sets_what_the_command_line_sets(tmp_path: Path) -> None:
    defaults = EditOptions(size="64x64", steps=3, seed=5, guidance=2.0)
    text = '\ufeff{"prompt": "a", "width": 32, "height": 96, "guidance": 3, "images": ["x/y.png"]}'
    line = line_of(tmp_path, text, defaults, (IMAGES,))
    assert line.options == EditOptions(width=32, height=96, steps=3, seed=5, guidance=3.0)
    assert line.paths(IMAGES) == (tmp_path / "x/y.png",)
    line = line_of(tmp_path, '{"prompt": "a", "size": [96, 32], "interval": [0, 0.5]}', defaults)
    assert line.options.dimensions() == (96, 32)
    assert line.options.arguments()["guidance_interval"] == (0.0, 0.5)
    chat = line_of(tmp_path, '{"prompt": "a", "stop": "b"}', ChatOptions(stop=["c"]))
    assert chat.options.stop == ["b"]


def test_seeds_follow_the_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"prompt":"a"}\n\n{"prompt":"b"}\n{"prompt":"c","seed":1}', encoding="utf-8")
    lines = list(read_lines(path, GenerateOptions(seed=10)))
    assert [n.options.seed for n in lines if isinstance(n, Line)] == [10, 12, 1]
    assert count_lines(path) == 3


def test_a_line_that_is_too_long_is_skipped_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    long = b'{"prompt": "' + b"a" * (3 * MAX_LINE_BYTES) + b'"}\n'
    path.write_bytes(long + b'{"prompt": "short"}\n')
    first, second = read_lines(path, GenerateOptions())
    assert isinstance(first, BadLine)
    assert "longer than" in first.reason
    assert isinstance(second, Line)
    assert (second.number, second.prompt) == (2, "short")


def test_results_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('garbage\n[1]\n{"status": "done"}\n', encoding="utf-8")
    results = Results(tmp_path)
    assert not results.take("x")
    results.append({"status": "done", "job": "x"})
    assert path.read_text(encoding="utf-8").startswith("garbage\n")
    again = Results(tmp_path)
    assert (again.take("x"), again.take("x")) == (True, False)
