"""Clips against the recorded arrays of PixelUMM: positions, masks, rows, answers, videos."""

from __future__ import annotations

import pytest
import torch

from neounify.model import Document, Image, Layout, Noise, Text
from neounify.model.parts import GEN, UND
from support.golden import load_fixture, needs_golden

pytestmark = needs_golden


def test_positions_of_text_images_and_clips() -> None:
    recorded, facts = load_fixture("common", "positions", "pixelumm")
    for name, span in (("text", Text(5)), ("image_2x3", Image(2, 3))):
        positions = Layout([Document((span,), start_t=7)])[UND].positions.T
        assert positions.dtype == recorded[name].dtype
        assert torch.equal(positions, recorded[name])
    assert Noise(2, 3).next_t(7) == facts["after_image"]


@pytest.mark.parametrize("fps", [24, 12, 30, 16, 60])
def test_positions_at_every_frame_rate(fps: int) -> None:
    recorded, facts = load_fixture("common", "positions", "pixelumm")
    clip = Noise(2, 3, 3, 24 / fps)
    positions = Layout([Document((clip,), start_t=7)])[GEN].positions.T
    assert torch.equal(positions.float(), recorded[f"video_3x2x3_fps{fps}"])
    assert clip.next_t(7) == facts["video"][str(fps)]["next"]
