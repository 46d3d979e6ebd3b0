"""Commands with a checkpoint of the second family: inspected, converted, used and refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

import neounify
from neounify.checkpoint import CheckpointFolder
from neounify.checkpoint.sizes import kept_weights
from neounify.runtime.memory_plan import STREAMS, Task, peak_bytes, working_bytes
from neounify.tasks.clips import clip_question
from support.pixelumm import SMALL, saved

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it is published, in its safetensors form, and `llm` beside it."""
    root = tmp_path_factory.mktemp("pixelumm")
    folder, llm = saved(root / "model"), root / "llm"
    llm.mkdir()
    for file in [*folder.iterdir()]:
        if file.name not in ("model.safetensors", "__SAVE_COMPLETE"):
            file.rename(llm / file.name)
    document = json.loads((llm / "config.json").read_text())
    sampling = document.pop("neounify")["sampling"]
    assert sampling["image_size"] == [64, 48]
    (llm / "config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    files = []
    for number, size in enumerate(((48, 32), (32, 64))):
        pixels = np.full((*size, 3), 60 * number, dtype=np.uint8)
        files.append(tmp_path / f"{number}.png")
        PIL.Image.fromarray(pixels).save(files[-1])
    return files


def test_inspect_knows_the_family(run_bare: Run, published: Path) -> None:
    missing = run_bare("inspect", published)
    assert missing.code == 1
    assert "name the folder with config.json and the tokenizer of Qwen3-8B" in missing.err
    ran = run_bare("inspect", published, "--config", published.parent / "llm")
    assert ran.code == 0
    assert "PixelUMM, dense, linear image head" in ran.out
    assert "generate videos" in ran.out
    facts = " ".join(ran.out.replace("│", " ").split())
    assert "video token 4 frames of 16x16 pixels" in facts
    assert "832x480, 96 frames at 24 a second, 35 steps, guidance 6, shift 10, unipc" in facts
    assert "video files read and written by PyAV" in facts
    listed = run_bare("inspect", published, "--config", published.parent / "llm", "--json").json
    tubes = {"tube_frames": 4, "und": True, "position_fps": 24.0}
    assert listed["config"]["video"] == {**tubes, "image_weights": False, "frame_by_frame": False}
    assert listed["config"]["capabilities"] == ["chat", "generate", "generate_video", "chat_video"]
    assert listed["video_files"] is True


def test_inspect_says_what_is_missing_for_video_files(
    run_bare: Run, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    ran = run_bare("inspect", published, "--config", published.parent / "llm")
    facts = " ".join(ran.out.replace("│", " ").split())
    assert "video files need the extra 'video', which is not installed: pip install" in facts


def test_quantise_and_parity(run_bare: Run, tmp_path: Path) -> None:
    """Codes are those that quantising at load gives; the report says what differs, and where."""
    folder = saved(tmp_path / "model")
    small = ("--images", 1, "--cases", 0)
    ran = run_bare("quantise", folder, "--to", "int8", "-o", "int8", *small)
    assert ran.code == 0, ran.err
    report = json.loads(Path("int8/parity/report.json").read_text())
    assert 0 < report["weights"]["mlp"] < 0.02
    assert report["weights"]["norm"] == report["weights"]["image head"] == 0
    assert all(0 < error < 0.5 for error in report["clean"].values())
    assert len(report["psnr"]) == 1
    neounify.load(folder, quantise="int8").save("saved")
    written, theirs = (load_file(f"{name}/model.safetensors") for name in ("int8", "saved"))
    assert written.keys() == theirs.keys()
    for name, codes in written.items():
        assert codes.dtype == theirs[name].dtype
        assert torch.equal(codes, theirs[name]), name
    again = run_bare("parity", folder, folder, "-o", "same", *small, "--json").json
    assert set(again["weights"].values()) == {0.0}
    assert again["logits"] == 0
    assert again["psnr"] == [100]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        (Task(kind="t2v", width=64, height=48, frames=8, steps=3), ("--task", "t2v")),
        (clip_question(SMALL, 5, None), ("--task", "chat", "--frames", 5)),
        (clip_question(SMALL, 5, None, tubes=True), ("--task", "chat", "--frames", 5, "--tubes")),
    ],
    ids=["clip", "frames", "tubes"],
)
def test_plans_are_of_the_sizes_of_the_files(
    run_bare: Run, tmp_path: Path, task: Task, options: tuple[object, ...]
) -> None:
    folder = saved(tmp_path / "model")
    machine = ("--gpu", "none", "--ram", "4G", "--json")
    ran = run_bare("plan", "--model", folder, *options, *machine)
    assert ran.code == 0, ran.err
    document = ran.json
    assert document["task"] == asdict(task)
    weights = kept_weights(CheckpointFolder.open(folder), torch.float32).weights
    on_disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    parts = sum(weights.stream(name) + weights.rest[name] for name in STREAMS)
    assert parts + weights.shared == pytest.approx(on_disk, rel=0.01)
    row = next(row for row in document["rows"] if row["mode"] == "all")
    working = working_bytes(SMALL, task, 4)
    assert row["peak"] == peak_bytes(weights, "all", working, unified=True)


