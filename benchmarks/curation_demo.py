"""`python -m benchmarks.curation_demo`: a curation whose answers are known.

Made scenes of 256 × 256 pixels with grain, and planted among them: exact, near and cropped copies,
damaged, blurred and framed files, wrong captions, copies of texts, known bad files. The pipeline
runs with a hook of stage 10 that the bundled model answers; what it should have dropped and what it
dropped are compared. `--train` then trains the bundled model on the data as it was and as it is
kept, and compares losses on scenes that neither saw, with intervals.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from neounify.bundled import bundled_model
from neounify.curate import CurateRecipe, curate, recipe_from_table
from neounify.curate.captions import likelihood_gains
from neounify.curate.images import perceptual_hash
from neounify.pipeline import Pipeline, load
from neounify.scenes.world.facts import FULL_STYLE, facts_of
from neounify.scenes.world.language import caption
from neounify.scenes.world.render import render
from neounify.scenes.world.scene import sample_scene, scene_config

SIDE, READ_SIDE = 256, 64
GRAIN, SHADE, PATCHES = 7.0, 11.0, (3, 5, 9, 17, 33)
"""Luma values of the grain, and of shading by patches of several sizes: flat scenes have no sound
hash."""
APART = 64
"""Bits that the hashes of two scenes are apart at least."""
QUESTION = "Describe the image in detail."
GOALS = {"crop": 0.90}
"""Shares that have to be dropped; 0.99 of all other kinds."""
STAGES: dict[str, Any] = {
    "geometry": {"min_side": 128},
    "quality": {"min_entropy": 3.0},
    "match": {"hook": "benchmarks.curation_demo:CaptionMatch", "bound": -0.15, "recaption": -0.15},
}


@dataclass(frozen=True)
class Planted:
    """A sample and what should become of it: "kept", or the kind of its fault."""

    id: str
    content: bytes | None
    text: str
    kind: str


@lru_cache(maxsize=1)
def _pipeline() -> Pipeline:
    return load(bundled_model(), dtype="float32")


class CaptionMatch:
    """Score of a caption: nats a character by which it is likelier than the model's own caption.

    About 0 where both say the same of the image, far below where the caption is of another.
    """

    def __call__(self, images: Sequence[Image.Image | None], texts: Sequence[str]) -> list[float]:
        pipeline = _pipeline()
        small = [i.resize((READ_SIDE, READ_SIDE), Image.Resampling.BOX) for i in images if i]
        answers = pipeline.chat_batch([QUESTION] * len(small), small, max_new_tokens=96)
        scores = []
        for image, answer, text in zip(small, answers, texts, strict=True):
            theirs, ours = likelihood_gains(pipeline, image, [text, answer.text], QUESTION)
            scores.append((theirs - ours) / len(text))
        return scores


def scenes(count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """Grained scenes with their full captions, no two of which are near copies."""
    config, rng = scene_config("default"), np.random.default_rng(seed)
    hashes = np.zeros((0, 4), np.uint64)
    texts: set[str] = set()
    while len(hashes) < count:
        scene = sample_scene(rng, config)
        text = caption(facts_of(scene, config, FULL_STYLE))
        image = _grained(render(scene, config, SIDE), rng)
        words = np.frombuffer(perceptual_hash(image)[0], "<u8")
        apart = np.bitwise_count(hashes ^ words).sum(axis=1)
        if text not in texts and (apart >= APART).all():
            texts.add(text)
            hashes = np.concatenate([hashes, words[None]])
            yield image, text


def _grained(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    change = rng.normal(0, GRAIN, (SIDE, SIDE))
    for patches in PATCHES:
        shade = Image.fromarray(rng.integers(0, 256, (patches, patches), dtype=np.uint8))
        grown = shade.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        change += (np.asarray(grown, np.float32) / 127.5 - 1) * SHADE
    # Away from black and white, where half of it would be cut off.
    values = 40 + pixels * (175 / 255) + change[..., None]
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def captioned(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).text((6, 6), "(c) 2026", "white", stroke_width=1, stroke_fill="black")
    return image


def cropped(image: Image.Image) -> Image.Image:
    """Without 5 % of the area, evenly on all sides."""
    off = round(SIDE * (1 - 0.95**0.5) / 2)
    return image.crop((off, off, SIDE - off, SIDE - off))


NEAR: dict[str, Callable[[Image.Image], bytes]] = {
    "smaller": lambda image: png(image.resize((230, 230), Image.Resampling.BICUBIC)),
    "jpeg": lambda image: jpeg(image, 90),
    "grey": lambda image: png(image.convert("L").convert("RGB").resize((250, 250))),
    "caption": lambda image: jpeg(captioned(image), 95),
}


def planted(size: int, seed: int) -> tuple[list[Planted], list[str], list[str]]:
    """All samples, and the lists of SHA-256 and of hashes; `size` samples of every fault."""
    pool = list(scenes(18 * size, seed))
    good = [Planted(f"good-{n}", png(i), t, "kept") for n, (i, t) in enumerate(pool[: 9 * size])]
    rest = iter(pool[9 * size :])
    samples = list(good)
    for n in range(size):
        image, text = pool[n]
        samples.append(Planted(f"zz-exact-{n}", good[n].content, f"{text} once more", "exact"))
        for name, change in NEAR.items():
            samples.append(Planted(f"zz-{name}-{n}", change(image), f"{text}, {name}", "near"))
        samples.append(Planted(f"zz-crop-{n}", png(cropped(image)), f"{text}, cropped", "crop"))
    faults: dict[str, Callable[[Image.Image], bytes]] = {
        "damaged": lambda image: png(image)[: 1000 + 10 * size],
        "blurred": lambda image: png(image.filter(ImageFilter.GaussianBlur(3))),
        "framed": lambda image: png(ImageOps.expand(image, 40, (30, 60, 120))),
    }
    for kind, change in faults.items():
        for n in range(size):
            image, text = next(rest)
            samples.append(Planted(f"{kind}-{n}", change(image), text, kind))
    for n in range(3 * size):
        image, _ = next(rest)
        samples.append(Planted(f"wrong-{n}", png(image), _other(pool, n), "wrong caption"))
    texts = [" ".join(t for _, t in pool[3 * n : 3 * n + 4]) for n in range(size)]
    for n, text in enumerate(texts):
        samples.append(Planted(f"text-{n}", None, text, "kept"))
        samples.append(Planted(f"text-{n}-copy", None, f"{text.upper()}!", "text copy"))
    files, hashes = [], []
    for n in range(size):
        image, text = next(rest)
        files.append(hashlib.sha256(png(image)).hexdigest())
        samples.append(Planted(f"bad-file-{n}", png(image), text, "known bad"))
        image, text = next(rest)
        hashes.append(perceptual_hash(image)[0].hex())
        samples.append(Planted(f"bad-hash-{n}", jpeg(image, 90), text, "known bad"))
    return samples, files, hashes


def _other(pool: Sequence[tuple[Image.Image, str]], number: int) -> str:
    """The caption of another scene."""
    return pool[(7 * number + 3) % len(pool)][1]


def write(samples: Sequence[Planted], folder: Path) -> Path:
    folder.mkdir(parents=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as lines:
        for sample in samples:
            record: dict[str, Any] = {"id": sample.id}
            answer = "Noted."
            if sample.content is not None:
                (folder / f"{sample.id}.img").write_bytes(sample.content)
                record["image"], answer = f"{sample.id}.img", "<image>"
            turns = (("human", sample.text), ("gpt", answer))
            record["conversations"] = [{"from": who, "value": value} for who, value in turns]
            lines.write(json.dumps(record) + "\n")
    return folder / "samples.jsonl"


def recipe_of(path: Path, files: Sequence[str], hashes: Sequence[str]) -> CurateRecipe:
    """The recipe, with lists of known bad files beside the data."""
    lists = {"sha256": path.with_name("files.txt"), "hashes": path.with_name("hashes.txt")}
    for name, entries in zip(lists.values(), (files, hashes), strict=True):
        name.write_text("\n".join(entries) + "\n")
    known = {name: str(place) for name, place in lists.items()}
    table = {
        "name": "demonstration",
        "sources": [{"name": "made", "kind": "jsonl", "path": str(path)}],
        "stages": {**STAGES, "known": known},
        "samples_per_unit": 200,
    }
    return recipe_from_table(table)


def shares(samples: Sequence[Planted], out: Path) -> dict[str, tuple[int, int]]:
    """(samples dropped, samples) of every kind."""
    import pyarrow.parquet as pq

    verdicts: dict[str, str] = {}
    for path in sorted((out / "table").glob("*.parquet")):
        for row in pq.read_table(path, columns=["id", "location", "verdict"]).to_pylist():
            verdicts[row["id"]] = row["verdict"]
    counts: dict[str, tuple[int, int]] = {}
    for sample in samples:
        dropped, total = counts.get(sample.kind, (0, 0))
        counts[sample.kind] = (dropped + (verdicts[sample.id] == "dropped"), total + 1)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curation_demo", description=__doc__)
    parser.add_argument("--size", type=int, default=20, help="samples of every fault")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/curation-demo"))
    parser.add_argument("--train", action="store_true", help="train on both and compare")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the training on each")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    samples, files, hashes = planted(arguments.size, seed=1)
    path = write(samples, arguments.out / "in")
    out = arguments.out / "curated"
    summary = curate(recipe_of(path, files, hashes), out, workers=arguments.workers)
    print(json.dumps(summary.dropped, indent=1))
    results: dict[str, Any] = {"reasons": summary.dropped["made"], "kinds": {}}
    for kind, (dropped, total) in shares(samples, out).items():
        results["kinds"][kind] = [dropped, total]
        share = dropped / total
        goal = 1 - GOALS.get(kind, 0.99) if kind == "kept" else GOALS.get(kind, 0.99)
        met = share <= goal + 1e-9 if kind == "kept" else share >= goal
        print(f"{kind:14} {dropped:4} of {total:4} dropped {'ok' if met else 'BAD'}")
    if arguments.train:
        from benchmarks.curation_training import compare

        folder, seeds = arguments.out / "training", range(arguments.seeds)
        results["training"] = compare(path, out / "shards", folder, seeds)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
