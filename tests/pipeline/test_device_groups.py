"""`load(devices=[…])`: one model in several processes, which answer as one does."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import neounify
from neounify.config.presets import TINY
from neounify.engine.shared_memory import folder
from neounify.errors import CheckpointError, ConfigError, EngineDied, RequestError
from neounify.model import NeoUnify
from neounify.pipeline.results import ImagePart, TextPart
from neounify.quant.linear import QuantLinear
from neounify.text import byte_tokenizer
from support.leaving import let_it_paint


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model with four key heads, which opens images in its answers."""
    torch.manual_seed(0)
    config = TINY.replace(num_heads=8, num_kv_heads=4)
    model = NeoUnify(config).eval().requires_grad_(False)
    place = tmp_path_factory.mktemp("model") / "four"
    let_it_paint(neounify.Pipeline(model, byte_tokenizer(), system_message="Paint.")).save(place)
    return place


@pytest.fixture(scope="module")
def one(path: Path) -> neounify.Pipeline:
    return neounify.load(path, dtype="float32")


@pytest.fixture(scope="module")
def two(path: Path) -> Iterator[neounify.Pipeline]:
    pipe = neounify.load(path, dtype="float32", devices=["cpu", "cpu"])
    assert pipe.devices is not None
    yield pipe
    pipe.devices.close()


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


Answers = tuple[list[str], list[torch.Tensor]]


def answers(pipe: neounify.Pipeline) -> Answers:
    """Texts and pixels of every task."""
    small: dict[str, Any] = {"width": 64, "height": 64, "steps": 3}
    texts = [pipe.chat("Hello", max_new_tokens=9, temperature=1.0, seed=3).text]
    texts.append(pipe.chat("What?", [picture()], max_new_tokens=5).text)
    images = pipe.generate(
        ["a boat", "a cat"], guidance=3.0, think=True, max_think_tokens=6, **small
    )
    pixels = list(images.pixels)
    pixels += pipe.edit("red", [picture()], guidance=2.0, image_guidance=1.5, **small).pixels
    for part in pipe.interleave("A story", max_images=2, max_new_tokens=8, seed=1, **small):
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, ImagePart):
            pixels.append(part.pixels)
    return texts, pixels


@pytest.fixture(scope="module")
def expected(one: neounify.Pipeline) -> Answers:
    return answers(one)


