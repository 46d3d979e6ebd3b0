"""Two small models against what the float64 reference computed for them, recorded by `make.py`."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

import neounify
from neounify.cache import SequenceCache
from neounify.checkpoint import to_published
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import Image, NeoUnify, Text
from neounify.text.template import image_prompt, unconditional_prompt
from recordings.make import (
    CONFIGS,
    GUIDANCE,
    HEIGHT,
    PROMPT,
    SHIFT,
    STEPS,
    T_EPS,
    T_EPS_TRAINING,
    WIDTH,
    direction,
    record,
)
from support import reference
from support.models import assert_close, exact, one_thread, pack, to_tokens
from support.reference import Clean, Noisy

__all__ = ["one_thread"]  # a fixture

FOLDER = Path(__file__).parent
SINGLE_PASS, TRAJECTORY = 2e-5, 1e-4
each = pytest.mark.parametrize("name", ["dense", "sparse"])


class Recording:
    """The arrays and facts of one model, and the documents they belong to."""

    def __init__(self, name: str) -> None:
        self.arrays = load_file(FOLDER / f"{name}.safetensors")
        self.facts: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text("utf-8"))

    def document(self, group: str) -> list[reference.Span]:
        spans: list[reference.Span] = []
        while (key := f"{group}.span{len(spans)}") in self.arrays:
            value = self.arrays[key]
            if not value.is_floating_point():
                spans.append(reference.Text(value.tolist()))
            elif group == "mixed" and len(spans) == 3:
                spans.append(Noisy(value.numpy(), "noisy", self.facts["t"], self.facts["noise"]))
            else:
                spans.append(Clean(value.numpy(), key))
        return spans


recording = cache(Recording)


@cache
def pipeline(name: str) -> neounify.Pipeline:
    return neounify.load(FOLDER / name, dtype="float32")


def prefilled(name: str, *, in_pieces: bool) -> tuple[NeoUnify, SequenceCache, Tensor]:
    """The model, a cache of the recorded prompt, and the hidden state of its last token."""
    model, spans = pipeline(name).model, recording(name).document("prompt")
    cache = SequenceCache(model.config, 4, dtype=torch.float32, device=torch.device("cpu"))
    first, image, last = spans
    assert isinstance(first, reference.Text)
    assert isinstance(image, Clean)
    assert isinstance(last, reference.Text)
    side = model.config.token_size
    grid = Image(image.pixels.shape[1] // side, image.pixels.shape[2] // side)
    pixels = torch.from_numpy(image.pixels)
    if not in_pieces:
        layout = (Text(len(first.ids)), grid, Text(len(last.ids)))
        inputs = [ModelInput(cache, layout, [*first.ids, *last.ids], [pixels])]
    else:
        inputs = [
            ModelInput(cache, (Text(len(first.ids)),), first.ids),
            ModelInput(cache, (grid,), [], [pixels]),
            *(ModelInput(cache, (Text(1),), [i]) for i in last.ids),
        ]
    with torch.no_grad():
        for item in inputs:
            hidden = forward_und(model, [item])
    return model, cache, hidden


@each
def test_logits_and_clean_images(name: str) -> None:
    recorded = recording(name)
    config = pipeline(name).config
    for group in ("prompt", "mixed"):
        packed = pack([recorded.document(group)], config, torch.float32)
        with torch.no_grad():
            logits, clean = packed.run(pipeline(name).model)
        assert_close(logits, recorded.arrays[f"{group}.logits"], SINGLE_PASS)
    assert clean is not None
    assert_close(clean, to_tokens(recorded.arrays["mixed.clean"].numpy(), config), SINGLE_PASS)


@each
@pytest.mark.parametrize("in_pieces", [False, True])
def test_kv_cache(name: str, in_pieces: bool) -> None:
    recorded = recording(name).arrays
    model, cache, hidden = prefilled(name, in_pieces=in_pieces)
    for layer in range(model.config.num_layers):
        keys, values = cache.read(layer, cache.length)
        assert_close(keys.transpose(0, 1), recorded["prompt.keys"][layer], SINGLE_PASS)
        assert_close(values.transpose(0, 1), recorded["prompt.values"][layer], SINGLE_PASS)
    with torch.no_grad():
        assert_close(model.logits(hidden)[0], recorded["prompt.logits"][-1], SINGLE_PASS)


@each
def test_prompts(name: str) -> None:
    pipe = pipeline(name)
    system = pipe.processor.system_message
    prompts = [
        image_prompt(pipe.tokenizer, PROMPT, system=system, think=False),
        unconditional_prompt(pipe.tokenizer, ""),
    ]
    assert [prompt.ids([], 0) for prompt in prompts] == recording(name).facts["prompt_ids"]


@each
def test_the_trajectory_of_an_image(name: str) -> None:
    recorded = recording(name).arrays
    predicted: list[Tensor] = []
    result = pipeline(name).generate(
        PROMPT,
        width=WIDTH,
        height=HEIGHT,
        steps=STEPS,
        guidance=GUIDANCE,
        shift=SHIFT,
        t_eps=T_EPS,
        noise=recorded["image.noise"][None],
        callback=lambda progress: predicted.append(progress.clean[0].clone()),
    )
    assert_close(torch.stack(predicted), recorded["image.predicted"], TRAJECTORY)
    assert_close(result.pixels[0], recorded["image.final"], TRAJECTORY)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients(name: str, dtype: torch.dtype) -> None:
    """Along the recorded direction of every weight."""
    recorded = recording(name)
    with exact() if dtype == torch.float64 else torch.enable_grad():
        model = neounify.load(FOLDER / name, dtype="float32").model.to(dtype).requires_grad_(True)
        packed = pack([recorded.document("mixed")], model.config, dtype)
        logits, clean = packed.run(model)
        assert clean is not None
        target = to_tokens(recorded.arrays["mixed.target"].numpy(), model.config)
        error = (clean - torch.from_numpy(target)) / max(1 - recorded.facts["t"], T_EPS_TRAINING)
        loss = cross_entropy(logits, recorded.arrays["mixed.labels"]) + error.square().mean()
        loss.backward()
    bound = 1e-4 if dtype == torch.float32 else 1e-7
    computed = {}
    for own_name, parameter in model.named_parameters():
        gradient = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad
        along = direction(tuple(parameter.shape))
        computed[to_published(own_name)] = (
            float((gradient.double().numpy() * along).sum()),
            float(gradient.norm() * np.linalg.norm(along)),
        )
    assert set(computed) == set(recorded.facts["derivatives"])
    for key, expected in recorded.facts["derivatives"].items():
        derivative, scale = computed[key]
        assert abs(derivative - expected) <= bound * scale + 1e-9, key


@pytest.mark.slow
def test_the_script_records_the_same_again(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "dense", tmp_path / "dense")
    record("dense", CONFIGS["dense"], 0, tmp_path)
    again, before = load_file(tmp_path / "dense.safetensors"), recording("dense").arrays
    assert again.keys() == before.keys()
    for key, value in before.items():
        torch.testing.assert_close(again[key], value, rtol=1e-6, atol=1e-6)
    facts = json.loads((tmp_path / "dense.json").read_text("utf-8"))
    assert facts["derivatives"] == pytest.approx(recording("dense").facts["derivatives"], 1e-4)
