#!/usr/bin/env python3
"""How many files of the package three ways of work enter, and how large its files are.

    .venv/bin/python scripts/count_files.py [--list] [--json]

The ways are traced in real runs of the bundled model, each once before it is counted, so that what
is imported, built and cached on first use does not count. `--list` names the files.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

from entered_files import REPORT_FOLDER, Recorder  # noqa: E402

PACKAGE = ROOT / "src" / "neounify"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 70
WAIT_SECONDS = 120


@dataclass(frozen=True)
class Way:
    """The files that one way of work enters, and how many are enough."""

    name: str
    aim: int
    files: tuple[str, ...]


# --- the ways ------------------------------------------------------------------------------------


def prompt_to_png() -> set[str]:
    """`Pipeline.generate` of a loaded model, and saving the image."""
    import neounify
    from neounify.bundled import bundled_model

    pipe = neounify.load(bundled_model(), dtype="float32")

    def work() -> None:
        with tempfile.TemporaryDirectory() as folder:
            image = pipe.generate(["a red circle"], seed=1, steps=2).images[0]
            image.save(Path(folder) / "image.png")

    return _entered(work)


def sample_to_gradient() -> set[str]:
    """A JSONL file of a text and an image sample, encoded and packed, and the loss's gradient."""
    import numpy as np
    import torch
    from PIL import Image

    import neounify
    from neounify.bundled import bundled_model
    from neounify.data.encode import Encoder
    from neounify.data.loader import LoaderConfig, load_packs
    from neounify.data.sources import JsonlSource
    from neounify.train.loss import Counts, LossConfig, loss_of

    pipe = neounify.load(bundled_model(), dtype="float32")
    model = pipe.model.train().requires_grad_(True)
    encoder = Encoder(config=model.config, tokenizer=pipe.tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path(folder) / "image.png")
        turns = [("<image>\nWhat is there?", "A circle."), ("a red circle", "<image>")]
        lines = [
            {
                "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
                "image": ["image.png"],
            }
            for q, a in turns
        ]
        file = Path(folder) / "samples.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        source = JsonlSource(file)

        def work() -> None:
            packs = load_packs(source, encoder, LoaderConfig(tokens_per_pack=512, workers=0))
            pack = next(iter(packs)).pack
            noise = torch.Generator().manual_seed(0)
            loss_of(model, pack, LossConfig(), Counts.of([pack]), noise).backward()

        return _entered(work)


def _entered(work: Callable[[], None]) -> set[str]:
    work()
    recorder = Recorder(str(PACKAGE))
    recorder.start()
    try:
        work()
    finally:
        recorder.stop()
    return recorder.files()


def http_to_engines(mode: str) -> set[str]:
    """One image asked of `neounify serve`, with its engines' processes if it has any."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(ROOT / "scripts" / "entered_files.py", folder / "sitecustomize.py")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join((name, str(ROOT / "src"))),
            REPORT_FOLDER: os.pathsep.join((name, str(PACKAGE))),
        }
        output = folder / "output.txt"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "neounify", "serve", "--port", port, "--mode", mode]
        with output.open("wb") as stream:
            server = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )
        try:
            _wait_until_ready(server, url, output)
            _post_image(url)
            _signal_all(folder, signal.SIGUSR1, "cleared")
            _post_image(url)
            reports = _signal_all(folder, signal.SIGUSR2, "entered")
            return {file for report in reports for file in report.read_text("utf-8").split()}
        finally:
            server.terminate()
            server.wait(WAIT_SECONDS)


def _wait_until_ready(server: subprocess.Popen[bytes], url: str, output: Path) -> None:
    for _ in range(WAIT_SECONDS * 10):
        with suppress(OSError):  # not listening yet, or 503
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
            return
        if server.poll() is not None:
            break
        time.sleep(0.1)
    raise RuntimeError(f"the server is not ready:\n{output.read_text('utf-8', 'replace')}")


def _post_image(url: str) -> None:
    body = {"prompt": "a red circle", "seed": 1, "steps": 2, "response_format": "b64_json"}
    request = urllib.request.Request(
        f"{url}/v1/images/generations",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
        assert json.load(answer)["data"][0]["b64_json"]


def _signal_all(folder: Path, number: signal.Signals, suffix: str) -> list[Path]:
    """Signal every traced process that is alive, and wait for the file that each then writes."""
    awaited: dict[int, Path] = {}
    for file in folder.glob("*.pid"):
        try:
            os.kill(int(file.stem), number)
        except ProcessLookupError:
            continue
        awaited[int(file.stem)] = file.with_suffix(f".{suffix}")
    for _ in range(WAIT_SECONDS * 20):
        if all(file.exists() for file in awaited.values()):
            return list(awaited.values())
        time.sleep(0.05)
    missing = [number for number, file in awaited.items() if not file.exists()]
    raise RuntimeError(f"processes {missing} did not answer {number.name}")


# --- sizes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Lengths in lines: of all files, and the files and functions above the limits."""

    files: int
    lines: int
    median: int
    long_files: dict[str, int]
    long_functions: dict[str, int]


def sizes() -> Sizes:
    """The sizes of the package's Python files."""
    lengths: dict[str, int] = {}
    functions: dict[str, int] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name, text = path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")
        lengths[name] = text.count("\n")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    functions[f"{name}: {node.name}"] = length
    return Sizes(
        len(lengths),
        sum(lengths.values()),
        round(statistics.median(lengths.values())),
        {name: n for name, n in lengths.items() if n > MAX_FILE_LINES},
        functions,
    )


# --- the table -----------------------------------------------------------------------------------


def ways() -> list[Way]:
    measured: list[tuple[str, int, set[str]]] = [
        ("prompt to PNG", 25, prompt_to_png()),
        ("HTTP request to engines and back", 35, http_to_engines("colocate")),
        ("the same, engines in processes", 35, http_to_engines("separate")),
        ("JSONL sample to gradient", 20, sample_to_gradient()),
    ]
    return [Way(name, aim, tuple(sorted(files))) for name, aim, files in measured]


def show(measured: list[Way], size: Sizes, *, names: bool) -> None:
    print(f"{'way':<34}{'files':>6}{'aim':>6}")
    for way in measured:
        print(f"{way.name:<34}{len(way.files):>6}{way.aim:>6}")
        if names:
            print("".join(f"    {file}\n" for file in way.files), end="")
    print()
    print(f"{'files':<34}{size.files:>6}")
    print(f"{'lines':<34}{size.lines:>6}")
    print(f"{'median lines of a file':<34}{size.median:>6}")
    for what, limit, long in (
        ("files", MAX_FILE_LINES, size.long_files),
        ("functions", MAX_FUNCTION_LINES, size.long_functions),
    ):
        print(f"{f'{what} over {limit} lines':<34}{len(long):>6}")
        for name, lines in long.items():
            print(f"    {name}: {lines}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="name the files that each way enters")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    measured, size = ways(), sizes()
    if options.json:
        print(json.dumps({"ways": [asdict(way) for way in measured], "sizes": asdict(size)}))
    else:
        show(measured, size, names=options.list)


if __name__ == "__main__":
    main()