def same(actual: neounify.Pipeline, expected: Answers) -> None:
    texts, pixels = answers(actual)
    other_texts, other_pixels = expected
    assert texts == other_texts
    assert len(pixels) == len(other_pixels) >= 4
    for a, b in zip(pixels, other_pixels, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_two_devices_answer_as_one(expected: Answers, two: neounify.Pipeline) -> None:
    same(two, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_starts")
@pytest.mark.parametrize("sequence", [1, 2, 4])
def test_four_devices_answer_as_one(expected: Answers, path: Path, sequence: int) -> None:
    four = neounify.load(path, dtype="float32", devices=["cpu"] * 4, sequence_parallel=sequence)
    same(four, expected)
    assert four.devices is not None
    four.devices.close()


@pytest.mark.usefixtures("quick_starts")
@pytest.mark.parametrize(
    "preset", ["w4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("int8-all", "fp8"))]
)
def test_quantised_weights_answer_as_on_one_device(path: Path, preset: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "quantise": preset, "backend": "reference"}
    pipe = neounify.load(path, devices=["cpu", "cpu"], **options)
    assert isinstance(pipe.model.get_submodule("layers.0.und.out.o_proj"), QuantLinear)
    same(pipe, answers(neounify.load(path, **options)))


def test_calls_of_several_threads_do_not_meet(
    one: neounify.Pipeline, two: neounify.Pipeline
) -> None:
    results: dict[int, str] = {}

    def chat(seed: int) -> None:
        results[seed] = two.chat("Hi", max_new_tokens=12, temperature=1.0, seed=seed).text

    threads = [threading.Thread(target=chat, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, text in results.items():
        assert text == one.chat("Hi", max_new_tokens=12, temperature=1.0, seed=seed).text


def test_a_killed_process_fails_the_call_and_is_started_again(
    one: neounify.Pipeline, two: neounify.Pipeline
) -> None:
    assert two.devices is not None
    (pid,) = two.devices.pids
    timer = threading.Timer(1.0, os.kill, (pid, signal.SIGKILL))
    timer.start()
    with pytest.raises(EngineDied, match="a process of the devices cpu, cpu ended, or failed"):
        two.generate("a boat", width=64, height=64, steps=1000)
    timer.join()
    again = two.generate("a boat", width=64, height=64, steps=3).pixels
    assert two.devices.pids != [pid]
    expected = one.generate("a boat", width=64, height=64, steps=3).pixels
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


def test_a_call_that_is_cancelled_leaves_the_next_ones_alone(
    one: neounify.Pipeline, two: neounify.Pipeline
) -> None:
    stop = threading.Event()
    timer = threading.Timer(0.5, stop.set)
    timer.start()
    with pytest.raises(neounify.NeounifyError, match="cancelled"):
        two.generate("a boat", width=64, height=64, steps=1000, cancel=stop)
    timer.join()
    assert two.chat("Hi", max_new_tokens=4).text == one.chat("Hi", max_new_tokens=4).text


def test_what_does_not_fit_is_refused_before_anything_is_started(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"understanding on 3 devices: the model's 4 key heads"):
        neounify.load(path, devices=["cpu"] * 3)
    with pytest.raises(ConfigError, match=r"sequence parallel 3 on 2 devices .*so 1, 2"):
        neounify.load(path, devices=["cpu", "cpu"], sequence_parallel=3)
    with pytest.raises(ConfigError, match=r"compile and memory='stream': for one device, got 2"):
        neounify.load(path, devices=["cpu", "cpu"], compile=True, memory="stream")


def test_bad_lists_of_devices_are_refused_before_anything_is_started(path: Path) -> None:
    wrong: Any
    for wrong in ("cpu,cpu", "cpu", [torch.device("cpu")] * 2):
        with pytest.raises(ConfigError, match=r"must be a list of names, as \['cuda:0'"):
            neounify.load(path, devices=wrong)
    for name in ("nothing", "cpu:x", "meta", "cuda:64", ""):
        for devices in (["cpu", name], [name, "cpu"]):
            with pytest.raises(RequestError, match=f"device '{name}' cannot be used here"):
                neounify.load(path, devices=devices)
    with pytest.raises(ConfigError, match=r"sequence parallel 2 on 1 devices"):
        neounify.load(path, sequence_parallel=2)


def test_a_load_that_fails_leaves_nothing(path: Path, tmp_path: Path) -> None:
    before = set(folder().glob("psm_neounify_*.lock"))
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be read"):
        neounify.load(path, devices=["cpu", "cpu"], lora=tmp_path / "none.safetensors")
    assert not locked_here(before)


def locked_here(before: set[Path]) -> list[Path]:
    """New locks of shared memory that this process has open, unlike those of other tests."""
    fresh = set(folder().glob("psm_neounify_*.lock")) - before
    opened = {os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()}
    return [lock for lock in fresh if str(lock) in opened]


def test_an_answer_that_is_not_read_leaves_no_engines(two: neounify.Pipeline) -> None:
    assert two.devices is not None
    size: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
    two.interleave("A story", max_new_tokens=4, **size)
    begun = two.interleave("A story", max_new_tokens=4, **size)
    next(begun)
    assert len(two.devices._open) == 1
    del begun
    assert not two.devices._open


def test_an_error_of_one_process_names_it(two: neounify.Pipeline) -> None:
    """Here the second finds no memory."""
    assert two.devices is not None
    two.chat("Hi", max_new_tokens=2)
    resource.prlimit(two.devices.pids[0], resource.RLIMIT_AS, (2**20, 2**20))
    with pytest.raises(EngineDied, match=r"worked on the call: .*rank 1.*(alloc|Memory)"):
        two.generate("a boat", width=1024, height=1024, steps=2)
    two.chat("Hi", max_new_tokens=2)


INTERRUPTED = """
import os, signal, sys
import neounify
pipe = neounify.load(sys.argv[1], dtype="float32", devices=["cpu", "cpu"])
(pid,) = pipe.devices.pids
if sys.argv[2] == "stopped":
    os.kill(pid, signal.SIGSTOP)
print(pid, pipe.devices._space.prefix, flush=True)
pipe.generate("a boat", width=64, height=64, steps=1000)
"""


@pytest.mark.parametrize(
    ("state", "number"),
    [
        pytest.param("runs", signal.SIGINT, marks=pytest.mark.slow),
        ("stopped", signal.SIGINT),
        ("runs", signal.SIGKILL),
    ],
)
def test_a_program_that_is_ended_in_a_call_leaves_nothing(
    path: Path, state: str, number: signal.Signals
) -> None:
    """By Ctrl-C, which is heard while it waits for another process too, or killed."""
    command = [sys.executable, "-c", INTERRUPTED, str(path), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
        assert program.stdout is not None
        pid, prefix = program.stdout.readline().decode().split()
        time.sleep(0.5)
        program.send_signal(number)
        assert program.wait(60) == -number
    end = time.monotonic() + 20
    while (Path("/proc") / pid).exists() and time.monotonic() < end:
        if (Path("/proc") / pid / "stat").read_text().split()[2] == "Z":
            break  # it has ended
        time.sleep(0.1)
    assert time.monotonic() < end
    assert not list(folder().glob(f"{prefix}*"))


def test_a_share_of_the_weights_is_not_saved(two: neounify.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="several devices cannot be saved"):
        two.save(tmp_path / "new")


def test_nothing_is_left_when_the_devices_are_closed(path: Path) -> None:
    pipe = neounify.load(path, dtype="float32", devices=["cpu", "cpu"])
    assert pipe.devices is not None
    names = f"{pipe.devices._space.prefix}*"  # other tests have pieces at the same time
    pipe.generate("a boat", width=256, height=256, steps=2)
    assert list(folder().glob(names))
    (pid,) = pipe.devices.pids
    pipe.devices.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not list(folder().glob(names))
    with pytest.raises(EngineDied, match="the devices of the model are closed; load it again"):
        pipe.chat("Hi")


def test_the_processes_end_with_the_model(path: Path) -> None:
    pipes = [neounify.load(path, dtype="float32", devices=["cpu", "cpu"]) for _ in range(2)]
    texts = [pipe.chat("Hi", max_new_tokens=3).text for pipe in pipes]
    assert texts[0] == texts[1]
    assert pipes[0].devices is not None
    names = f"{pipes[0].devices._space.prefix}*"
    (pid,) = pipes[0].devices.pids
    del pipes[0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not list(folder().glob(names))
    assert pipes[0].chat("Hi", max_new_tokens=3).text == texts[0]
