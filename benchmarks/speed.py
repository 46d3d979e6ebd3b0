"""Prefill, decoding and denoising of the benchmark model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks import counting
from benchmarks.figure import Figure
from benchmarks.models import new_cache, random_ids, random_model, read_text
from benchmarks.timing import Machine, measure_machine, median_seconds
from neounify.config import TextSampling
from neounify.engine.denoiser import DenoiseJob, Denoiser
from neounify.engine.messages import Decode, LocalTransport, Prefill, TextInput, new_number
from neounify.engine.sequences import ContiguousCaches, ModelInput
from neounify.engine.understanding import UnderstandingEngine, forward_und
from neounify.flow.guidance import Guidance
from neounify.flow.sampling import Euler
from neounify.model import Image, NeoUnify, Text
from neounify.model.layout import Grid
from neounify.model.parts import UND
from neounify.runtime.plan import ExecutionPlan

PREFIXES = (64, 13)
"""Tokens of the conditional and the unconditional prefix of an image."""
DECODED = 40
SIZES = (256, 512, 1024)
Make = Callable[..., Figure]


def figures(dtype: torch.dtype, *, compiled: bool) -> Iterator[Figure]:
    """All speed figures of one dtype and mode."""
    name = str(dtype).removeprefix("torch.")
    make = partial(Figure, dtype=name, mode="compiled" if compiled else "eager")
    machine = measure_machine(dtype)
    if not compiled:
        yield make(name="matmul 2048³", value=machine.matmul_flops / 1e9, unit="GFLOP/s")
        yield make(name="matrix-vector product", value=machine.read_bytes / 1e9, unit="GB/s")
    model = random_model(dtype, compiled=compiled)
    with torch.inference_mode():
        yield from _prefill(model, machine, make)
        yield from _denoise(model, machine, make)
        yield from _decode(model, machine, make)


def _prefill(model: NeoUnify, machine: Machine, make: Make) -> Iterator[Figure]:
    ids = random_ids(model, 1024)

    def text() -> None:
        cache = new_cache(model, 1024)
        model.logits(forward_und(model, [ModelInput(cache, (Text(1024),), ids)]))

    image = torch.randn(3, 512, 512)
    spans = (Text(64), Image(16, 16), Text(64))

    def mixed() -> None:
        cache = new_cache(model, 384)
        model.logits(forward_und(model, [ModelInput(cache, spans, ids[:128], [image])]))

    for name, call, operations in (
        ("prefill of 1024 tokens", text, counting.prefill(model, 1024)),
        ("prefill of 128 tokens and a 512² image", mixed, counting.prefill(model, 384, 256)),
    ):
        seconds = median_seconds(call)
        yield _rate(name, seconds, operations, machine, make)


def _denoise(model: NeoUnify, machine: Machine, make: Make) -> Iterator[Figure]:
    cond, uncond = (read_text(model, length)[0] for length in PREFIXES)
    first: tuple[float, int] | None = None
    denoiser = Denoiser(model)
    for side in SIZES:
        grid = Grid(side // 32, side // 32)
        tokens = grid.length
        noise = torch.randn(tokens, 3 * 32**2)

        def step(noise: torch.Tensor = noise, grid: Grid = grid) -> None:
            job = DenoiseJob(
                z=noise,
                grid=grid,
                prefixes={"cond": cond, "uncond": uncond},
                guidance=Guidance(),
                times=(0.0, 0.5, 1.0),
                noise_scale=1.0,
                t_eps=0.02,
                solver=Euler(),
            )
            denoiser.step([job])

        seconds = median_seconds(step)
        operations = counting.denoise(model, tokens, list(PREFIXES))
        first = first or (seconds, operations)
        note = f"time ×{seconds / first[0]:.1f}, operations ×{operations / first[1]:.1f}"
        name = f"guided denoising step at {side}²"
        yield _rate(name, seconds, operations, machine, make, note if side > SIZES[0] else "")


def _decode(model: NeoUnify, machine: Machine, make: Make) -> Iterator[Figure]:
    bytes_read = model.lm_head.weight.element_size() * (
        counting.layer_weights(model, UND) + model.lm_head.weight.numel()
    )
    single = tokens_per_second(model, 1)
    share = single * bytes_read / machine.read_bytes
    yield make(
        name="decoding, batch 1",
        value=single,
        unit="tokens/s",
        share=share,
        aim="75 %",
        met=share >= 0.75,
    )
    batch = tokens_per_second(model, 8)
    yield make(
        name="decoding, batch 8",
        value=batch,
        unit="tokens/s",
        aim="5 × batch 1",
        met=batch >= 5 * single,
        note=f"×{batch / single:.2f}",
    )


def tokens_per_second(model: NeoUnify, batch: int) -> float:
    best = 0.0
    for _ in range(3):
        engine = UnderstandingEngine(
            model,
            LocalTransport(),
            ExecutionPlan(prefill_step_rows=64 * batch),
            ContiguousCaches(model),
        )
        for _ in range(batch):
            call, name = new_number(), (new_number(), "cond")
            then = Decode(call, name, TextSampling(), frozenset(), DECODED + 8)
            prompt = (TextInput(tuple(random_ids(model, 64))),)
            engine.submit(Prefill(call, {name: prompt}, {name: DECODED + 8}, then))
        for _ in range(4):
            engine.step()
        start = time.perf_counter()
        for _ in range(DECODED):
            engine.step()
        best = max(best, batch * DECODED / (time.perf_counter() - start))
    return best


def _rate(
    name: str,
    seconds: float,
    operations: int,
    machine: Machine,
    make: Make,
    note: str = "",
) -> Figure:
    share = operations / seconds / machine.matmul_flops
    return make(
        name=name,
        value=seconds,
        unit="s",
        share=share,
        aim="85 %",
        met=share >= 0.85,
        note=note,
    )
