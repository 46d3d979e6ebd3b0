"""`generate` and `edit`: files, names, records."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import neounify
from neounify.cli.images import read_record
from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline
from neounify.text import byte_tokenizer
from neounify.video.read import read_video
from support.clips import clip_bytes, numbered

SMALL = ("--size", "64x32", "--steps", "2")


@pytest.fixture(scope="module")
def pipe(toy: Path) -> Pipeline:
    return neounify.load(toy, device="cpu")


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.array(image)


def test_the_file_holds_exactly_the_generated_pixels(
    run: Callable[..., Any], pipe: Pipeline, tmp_path: Path
) -> None:
    ran = run("generate", "A Red Boat!", *SMALL, "--seed", 5, "--device", "cpu")
    assert ran.code == 0
    path = Path("outputs/a-red-boat_s5_1.png")
    assert f"saved {path}" in ran.out
    want = pipe.generate("A Red Boat!", width=64, height=32, steps=2, seed=5).images[0]
    assert np.array_equal(pixels(path), np.array(want))
    assert sorted(p.name for p in Path("outputs").iterdir()) == [
        "a-red-boat_s5_1.json",
        "a-red-boat_s5_1.png",
    ]


def test_a_negative_prompt_is_used_and_recorded(
    run: Callable[..., Any], pipe: Pipeline, tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        '{"prompt": "a boat", "id": "dark", "negative_prompt": "dark"}\n'
        '{"prompt": "a boat", "id": "plain", "seed": 4}\n'
        '{"prompt": "a boat", "id": "free", "guidance": 1, "negative_prompt": "dark"}\n'
    )
    options: dict[str, Any] = {"width": 64, "height": 32, "steps": 2, "guidance": 3, "seed": 4}
    arguments = (*SMALL, "--guidance", 3, "--seed", 4, "--device", "cpu")
    want = {
        text: np.array(pipe.generate("a boat", negative_prompt=text, **options).images[0])
        for text in ("blurry", "dark", "")
    }
    assert run("generate", "a boat", *arguments, "--negative-prompt", "blurry").code == 0
    path = Path("outputs/a-boat_s4_1.png")
    assert np.array_equal(pixels(path), want["blurry"])
    assert read_record(path)["settings"]["negative_prompt"] == "blurry"
    ran = run("generate", "--input", lines, *arguments, "--output", "many")
    assert ran.code == 1
    assert "guidance is 1, so nothing is steered away from" in ran.err
    assert np.array_equal(pixels(Path("many/dark_s4_1.png")), want["dark"])
    assert np.array_equal(pixels(Path("many/plain_s4_1.png")), want[""])


def test_a_negative_prompt_needs_guidance(run: Callable[..., Any]) -> None:
    ran = run("generate", "a boat", *SMALL, "--guidance", 1, "--negative-prompt", "blurry")
    assert ran.code != 0
    assert "negative_prompt: guidance is 1" in ran.err
    assert "loading" not in ran.err


def test_the_record_in_the_file_and_beside_it(
    run: Callable[..., Any], pipe: Pipeline, toy: Path
) -> None:
    run("generate", "ein Boot, 湖", *SMALL, "--norm", "global", "--interval", "0.1,0.9")
    path = Path("outputs/ein-boot-湖_s0_1.png")
    record = read_record(path)
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == record
    assert record["prompt"] == "ein Boot, 湖"
    assert (record["task"], record["seed"], record["index"]) == ("generate", 0, 1)
    assert record["size"] == [64, 32]
    assert record["neounify"] == neounify.__version__
    assert record["model"]["fingerprint"] == pipe.fingerprint
    assert record["model"]["folder"] == toy.name
    assert str(toy.parent) not in json.dumps(record)
    assert record["evaluations"] == 3  # the first of two steps is outside the interval
    assert record["settings"] == {
        "steps": 2,
        "shift": 3.0,
        "guidance": 4.0,
        "interval": [0.1, 0.9],
        "norm": "global",
        "negative_prompt": "",
        "solver": "euler",
        "t_eps": 0.02,
        "think": False,
        "system": None,
    }
    shown = run("inspect", path, "--json")
    assert shown.json == record


def test_nothing_is_overwritten_unless_asked(run: Callable[..., Any]) -> None:
    for _ in range(3):
        assert run("generate", "boat", *SMALL, "-q").code == 0
    names = sorted(p.name for p in Path("outputs").glob("*.png"))
    assert names == ["boat_s0_1-2.png", "boat_s0_1-3.png", "boat_s0_1.png"]
    before = Path("outputs/boat_s0_1.png").stat().st_mtime_ns
    ran = run("generate", "boat", *SMALL, "-q", "--overwrite")
    assert ran.out.strip() == str(Path("outputs/boat_s0_1.png"))
    assert Path("outputs/boat_s0_1.png").stat().st_mtime_ns > before
    assert len(list(Path("outputs").iterdir())) == 6


def test_a_named_file_is_honoured_exactly(run: Callable[..., Any]) -> None:
    assert run("generate", "boat", *SMALL, "-o", "deep/x.png").code == 0
    assert Path("deep/x.png").is_file()
    assert Path("deep/x.json").is_file()
    ran = run("generate", "boat", *SMALL, "-o", "deep/x.png")
    assert ran.code == 1
    assert "already exists" in ran.err
    assert run("generate", "boat", *SMALL, "-o", "deep/x.png", "--overwrite").code == 0
    Path("deep/y.json").write_text("mine", encoding="utf-8")
    assert run("generate", "boat", *SMALL, "-o", "deep/y.png").code == 1
    assert Path("deep/y.json").read_text(encoding="utf-8") == "mine"


def test_several_prompts_and_images_each(run: Callable[..., Any], pipe: Pipeline) -> None:
    ran = run("generate", "one cat", "two cats", *SMALL, "--count", 2, "--json")
    files = [Path(entry["file"]) for entry in ran.json["files"]]
    assert [f.name for f in files] == [
        "one-cat_s0_1.png",
        "one-cat_s0_2.png",
        "two-cats_s0_1.png",
        "two-cats_s0_2.png",
    ]
    want = pipe.generate(
        ["one cat", "two cats"], width=64, height=32, steps=2, images_per_prompt=2
    ).images
    for file, image in zip(files, want, strict=True):
        assert np.abs(pixels(file).astype(int) - np.array(image)).max() <= 1
    assert ran.json["files"][3]["record"] == read_record(files[3])


def test_prompts_without_quotes_get_a_hint(run: Callable[..., Any]) -> None:
    ran = run("generate", "a", "boat", *SMALL)
    assert ran.code == 0
    assert "quotes" in ran.err


def test_previews_are_one_sheet(run: Callable[..., Any]) -> None:
    run("generate", "boat", "--size", "64x32", "--steps", 3, "--previews")
    with Image.open("outputs/boat_s0_1.previews.png") as sheet:
        assert sheet.size == (3 * 64 + 2 * 4, 32)


def test_a_thought_is_shown_and_recorded(run: Callable[..., Any]) -> None:
    ran = run("generate", "boat", *SMALL, "--think", "--max-think-tokens", 5)
    assert ran.code == 0
    assert "thought: " in ran.out
    assert isinstance(read_record(Path("outputs/boat_s0_1.png"))["thought"], str)


def test_edit_of_two_images(run: Callable[..., Any], pipe: Pipeline, image_file: Path) -> None:
    arguments = ("--image", image_file, "--image", image_file, *SMALL, "--image-guidance", 2)
    ran = run("edit", "mix <image> and <image>", *arguments, "--device", "cpu", "--json")
    assert ran.code == 0
    (entry,) = ran.json["files"]
    want = pipe.edit(
        "mix <image> and <image>", [image_file] * 2, width=64, height=32, steps=2, image_guidance=2
    ).images[0]
    assert np.array_equal(pixels(Path(entry["file"])), np.array(want))
    assert entry["record"]["images"] == ["image.png"] * 2
    assert entry["record"]["settings"]["image_guidance"] == 2
    assert entry["record"]["task"] == "edit"


def test_edit_keeps_the_shape_of_its_image(run: Callable[..., Any], image_file: Path) -> None:
    ran = run("edit", "bluer", "--image", image_file, "--steps", 1, "--json")
    width, height = ran.json["files"][0]["record"]["size"]
    assert width > height


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_an_unreadable_image(run: Callable[..., Any], content: bytes) -> None:
    Path("bad.png").write_bytes(content)
    ran = run("edit", "bluer", "--image", "bad.png")
    assert ran.code == 1
    assert "bad.png" in ran.err
    assert not Path("outputs").exists()


def test_an_output_folder_that_cannot_be_created(run: Callable[..., Any]) -> None:
    Path("file").write_text("", encoding="utf-8")
    ran = run("generate", "boat", *SMALL, "-o", "file/inside")
    assert ran.code == 1
    assert "cannot be created" in ran.err


def test_memory_by_stream_generates_the_same(run: Callable[..., Any]) -> None:
    run("generate", "boat", *SMALL, "-o", "a.png")
    assert run("generate", "boat", *SMALL, "-o", "b.png", "--memory", "stream").code == 0
    assert np.array_equal(pixels(Path("a.png")), pixels(Path("b.png")))


def test_inspect_refuses_other_pngs(run: Callable[..., Any], image_file: Path) -> None:
    ran = run("inspect", image_file)
    assert ran.code == 1
    assert "no record" in ran.err


@pytest.fixture(scope="module")
def moving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a miniature that generates videos."""
    able = (*TINY.capabilities, "generate_video", "continue_video")
    config = TINY.replace(video=VideoConfig(tube_frames=4, und=True), capabilities=able)
    folder = tmp_path_factory.mktemp("moving") / "model"
    neounify.Pipeline(NeoUnify(config).eval(), byte_tokenizer()).save(folder)
    return folder


