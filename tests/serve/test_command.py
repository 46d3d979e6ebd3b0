"""`neounify serve` as people run it: ordinary clients get what the pipeline gives."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import openai
import PIL.Image
import pytest

import neounify
from neounify.provenance.metadata import read_provenance
from support.processes import children_of, runs
from support.serving_command import fetch, served


def image_of(item: openai.types.Image) -> tuple[bytes, PIL.Image.Image]:
    assert item.b64_json is not None
    data = base64.b64decode(item.b64_json)
    return data, PIL.Image.open(io.BytesIO(data))


def as_url(image: PIL.Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_the_bundled_model_answers_ordinary_clients() -> None:
    from neounify.bundled import bundled_model

    pipe = neounify.load(bundled_model(), dtype="float32")
    with served("--dtype", "float32") as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        model = client.models.list().data[0].id
        generated = client.images.generate(
            model=model, prompt="a red circle", size="auto", extra_body={"seed": 3, "steps": 6}
        )
        data, image = image_of((generated.data or [])[0])
        mine = pipe.generate("a red circle", seed=3, steps=6).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(mine, int)).max() <= 1
        assert read_provenance(data)["seed"] == 3

        question = "What colour is the background?"
        stream = client.chat.completions.create(
            model=model,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": as_url(image)}},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            stream=True,
        )
        answer = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
        assert answer == pipe.chat(question, image).text

        assert "neounify" in fetch(f"{address}/")
        assert "neounify_gen_steps_total 6.0" in fetch(f"{address}/metrics")

        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_both_processes_end_and_drain_on_a_signal(folder: Path) -> None:
    settings = (
        "--model",
        str(folder),
        "--dtype",
        "float32",
        "--mode",
        "separate",
        "--threads",
        "1",
    )
    with served(*settings) as (process, address):
        children = children_of(process.pid)
        assert len(children) >= 2
        body = {"prompt": "a boat", "size": "64x64", "steps": 60, "seed": 1}
        asked = json.dumps({**body, "stream": True, "partial_images": 1})
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request(
            "POST", "/v1/images/generations", asked, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        answer.readline()  # of a preview: the work is under way
        process.send_signal(signal.SIGTERM)
        events = [line.decode().strip() for line in answer if line.startswith(b"event:")]
        connection.close()
        assert events[-1] == "event: image_generation.completed"
        assert process.wait(30) == 0
        for _ in range(100):
            left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
            if not left:
                break
            time.sleep(0.1)
        assert not left


def test_a_killed_server_leaves_nothing_behind(folder: Path) -> None:
    """Its engines notice within seconds, also in the middle of their steps."""
    settings = ("--model", str(folder), "--dtype", "float32", "--mode", "separate")
    with served(*settings, "--threads", "1") as (process, address):
        children = children_of(process.pid)
        files = [entry.readlink() for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        (lock,) = (file for file in files if file.suffix == ".lock")
        body = {"prompt": "a boat", "size": "64x64", "steps": 200, "n": 4}
        asked = json.dumps({**body, "stream": True, "partial_images": 3})
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
        connection.request(
            "POST", "/v1/images/generations", asked, {"Content-Type": "application/json"}
        )
        connection.getresponse().readline()  # of a preview: the work is under way
        process.kill()
        for _ in range(600):
            left = [pid for pid in children if runs(pid)]
            if not left:
                break
            time.sleep(0.1)
        assert not left
        connection.close()
    assert not list(lock.parent.glob(f"{lock.stem}*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mode", "twice"), "--mode twice is unknown; known: colocate, separate"),
        (("--generation-threads", "1"), "need --mode separate"),
        (("--model", "nowhere"), "does not exist"),
        (("--api-keys", "nowhere.txt"), "--api-keys nowhere.txt: no such file"),
        (("--hook", "nonsense"), "does not name a hook"),
        (("--word-list", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_wrong_options_are_one_clear_error(arguments: tuple[str, ...], message: str) -> None:
    command = [sys.executable, "-m", "neounify", "serve", *arguments]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