def test_the_doctor_says_what_the_model_can(run_bare: Run, published: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    Path("recipe.toml").write_text(
        f'''
name = "x"
[model]
checkpoint = "{folder}"
[[stages]]
name = "joint"
steps = 5
[[stages.data]]
kind = "motion"
tasks = {{ t2v = 1.0 }}
'''
    )
    ran = run_bare("doctor", "recipe.toml", "--seconds", 1, "--device", "cpu")
    assert "ok   model                PixelUMM; it can answer questions about text and" in ran.out
    assert "ok   video files          read and written by PyAV" in ran.out


def test_chat_about_two_images(run_bare: Run, published: Path, images: list[Path]) -> None:
    model = ("--model", published, "--config", published.parent / "llm", "--max-new-tokens", 4)
    pictures = [argument for image in images for argument in ("--image", image)]
    ran = run_bare("chat", "Is <image 2> like <image 1>?", *pictures, *model)
    assert ran.code == 0, ran.err
    wrong = run_bare("chat", "Is <image 3> like <image 1>?", *pictures, *model)
    assert wrong.code == 1
    assert "the text marks images 3, 1, but there are 2" in wrong.err
    lines = "Is <image 1>?\nIs <image 2> like <image 1>?\nWhy?\n/save talk.json\n/exit\n"
    talk = run_bare("chat", *pictures, *model, input=lines)
    assert "but not all: 1 of 2 have no mark" in talk.err
    assert talk.out.splitlines()[0] == ran.out.strip("\n")
    assert len(talk.out.splitlines()) == 2
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    assert saved["messages"][0]["content"] == "Is <image 2> like <image 1>?"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        (("edit", "make it red", "--image", "0.png", "--steps", 1), "edit images"),
        (("story", "a trip"), "write answers of text and images"),
        (("chat", "why?", "--think"), "think before answering"),
    ],
)
def test_what_is_refused(
    run_bare: Run, published: Path, images: list[Path], command: tuple[Any, ...], what: str
) -> None:
    ran = run_bare(*command, "--model", published, "--config", published.parent / "llm")
    assert ran.code == 1
    assert f"this PixelUMM model was not trained to {what}; it can answer questions" in ran.err


@pytest.mark.usefixtures("no_loading")
def test_edits_are_refused_before_loading(
    run_bare: Run, published: Path, images: list[Path]
) -> None:
    model = ("--model", published, "--config", published.parent / "llm")
    ran = run_bare("edit", "make it red", "--image", images[0], *model)
    assert ran.code == 1
    assert "was not trained to edit images" in ran.err


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("clip", [(), ("--frames", 8)])
@pytest.mark.parametrize("which", ["prompt", "negative prompt"])
def test_prompts_beyond_what_is_read_are_refused_before_loading(
    run_bare: Run, published: Path, clip: tuple[Any, ...], which: str
) -> None:
    long = "a " * 10_000
    asked = ("a boat", "--negative-prompt", long) if which == "negative prompt" else (long,)
    model = ("--model", published, "--config", published.parent / "llm", "--steps", 3)
    ran = run_bare("generate", *asked, *clip, *model)
    assert ran.code == 1
    assert f"the {which} has 20,000 tokens, this model reads 4,096 at most" in ran.err
    Path("lines.jsonl").write_text(json.dumps({"prompt": long}), encoding="utf-8")
    ran = run_bare("generate", "--input", "lines.jsonl", *clip, *model)
    assert "no line can be processed" in ran.err
    assert "tokens, this model reads 4,096 at most" in ran.err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_converted(
    run_bare: Run, published: Path, tmp_path: Path
) -> None:
    source, llm = tmp_path / "dcp", published.parent / "llm"
    tensors = load_file(published / "model.safetensors")
    dcp.save(tensors, checkpoint_id=source / "model", no_dist=True)
    (source / "__SAVE_COMPLETE").touch()
    for options in ((), ("--config", llm)):
        refused = run_bare("inspect", source, *options)
        assert refused.code == 1
        assert f"neounify convert {source} OUT --from-dcp --config FOLDER" in refused.err
    bare = run_bare("convert", source, "out", "--from-dcp")
    assert bare.code == 1
    assert "holds no config.json: name the folder with config.json and the tokenizer" in bare.err
    assert "Qwen3-8B, as --config" in bare.err
    ran = run_bare("convert", source, "out", "--from-dcp", "--config", llm)
    assert ran.code == 0, ran.err
    assert "is a pickle; it is read without running anything" in ran.err
    assert "__SAVE_COMPLETE" not in ran.err
    assert (tmp_path / "out" / "__SAVE_COMPLETE").is_file()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(written[name].equal(tensors[name]) for name in tensors)
    assert run_bare("inspect", "out").code == 0
    both = run_bare(
        "convert", source, "other", "--from-dcp", "--config", llm, "--dtype", "bfloat16"
    )
    assert both.code == 2
    assert "--from-dcp keeps weights as they are" in both.err
    shutil.rmtree(tmp_path / "out")
    (source / "__SAVE_COMPLETE").unlink()
    unfinished = run_bare("convert", source, "out", "--from-dcp", "--config", llm)
    assert unfinished.code == 0
    assert "lacks __SAVE_COMPLETE" in unfinished.err
    shutil.rmtree(tmp_path / "out")
