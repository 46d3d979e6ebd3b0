"""The main job on recorded models: the files a user gets hold what was recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from neounify.cli.images import read_record
from support.golden import checkpoint, golden_path, load_fixture, needs_golden

pytestmark = needs_golden
NAMES = ("tiny-dense", "tiny-pixelhead")
SIZE = ("--size", "64x96", "--steps", "4", "--shift", "3", "--device", "cpu")


def as_levels(final: Tensor) -> Any:
    return ((final[0] * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).numpy()


def check_file(file: str, final: Tensor) -> None:
    """Equal but for values so near to a rounding boundary that the tolerance decides."""
    with Image.open(file) as image:
        difference = np.abs(np.array(image).astype(float) - as_levels(final))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_the_file_holds_the_recorded_image(
    run: Callable[..., Any], golden_checkpoint: Callable[[str], Path], name: str
) -> None:
    arrays, facts = load_fixture(name, "t2i")
    seed = ("--seed", facts["seed"], "--dtype", "float32", "--model", golden_checkpoint(name))
    assert run("generate", facts["prompt"], *SIZE, *seed, "-o", "x.png").code == 0
    check_file("x.png", arrays["none.final"])


def test_the_file_holds_the_recorded_image_of_the_second_family(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Without a solver named: the checkpoint's is dpm2m."""
    folder = checkpoint("tiny-f22", tmp_path, "pixelumm")
    arrays, facts = load_fixture("tiny-f22", "t2i", "pixelumm")
    model = ("--model", folder, "--config", folder / "llm", "--dtype", "float32")
    options = ("--size", "64x48", "--steps", 4, "--seed", facts["seed"], "--device", "cpu")
    assert run("generate", facts["prompt"], *options, *model, "-o", "x.png").code == 0
    with Image.open("x.png") as image:
        difference = np.abs(np.array(image).astype(int) - arrays["none.uint8"].numpy())
    assert difference.max() <= 1
    settings = read_record(Path("x.png"))["settings"]
    assert (settings["solver"], settings["shift"], settings["guidance"]) == ("dpm2m", 3.0, 3.5)
    assert settings["t_eps"] == 0.05


def test_the_edited_file_holds_the_recorded_image(
    run: Callable[..., Any], golden_checkpoint: Callable[[str], Path]
) -> None:
    arrays, facts = load_fixture("tiny-pixelhead", "it2i")
    images: list[object] = []
    for name in facts["images"]["2img"]:
        images += ["--image", golden_path("fixtures", "images", f"{name}.png")]
    seed = ("--seed", facts["seed"], "--dtype", "float32")
    model = ("--model", golden_checkpoint("tiny-pixelhead"), "-o", "x.png")
    assert run("edit", facts["prompts"]["2img"], *images, *SIZE, *seed, *model).code == 0
    check_file("x.png", arrays["2img.4_1.final"])


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_recorded_one(
    run: Callable[..., Any], golden_checkpoint: Callable[[str], Path], name: str
) -> None:
    _, facts = load_fixture(name, "chat")
    image = golden_path("fixtures", "images", f"{facts['image']}.png")
    options = ("--max-new-tokens", 12, "--dtype", "float32", "--device", "cpu", "--json")
    model = golden_checkpoint(name)
    ran = run("chat", facts["question"], "--image", image, *options, "--model", model)
    assert ran.json["answer"] == facts["results"]["turn1"]["response"].strip()
