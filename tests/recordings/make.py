"""Record what two small models compute, by the float64 reference; the tests beside this compare.

    PYTHONPATH=src:tests .venv/bin/python tests/recordings/make.py

A model's folder that exists keeps its weights; remove it for new ones. Of the package the script
uses the random models, the saving and loading of their folders, and the tokenizer. Logits,
keys and values, clean images, steps and derivatives are the reference's, and the rules of time,
noise and guidance are written out below.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

import neounify
from neounify.config import CheckpointDefaults, FlowConfig, MlpConfig, ModelConfig
from neounify.text import byte_tokenizer
from support import reference
from support.models import Maker, facts_of, random_model, weights_of
from support.reference import Array, Facts, Noisy, Weights

FOLDER = Path(__file__).parent
SYSTEM, PROMPT = "Draw.", "a red circle"
WIDTH, HEIGHT, STEPS, GUIDANCE, SHIFT = 24, 16, 4, 3.0, 2.0
T_EPS, T_EPS_TRAINING = 0.02, 0.05

SHARED: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 264,
    "patch_size": 4,
    "merge": 2,
    "vision_hidden_size": 8,
    "flow_head_width": 24,
    "flow": FlowConfig(noise_scale_base_tokens=4, noise_scale=2.0),
    "sampling": CheckpointDefaults(
        image_size=(WIDTH, HEIGHT), trained_sizes=((WIDTH, HEIGHT),), steps=STEPS
    ),
}
CONFIGS = {
    "dense": ModelConfig(
        hidden_size=24,
        head_dim=16,
        und_mlp=MlpConfig(width=40),
        gen_mlp=MlpConfig(width=40),
        attention_bias=True,
        **SHARED,
    ),
    "sparse": ModelConfig(
        hidden_size=16,
        head_dim=8,
        und_mlp=MlpConfig(
            width=24, num_experts=3, experts_per_token=2, expert_width=8, sparse=(False, True)
        ),
        gen_mlp=MlpConfig(
            width=24, num_experts=3, experts_per_token=1, expert_width=12, sparse=(True, True)
        ),
        tie_embeddings=True,
        image_head="pixel",
        **SHARED,
    ),
}


def documents(config: ModelConfig, seed: int) -> list[list[reference.Span]]:
    """A prompt with an image to prefill, and a mixed document with a noisy image to train on."""
    maker = Maker(random.Random(seed), config)
    prompt = [maker.text(5), *maker.clean((2, 2)), maker.text(4)]
    mixed = [maker.text(3), *maker.clean((1, 2)), maker.text(2), *maker.noisy((2, 2))]
    return [prompt, mixed]


def loss(answer: reference.Answer, labels: Array, noisy: Noisy, target: Array) -> float:
    """Mean cross-entropy of the und tokens' labels, plus the mean squared error of the velocity."""
    nats = [
        math.log(np.exp(row - row.max()).sum()) + row.max() - row[label]
        for row, label in zip(answer.logits, labels, strict=True)
    ]
    error = (answer.clean[0] - target) / max(1 - noisy.t, T_EPS_TRAINING)
    return float(np.mean(nats) + (error**2).mean())


def direction(shape: tuple[int, ...]) -> Array:
    """Along which a weight is moved: cos(1), cos(2), … in row-major order."""
    return np.cos(1.0 + np.arange(math.prod(shape))).reshape(shape)


def derivatives(
    document: list[reference.Span], labels: Array, target: Array, weights: Weights, facts: Facts
) -> dict[str, float]:
    """By weight, the loss's derivative along `direction`, from central differences."""
    noisy = document[-1]
    assert isinstance(noisy, Noisy)
    by_name: dict[str, float] = {}
    for name, weight in weights.items():
        along = direction(weight.shape)
        step = 1e-4 / float(np.linalg.norm(along))
        ends = []
        for signed in (step, -step):
            moved = {**weights, name: weight + signed * along}
            ends.append(loss(reference.forward([document], moved, facts)[0], labels, noisy, target))
        by_name[name] = (ends[0] - ends[1]) / (2 * step)
    return by_name


def times() -> list[float]:
    """t from 0 to 1, bent towards noise: u ← S·u / (1 + (S - 1)·u) of u = 1 - t."""
    us = [1 - n / STEPS for n in range(STEPS + 1)]
    return [1 - SHIFT * u / (1 + (SHIFT - 1) * u) for u in us]


