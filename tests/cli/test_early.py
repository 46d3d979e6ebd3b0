"""Errors that need no model are reported before it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neounify.bundled import bundled_model
from neounify.cli.chat import asks_about_image
from neounify.files import is_empty, locked_folder

Run = Callable[..., Any]
RECIPES = Path(__file__).parents[2] / "recipes"
BUNDLED = ("--model", str(bundled_model()))


CORES = f"100000: this machine has {os.cpu_count()} core"
EDIT = ("edit", "bluer", "--image", "image.png")
BAD: list[tuple[tuple[str, ...], str]] = [
    (("generate", ""), "the prompt is empty"),
    (("generate", "a", "  "), "the prompt is empty"),
    (("generate", "a <image> circle"), "1 <image> marks for 0 images"),
    (("generate", "a", "--lora", "nope"), "--lora nope: no such file"),
    (("generate", "a", "--lora", "text.txt"), "text.txt"),
    (("generate", "a", "--lora", "empty"), "--lora empty: the folder holds no"),
    (("generate", "a", "--device", "toaster"), "toaster"),
    (("generate", "a", "--device", "cuda:77"), "cuda:77"),
    (("generate", "a", "--dtype", "int3"), "int3"),
    (("generate", "a", "--memory", "some"), "all, stream"),
    (("generate", "a", "--attention", "flush"), "'flush' is unknown; known are auto, sdpa, blocks"),
    (("generate", "a", "--size", "4096x4096"), "16,384 tokens, this model's context holds 8,192"),
    (("edit", "bluer", "--image", "image.png", "--size", "4096x4096"), "16,384 tokens"),
    (("story", "a", "--size", "4096x4096"), "16,384 tokens"),
    (("generate", "a", "--seed", str(2**64)), "seed"),
    (("generate", "a", "--count", "65"), "images_per_prompt"),
    (("generate", "a", "--think", "--max-think-tokens", "0"), "max_think_tokens"),
    (("generate", "a", "--guidance", "nan"), "guidance"),
    (("generate", "a", "--output", "text.txt/deeper"), "text.txt/deeper"),
    (("generate", "a", "--threads", "100000"), CORES),
    (("generate", "--input", "empty"), "--input empty: not a file, but a folder"),
    (("generate", "--input", "nope"), "--input nope: no such file"),
    (("edit", "bluer", "--image", "nope.png"), "nope.png"),
    ((*EDIT, "--image-guidance", "nan"), "guidance"),
    (("edit", "<image> <image>", "--image", "image.png"), "2 <image> marks for 1 images"),
    (("chat", ""), "the question is empty"),
    (("chat", "the <image> circle"), "1 <image> marks for 0 images"),
    (("chat", "a", "--image", "nope.png"), "nope.png"),
    (("chat", "a", "--temperature", "-1"), "temperature"),
    (("chat", "a", "--max-new-tokens", "0"), "max_new_tokens"),
    (("chat", "--top-p", "7"), "top_p"),
    (("chat", "--min-p", "7"), "min_p"),
    (("chat", "a", "--stop", ""), "stop must be at most 16 non-empty strings"),
    (("chat", "--stop", ""), "stop must be at most 16 non-empty strings"),
    (("chat", "a", "--threads", "100000"), CORES),
    (("chat", "--threads", "100000"), CORES),
    (("chat", "--input", "empty"), "--input empty: not a file, but a folder"),
    (("story", ""), "the prompt is empty"),
    (("story", "a", "--max-images", "101"), "max_images"),
    (("story", "a", "--max-new-tokens", "0"), "max_new_tokens"),
    (("story", "a", "--top-p", "7"), "top_p"),
    (("story", "a", "--min-p", "7"), "min_p"),
    (("story", "a", "--output", "text.txt/deeper"), "text.txt"),
    (("eval", "--tasks", "paint,dance"), "dance"),
    (("eval", "--tasks", ","), "tasks"),
    (("eval", "--steps", "0"), "steps"),
    (("eval", "--threads", "100000"), CORES),
    (("train", "recipe.toml", "--threads", "100000"), CORES),
    (("eval", "--output", "text.txt/deeper"), "text.txt"),
    (("eval", "--tasks", "dance", "--output", "full"), "dance"),
    (("eval", "--output", "full"), "full is not empty"),
    (("parity", *BUNDLED[1:], *BUNDLED[1:], "--dtype", "int3", "-o", "full"), "int3"),
    (("parity", *BUNDLED[1:], *BUNDLED[1:], "--device", "toaster", "-o", "full"), "toaster"),
    (("parity", *BUNDLED[1:], *BUNDLED[1:], "--backend", "fast", "-o", "full"), "'fast'"),
    (("parity", *BUNDLED[1:], *BUNDLED[1:], "-o", "full"), "full is not empty"),
    (("quantise", *BUNDLED[1:], "-o", "out", "--dtype", "int3"), "int3"),
    (("quantise", *BUNDLED[1:], "-o", "out", "--device", "toaster"), "toaster"),
    (("quantise", *BUNDLED[1:], "-o", "out", "--backend", "fast"), "'fast'"),
    (
        ("quantise", *BUNDLED[1:], "-o", "out", "--to", "f16", "--backend", "torch"),
        "backend 'torch' is one of quantised weights, and f16 makes none",
    ),
    (("generate", "a", "--backend", "torch"), "backend 'torch' is one of quantised weights, and"),
    (("serve", "--backend", "torch"), "has none: leave it out, or quantise the weights"),
    (("serve", "--device", "toaster"), "toaster"),
    (("serve", "--mode", "separate", "--generation-device", "toaster"), "toaster"),
    (("serve", "--lora", "nope"), "--lora nope: no such file"),
    (("serve", "--dtype", "int3"), "int3"),
    (("serve", "--threads", "100000"), f"--threads {CORES}"),
    (
        ("serve", "--mode", "separate", "--generation-threads", "100000"),
        f"--generation-threads {CORES}",
    ),
]


@pytest.mark.usefixtures("no_loading", "image_file")
@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_refused_before_loading(run: Run, arguments: tuple[str, ...], words: str) -> None:
    Path("text.txt").write_text("text", encoding="utf-8")
    Path("empty").mkdir()
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(Path().rglob("*"))
    ran = run(*arguments)
    assert ran.code in (1, 2)
    assert ran.err.startswith("error: ")
    assert words in ran.err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("no_loading")
def test_the_folder_of_a_run_is_no_lora_but_holds_one(run: Run) -> None:
    adapter = Path("run/adapter/adapter_model.safetensors")
    adapter.parent.mkdir(parents=True)
    adapter.touch()
    ran = run("generate", "a", "--lora", "run")
    assert ran.code == 1
    assert f"the folder holds no {adapter.name}; {adapter.parent} does" in ran.err


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("command", "lines", "words"),
    [
        ("generate", ["", "  "], "it has no lines"),
        ("generate", ["not json", '{"prompt": ""}'], "line 1: the line is not JSON"),
        ("generate", ['{"prompt": "a", "steps": 0}'], "line 1: steps"),
        ("generate", ['{"prompt": "a", "size": "63x63"}'], "line 1: size 63x63"),
        ("edit", ['{"prompt": "a"}'], "line 1: edit needs at least one image"),
        ("edit", ['{"prompt": "a", "images": ["nope.png"]}'], "nope.png: no such file"),
        ("chat", ['{"prompt": "an <image>"}'], "line 1: the text has 1 <image> marks"),
        ("chat", ["{}"] * 5, "and 2 more"),
    ],
)
def test_a_file_without_one_usable_line(
    run: Run, command: str, lines: list[str], words: str
) -> None:
    Path("jobs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    ran = run(command, "--input", "jobs.jsonl")
    assert ran.code == 1
    assert ran.err.startswith("error: --input jobs.jsonl: no line can be processed")
    assert words in ran.err


def test_a_batch_that_is_done_stays_done(run: Run, image_file: Path) -> None:
    Path("jobs.jsonl").write_text('{"prompt": "a", "images": ["image.png"]}', encoding="utf-8")
    first = ("edit", "--input", "jobs.jsonl", "--size", "64x32", "--steps", "1")
    assert run(*first).code == 0
    image_file.unlink()
    ran = run(*first)
    assert ran.code == 0
    assert "1 done in an earlier run" in ran.out


@pytest.mark.parametrize("size", ["160x160", "160x64"])
def test_a_size_never_trained_is_a_line_on_stderr(run_bare: Run, size: str) -> None:
    arguments = ("generate", "a star", "--steps", 1)
    words = f"warning: size {size}: the model was trained at 64x64, 96x96"
    ran = run_bare(*arguments, "--size", size)
    assert ran.code == 0
    assert words in ran.err
    assert run_bare(*arguments, "--size", size, "-q").err == ""
    assert "warning" not in run_bare(*arguments).err
    Path("jobs.jsonl").write_text(json.dumps({"prompt": "a star"}), encoding="utf-8")
    ran = run_bare("generate", "--input", "jobs.jsonl", "--steps", 1, "--size", size)
    assert words in ran.err
    ran = run_bare("story", "a star", "--steps", 1, "--size", size, "--max-new-tokens", 1)
    assert words in ran.err


def test_a_question_without_an_image_gets_a_hint(run_bare: Run, image_file: Path) -> None:
    question = ("chat", "What colour is the star?", "--max-new-tokens", 2)
    assert "no image is given" in run_bare(*question).err
    assert run_bare(*question).code == 0
    assert "no image" not in run_bare(*question, "--image", image_file).err
    assert "no image" not in run_bare(*question, "-q").err


def test_the_hint_comes_once_in_a_conversation(run_bare: Run) -> None:
    ran = run_bare("chat", "--max-new-tokens", 2, input="What colour?\nAnd now?\n")
    assert ran.err.count("no image is given") == 1


@pytest.mark.parametrize(
    ("question", "hint"),
    [
        ("What is in the picture?", True),
        ("Describe this image.", True),
        ("图里有什么?", True),
        ("What is the capital of France?", False),
        ("Write a sentence about imagery.", False),
    ],
)
def test_other_models_get_it_only_where_words_say_so(toy: Path, question: str, hint: bool) -> None:
    assert asks_about_image(question, toy) is hint


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--input", "jobs.jsonl", "--output", "here"),
        ("chat", "--input", "jobs.jsonl", "--output", "here"),
        ("eval", "--output", "here"),
        ("train", str(RECIPES / "scenes.toml"), "--out", "here"),
    ],
    ids=lambda command: command[0],
)
def test_a_folder_that_another_process_writes_to(run: Run, command: tuple[str, ...]) -> None:
    Path("jobs.jsonl").write_text('{"prompt": "a"}', encoding="utf-8")
    with locked_folder(Path("here")):
        ran = run(*command)
        assert ran.code == 1
        assert f"here is in use by another process (pid {os.getpid()})" in ran.err
        assert is_empty(Path("here"))
