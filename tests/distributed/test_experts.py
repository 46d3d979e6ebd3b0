"""Experts dealt out to ranks against one process: losses and gradients, spread and all on one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from neounify.checkpoint.names import each_expert
from neounify.config import MlpConfig, ModelConfig
from neounify.distributed.mesh import MeshShape
from neounify.distributed.parallelize import parallelize
from neounify.distributed.ranks import ONE, Ranks
from neounify.distributed.shards import local, whole
from neounify.model import NeoUnify
from neounify.train.setup import checkpoint_layers, freeze
from support.models import Maker, Packed, pack, random_config, random_model
from support.ranks import run_ranks
from support.reference import Document

SECONDS = 540.0
CASES: dict[str, dict[str, Any]] = {
    "spread": {},
    "all on one": {"one": True},
    "recomputed": {"recompute": True},
    "frozen und": {"frozen": ("und", "shared")},
    "frozen experts": {"frozen": ("experts", "router", "embedding", "patch embedding")},
}


def config() -> ModelConfig:
    mlp = MlpConfig(width=8, num_experts=4, experts_per_token=2, expert_width=8, sparse=(True,) * 2)
    return random_config(
        random.Random(0),
        num_layers=2,
        hidden_size=16,
        und_mlp=mlp,
        gen_mlp=MlpConfig(
            width=8, num_experts=4, experts_per_token=1, expert_width=16, sparse=(False, True)
        ),
        image_head="flow",
    )


def packs() -> list[Packed]:
    """Of four ranks: text alone, text and noise, an image that is seen, everything."""
    maker = Maker(random.Random(1), config())
    documents: list[Sequence[Document]] = [
        [[maker.text(7)]],
        [[maker.text(3), *maker.noisy((2, 3))]],
        [[*maker.clean((2, 2)), maker.text(2)]],
        maker.showcase(),
    ]
    return [pack(some, maker.config, torch.float32) for some in documents]


def loss_of(model: NeoUnify, packed: Packed) -> Tensor:
    """Of logits, which a pack without answers has not, and of clean images where there are some."""
    logits, clean = packed.run(model)
    loss = torch.zeros(())
    if packed.images or not packed.layout.lengths.get("gen"):
        loss = loss + (logits.square() * torch.linspace(0.5, 1, logits.shape[1])).mean()
    return loss if clean is None else loss + clean.square().mean()


def model_of(case: str) -> NeoUnify:
    settings = CASES[case]
    model = random_model(config(), 0).float().requires_grad_(True)
    freeze(model, settings.get("frozen", ()))
    checkpoint_layers(model, settings.get("recompute", False))
    if settings.get("one"):
        for mlp in model.sparse_mlps:
            mlp.router.weight.data.zero_()
    return model


def gradients(case: str, ranks: Ranks, shape: MeshShape) -> dict[str, Any]:
    """The sum of the losses of all packs, and its gradients by the names of checkpoints."""
    parallel = parallelize(model_of(case), ranks, shape)
    total = torch.zeros(())
    for packed in packs()[ranks.rank :: ranks.size]:
        loss = parallel.objective(loss_of, packed)
        loss.backward()
        total += loss.detach()
    ranks.add_(total)
    losses = {"loss": total.numpy()}
    named = parallel.objective.model.named_parameters()
    tensors = {n: whole(p.grad) for n, p in named if p.grad is not None and p.requires_grad}
    return losses | {name: x.numpy() for name, x in each_expert(tensors).items()}


def on_ranks(cases: list[str], *shapes: MeshShape) -> list[dict[str, Any]]:
    """The cases on each mesh, and the shapes of the experts that this rank holds."""
    ranks = Ranks(distributed.get_rank(), distributed.get_world_size())
    of_shapes = []
    for shape in shapes:
        model = parallelize(model_of("spread"), ranks, shape).objective.model
        shares = [local(p) for n, p in model.named_parameters() if n.endswith("experts.gate_proj")]
        of_cases = {case: gradients(case, ranks, shape) for case in cases}
        of_shapes.append({**of_cases, "shares": [list(part.shape) for part in shares]})
    return of_shapes


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {case: gradients(case, ONE, MeshShape()) for case in CASES}


def check(alone: dict[str, Any], ranks: list[dict[str, Any]], case: str) -> None:
    for rank in ranks:
        assert rank[case].keys() == alone[case].keys()
        for name, wanted in alone[case].items():
            error = np.abs(rank[case][name] - wanted).max()
            assert error <= 1e-6 * max(1.0, np.abs(wanted).max()), (case, name, error)


def test_experts_on_two_ranks(alone: dict[str, Any]) -> None:
    """The experts of a layer are dealt out, its other parameters cut by rows."""
    shape = MeshShape(expert=2)
    ranks = run_ranks(on_ranks, list(CASES), shape, ranks=2, seconds=SECONDS)
    for case in CASES:
        check(alone, [rank[0] for rank in ranks], case)
    assert ranks[1][0]["shares"] == [[2, 8, 16], [2, 8, 16], [2, 16, 16]]


@pytest.mark.slow
def test_experts_on_four_ranks(alone: dict[str, Any]) -> None:
    """With shards and with copies of the same experts, and more ranks than experts."""
    meshes = {
        MeshShape(shard=2, expert=2): [2, 4, 16],
        MeshShape(expert=4): [1, 8, 16],
        MeshShape(replicate=2, expert=2): [2, 8, 16],
        MeshShape(shard=4): [1, 8, 16],
    }
    cases = ["all on one", "frozen und"]
    ranks = run_ranks(on_ranks, cases, *meshes, ranks=4, seconds=SECONDS)
    for number, shares in enumerate(meshes.values()):
        assert ranks[3][number]["shares"][0] == shares
        for case in cases:
            check(alone, [rank[number] for rank in ranks], case)
