"""Training speed relative to the machine's matmul rate, and peak memory.

Operations are those the mathematics needs, a multiply-add counting as two:

    forward            2 · weights · rows + 4 · (query, key) pairs · heads · d · layers
    training step      3 · forward, where everything is trained

Gradients of weights that are frozen, and of activations in front of which nothing is trained, are
not computed and so not counted; nor is what activation checkpointing computes again.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from neounify.config import ModelConfig
from neounify.data.loader import Pack
from neounify.data.packing import cost_of
from neounify.model.embed import PatchEmbed
from neounify.model.heads import PixelHead
from neounify.model.layout import Kind
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN, STREAMS, UND, StreamName
from neounify.model.stream import SparseMlp

if TYPE_CHECKING:
    from neounify.train.progress import Progress

MATMUL_SECONDS = 0.2
"""Seconds of measuring the machine's rate, after one warm-up call."""


def weights(module: nn.Module) -> int:
    """Multiply-adds of one token in a module's matrices; a norm's vector is no matrix product.

    Of a sparse MLP, the experts that a token is sent to.
    """
    if isinstance(module, SparseMlp):
        experts = module.router.out_features
        return weights(module.router) + module.top_k * weights(module.experts) // experts
    if isinstance(module, PatchEmbed):
        patches = module.merge.weight[0, 0].numel()
        return patches * module.patch.weight.numel() + module.merge.weight.numel()
    if isinstance(module, PixelHead):
        # Each pixel shuffle by 2 before a convolution makes four positions of one.
        return 4 * module.conv1.weight.numel() + 16 * module.conv2.weight.numel()
    direct = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
    return direct + sum(weights(child) for child in module.children())


def layer_weights(model: NeoUnify, stream: StreamName) -> int:
    """Weights every token of a stream passes, without embedding, logits and image head."""
    return sum(weights(layer.get_submodule(stream)) for layer in model.layers)


def attention(config: ModelConfig, pairs: int) -> int:
    """Operations of all layers for so many (query, key) pairs."""
    return 4 * pairs * config.num_heads * config.head_dim * config.num_layers


@dataclass(frozen=True)
class _Part:
    """Matrices that rows pass, their trained share, and whether gradients flow through them."""

    weights: int
    trained: float
    flows: bool

    def operations(self, rows: int, attention: int = 0) -> float:
        passes = 1 + self.flows + self.trained
        return 2 * self.weights * rows * passes + attention * (1 + 2 * self.flows)


class StepOperations:
    """Counts the operations of a training step of one model, frozen as it is now."""

    def __init__(self, model: NeoUnify) -> None:
        self.config = model.config
        self.kappa = model.config.pairs_per_row
        layers = {s: [layer.get_submodule(s) for layer in model.layers] for s in STREAMS}
        patches: dict[tuple[StreamName, Kind], nn.Module] = {
            (UND, "image"): model.und_patch,
            (GEN, "image"): model.gen_patch,
        }
        heads: dict[Kind, nn.Module] = {"image": model.image_head}
        if self.config.video is not None:
            patches[GEN, "tube"], heads["tube"] = model.pixel_layers("tube")
            if self.config.sees_tubes:
                patches[UND, "tube"] = model.und_tube
        embeds = {s: [module for (n, _), module in patches.items() if n == s] for s in STREAMS}
        in_und = _share([*layers[UND], *embeds[UND], model.embed_tokens]) > 0
        in_gen = in_und or _share([*layers[GEN], *embeds[GEN]]) > 0
        flows = {UND: in_und, GEN: in_gen}
        logits = model.embed_tokens if self.config.tie_embeddings else model.lm_head
        self.layers = {
            s: _Part(layer_weights(model, s), _share(modules), flows[s])
            for s, modules in layers.items()
        }
        self.patches = {key: _part(patch, flows=False) for key, patch in patches.items()}
        self.logits = _part(logits, in_und)
        self.heads = {kind: _part(head, in_gen) for kind, head in heads.items()}

    def cost(self, pack: Pack) -> float:
        """The time of a pack, in rows: its own, and those that take as long as its attention."""
        return cost_of(pack.layout, self.kappa)

    def of(self, pack: Pack) -> float:
        layout = pack.layout

        def rows(stream: StreamName, kind: Kind) -> int:
            return sum(grid.length for grid in layout[stream].grids_of(kind))

        layers = sum(
            part.operations(layout[s].length, attention(self.config, layout.pairs(s)))
            for s, part in self.layers.items()
        )
        patches = sum(part.operations(rows(*key)) for key, part in self.patches.items())
        heads = sum(part.operations(rows(GEN, kind)) for kind, part in self.heads.items())
        return layers + patches + heads + self.logits.operations(len(pack.label_ids))


def _part(module: nn.Module, flows: bool) -> _Part:
    return _Part(weights(module), _share([module]), flows)


def _share(modules: Iterable[nn.Module]) -> float:
    """The trained share of the parameters, 0 to 1."""
    parameters = [p for module in modules for p in module.parameters()]
    return sum(p.numel() for p in parameters if p.requires_grad) / sum(
        p.numel() for p in parameters
    )


@torch.no_grad()
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the best of some square matrix products.

    Draws no random numbers that anything else uses.
    """
    side = 1024 if device.type == "cpu" else 4096
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, generator=generator, device=device).to(dtype)
    best, until = float("inf"), None
    while until is None or time.perf_counter() < until:
        start = time.perf_counter()
        a @ a
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        if until is None:
            until = time.perf_counter() + MATMUL_SECONDS
        else:
            best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: of the process on a CPU, of torch's tensors on an accelerator, at most so far."""
    if device.type in ("cpu", "mps"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return torch.accelerator.max_memory_allocated(device)


class Meter:
    """The speed of one stage on all `ranks`, read at every report; seconds are of `Progress`."""

    def __init__(
        self, device: torch.device, precision: str, progress: Progress, ranks: int = 1
    ) -> None:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self.device = device
        self.rate, self.ranks = matmul_rate(self.device, dtype), ranks
        self._first = self._last = replace(progress)
        self._operations = 0.0

    def add(self, operations: float) -> None:
        """Count the operations of a step."""
        self._operations += operations

    def tokens_per_second(self, progress: Progress) -> float:
        """Since the last reading."""
        return (progress.tokens - self._last.tokens) / self._seconds(progress)

    def seconds_left(self, progress: Progress, steps: int) -> float:
        """Until the end of the stage, at its average pace so far."""
        done = progress.step - self._first.step
        pace = (progress.seconds - self._first.seconds) / max(1, done)
        return (steps - progress.stage_step) * pace

    def read(self, progress: Progress) -> dict[str, float]:
        """Means since the last reading, by name; the next reading starts here."""
        seconds = self._seconds(progress)
        means = {
            "tokens_per_second": self.tokens_per_second(progress),
            "images_per_second": (progress.images - self._last.images) / seconds,
            "operations_per_second": self._operations / seconds,
            "matmul_share": self._operations / seconds / (self.ranks * self.rate),
            "peak_memory_gb": peak_memory(self.device) / 2**30,
        }
        self._last, self._operations = replace(progress), 0.0
        return means

    def _seconds(self, progress: Progress) -> float:
        return max(1e-9, progress.seconds - self._last.seconds)
