"""The package on a GPU, where there is one: the recordings of the reference, tasks, training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import neounify
from engine.test_graphs import engine_tokens
from neounify.bundled import bundled_model
from neounify.cache import new_cache
from neounify.checkpoint import CheckpointFolder
from neounify.checkpoint.quantise_files import quantise_checkpoint
from neounify.config import TextSampling
from neounify.decode.sampler import SamplingBatch, SamplingState
from neounify.engine.denoiser import Denoiser, make_job
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.evaluate.parity import output_errors
from neounify.flow.sampling import ImageSampling
from neounify.model import Text
from neounify.model.layout import Grid
from neounify.quant.backends import W8A8_ROWS, choose_backend
from neounify.quant.formats import FourBits, Fp8Rows, Int8Rows, PublishedFormat
from neounify.quant.linear import QuantLinear
from neounify.text.tokenizer import Tokenizer
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import Recipe
from neounify.train.setup import build_setup
from neounify.train.state import saved_states
from recordings.make import GUIDANCE, HEIGHT, PROMPT, SHIFT, STEPS, T_EPS, WIDTH
from recordings.test_recordings import FOLDER, recording
from support.models import assert_close
from support.post_training import BASE, LORA, METHODS, described
from train.test_trainer import recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
"""Without a GPU nothing here runs; docs/log.md says where and when it last did."""

RELATIVE, HALF = 2e-3, 0.1
"""Relative error of a trajectory in float32, whose sums run in another order than on the CPU, and
in bfloat16, whose trajectories are up to 0.034 off on the CPU."""
PRESETS = {"int8": "w8a8", "fp8": "torch", "w4": "w8a8"}
"""Preset → the backend that rounds x as a GPU does, on the CPU too."""
FORMATS: list[PublishedFormat] = [Int8Rows(), Int8Rows(64), Fp8Rows(), FourBits(64)]


@pytest.fixture(scope="module")
def pipe() -> neounify.Pipeline:
    return neounify.load(bundled_model(), device="cuda")


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("attention", "dtype"),
    [
        ("auto", "float32"),
        ("blocks", "float32"),
        ("sdpa", "float32"),
        ("graphs", "float32"),
        ("graphs", "bfloat16"),
        ("varlen", "bfloat16"),
    ],
)
def test_the_recorded_trajectory_of_an_image(name: str, attention: str, dtype: str) -> None:
    recorded = recording(name).arrays
    pipe = neounify.load(FOLDER / name, dtype=dtype, device="cuda", attention=attention)
    result = pipe.generate(
        PROMPT,
        width=WIDTH,
        height=HEIGHT,
        steps=STEPS,
        guidance=GUIDANCE,
        shift=SHIFT,
        t_eps=T_EPS,
        noise=recorded["image.noise"][None].to("cuda"),
    )
    relative = RELATIVE if dtype == "float32" else HALF
    assert_close(result.pixels[0].cpu(), recorded["image.final"], relative)


@pytest.mark.parametrize("memory", ["stream", "layers"])
def test_modes_of_memory_give_the_same_bits(memory: Any) -> None:
    resident = 2 if memory == "layers" else None
    whole, some, on_cpu = (
        neounify.load(bundled_model(), dtype="float32", **options)
        for options in (
            {"device": "cuda", "memory": "all"},
            {"device": "cuda", "memory": memory, "resident_layers": resident},
            {"device": "cpu"},
        )
    )
    results = [pipe.generate("a red circle", seed=1, steps=4) for pipe in (whole, some, on_cpu)]
    pixels = [result.pixels.cpu() for result in results]
    assert torch.equal(pixels[1], pixels[0])
    assert_close(pixels[1], pixels[2], RELATIVE)
    (image,) = results[0].images
    texts = [pipe.chat("What colour is it?", images=[image]).text for pipe in (whole, some, on_cpu)]
    assert texts[0] == texts[1] == texts[2] != ""


@pytest.mark.parametrize("attention", ["auto", "graphs"])
def test_an_engine_decodes_what_it_does_on_the_cpu(attention: str) -> None:
    models = [
        neounify.load(FOLDER / "dense", dtype="float32", device=device).model
        for device in ("cuda", "cpu")
    ]
    assert engine_tokens(models[0], attention, 0.0) == engine_tokens(models[1], "auto", 0.0)


# --- codes ---


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model by preset, quantised on the CPU."""
    folders = {preset: tmp_path_factory.mktemp("codes") / preset for preset in PRESETS}
    for preset, folder in folders.items():
        quantise_checkpoint(
            CheckpointFolder.open(bundled_model()),
            folder,
            preset,
            tokenizer=Tokenizer.from_folder(bundled_model(), ()),
        )
    return folders


def difference(one: neounify.Pipeline, other: neounify.Pipeline) -> float:
    """The largest relative error of logits and of x̂ of one pass."""
    logits, clean = output_errors(other, one, ["a red circle", "two blue stars"], (64, 64))
    assert logits is not None
    return max(logits, *clean.values())


@pytest.mark.parametrize("backend", ["reference", "auto", "named"])
@pytest.mark.parametrize("preset", PRESETS)
def test_models_of_codes_are_those_of_the_cpu(
    coded: dict[str, Path], preset: str, backend: str
) -> None:
    """Those that round x are nearer to the CPU's than rounding takes that from the reference."""
    options: dict[str, Any] = {"dtype": "float32"}
    reference, rounded = (
        neounify.load(coded[preset], backend=name, **options)
        for name in ("reference", PRESETS[preset])
    )
    bound = difference(rounded, reference)
    assert 0 < bound < 0.1
    used = PRESETS[preset] if backend == "named" else backend
    here = neounify.load(coded[preset], device="cuda", backend=used, **options)
    if backend == "reference":
        assert difference(here, reference) < RELATIVE
    elif backend == "named":
        assert difference(here, rounded) < bound
    else:
        assert difference(here, reference) < 1.5 * bound