def test_videos_are_saved_with_their_records(run: Callable[..., Any], moving: Path) -> None:
    clip = ("generate", "a star", *SMALL, "--model", moving, "--device", "cpu", "--frames", 8)
    ran = run(*clip, "--fps", 16, "--previews")
    assert ran.code == 0, ran.err
    path = Path("outputs/a-star_s0_1.mp4")
    assert f"saved {path}  (8 frames at 16 a second, 64x32, seed 0, 2 steps)" in ran.out
    assert path.read_bytes()[4:8] == b"ftyp"
    record = json.loads(path.with_suffix(".json").read_text())
    assert (record["frames"], record["fps"], record["size"]) == (8, 16.0, [64, 32])
    assert run("inspect", path, "--json").json == record
    assert json.loads(run("inspect", path).out) == record
    assert Path("outputs/a-star_s0_1.previews.png").is_file()
    assert run(*clip, "--output", "one.mp4").code == 0
    assert Path("one.mp4").is_file()
    lines = Path("lines.jsonl")
    lines.write_text('{"prompt": "a star", "id": "moves", "seed": 3}\n')
    assert run("generate", "--input", lines, *clip[2:], "--output", "many").code == 0
    assert Path("many/moves_s3_1.mp4").is_file()


def test_clips_of_others_have_no_record(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "other.mp4").write_bytes(clip_bytes(numbered(9)))
    ran = run("inspect", "other.mp4")
    assert ran.code == 1
    assert "other.mp4 has no record: neounify did not generate it as MP4" in ran.err


