"""Rows of a pack cut over ranks: losses and gradients against one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neounify.config import MlpConfig, ModelConfig
from neounify.config.presets import SCENES
from neounify.data.encode import Encoded
from neounify.data.loader import Pack, make_pack
from neounify.distributed.mesh import MeshShape
from neounify.distributed.parallelize import Parallel, parallelize
from neounify.distributed.sequence import cut_rows
from neounify.model.build import compile_streams
from neounify.model.layout import Document, Image, Layout, Noise, Span, Text
from neounify.model.parts import STREAMS
from neounify.train.loss import Counts, LossConfig, Metrics, loss_of
from neounify.train.setup import checkpoint_layers, freeze
from neounify.train.weights import new_model
from support.models import TINY_CHANGES
from support.parallel_runs import numpy, this_rank
from support.ranks import run_ranks

CONFIG = SCENES.replace(**TINY_CHANGES)
EXPERTS = MlpConfig(
    width=0, num_experts=4, experts_per_token=2, expert_width=16, sparse=(True, True)
)
KINDS: dict[str, list[tuple[Span, ...]]] = {
    "texts": [(Text(300),), (Text(5),), (Text(61),)],
    "images": [(Text(9), Noise(3, 4)), (Text(5), Noise(2, 2)), (Text(4), Image(2, 3), Text(6))],
    "edits": [(Image(5, 3), Text(7), Noise(5, 3)), (Image(2, 2), Text(3), Noise(2, 2))],
    "stories": [(Text(6), Noise(2, 3), Image(2, 3), Text(20), Noise(3, 3), Image(3, 3))],
    "fewer rows than ranks": [(Text(2), Noise(1, 2))],
}
PACKS = list(KINDS)
SHAPES = {
    "shard 2": (MeshShape(shard=2), 2),
    "sequence 2": (MeshShape(sequence=2), 2),
    "sequence 4": (MeshShape(sequence=4), 4),
    "shard 2, sequence 2": (MeshShape(shard=2, sequence=2), 4),
    "replicate 2, sequence 2": (MeshShape(replicate=2, sequence=2), 4),
}


def document(spans: tuple[Span, ...], rng: np.random.Generator) -> Encoded:
    """Random tokens and pixels; every second text token is a label."""
    texts = sum(span.length for span in spans if isinstance(span, Text))
    rows: list[int] = []
    first = 0
    for span in spans:
        if isinstance(span, Text):
            rows += range(first, first + span.length, 2)
        first += span.length if span.stream == "und" else 0

    def pixels(span: Span) -> Any:
        assert not isinstance(span, Text)
        side = CONFIG.token_size
        return rng.integers(0, 256, (span.rows * side, span.columns * side, 3), dtype=np.uint8)

    return Encoded(
        sample="made",
        task="interleave",
        document=Document(spans),
        ids=tuple(int(i) for i in rng.integers(0, 200, texts)),
        label_rows=tuple(rows),
        label_ids=tuple(int(i) for i in rng.integers(0, 200, len(rows))),
        images=tuple(pixels(span) for span in spans if isinstance(span, Image)),
        targets=tuple(pixels(span) for span in spans if isinstance(span, Noise)),
    )


def pack_of(kind: str) -> Pack:
    rng = np.random.default_rng(len(kind))
    return make_pack([document(spans, rng) for spans in KINDS[kind]])


def config_of(variant: str) -> ModelConfig:
    return CONFIG.replace(und_mlp=EXPERTS, gen_mlp=EXPERTS) if variant == "sparse" else CONFIG


def gradients(shape: MeshShape, variant: str) -> dict[str, Any]:
    """Loss, metrics and gradients of every kind of pack; groups take different packs at a time."""
    ranks = this_rank()
    model = new_model(config_of(variant), 0)
    parallel = parallelize(model, ranks, shape if ranks.size > 1 else MeshShape())
    if variant == "frozen und":
        freeze(model, ("und", "shared"))
    checkpoint_layers(model, variant == "recomputed")
    compiled = variant == "compiled" and ranks.size > 1
    if compiled:
        compile_streams(model)
    results = {}
    for number in range(1 if compiled else len(PACKS)):
        loss, metrics = torch.zeros(()), Metrics()
        for place in range(shape.packs):
            # Each group has its pack of the step, one process has all of them.
            if ranks.size == 1 or place == parallel.packs.rank:
                kind = PACKS[(number + place) % len(PACKS)]
                loss = loss + one_loss(parallel, pack_of(kind), metrics)
        loss.backward()
        total = loss.detach()
        ranks.add_(total, metrics.text, metrics.image)
        results[PACKS[number]] = {
            "loss": float(total),
            "metrics": metrics.report(),
            "gradients": {
                name: numpy(torch.zeros_like(p) if p.grad is None else p.grad)
                for name, p in model.named_parameters()
                if p.requires_grad
            },
        }
        model.zero_grad(set_to_none=True)
    return results


def one_loss(parallel: Parallel, pack: Pack, metrics: Metrics) -> torch.Tensor:
    noise = torch.Generator().manual_seed(5)
    counts = Counts(100, 100, 10)
    share = parallel.share(pack.layout)
    arguments = (pack, LossConfig(text_weight=1.0), counts, noise, metrics, None, share)
    loss: torch.Tensor = parallel.objective(loss_of, *arguments)
    return loss


def on_ranks(variants: tuple[str, ...]) -> dict[str, Any]:
    return {
        f"{name}/{variant}": gradients(shape, variant)
        for name, (shape, size) in SHAPES.items()
        if size == this_rank().size
        for variant in variants
    }


def check(results: list[dict[str, Any]]) -> None:
    for case, got in results[0].items():
        name, variant = case.split("/")
        expected = gradients(SHAPES[name][0], variant)
        for kind in got:
            one = expected[kind]
            where = f"{case}, {kind}"
            assert got[kind]["loss"] == pytest.approx(one["loss"], rel=1e-6), where
            assert got[kind]["metrics"] == pytest.approx(one["metrics"], rel=1e-5, abs=1e-6), where
            largest = max(np.abs(gradient).max() for gradient in one["gradients"].values())
            for parameter, gradient in one["gradients"].items():
                # The second term is the rounding of sums that cancel.
                bound = 1e-5 * np.abs(gradient).max() + 1e-7 * largest
                difference = np.abs(got[kind]["gradients"][parameter] - gradient).max()
                assert difference <= bound, f"{where}: {parameter}"


def test_two_ranks_share_a_pack() -> None:
    check(run_ranks(on_ranks, ("plain", "recomputed", "frozen und", "sparse"), seconds=540))


@pytest.mark.slow
def test_two_ranks_share_a_pack_in_compiled_layers() -> None:
    check(run_ranks(on_ranks, ("compiled",), seconds=540))


@pytest.mark.slow
def test_four_ranks_share_packs_in_every_mesh() -> None:
    check(run_ranks(on_ranks, ("plain", "recomputed"), ranks=4, seconds=540))


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_rows_are_cut_into_parts_of_like_cost(parts: int) -> None:
    layout = Layout([Document(spans) for spans in KINDS["edits"] + KINDS["texts"]])
    for name in STREAMS:
        cuts = cut_rows(layout, name, parts, 100.0)
        assert [cut.start for cut in cuts[1:]] == [cut.stop for cut in cuts[:-1]]
        assert (cuts[0].start, cuts[-1].stop) == (0, layout[name].length)
    # Later tokens of a text see more, so its first part has more rows.
    layout = Layout([Document((Text(1000),))])
    first, second = cut_rows(layout, "und", 2, 100.0)
    assert len(first) > 1.3 * len(second)

    def cost(rows: range) -> float:
        return sum(1 + (row + 1) / 100 for row in rows)

    assert cost(first) == pytest.approx(cost(second), rel=0.01)
