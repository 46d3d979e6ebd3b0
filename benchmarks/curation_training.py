"""The bundled model trained on data as it was and as curation keeps it, compared on unseen scenes.

Both runs have the same recipe, steps and seeds. The measure is the image loss of a scene given its
caption, with the same noise and times for both; differences are paired by scene.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.timing import describe_machine
from neounify.bundled import bundled_model
from neounify.data import Sample, SampleImage, SampleText, Turn
from neounify.data.encode import Encoder
from neounify.data.loader import make_pack
from neounify.evaluate.intervals import Mean, PairedMeans
from neounify.pipeline import load
from neounify.train.loss import Counts, LossConfig, loss_of

STEPS, RATE, SIDE = 40, 3e-4, 64
SCENES, DRAWS, SEED = 60, 4, 77

RECIPE = """
name = "{name}"
seed = {seed}
workers = 0

[model]
checkpoint = "{checkpoint}"

[[stages]]
name = "sft"
steps = {steps}
ema = 0.0
sample_every = 100000
optimizer = {{ learning_rate = {rate} }}
data = [{data}]

[stages.method]
kind = "supervised"
tokens_per_pack = 1024
target_pixels = [{area}, {area}]
"""


def run(name: str, data: str, folder: Path, seed: int) -> Path:
    """Train on a source of data; returns the folder of the model."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe, out = folder / f"{name}-{seed}.toml", folder / f"{name}-{seed}"
    settings = {"name": name, "seed": seed, "checkpoint": bundled_model(), "steps": STEPS}
    recipe.write_text(RECIPE.format(**settings, rate=RATE, data=data, area=SIDE * SIDE))
    command = [sys.executable, "-m", "neounify", "train", str(recipe), "--out", str(out)]
    subprocess.run([*command, "--threads", "1", "--quiet"], check=True)
    return out / "model"


@torch.inference_mode()
def losses(model_folder: Path, scenes: list[tuple[Image.Image, str]]) -> list[float]:
    """The image loss of every scene, by DRAWS noises that depend on its number alone."""
    pipeline = load(model_folder, dtype="float32")
    encoder = Encoder(
        config=pipeline.config,
        tokenizer=pipeline.tokenizer,
        system_message=pipeline.processor.system_message,
        noise_draws=DRAWS,
    )
    config = LossConfig(text_weight=0.0)
    results = []
    for number, (image, text) in enumerate(scenes):
        small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
        answer = Turn("assistant", (SampleImage(small, "target"),))
        sample = Sample("t2i", (Turn("user", (SampleText(text),)), answer))
        pack = make_pack([encoder(sample, np.random.default_rng(0))])
        generator = torch.Generator().manual_seed(number)
        loss = loss_of(pipeline.model, pack, config, Counts.of([pack]), generator)
        results.append(float(loss))
    return results


def compare(raw: Path, shards: Path, folder: Path, seeds: Sequence[int]) -> Any:
    """Losses after training on raw JSON lines and on curated shards; printed, and as plain data."""
    from benchmarks.curation_demo import scenes

    unseen = list(scenes(SCENES, SEED))
    sources = {
        "uncurated": f'{{ kind = "jsonl", path = "{raw}" }}',
        "curated": f'{{ kind = "shards", path = "{shards}" }}',
    }
    every = {
        name: np.array([losses(run(name, data, folder, seed), unseen) for seed in seeds])
        for name, data in sources.items()
    }
    # Noises and scenes are the same for all seeds, so a scene counts once, by its mean.
    means = {name: values.mean(axis=0).tolist() for name, values in every.items()}
    before = losses(bundled_model(), unseen)
    difference = PairedMeans.of(means["uncurated"], means["curated"])
    by_seed = (every["uncurated"] - every["curated"]).mean(axis=1)
    results = {
        "before": Mean.of(before).to_json(),
        **{name: Mean.of(values).to_json() for name, values in means.items()},
        "uncurated_minus_curated": asdict(difference),
        "uncurated_minus_curated_by_seed": by_seed.tolist(),
        "scenes": SCENES,
        "seeds": list(seeds),
        "steps": STEPS,
        "machine": describe_machine(),
    }
    print(json.dumps(results, indent=1))
    return results