def test_clips_are_continued(run: Callable[..., Any], moving: Path, tmp_path: Path) -> None:
    (tmp_path / "before.mp4").write_bytes(clip_bytes(numbered(9)))
    clip = (*SMALL, "--model", moving, "--device", "cpu", "--frames", 8, "--fps", 10)
    ran = run("generate", "What next?", *clip, "--condition", "before.mp4")
    assert ran.code == 0, ran.err
    path = Path("outputs/what-next_s0_1.mp4")
    assert json.loads(path.with_suffix(".json").read_text())["condition"] == "before.mp4"
    Path("lines.jsonl").write_text(
        '{"prompt": "What next?", "condition": "before.mp4"}\n{"prompt": "What next?", "seed": 0}\n'
    )
    assert run("generate", "--input", "lines.jsonl", *clip, "--output", "many").code == 0
    first, second = (Path(f"many/000{n}-what-next_s0_1.mp4") for n in (1, 2))
    continued, alone = (read_video(file).images[0] for file in (first, second))
    assert continued.tobytes() == read_video(path).images[0].tobytes()
    assert continued.tobytes() != alone.tobytes()
    pipe = neounify.load(moving, device="cpu")
    sizes: dict[str, Any] = {"width": 64, "height": 32, "frames": 8, "fps": 10, "steps": 2}
    wanted = pipe.generate("What next?", condition="before.mp4", **sizes).videos[0]
    wanted.save("wanted.mp4")
    assert continued.tobytes() == read_video("wanted.mp4").images[0].tobytes()
    refused = run("generate", "a", "--model", moving, "--condition", "before.mp4")
    assert "--condition is of videos: give --frames" in refused.err


