"""Reconstruction: how much of an image an edit that changes nothing preserves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neounify.evaluate.metrics import psnr, ssim
from neounify.scenes.bench.category import Example, Pixels
from neounify.scenes.bench.checks import Verdict
from neounify.scenes.bench.prompts import is_held_out_turn
from neounify.scenes.world.draw import sample_rng
from neounify.scenes.world.edits import KEEP_REQUESTS
from neounify.scenes.world.lexicon import Language
from neounify.scenes.world.scene import Scene, SceneConfig, Split, sample_scene

MIN_PSNR = 30.0
"""PSNR in dB that a copy must reach."""
_STREAM = 600


@dataclass(frozen=True)
class CopyCase:
    """A scene to be generated again unchanged."""

    scene: Scene
    request: str
    held_out: bool


def copy_cases(
    config: SceneConfig, number: int = 200, seed: int = 0, language: Language = "en"
) -> tuple[CopyCase, ...]:
    """Copies in alternating wordings, every fourth of a scene held out of training."""
    requests = KEEP_REQUESTS[language]
    cases = []
    for index in range(number):
        held_out = is_held_out_turn(index)
        split: Split = "held_out" if held_out else "train"
        scene = sample_scene(sample_rng(seed, _STREAM, index), config, split=split)
        cases.append(CopyCase(scene, requests[index % len(requests)], held_out))
    return tuple(cases)


def check_copy(source: Pixels, copy: Pixels) -> Verdict:
    """Whether a copy is as near to its source as `MIN_PSNR`."""
    return Verdict({f"psnr >= {MIN_PSNR:.0f} dB": psnr(source, copy) >= MIN_PSNR})


def likeness(examples: Sequence[Example]) -> dict[str, float]:
    """PSNR in dB (mean and median) and mean SSIM of copies."""
    pairs = [(e.source, e.image) for e in examples]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    errors = [psnr(a, b) for a, b in both]
    return {
        "psnr": float(np.mean(errors)),
        "median_psnr": float(np.median(errors)),
        "ssim": float(np.mean([ssim(a, b) for a, b in both])),
    }