@pytest.mark.parametrize("rows", [1, W8A8_ROWS - 1, W8A8_ROWS, 1000])
@pytest.mark.parametrize("shape", [(512, 512), (40, 192), (36, 192)], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_layers_of_codes(format: PublishedFormat, shape: tuple[int, int], rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, x = (torch.randn(n, shape[1], generator=generator) for n in (shape[0], rows))
    outputs = {}
    for device in ("cpu", "cuda"):
        for backend in ("reference", "auto"):
            chosen = choose_backend(backend, format, shape, torch.device(device))
            layer = QuantLinear(format, shape, None, chosen)
            for name, tensor in format.quantise(weight).items():
                layer.register_parameter(name, nn.Parameter(tensor.to(device), False))
            outputs[device, backend] = layer(x.to(device)).cpu()
    expected = outputs["cpu", "reference"]
    largest = float(expected.abs().max())
    assert float((outputs["cuda", "reference"] - expected).abs().max()) <= 1e-5 * largest
    assert float((outputs["cuda", "auto"] - expected).abs().max()) <= 0.05 * largest


def test_every_task_gives_the_same_twice(pipe: neounify.Pipeline) -> None:
    first = pipe.generate("a red circle", seed=1, steps=4).images[0]
    again = pipe.generate("a red circle", seed=1, steps=4).images[0]
    assert np.array_equal(np.asarray(first), np.asarray(again))
    edited = pipe.edit("Make the circle blue.", first, seed=2, steps=4).images[0]
    assert edited.size == first.size
    answers = [pipe.chat("What colour is the circle?", images=[first]).text for _ in range(2)]
    assert answers[0] == answers[1] != ""
    story = pipe.interleave("Tell a story about a red circle.", seed=3, steps=4, max_new_tokens=40)
    assert story is not None


def test_answers_are_those_of_the_cpu(pipe: neounify.Pipeline) -> None:
    image = pipe.generate("a red circle and a blue square", seed=4).images[0]
    on_cpu = neounify.load(bundled_model())
    for question in ("What colour is the square?", "How many shapes are there?"):
        assert pipe.chat(question, images=[image]).text == (
            on_cpu.chat(question, images=[image]).text
        )


@contextmanager
def no_waiting() -> Iterator[None]:
    """torch raises an error where the host waits for the device inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_wait_in_a_denoising_step(pipe: neounify.Pipeline) -> None:
    cache = new_cache(pipe.model, 3)
    forward_und(pipe.model, [ModelInput(cache, (Text(3),), [1, 2, 3])])
    sampling = ImageSampling(steps=4, guidance=1.0).resolve(pipe.config, editing=False)
    noise = torch.randn(16, pipe.config.token_width)
    job = make_job(pipe.model, noise, Grid(4, 4), {"cond": cache}, sampling)
    denoiser = Denoiser(pipe.model)
    with torch.inference_mode():
        denoiser.step([job])
        with no_waiting():
            denoiser.step([job])
            denoiser.step([job])


def test_a_decoding_step_waits_for_its_tokens_alone(pipe: neounify.Pipeline) -> None:
    model, device = pipe.model, pipe.model.device
    caches = [new_cache(model, 16) for _ in range(2)]
    items = [ModelInput(cache, (Text(3),), [1, 2, 3]) for cache in caches]
    states = [
        SamplingState(TextSampling(temperature=1.0, top_p=0.9, repetition_penalty=1.2, seed=n))
        for n in range(2)
    ]
    with torch.inference_mode():
        hidden = forward_und(model, items)
        batch = SamplingBatch(states, model.config.vocab_size, device)
        for _ in range(3):
            tokens = batch.sample(model.logits(hidden))
            items = [
                ModelInput(cache, (Text(1),), [choice.token])
                for cache, choice in zip(caches, tokens, strict=True)
            ]
            with no_waiting():
                hidden = forward_und(model, items)
                batch.choose(model.logits(hidden))


def trained(folder: Path, parsed: Recipe, device: str, steps: int | None = None) -> Trainer:
    log = Log(folder, Console(quiet=True), tensorboard=False)
    setup = build_setup(parsed, torch.device(device), folder)
    training = Trainer(parsed, setup, folder, log)
    if states := saved_states(training.states):
        training.resume(states[-1])
    training.run(stop_after=steps)
    return training


def values(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_training_resumes_to_the_bit(tmp_path: Path) -> None:
    parsed = recipe()
    whole = trained(tmp_path / "whole", parsed, "cuda")
    trained(tmp_path / "cut", parsed, "cuda", 5)
    again = trained(tmp_path / "cut", parsed, "cuda")
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    losses = values(tmp_path / "whole", "text/loss")
    assert all(math.isfinite(loss) for loss in losses)
    on_cpu = trained(tmp_path / "cpu", parsed, "cpu")
    assert values(tmp_path / "cpu", "text/loss") == pytest.approx(losses, rel=0.05)
    assert asdict(on_cpu.progress)["samples"] == asdict(again.progress)["samples"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_post_training_resumes_to_the_bit(
    kind: str, lora: bool, tmp_path: Path, base: Path
) -> None:
    streams = list(METHODS[kind].streams)
    stage: dict[str, Any] = {"lora": {**LORA, "streams": streams}} if lora else {}
    parsed = described(kind, **stage)
    whole = trained(tmp_path / "whole", parsed, "cuda")
    trained(tmp_path / "cut", parsed, "cuda", 2)
    again = trained(tmp_path / "cut", parsed, "cuda")
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    trained(folder, recipe(), "cpu", 1).export(folder / "model")
    BASE[:] = [folder / "model"]
    return folder / "model"