def test_models_that_do_not_continue_clips_say_so(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "before.mp4").write_bytes(clip_bytes(numbered(9)))
    ran = run("generate", "a star", *SMALL, "--frames", 8, "--condition", "before.mp4")
    assert ran.code == 1
    assert "was not trained to continue videos; it can answer" in ran.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--frames", 6), "multiple of 4, at least 4, got 6"),
        (("--frames", 8, "--fps", 0), "fps must be above 0"),
        (("--frames", 8, "--negative-prompt", "<video>"), "a <video> mark without a clip"),
        (("--fps", 8), "give --frames too"),
        (("--frames", 8, "--output", "x.png"), "videos are saved as .mp4"),
        (("--frames", 8, "--output", "x.webm"), "videos are saved as .mp4, or into a folder"),
        (("--frames", 8, "--output", "x.MOV"), "videos are saved as .mp4, or into a folder"),
        (("--output", "x.mp4"), "images are saved as .png, or into a folder; --frames N"),
    ],
)
def test_videos_that_cannot_be_are_refused_before_loading(
    run: Callable[..., Any], moving: Path, options: tuple[Any, ...], message: str
) -> None:
    ran = run("generate", "a star", *SMALL, "--model", moving, *options)
    assert ran.code != 0
    assert message in ran.err
    assert not [path for path in Path().iterdir() if path.name.startswith(("outputs", "x."))]


def test_clips_that_could_not_be_saved_are_refused_before_loading(
    run: Callable[..., Any], moving: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    Path("lines.jsonl").write_text('{"prompt": "a star"}\n')
    clip = (*SMALL, "--model", moving, "--frames", 8)
    for ran in (
        run("generate", "a star", *clip, "--output", "star.mp4"),
        run("generate", "--input", "lines.jsonl", *clip, "--output", "many"),
    ):
        assert ran.code != 0
        assert "video files need the extra 'video'" in ran.err.replace("\n", " ")
        assert "loading" not in ran.err
    assert not Path("star.mp4").exists()


def test_marks_of_clips_are_refused_before_loading(run: Callable[..., Any], moving: Path) -> None:
    ran = run("generate", "a <video>", *SMALL, "--model", moving, "--frames", 8)
    assert ran.code == 1
    assert "the text has a <video> mark without a clip" in ran.err


def test_models_without_videos_refuse_frames(run: Callable[..., Any], toy: Path) -> None:
    ran = run("generate", "a star", *SMALL, "--frames", 8)
    assert ran.code != 0
    assert "was not trained to generate videos" in ran.err
