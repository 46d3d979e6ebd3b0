"""Parallelism from outside: shares of the heads on ranks, sharded halves, hooks in every mode."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from neounify.attention import BACKENDS
from neounify.cache import new_cache, new_paged_cache
from neounify.cache.key_values import text_keys
from neounify.config import MlpConfig, ModelConfig
from neounify.model import Layout, NeoUnify, Noise, Text, build
from neounify.model.parts import GEN, STREAMS, UND
from neounify.model.stream import Layer, OutputMlp, QKVProjection
from neounify.train.setup import checkpoint_layers
from support import reference
from support.attention import plan
from support.models import Maker, pack, random_config, random_model
from support.ranks import run_ranks

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Projections that are cut by outputs: heads, or the width of the MLP."""
COLUMNS = ("o_proj", "down_proj")
"""Projections that are cut by inputs: their outputs are added over the ranks."""


def small_config(seed: int = 0) -> ModelConfig:
    return random_config(
        random.Random(seed),
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        hidden_size=16,
        attention_bias=False,
        und_mlp=MlpConfig(width=12),
        gen_mlp=MlpConfig(width=20),
    )


def prefill_and_denoise(model: NeoUnify, backend: str) -> Tensor:
    """Prefill of two prompts, one decoding step of each, and a noisy image behind each of them."""
    config, numbers = model.config, torch.Generator().manual_seed(0)
    caches = [new_cache(model, 2) for _ in range(2)]
    outputs = [decode_paged(model, backend)]
    for lengths in ((5, 3), (1, 1)):
        layout = Layout(c.document(Text(n)) for c, n in zip(caches, lengths, strict=True))
        attend = plan(layout, caches, backend)
        x = torch.randn(sum(lengths), config.hidden_size, generator=numbers, dtype=torch.float64)
        outputs.append(model.backbone(layout, {UND: x}, attend)[UND])
        for cache, document in zip(caches, layout.documents, strict=True):
            cache.advance(document)
    layout = Layout(c.document(Noise(2, 2)) for c in caches)
    x = torch.randn(8, config.hidden_size, generator=numbers, dtype=torch.float64)
    outputs.append(model.backbone(layout, {GEN: x}, plan(layout, caches, backend))[GEN])
    return torch.cat(outputs)


def decode_paged(model: NeoUnify, backend: str) -> Tensor:
    """Prefill and three decoding steps of two sequences of one paged cache."""
    numbers = torch.Generator().manual_seed(1)
    pool = new_paged_cache(model, 8, 4)
    sequences = [pool.open(text_keys(range(n), 0), 8) for n in (1, 6)]
    outputs = []
    for lengths in ((1, 6), (1, 1), (1, 1)):
        layout = Layout(s.document(Text(n)) for s, n in zip(sequences, lengths, strict=True))
        x = torch.randn(sum(lengths), model.config.hidden_size, generator=numbers).double()
        outputs.append(model.backbone(layout, {UND: x}, plan(layout, sequences, backend))[UND])
        for sequence, document in zip(sequences, layout.documents, strict=True):
            sequence.advance(document)
    return torch.cat(outputs)


def half_of_the_heads(backend: str) -> object:
    """On each of two ranks: half of every projection, outputs added by hooks."""
    rank = dist.get_rank()
    model = random_model(small_config(), 0, torch.float64)
    model.kv_heads //= 2
    for layer in model.layers:
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            kind = name.rpartition(".")[2]
            share = module.weight.chunk(2, dim=0 if kind in ROWS else 1)[rank]
            module.weight = nn.Parameter(share.contiguous(), requires_grad=False)
            if kind in COLUMNS:
                module.register_forward_hook(lambda _module, _inputs, out: dist.all_reduce(out))
    with torch.no_grad():
        outputs = prefill_and_denoise(model, backend)
    return outputs.numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_with_half_of_the_heads_compute_the_whole(backend: str) -> None:
    whole = random_model(small_config(), 0, torch.float64)
    with torch.no_grad():
        expected = prefill_and_denoise(whole, backend)
    for outputs in run_ranks(half_of_the_heads, backend):
        torch.testing.assert_close(torch.from_numpy(outputs), expected)


