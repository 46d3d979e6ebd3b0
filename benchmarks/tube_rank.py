"""Clips through a linear bottleneck: how many numbers a tube needs to pass the checker.

    python -m benchmarks.tube_rank --ranks 128 192 256

A linear head of width D gives tubes of at most D dimensions. The best ones for a set of clips are
its principal components: true clips, projected to so many, go through the checker. Prints, for each
rank, how many pass and the PSNR in dB of the tubes that are not flat.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray

from neounify.image.clips import rows_to_frames, tube_rows
from neounify.motion.bench import check_motion
from neounify.motion.world import (
    MotionScene,
    motion_config,
    motion_facts,
    render_motion,
    sample_motion,
)
from neounify.scenes.world import sample_rng

CONFIG = motion_config("default")
FRAMES, TUBE_FRAMES = 8, 4
FLAT = 0.05
"""Standard deviation of the values (-1 to 1) of a tube below which it counts as flat."""


def scenes(seed: int, number: int) -> list[MotionScene]:
    """Clips of the world, all of one length."""
    return [sample_motion(sample_rng(seed, n), CONFIG, frames=FRAMES) for n in range(number)]


def tubes_of(scene: MotionScene, side: int) -> NDArray[np.float32]:
    """The tubes of a clip, values from -1 to 1."""
    clip = torch.from_numpy(render_motion(scene, CONFIG)).movedim(-1, 1) / 127.5 - 1
    return np.asarray(tube_rows(clip, side, TUBE_FRAMES), np.float32)


def frames_of(tubes: NDArray[np.float32], side: int) -> NDArray[np.uint8]:
    """The frames of tubes, uint8."""
    cells = CONFIG.side // side
    frames = rows_to_frames(torch.from_numpy(tubes), cells, cells, side, TUBE_FRAMES)
    return np.asarray(((frames.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1))


def main() -> None:
    """Parse the command line, project, check, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 192, 256])
    parser.add_argument("--side", type=int, default=16, help="pixels of a tube's side")
    parser.add_argument("--fitted", type=int, default=500, help="clips that give the components")
    parser.add_argument("--cases", type=int, default=60, help="other clips that are checked")
    options = parser.parse_args()
    known = np.concatenate([tubes_of(s, options.side) for s in scenes(5, options.fitted)])
    mean = known.mean(0)
    _, components = np.linalg.eigh((known - mean).T @ (known - mean))
    cases = scenes(6, options.cases)
    for rank in options.ranks:
        basis, right, errors = components[:, -rank:], 0, []
        for scene in cases:
            tubes = tubes_of(scene, options.side)
            projected = (tubes - mean) @ basis @ basis.T + mean
            facts = motion_facts(scene, background=True)
            right += check_motion(facts, frames_of(projected, options.side), CONFIG).correct
            errors.append(((projected - tubes) ** 2)[tubes.std(1) > FLAT])
        psnr = 10 * np.log10(4 / np.concatenate(errors).mean())
        print(f"rank {rank}: {right} of {len(cases)} pass, {psnr:.1f} dB")


if __name__ == "__main__":
    main()
