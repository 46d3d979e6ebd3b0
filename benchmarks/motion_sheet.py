"""A sheet of clips of the world of moving shapes, each over its caption.

python -m benchmarks.motion_sheet --output docs/motion.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from neounify.image.contact_sheet import contact_sheet, strip
from neounify.motion.world import (
    MOTION_KINDS,
    motion_caption,
    motion_config,
    motion_facts,
    render_motion,
    sample_motion,
)
from neounify.scenes.world import sample_rng


def main() -> None:
    """Parse the command line, draw clips, write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    parser.add_argument("--number", type=int, default=14, help="clips, their kinds in turn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = motion_config("default")
    strips, captions = [], []
    for number in range(options.number):
        rng = sample_rng(options.seed, 530, number)
        kinds = [MOTION_KINDS[number % len(MOTION_KINDS)]]
        scene = sample_motion(rng, config, kinds=kinds, frames=8)
        strips.append(strip(render_motion(scene, config)))
        captions.append(motion_caption(motion_facts(scene), rng))
    passed = [True] * len(strips)
    contact_sheet(strips, captions, passed, columns=2, side=64, lines=1).save(options.output)


if __name__ == "__main__":
    main()