def trajectory(
    prompts: list[list[int]], noise: Array, sigma: float, weights: Weights, facts: Facts
) -> tuple[Array, Array]:
    """The clean images predicted on the way, [steps, 3, H, W], and the final one, [3, H, W]."""
    z, predicted = noise, []
    for t, after in zip(times()[:-1], times()[1:], strict=True):
        remaining = max(1 - t, T_EPS)
        span = Noisy(z, "image", t, sigma)
        answers = reference.forward([[reference.Text(p), span] for p in prompts], weights, facts)
        cond, uncond = ((answer.clean[0] - z) / remaining for answer in answers)
        v = uncond + GUIDANCE * (cond - uncond)
        predicted.append(z + v * remaining)
        z = z + (after - t) * v
    return np.stack(predicted), z


def prompt_ids(tokenizer: Any) -> list[list[int]]:
    """Ids of the prompt with the system message, and of the empty one, as published."""

    def ids(*parts: str) -> list[int]:
        special = {"<|im_start|>", "<|im_end|>", "<think>", "</think>", "<img>"}
        return [
            i
            for part in parts
            for i in ([tokenizer.id(part)] if part in special else tokenizer.encode(part))
        ]

    start, end = "<|im_start|>", "<|im_end|>"
    answer = (start, "assistant\n")
    thought = ("<think>", "\n\n", "</think>", "\n\n", "<img>")
    return [
        ids(
            *(start, f"system\n{SYSTEM}", end, "\n"),
            *(start, f"user\n{PROMPT}", end, "\n"),
            *(*answer, *thought),
        ),
        ids(start, "user\n", end, "\n", *answer, "<img>"),
    ]


def record(name: str, config: ModelConfig, seed: int, folder: Path = FOLDER) -> None:
    """Write the arrays of the model in its folder, created with random weights if missing."""
    tokenizer = byte_tokenizer()
    if not (folder / name).exists():
        pipe = neounify.Pipeline(random_model(config, seed), tokenizer, system_message=SYSTEM)
        pipe.save(folder / name)
    model = neounify.load(folder / name, dtype="float32").model
    weights, facts = weights_of(model), facts_of(config)
    numbers = np.random.default_rng(seed)

    prompt, mixed = documents(config, seed)
    answer, trained = reference.forward([prompt, mixed], weights, facts)
    labels = numbers.integers(0, config.vocab_size, len(trained.logits))
    noisy = mixed[-1]
    assert isinstance(noisy, Noisy)
    target: Array = np.asarray(numbers.normal(size=noisy.pixels.shape))

    tokens = WIDTH * HEIGHT // config.token_size**2
    scale = min(
        config.flow.noise_scale * math.sqrt(tokens / config.flow.noise_scale_base_tokens),
        config.flow.noise_scale_max,
    )
    noise = (numbers.normal(size=(3, HEIGHT, WIDTH)) * scale).astype(np.float32)
    ids = prompt_ids(tokenizer)
    predicted, final = trajectory(
        ids, noise.astype(np.float64), scale / config.flow.noise_scale_max, weights, facts
    )
    arrays = {
        "prompt.logits": answer.logits,
        "prompt.keys": np.stack([kv.keys for kv in answer.kv]),
        "prompt.values": np.stack([kv.values for kv in answer.kv]),
        "mixed.logits": trained.logits,
        "mixed.clean": trained.clean[0],
        "mixed.labels": labels,
        "mixed.target": target,
        "image.noise": noise,
        "image.predicted": predicted,
        "image.final": final,
    }
    for group, spans in (("prompt", prompt), ("mixed", mixed)):
        for number, span in enumerate(spans):
            value = span.ids if isinstance(span, reference.Text) else span.pixels
            arrays[f"{group}.span{number}"] = np.asarray(value)
    whole = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    save_file(
        {k: v if v.dtype.kind == "i" else v.astype(np.float32) for k, v in whole.items()},
        folder / f"{name}.safetensors",
    )
    facts_file = {
        "seed": seed,
        "prompt_ids": ids,
        "t": noisy.t,
        "noise": noisy.noise,
        "derivatives": derivatives(mixed, labels, target, weights, facts),
    }
    (folder / f"{name}.json").write_text(json.dumps(facts_file, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    for seed, (name, config) in enumerate(CONFIGS.items()):
        record(name, config, seed)


if __name__ == "__main__":
    main()