def loss_and_gradients(model: NeoUnify, seed: int) -> tuple[float, dict[str, Tensor]]:
    """The loss of one pack, and its gradients, summed over the ranks where they are sharded."""
    rng = random.Random(seed)
    maker = Maker(rng, model.config)
    documents: list[list[reference.Span]] = [
        [maker.text(3), *maker.noisy((1, 2), copy=True)],
        [maker.text(4)],
    ]
    packed = pack(documents, model.config, torch.float64)
    logits, clean = packed.run(model)
    assert clean is not None
    loss = logits.square().mean() + clean.square().mean()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        gradients[name] = gradient.detach()
    return loss.item(), gradients


def sharded_halves(recompute: bool) -> dict[str, Any]:
    """On each of two ranks: every half sharded over both, in inference and in training."""
    model = random_model(small_config(), 0, torch.float64)
    mesh = init_device_mesh("cpu", (2,))
    called: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, QKVProjection | OutputMlp):
            fully_shard(module, mesh=mesh)
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.register_forward_hook(lambda *_, name=name: called.add(name))
        elif isinstance(module, Layer):
            module.recompute = recompute
    with torch.no_grad():
        outputs = prefill_and_denoise(model, "auto")
    model.requires_grad_(True)
    loss, gradients = loss_and_gradients(model, dist.get_rank())
    sharded = {
        name: gradient.numpy()
        for name, gradient in gradients.items()
        if ".qkv." in name or ".out." in name
    }
    return {"outputs": outputs.numpy(), "loss": loss, "called": called, "gradients": sharded}


@pytest.mark.parametrize("recompute", [False, True])
def test_halves_can_be_sharded(recompute: bool) -> None:
    whole = random_model(small_config(), 0, torch.float64)
    with torch.no_grad():
        expected = prefill_and_denoise(whole, "auto")
    whole.requires_grad_(True)
    losses: list[float] = []
    sums: dict[str, Tensor] = {}
    for rank in range(2):
        whole.zero_grad()
        loss, gradients = loss_and_gradients(whole, rank)
        losses.append(loss)
        for name, gradient in gradients.items():
            sums[name] = sums[name] + gradient if name in sums else gradient
    halves = {f"layers.{n}.{s}.{half}" for n in (0, 1) for s in STREAMS for half in ("qkv", "out")}
    for loss, result in zip(losses, run_ranks(sharded_halves, recompute), strict=True):
        assert result["called"] == halves
        torch.testing.assert_close(torch.from_numpy(result["outputs"]), expected)
        assert result["loss"] == pytest.approx(loss)
        assert result["gradients"].keys() == {n for n in sums if ".qkv." in n or ".out." in n}
        for name, gradient in result["gradients"].items():
            torch.testing.assert_close(torch.from_numpy(gradient), sums[name])


@pytest.mark.parametrize("how", ["compiled", "recomputed"])
def test_hooks_are_called(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Compiling and recomputing change neither `forward` nor who is called."""
    model = random_model(small_config(), 0, torch.float64, grad=True)
    expected = loss_and_gradients(model, 0)
    model.zero_grad()
    if how == "compiled":
        # No kernel is built here: what is compiled is called as it is.
        compiled: list[object] = []

        def take(function: Any, dynamic: bool) -> Any:
            compiled.append(function)
            return function

        monkeypatch.setattr(torch, "compile", take)
        monkeypatch.setattr(build, "MIN_ROWS", 1)
        build.compile_streams(model)
        assert len(compiled) == 8
    else:
        checkpoint_layers(model, True)
    called: set[str] = set()
    for name, module in model.named_modules():
        assert "forward" not in module.__dict__
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    loss, gradients = loss_and_gradients(model, 0)
    assert loss == expected[0]
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[1][name])
    halves = {f"layers.{n}.{s}.{half}" for n in (0, 1) for s in STREAMS for half in ("qkv", "out")}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert halves | linears <= called
