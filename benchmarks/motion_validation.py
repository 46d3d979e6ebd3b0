"""Validate the checker of clips and time the world of moving shapes; prints JSON.

    python benchmarks/motion_validation.py --number 1000 --worn 200 --preset default

Each figure is the share of right judgements with its 95 % interval: true and worn clips, their
continuations and answers accepted, wrong ones rejected. This takes about a minute of one core.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise

from neounify.motion.bench.follow import follow
from neounify.motion.bench.validation import (
    validate_continuation,
    validate_motion,
    validate_motion_answers,
)
from neounify.motion.world import MOTION_PRESETS, MotionConfig, render_motion, sample_motion
from neounify.scenes.world import sample_rng


def speeds(config: MotionConfig, number: int) -> dict[str, float]:
    """Clips drawn, rendered and followed; each per second of CPU time."""
    times = [time.process_time()]
    scenes = [sample_motion(sample_rng(1, index), config) for index in range(number)]
    times.append(time.process_time())
    clips = [render_motion(scene, config) for scene in scenes]
    times.append(time.process_time())
    for clip in clips:
        follow(clip, config)
    times.append(time.process_time())
    drawn, rendered, followed = (round(number / (end - start), 1) for start, end in pairwise(times))
    return {
        "clips drawn per s": drawn,
        "clips rendered per s": rendered,
        "clips followed per s": followed,
    }


def main() -> None:
    """Parse the command line, validate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=1000, help="true clips, and wrong ones")
    parser.add_argument(
        "--worn", type=int, default=200, help="clips copied in every wear, continuations, answers"
    )
    parser.add_argument("--preset", choices=list(MOTION_PRESETS), default="default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = MOTION_PRESETS[options.preset]
    few = (config, options.worn, options.seed)
    rates = (
        validate_motion(config, options.number, options.seed, options.worn)
        | validate_continuation(*few)
        | validate_motion_answers(*few)
    )
    result = {
        "preset": options.preset,
        "number": options.number,
        "worn": options.worn,
        "seed": options.seed,
        "speed": speeds(config, min(200, options.number)),
        "rates": {name: rate.to_json() for name, rate in rates.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
