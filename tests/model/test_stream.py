"""Halves of a stream as modules: hooks, replaced linears, shares of heads, joined norms."""

from __future__ import annotations

import random
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neounify.checkpoint.names import each_expert
from neounify.config import MlpConfig
from neounify.model import Document, Layout, NeoUnify, Text
from neounify.model.parts import STREAMS
from neounify.model.stream import (
    OutputMlp,
    QKVProjection,
    SparseMlp,
    frozen_linear,
    onednn_is_faster,
)
from support.models import Maker, Packed, pack, random_config, random_model


def _setup(**fixed: object) -> tuple[NeoUnify, Packed]:
    rng = random.Random(0)
    config = random_config(rng, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, **fixed)
    maker = Maker(rng, config)
    packed = pack([[maker.text(3), *maker.noisy((1, 2))]], config, torch.float64)
    return random_model(config, 0, torch.float64), packed


def test_every_module_with_weights_is_called() -> None:
    """So that hooks of sharding and of quantisation reach it; embeddings and heads included."""
    model, packed = _setup(und_mlp=MlpConfig(width=8), gen_mlp=MlpConfig(width=8))
    called: set[str] = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    packed.run(model)
    halves = {f"layers.{n}.{s}.{half}" for n in (0, 1) for s in STREAMS for half in ("qkv", "out")}
    assert halves <= called
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= called


