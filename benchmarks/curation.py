"""`python -m benchmarks.curation`: speed of curation.

Stages 1 to 6 on made JPEGs, in seconds of the processor, so that other work on the machine counts
little; pairs of near copies among random hashes by their number, with the exponent of their growth
and what it means for 10^8; memory of the process at its highest.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import describe_machine
from neounify.curate.measure import measure_unit, measured_rows
from neounify.curate.near import BANDS, band_pairs
from neounify.curate.recipe import CurateRecipe, recipe_from_table
from neounify.curate.seconds import Stopwatch
from neounify.curate.units import containers_of, take_inventory, units_of

IMAGES = {512: 150, 1024: 50}
"""Images of each side that are measured."""
HASHES = (10**4, 10**5, 10**6, 3 * 10**6)
ALL_BANDS = 10**6
"""Hashes up to which all bands are measured; of more one, which stands for the 16."""
GOAL_HASHES, GOAL_HOURS, GOAL_SPEED = 10**8, 12, 150
PLANTED = 100
LONG_RUN, LONG_FILES, LONG_SIDE = 20_000, 500, 96
"""Images of the long run, the files that they repeat, and their side."""


def photo(side: int, seed: int) -> bytes:
    """A JPEG of patches of several sizes with grain, of about 2 bits a pixel."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3), np.float32)
    for patch in (4, 12, 40, side // 4):
        values = (rng.random((patch, patch, 3)) * 255).astype(np.uint8)
        grown = Image.fromarray(values).resize((side, side), Image.Resampling.BICUBIC)
        total += np.asarray(grown, np.float32) / 4
    total += rng.normal(0, 6, total.shape)
    buffer = io.BytesIO()
    Image.fromarray(np.clip(total, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def folder_of(side: int, count: int, folder: Path) -> CurateRecipe:
    """A recipe of JSON lines with `count` images."""
    lines = []
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(photo(side, number))
        turns = [{"from": "human", "value": f"a view of {number}"}]
        turns.append({"from": "gpt", "value": "<image>"})
        lines.append(json.dumps({"conversations": turns, "image": f"{number}.jpg"}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    source = {"name": "made", "path": str(folder / "samples.jsonl")}
    return replace(recipe_from_table({"sources": [source]}), measure="all")


def stage_speed(side: int, count: int) -> dict[str, float]:
    """Images a second of one core for stages 1 to 6 and the text, and the mean file size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder_of(side, count, folder)
        container = containers_of(recipe.sources)[0]
        unit = units_of(container, take_inventory(container), recipe)[0]
        size = sum(path.stat().st_size for path in folder.glob("*.jpg")) / count
        begin, clock = time.process_time(), time.perf_counter()
        rows = list(measured_rows(unit, recipe, Stopwatch()))
        seconds, passed = time.process_time() - begin, time.perf_counter() - clock
    assert all(row.images[0].hash is not None for row in rows)
    return {
        "side": side,
        "images_per_core_second": count / seconds,
        "images_per_second": count / passed,
        "mean_bytes": size,
    }


def long_run() -> dict[str, float]:
    """Memory of this process, in MiB, over many units of small images, all of them measured."""
    with tempfile.TemporaryDirectory() as name:
        recipe = folder_of(LONG_SIDE, LONG_FILES, Path(name))
        path = recipe.sources[0].data.path
        lines = Path(path).read_text()
        Path(path).write_text(lines * (LONG_RUN // LONG_FILES))
        (container,) = containers_of(recipe.sources)
        units = units_of(container, take_inventory(container), recipe)
        megabytes = []
        for unit in units:
            measure_unit(unit, recipe, Path(name) / "part.parquet")
            megabytes.append(_resident())
    steady = megabytes[len(megabytes) // 4 :]
    return {
        "images": LONG_RUN,
        "side": LONG_SIDE,
        "after_a_quarter_mib": steady[0],
        "at_the_end_mib": steady[-1],
        "highest_mib": max(megabytes),
    }


def _resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def near_seconds(count: int) -> dict[str, float]:
    """Seconds of one core for all bands of random hashes with planted copies 31 bits apart."""
    rng = np.random.default_rng(count)
    words = rng.integers(0, 2**64, (count, 4), dtype=np.uint64)
    for number in range(PLANTED):
        bits = np.unpackbits(words[number].view(np.uint8))
        bits[rng.choice(256, 31, replace=False)] ^= 1
        words[count - 1 - number] = np.packbits(bits).view(np.uint64)
    band_pairs(words[:1000], 0, 31, 1)  # compiles
    begin = time.process_time()
    bands = BANDS if count <= ALL_BANDS else 1
    pairs = sum(len(band_pairs(words, band, 31, 1)) for band in range(bands))
    seconds = (time.process_time() - begin) * BANDS / bands
    assert bands < BANDS or pairs == PLANTED, pairs
    comparisons = count**2 / 2**16 * BANDS * 17 / 2
    return {"hashes": count, "core_seconds": seconds, "per_second": comparisons / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curation", description=__doc__)
    parser.add_argument("--hashes", type=int, default=max(HASHES), help="largest number of hashes")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    speeds = [stage_speed(side, count) for side, count in IMAGES.items()]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for speed in speeds:
        print(
            f"{speed['side']:.0f}²: {speed['images_per_core_second']:.0f} images a second and core "
            f"({speed['mean_bytes'] / 1000:.0f} kB each); aim at 512²: {GOAL_SPEED}"
        )
    print(f"memory of the worker at its highest: {memory:.0f} MiB")
    long = long_run()
    print(
        f"{long['images']:,} images of {long['side']}²: {long['after_a_quarter_mib']:.0f} MiB at "
        f"a quarter, {long['at_the_end_mib']:.0f} at the end, {long['highest_mib']:.0f} at most"
    )
    rows = [near_seconds(count) for count in HASHES if count <= arguments.hashes]
    for row in rows:
        print(
            f"{row['hashes']:>10,.0f} hashes: {row['core_seconds']:8.2f} core seconds, "
            f"{row['per_second'] / 1e9:.2f} · 10^9 comparisons a second"
        )
    before, last = rows[-2:]
    slope = math.log(last["core_seconds"] / before["core_seconds"]) / math.log(
        last["hashes"] / before["hashes"]
    )
    # Comparisons grow with the square, all else slower, so this is an upper bound.
    hours = last["core_seconds"] * (GOAL_HASHES / last["hashes"]) ** 2 / 3600
    print(f"exponent of the last step {slope:.2f}; by the square, 10^8 take {hours:.1f} core hours")
    print(f"aim: {GOAL_HOURS}")
    if arguments.json:
        document = {
            "machine": describe_machine(),
            "stages": speeds,
            "memory_mib": memory,
            "long_run": long,
            "near": rows,
            "exponent": slope,
            "hours_for_1e8": hours,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
