"""`story`: a folder that anyone can open."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import neounify
from neounify.cli.images import read_record
from neounify.cli.toy import toy_pipeline
from neounify.pipeline import ImagePart, Pipeline, PreviewPart, TextPart

SMALL = ("--size", "64x32", "--steps", "2")


@pytest.fixture(scope="module")
def drawing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that opens an image about every other token."""
    pipe = toy_pipeline(seed=0)
    with torch.no_grad():
        pipe.model.lm_head.weight[pipe.tokenizer.id("<img>")] *= 10
    folder = tmp_path_factory.mktemp("models") / "model"
    pipe.save(folder)
    return folder


def parts(*items: object) -> Callable[..., Iterator[object]]:
    def interleave(self: Pipeline, *_: object, **__: object) -> Iterator[object]:
        for item in items:
            if isinstance(item, BaseException):
                raise item
            yield item

    return interleave


def image(level: float) -> ImagePart:
    return ImagePart(torch.full((3, 32, 64), level), 8.0)


def test_the_folder(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = parts(
        TextPart("Once <b>"), TextPart(" upon"), image(-1.0), TextPart("End."), image(1.0)
    )
    monkeypatch.setattr(Pipeline, "interleave", scripted)
    ran = run("story", "A boat & a lake", *SMALL)
    assert ran.code == 0
    folder = Path("outputs/a-boat-a-lake_s0")
    assert sorted(p.name for p in folder.iterdir()) == [
        "01.json",
        "01.png",
        "02.json",
        "02.png",
        "story.html",
        "story.json",
        "story.md",
    ]
    markdown = (folder / "story.md").read_text(encoding="utf-8")
    assert markdown == (
        "# A boat & a lake\n\nOnce <b> upon\n\n![](01.png)\n\nEnd.\n\n![](02.png)\n"
    )
    page = (folder / "story.html").read_text(encoding="utf-8")
    assert "Once &lt;b&gt; upon" in page
    assert "<h1>A boat &amp; a lake</h1>" in page
    assert page.count("data:image/png;base64,") == 2
    assert "Once <b> upon" in ran.out
    record = read_record(folder / "02.png")
    assert (record["task"], record["index"], record["size"]) == ("story", 2, [64, 32])
    story = json.loads((folder / "story.json").read_text(encoding="utf-8"))
    assert story["complete"] is True
    assert [next(iter(part)) for part in story["parts"]] == ["text", "image", "text", "image"]


def test_a_second_story_gets_its_own_folder(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pipeline, "interleave", parts(TextPart("Hm.")))
    for _ in range(2):
        ran = run("story", "A boat", *SMALL, "-o", "stories", "--json")
    assert ran.json["folder"] == str(Path("stories/a-boat_s0-2"))
    assert ran.json["parts"] == [{"text": "Hm."}]


def test_an_interrupted_story_is_kept_up_to_there(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = parts(TextPart("Once"), image(0.0), KeyboardInterrupt())
    monkeypatch.setattr(Pipeline, "interleave", scripted)
    ran = run("story", "A boat", *SMALL)
    assert ran.code == 130
    folder = Path("outputs/a-boat_s0")
    story = json.loads((folder / "story.json").read_text(encoding="utf-8"))
    assert story["complete"] is False
    assert "![](01.png)" in (folder / "story.md").read_text(encoding="utf-8")


def test_a_toy_writes_a_story_with_images(
    run: Callable[..., Any], drawing_model: Path, image_file: Path
) -> None:
    limits = ("--max-new-tokens", 12, "--max-images", 2, "--previews", "--device", "cpu")
    ran = run(
        "story", "Boats", "--image", image_file, "--model", drawing_model, *SMALL, *limits, "--json"
    )
    pipe = neounify.load(drawing_model, device="cpu")
    expected = pipe.interleave(
        "Boats", image_file, width=64, height=32, steps=2, max_new_tokens=12, max_images=2
    )
    want = [part for part in expected if not isinstance(part, PreviewPart)]
    images = [part for part in want if isinstance(part, ImagePart)]
    assert len(images) == 2
    assert sum(isinstance(part, TextPart) for part in want) > 0
    folder = Path(ran.json["folder"])
    for number, part in enumerate(images, start=1):
        with Image.open(folder / f"{number:02d}.png") as saved:
            assert np.array_equal(np.array(saved), np.array(part.image))
        assert (folder / f"{number:02d}.previews.png").is_file()
    texts = "".join(part.text for part in want if isinstance(part, TextPart))
    assert "".join(part.get("text", "") for part in ran.json["parts"]) == texts