def test_a_linear_may_be_replaced() -> None:
    class Doubled(nn.Module):
        """No weight of the usual kind."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.halved = nn.Parameter(linear.weight / 2)
            self.bias = linear.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.halved + self.halved, self.bias)

    model, packed = _setup()
    expected = packed.run(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, Doubled(module))
    for actual, wanted in zip(packed.run(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_rank_may_hold_half_of_the_heads() -> None:
    """Two shares of the projections, each with its own heads, give all of them together."""
    model, _ = _setup()
    config = model.config
    half = model.get_submodule("layers.0.und.qkv")
    assert isinstance(half, QKVProjection)
    layout = Layout([Document((Text(5),))])
    x = torch.randn(5, config.hidden_size, dtype=torch.float64)
    rotation = model._rotation(layout, "und", x)
    whole = half(x, rotation)
    shares = []
    for rank in range(2):
        share = QKVProjection(config).double().requires_grad_(False)
        share.load_state_dict(half.state_dict())
        for name in ("q_proj", "k_proj", "v_proj"):
            linear = share.get_submodule(name)
            for kind, values in list(linear.named_parameters()):
                setattr(linear, kind, nn.Parameter(values.chunk(2)[rank], requires_grad=False))
        shares.append(share(x, rotation))
    for both, parts in zip(whole, zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(list(parts), dim=1), both)


def _change(model: NeoUnify, name: str, how: str) -> None:
    norm = model.get_submodule(name)
    new = norm.get_parameter("weight").detach() * 3
    if how == "in place":
        norm.get_parameter("weight").copy_(new)
    elif how == "data":
        norm.get_parameter("weight").data = new
    elif how == "parameter":
        norm.register_parameter("weight", nn.Parameter(new, requires_grad=False))
    else:
        model.load_state_dict({**model.state_dict(), f"{name}.weight": new})


def _assert_like_a_fresh_one(model: NeoUnify, packed: Packed) -> None:
    fresh = NeoUnify(model.config).double().requires_grad_(False)
    fresh.load_state_dict(model.state_dict())
    for actual, wanted in zip(packed.run(model), packed.run(fresh), strict=True):
        torch.testing.assert_close(actual, wanted, atol=0, rtol=0)


@pytest.mark.parametrize("how", ["in place", "data", "parameter", "load"])
def test_norms_follow_their_weights(how: str) -> None:
    model, packed = _setup()
    packed.run(model)
    _change(model, "layers.1.gen.qkv.k_norm_hw", how)
    _assert_like_a_fresh_one(model, packed)


@pytest.mark.parametrize("undo", ["load", "train", "grad"])
def test_fused_norms(undo: str) -> None:
    """They compute the same; loading and training undo them."""
    model, packed = _setup()
    expected = packed.run(model)
    model.fuse()
    half = model.get_submodule("layers.1.gen.qkv")
    assert isinstance(half, QKVProjection)
    assert half.head_weights is not None
    assert not any("head_weights" in name for name in model.state_dict())
    for actual, wanted in zip(packed.run(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=0, rtol=0)
    if undo == "train":
        model.train()
    if undo == "grad":
        model.requires_grad_(True)
    with torch.no_grad():
        _change(model, "layers.1.gen.qkv.k_norm_hw", "load" if undo == "load" else "in place")
    _assert_like_a_fresh_one(model, packed)


def test_trained_norms_get_gradients() -> None:
    model, packed = _setup()
    packed.run(model)
    model.requires_grad_(True)
    logits, clean = packed.run(model)
    (logits.sum() + clean.sum()).backward()  # type: ignore[union-attr]
    for stream in STREAMS:
        gradient = model.get_parameter(f"layers.0.{stream}.qkv.q_norm_hw.weight").grad
        assert gradient is not None
        assert gradient.any()


def test_compute_dtype_follows_casts() -> None:
    model, packed = _setup()
    assert model.compute_dtype == torch.float64
    with pytest.warns(DeprecationWarning, match="use NeoUnify.compute_dtype"):
        assert model.dtype == torch.float64
    assert model.bfloat16().compute_dtype == torch.bfloat16
    assert model.to("cpu").compute_dtype == torch.bfloat16
    model.float()
    logits, _ = packed.run(model)
    assert model.compute_dtype == logits.dtype == torch.float32


def test_stacked_experts_compute_the_same() -> None:
    config = MlpConfig(
        width=8, num_experts=6, experts_per_token=2, expert_width=8, sparse=(True, False)
    )
    model, packed = _setup(und_mlp=config, gen_mlp=config, hidden_size=16)
    model.float()
    expected = packed.run(model)
    sparse = [m for m in model.modules() if isinstance(m, SparseMlp)]
    assert sparse
    each = model.state_dict()
    for mlp in sparse:
        mlp.stack()
    for actual, wanted in zip(packed.run(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    joined = model.state_dict()
    assert [name for name in joined if "experts" in name] == [
        f"layers.0.{stream}.out.mlp.experts.{part}_proj"
        for stream in STREAMS
        for part in ("gate", "up", "down")
    ]
    apart = each_expert(joined)
    assert apart.keys() == each.keys()
    assert all(torch.equal(apart[name], tensor) for name, tensor in each.items())
    for mlp in sparse:
        assert mlp.unstack()
    for actual, wanted in zip(packed.run(model), expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=0, rtol=0)


def test_output_of_a_stream() -> None:
    """x + o(attended), then x + mlp(norm(x))."""
    model, _ = _setup(und_mlp=MlpConfig(width=8), gen_mlp=MlpConfig(width=8))
    out = model.get_submodule("layers.0.gen.out")
    assert isinstance(out, OutputMlp)
    x = torch.randn(3, model.config.hidden_size, dtype=torch.float64)
    attended = torch.randn(3, 4, 8, dtype=torch.float64)
    between = x + out.o_proj(attended.reshape(3, 32))
    torch.testing.assert_close(out(x, attended), between + out.mlp(out.post_norm(between)))


# --- products of frozen layers ---


def test_large_frozen_products_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """By oneDNN, which differs in the last bits; everything else goes the way of torch."""
    calls: list[int] = []
    plain = nn.functional.linear

    def linear(*parts: Any) -> Tensor:
        calls.append(1)
        return plain(*parts)

    monkeypatch.setattr("neounify.model.stream.linear", linear)
    layer = torch.nn.Linear(256, 320).requires_grad_(False)
    x = torch.randn(64, 256)
    for rows, grad, dtype, direct in (
        (64, False, torch.float32, True),
        (3, False, torch.float32, False),  # too few for its call to pay
        (64, True, torch.float32, False),
        (64, False, torch.bfloat16, False),
    ):
        calls.clear()
        with torch.set_grad_enabled(grad):
            product = frozen_linear(layer.to(dtype), x[:rows].to(dtype))
        assert bool(calls) != direct
        wanted = plain(x[:rows].double(), layer.weight.double(), layer.bias.double())
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(product.double(), wanted, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("capability", "vendor", "faster"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX2", "AuthenticAMD", False),
        ("AVX512", "GenuineIntel", False),
        ("DEFAULT", "", False),
    ],
)
def test_which_processors_prefer_onednn(
    capability: str, vendor: str, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr("neounify.model.stream.processor_vendor", lambda: vendor)
    assert onednn_is_faster.__wrapped__() is (faster and torch.backends.mkldnn.is_available())


def test_a_model_computes_large_products_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, packed = _setup()
    with torch.no_grad():
        expected = packed.run(model.float())
        monkeypatch.setattr("neounify.model.neo.onednn_is_faster", lambda: True)
        monkeypatch.setattr("neounify.model.stream.ONEDNN_PRODUCTS", 1)
        model.multiply_fast()
        for actual, wanted in zip(packed.run(model), expected, strict=True):
            torch.testing.assert_close(actual, wanted, atol=1e-4, rtol=0)
    copy = deepcopy(model)
    layer = copy.get_submodule("layers.0.und.qkv.q_proj")
    assert isinstance(layer.forward, partial)
    assert layer.forward.args[0] is layer
