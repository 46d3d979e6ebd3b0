"""Images of PixelUMM through the pipeline against the recorded trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neounify
from neounify.flow.path import clean_from_velocity
from neounify.flow.sampling import ImageSampling
from neounify.image.pixels import patchify
from neounify.tasks.image import ImageRequest, branch_prompt
from support.golden import checkpoint, load_fixture, needs_golden
from support.golden_steps import DPM, TRAJECTORY, Steps
from support.models import assert_close, one_thread

__all__ = ["one_thread"]  # a fixture

FAMILY = "pixelumm"
CASES = ("none", "cfg1", "global", "channel", "clamp", "interval", "shift1", "steps3")
pytestmark = [needs_golden, pytest.mark.parametrize("name", ["tiny-f18", "tiny-f22"])]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("painting")
    return {name: checkpoint(name, root, FAMILY) for name in ("tiny-f18", "tiny-f22")}


@pytest.fixture(scope="module")
def pipes(folders: dict[str, Path]) -> dict[str, neounify.Pipeline]:
    return {name: neounify.load(path, config=path / "llm") for name, path in folders.items()}


def _arguments(facts: dict[str, Any], case: str) -> dict[str, Any]:
    settings = facts["cases"][case]
    height, width = facts["height_width"]
    low, high = settings["interval"]
    return {
        "width": width,
        "height": height,
        "seed": facts["seed"],
        "steps": settings["steps"],
        "shift": settings["shift"],
        "guidance": settings["guidance"],
        "guidance_interval": (1 - high, 1 - low),
        "guidance_norm": settings["norm"],
    }


def _rows(pixels: Tensor) -> Tensor:
    return patchify(pixels, 16, 3)[0]


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_trajectories(
    name: str,
    case: str,
    published: bool,
    pipes: dict[str, neounify.Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The image, the times and which steps are guided; of one case z, x̂ and v of every step."""
    recorded, facts = load_fixture(name, "t2i", FAMILY)
    assert facts["cases"].keys() == set(CASES)
    # Pixels as they were denoised; levels that are cut are compared in test_clips.py.
    monkeypatch.setattr("neounify.engine.generation.cut_levels", lambda pixels: pixels)
    steps, arguments = Steps(monkeypatch), _arguments(facts, case)
    result = pipes[name].generate(facts["prompt"], published_solver=published, **arguments)
    tolerance = TRAJECTORY if published else DPM
    assert_close(_rows(result.pixels), recorded[f"{case}.final"], tolerance)
    levels = np.asarray(result.images[0]).astype(int) - recorded[f"{case}.uint8"].numpy()
    assert np.abs(levels).max() <= 1
    times = 1 - torch.tensor(steps.t, dtype=torch.float64)
    assert_close(times, recorded[f"{case}.t"], 1e-6)
    assert [len(v) > 1 for v in steps.v] == facts["cases"][case]["guided"]
    assert torch.equal(steps.z[0], recorded["init_noise"])
    if f"{case}.z" not in recorded:
        return
    t_eps, guidance = pipes[name].config.flow.t_eps_sampling, arguments["guidance"]
    assert t_eps is not None
    for k, (z, t, v) in enumerate(zip(steps.z, steps.t, steps.v, strict=True)):
        assert_close(z, recorded[f"{case}.z"][k], tolerance)
        for branch in ("cond", "uncond"):
            clean = clean_from_velocity(v[branch], z, t, t_eps)
            assert_close(clean, recorded[f"{case}.x_{branch}"][k], tolerance)
        mixed = v["uncond"] + guidance * (v["cond"] - v["uncond"])
        assert_close(-mixed, recorded[f"{case}.v"][k], tolerance)
        for branch, positions in steps.positions[k].items():
            assert torch.equal(positions.float(), recorded[f"{branch}.noise_positions"])


def test_a_negative_prompt(name: str, pipes: dict[str, neounify.Pipeline]) -> None:
    """It stands where the empty caption of the unconditional prompt does."""
    pipe, (recorded, facts) = pipes[name], load_fixture(name, "t2v", FAMILY)
    negative = "blurry, static"
    if name == "tiny-f22":
        assert facts["cases"]["unipc_neg"]["negative_prompt"] == negative
    request = ImageRequest(
        prompt=facts["prompt"],
        width=64,
        height=48,
        sampling=ImageSampling().resolve(pipe.config, editing=False),
        negative_prompt=negative,
    )
    ids = branch_prompt(pipe.processor, request, "uncond").ids([], -1)
    if name == "tiny-f22":
        assert ids == recorded["unipc_neg.uncond.ids"].tolist()
    _, facts = load_fixture(name, "t2i", FAMILY)
    arguments = _arguments(facts, "none")
    steered = pipe.generate(facts["prompt"], negative_prompt=negative, **arguments)
    plain = pipe.generate(facts["prompt"], **arguments)
    assert not torch.equal(steered.pixels, plain.pixels)
