"""Validate SceneBench's checker programs and time the world of scenes; prints JSON.

    python benchmarks/scenebench_validation.py --number 2000 --preset default

Each figure is the share of right judgements with its 95 % interval: true and worn renders, answers
and captions accepted, deliberately wrong ones rejected. On one core the full number takes about
ten minutes a preset.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from neounify.scenes.bench import perceive
from neounify.scenes.bench.validation import (
    validate_answers,
    validate_edits,
    validate_painting,
)
from neounify.scenes.world import PRESETS, SceneDataset, render, sample_rng, sample_scene
from neounify.scenes.world.scene import SceneConfig


def speeds(config: SceneConfig, number: int) -> dict[str, float]:
    """Scenes drawn and rendered, samples built, images perceived; each per second of CPU time."""
    # Scenes not rendered before, so that jittered worlds find no mask in the cache.
    scenes = [sample_scene(sample_rng(10**6, index), config) for index in range(number)]
    dataset = SceneDataset(0, config)

    def rate(work: Callable[[int], object], count: int) -> float:
        start = time.process_time()
        for index in range(count):
            work(index)
        return round(count / (time.process_time() - start), 1)

    drawn = rate(lambda i: sample_scene(sample_rng(1, i), config), number)
    rendered = rate(lambda i: render(scenes[i], config), number)
    images = [render(scene, config) for scene in scenes]
    return {
        "scenes drawn per s": drawn,
        "scenes rendered per s": rendered,
        "samples built per s": rate(lambda i: dataset[i], number),
        "images perceived per s": rate(lambda i: perceive(images[i], config), number),
    }


def main() -> None:
    """Parse the command line, validate, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=2000, help="cases per category")
    parser.add_argument("--preset", choices=list(PRESETS), default="default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = PRESETS[options.preset]
    start = time.perf_counter()
    painting = validate_painting(config, options.number, options.seed)
    texts = validate_answers(config, options.number, options.seed)
    edits = validate_edits(config, options.number, options.seed)
    result = {
        "preset": options.preset,
        "number": options.number,
        "seed": options.seed,
        "speed": speeds(config, min(2000, options.number)),
        "painting": {
            category: {name: rate.to_json() for name, rate in rates.items()}
            for category, rates in painting.items()
        },
        "texts": {name: rate.to_json() for name, rate in texts.items()},
        "edits": {name: rate.to_json() for name, rate in edits.items()},
        "seconds": round(time.perf_counter() - start, 1),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
