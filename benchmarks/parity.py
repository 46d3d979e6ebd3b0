"""`make parity`: differences from the recorded arrays, as the README's table.

Needs the recordings beside the repository, or NEOUNIFY_GOLDEN naming their folder.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import neounify
from neounify.cache import SequenceCache
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import Text
from neounify.pipeline import Pipeline
from support.golden import checkpoint, golden_path, load_fixture

NAMES = ("tiny-dense", "tiny-moe", "tiny-pixelhead")
BOUNDS = {"single pass: logits, keys and values": 2e-5}
WHOLE = 1e-4

Differences = dict[str, list[float]]


def main() -> None:
    by_check: Differences = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for name in NAMES:
            pipe = neounify.load(checkpoint(name, Path(folder)))
            _prefill(pipe, name, by_check)
            _painting(pipe, name, by_check)
            _editing(pipe, name, by_check)
    print("| what | largest difference | bound |\n|---|---|---|")
    for what, differences in by_check.items():
        print(f"| {what} | {max(differences):.1e} | {BOUNDS.get(what, WHOLE):.0e} |")


def difference(ours: Tensor, recorded: Tensor) -> float:
    return ((ours - recorded).abs().max() / recorded.abs().max()).item()


@torch.inference_mode()
def _prefill(pipe: Pipeline, name: str, by_check: Differences) -> None:
    recorded, _ = load_fixture(name, "text")
    ids = recorded["input_ids"][0].tolist()
    cache = SequenceCache(pipe.config, len(ids), dtype=torch.float32, device=pipe.model.device)
    hidden = forward_und(pipe.model, [ModelInput(cache, (Text(len(ids)),), ids)])
    differences = by_check["single pass: logits, keys and values"]
    differences.append(difference(pipe.model.logits(hidden), recorded["logits"][0, -1:]))
    for layer in (0, 2):
        keys, values = cache.read(layer, len(ids))
        differences.append(difference(keys, recorded[f"cache.{layer}.k"][0]))
        differences.append(difference(values, recorded[f"cache.{layer}.v"][0]))


def _painting(pipe: Pipeline, name: str, by_check: Differences) -> None:
    recorded, info = load_fixture(name, "t2i")
    for case, parameters in info["cases"].items():
        out = pipe.generate(info["prompt"], **_sampling(parameters))
        by_check["text to image, whole trajectories"].append(
            difference(out.pixels, recorded[f"{case}.final"])
        )


def _editing(pipe: Pipeline, name: str, by_check: Differences) -> None:
    recorded, info = load_fixture(name, "it2i")
    for case, parameters in info["cases"].items():
        if not isinstance(parameters, dict) or case.endswith("bf16px"):
            continue
        group = case.split(".")[0]
        images = [golden_path("fixtures", "images", f"{i}.png") for i in info["images"][group]]
        guidance = {"image_guidance": parameters["img_cfg_scale"], "published_interval": True}
        out = pipe.edit(info["prompts"][group], images, **_sampling(parameters), **guidance)
        by_check["editing, whole trajectories"].append(
            difference(out.pixels, recorded[f"{case}.final"])
        )


def _sampling(parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "width": 64,
        "height": 96,
        "steps": parameters["num_steps"],
        "shift": parameters["timestep_shift"],
        "seed": parameters["seed"],
        "guidance": parameters["cfg_scale"],
        "guidance_norm": parameters.get("cfg_norm", "none"),
        "guidance_interval": tuple(parameters.get("cfg_interval", (0, 1))),
        "images_per_prompt": parameters.get("batch_size", 1),
    }


if __name__ == "__main__":
    main()
