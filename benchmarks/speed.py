"""Prefill, decoding and denoising of the benchmark model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks import counting
from benchmarks.figure import Figure
from benchmarks.models import BENCH_CLIPS, new_cache, random_ids, random_model, read_text
from benchmarks.timing import Machine, measure_machine, median_seconds, processor_seconds
from neounify.config import TextSampling
from neounify.engine.denoiser import DenoiseJob, Denoiser
from neounify.engine.messages import Decode, LocalTransport, Prefill, TextInput, new_number
from neounify.engine.sequences import ContiguousCaches, KVCacheManager, ModelInput
from neounify.engine.understanding import UnderstandingEngine, forward_und
from neounify.flow.guidance import Guidance
from neounify.flow.sampling import Euler
from neounify.model import Document, Image, Layout, NeoUnify, Span, Text
from neounify.model.build import meta_model
from neounify.model.layout import Grid
from neounify.model.parts import UND
from neounify.runtime.plan import ExecutionPlan

PREFIXES = (64, 13)
"""Tokens of the conditional and the unconditional prefix of an image."""
DECODED = 40
GRIDS = {
    f"guided denoising step at {side}²": Grid(side // 32, side // 32) for side in (256, 512, 1024)
}
CLIPS = {"guided step of a clip of 64 frames at 256²": Grid(8, 8, tubes=16)}
"""Of as many tokens as an image at 1024²."""
PREFILLS = {
    "prefill of 1024 tokens": (Text(1024),),
    "prefill of 128 tokens and a 512² image": (Text(64), Image(16, 16), Text(64)),
}
MATMUL = "matmul 2048³"
DECODING_AIM = 0.6
"""Share of the bandwidth that decoding should reach, by processor time."""
AIM = 0.85
"""Share of the matmul rate that prefill and denoising should reach."""
Make = Callable[..., Figure]


def figures(dtype: torch.dtype, *, compiled: bool) -> Iterator[Figure]:
    """All speed figures of one dtype and mode."""
    name = str(dtype).removeprefix("torch.")
    make = partial(Figure, dtype=name, mode="compiled" if compiled else "eager")
    machine = measure_machine(dtype)
    yield make(name=MATMUL, value=machine.matmul_flops / 1e9, unit="GFLOP/s")
    if not compiled:
        yield make(name="matrix-vector product", value=machine.read_bytes / 1e9, unit="GB/s")
    model = random_model(dtype, compiled=compiled)
    with torch.inference_mode():
        yield from _prefill(model, machine, make)
        yield from _denoise(model, GRIDS, machine, make)
        yield from _decode(model, machine, make)
        clips = random_model(dtype, compiled=compiled, config=BENCH_CLIPS)
        yield from _denoise(clips, CLIPS, machine, make)


def _prefill(model: NeoUnify, machine: Machine, make: Make) -> Iterator[Figure]:
    ids = random_ids(model, 1024)
    pixels = torch.randn(3, 512, 512)

    def read(spans: Sequence[Span]) -> None:
        layout = Layout([Document(tuple(spans))])
        cache = new_cache(model, layout[UND].length)
        images = [pixels] * len(layout[UND].grids)
        item = ModelInput(cache, tuple(spans), ids[: layout.text_length], images)
        model.logits(forward_und(model, [item]))

    for name, spans in PREFILLS.items():
        seconds = median_seconds(partial(read, spans))
        yield _rate(make(name=name, value=seconds, unit="s"), model, machine.matmul_flops)


def _denoise(
    model: NeoUnify, grids: Mapping[str, Grid], machine: Machine, make: Make
) -> Iterator[Figure]:
    cond, uncond = (read_text(model, length)[0] for length in PREFIXES)
    denoiser, first = Denoiser(model), 0.0
    for name, grid in grids.items():
        config = model.config
        noise = torch.randn(grid.length, config.tube_width if grid.tubes else config.token_width)

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
        note = ""
        if first:
            more = operations(model, name) / operations(model, next(iter(grids)))
            note = f"time ×{seconds / first:.1f}, operations ×{more:.1f}"
        first = first or seconds
        figure = make(name=name, value=seconds, unit="s", note=note)
        yield _rate(figure, model, machine.matmul_flops)


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
    yield _by_processor(model, bytes_read, machine, make)
    batch = tokens_per_second(model, 8)
    yield make(
        name="decoding, batch 8",
        value=batch,
        unit="tokens/s",
        aim="5 × batch 1",
        met=batch >= 5 * single,
        note=f"×{batch / single:.2f}",
    )


def _by_processor(model: NeoUnify, bytes_read: int, machine: Machine, make: Make) -> Figure:
    """Decoding by processor time, on a machine that does other work; share of the bandwidth."""
    engine = decoding(model, 1)
    seconds = processor_seconds(engine.step, DECODED // 2)
    share = bytes_read / seconds / machine.read_bytes_processor
    return make(
        name="decoding, batch 1, processor time",
        value=1 / seconds,
        unit="tokens/s",
        share=share,
        aim="60 %",
        met=share >= DECODING_AIM,
        note=f"{counting.operators(engine.step)} operators a step",
    )


def decoding(
    model: NeoUnify, batch: int, caches: KVCacheManager | None = None
) -> UnderstandingEngine:
    """An engine whose every step decodes a token of each of `batch` sequences, some DECODED."""
    engine = UnderstandingEngine(
        model,
        LocalTransport(),
        ExecutionPlan(prefill_step_rows=64 * batch),
        caches or ContiguousCaches(model),
    )
    for _ in range(batch):
        call, name = new_number(), (new_number(), "cond")
        then = Decode(call, name, TextSampling(), frozenset(), DECODED + 8)
        prompt = (TextInput(tuple(random_ids(model, 64))),)
        engine.submit(Prefill(call, {name: prompt}, {name: DECODED + 8}, then))
    for _ in range(4):
        engine.step()
    return engine


def tokens_per_second(model: NeoUnify, batch: int) -> float:
    best = 0.0
    for _ in range(3):
        engine = decoding(model, batch)
        start = time.perf_counter()
        for _ in range(DECODED):
            engine.step()
        best = max(best, batch * DECODED / (time.perf_counter() - start))
    return best


# --- operations ---


def operations(model: NeoUnify, name: str) -> int:
    """Operations of what a figure of prefill or denoising measures."""
    if name in PREFILLS:
        return counting.prefill(model, PREFILLS[name])
    return counting.denoise(model, (GRIDS | CLIPS)[name], PREFIXES)


def _rate(figure: Figure, model: NeoUnify, matmul_flops: float) -> Figure:
    """The figure with its share of the matmul rate."""
    share = operations(model, figure.name) / figure.value / matmul_flops
    return replace(figure, share=share, aim=f"{AIM:.0%}".replace("%", " %"), met=share >= AIM)


def recounted(figures: Sequence[Figure]) -> list[Figure]:
    """Figures of an earlier run with the shares that today's counts of operations give."""
    model = meta_model(BENCH_CLIPS)
    rates = {(f.dtype, f.mode): f.value * 1e9 for f in figures if f.name == MATMUL}
    return [
        _rate(figure, model, rates[figure.dtype, figure.mode])
        if figure.name in {**PREFILLS, **GRIDS, **CLIPS}
        else figure
        for figure in figures
    ]
