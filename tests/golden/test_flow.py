"""Times, their embeddings and noise scales against the recorded arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neounify.checkpoint import load_model
from neounify.flow.path import initial_noise, noise_scale, timesteps
from neounify.model.embed import sinusoids
from support.golden import load_fixture, needs_golden
from support.models import assert_close, one_thread

__all__ = ["one_thread"]  # a fixture

TOLERANCE = 2e-5
pytestmark = [
    needs_golden,
    pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-pixelhead"]),
]
Checkpoint = Callable[[str], Path]


def test_embeddings_of_time_and_noise(name: str, golden_checkpoint: Checkpoint) -> None:
    recorded, facts = load_fixture(name, "schedule")
    model = load_model(golden_checkpoint(name), dtype="float32")
    assert model.config.flow.noise_scale_max == facts["noise_scale_max_value"]
    assert_close(sinusoids(recorded["t"]), recorded["t_freq"], TOLERANCE)
    assert_close(model.timestep_embedder(recorded["t"]), recorded["t_emb"], TOLERANCE)
    embedded = model.noise_scale_embedder(recorded["noise_in"])
    assert_close(embedded, recorded["noise_emb"], TOLERANCE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [8, 50])
def test_timesteps(name: str, steps: int, shift: float) -> None:
    recorded, _ = load_fixture(name, "schedule")
    wanted = recorded[f"timesteps.steps{steps}.shift{shift:.0f}"]
    assert_close(timesteps(steps, shift), wanted, 1e-7)


def test_noise_scales(name: str, golden_checkpoint: Checkpoint) -> None:
    """Every recorded size and mode."""
    _, facts = load_fixture(name, "schedule")
    flow = load_model(golden_checkpoint(name)).config.flow
    assert len(facts["noise_scale"]) == 4
    for mode, sizes in facts["noise_scale"].items():
        for size, wanted in sizes.items():
            width, height = map(int, size.split("x"))
            actual = noise_scale(
                width // 32 * (height // 32), dataclasses.replace(flow, noise_scale_mode=mode)
            )
            assert actual == pytest.approx(wanted, rel=1e-12)


def test_initial_noise(name: str) -> None:
    recorded, facts = load_fixture(name, "velocity")
    noise = initial_noise((1, 3, 96, 64), facts["noise_scale"], torch.Generator().manual_seed(7))
    assert_close(noise, recorded["noise"], 1e-6)
