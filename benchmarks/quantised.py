"""Decoding, prefill and kept bytes of the benchmark model in int8 against float32, on a CPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.figure import Figure
from benchmarks.models import new_cache, random_ids, random_model
from benchmarks.speed import tokens_per_second
from benchmarks.timing import median_seconds
from neounify.checkpoint.load import load_checkpoint
from neounify.checkpoint.save import save_model
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import NeoUnify, Text

PRESETS = ("int8", "int8-all")
AIMS = dict.fromkeys(PRESETS, (1.6, 0.9))
"""Preset → least speed of decoding and of prefill, against float32."""
PROMPT = 1024


def figures() -> Iterator[Figure]:
    """float32 first, then each preset in bfloat16, from one checkpoint."""
    plain = random_model(torch.float32)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        save_model(plain, Path(folder) / "plain")
        first = _measured(plain)
        yield from _figures("float32", "plain", first, first)
        for preset in PRESETS:
            loaded = load_checkpoint(Path(folder) / "plain", dtype="bfloat16", quantise=preset)
            yield from _figures("bfloat16", preset, _measured(loaded.model), first)


def _measured(model: NeoUnify) -> tuple[float, float, float]:
    """(tokens a second at batch 1, prompt tokens a second, bytes of all weights)."""
    ids = random_ids(model, PROMPT)

    def prefill() -> None:
        cache = new_cache(model, PROMPT)
        model.logits(forward_und(model, [ModelInput(cache, (Text(PROMPT),), ids)]))

    kept = sum(tensor.nbytes for tensor in model.state_dict().values())
    return tokens_per_second(model, 1), PROMPT / median_seconds(prefill), kept


def _figures(
    dtype: str, mode: str, values: tuple[float, float, float], first: tuple[float, float, float]
) -> Iterator[Figure]:
    decoding, prefill, kept = values
    aims = AIMS.get(mode, (0.0, 0.0))
    for name, value, base, aim in (
        ("decoding, batch 1", decoding, first[0], aims[0]),
        (f"prefill of {PROMPT} tokens", prefill, first[1], aims[1]),
    ):
        yield Figure(
            name=name,
            dtype=dtype,
            mode=mode,
            value=value,
            unit="tokens/s",
            aim=f"{aim:g} × float32" if aim else "",
            met=value >= aim * base if aim else None,
            note=f"×{value / base:.2f}",
        )
    share = kept / first[2]
    yield Figure(
        name="bytes of the weights",
        dtype=dtype,
        mode=mode,
        value=kept / 1e6,
        unit="MB",
        aim="a third of float32" if mode in AIMS else "",
        met=share <= 1 / 3 if mode in AIMS else None,
        note=f"×{share:.2f}",
    )
