"""The sparse MLP: its router, and that no expert works for nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neounify.config import MlpConfig
from neounify.model.stream import PROJECTIONS, Experts, SparseMlp, StackedExperts, may_group
from support import reference
from support.models import assert_close, exact

SIZE = 12


def _block(
    experts: int, top_k: int, *, normalise: bool = True, dtype: torch.dtype = torch.float64
) -> SparseMlp:
    config = MlpConfig(
        width=0,
        num_experts=experts,
        experts_per_token=top_k,
        expert_width=7,
        normalise_top_k=normalise,
        sparse=(True,),
    )
    torch.manual_seed(experts * 10 + top_k)
    return SparseMlp(SIZE, config).to(dtype).requires_grad_(False)


def _each(block: SparseMlp) -> Experts:
    assert isinstance(block.experts, Experts)
    return block.experts


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _inputs(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, SIZE, generator=generator, dtype=torch.float64)


def _weights(block: SparseMlp) -> dict[str, reference.Array]:
    tensors = {name.replace("router", "gate"): t for name, t in block.state_dict().items()}
    return {f"mlp.{name}": tensor.double().numpy() for name, tensor in tensors.items()}


def _rows_per_expert(block: SparseMlp, x: Tensor) -> Counter[int]:
    """How many rows each expert was called with; an expert that is not called is not in it."""
    rows: Counter[int] = Counter()
    calls: Counter[int] = Counter()

    def count(number: int, module: nn.Module, args: tuple[Tensor]) -> None:
        rows[number] += args[0].shape[0]
        calls[number] += 1

    hooks = [
        expert.register_forward_pre_hook(lambda module, args, n=n: count(n, module, args))
        for n, expert in enumerate(_each(block))
    ]
    block(x)
    for hook in hooks:
        hook.remove()
    assert set(calls.values()) <= {1}
    return rows


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 1), (5, 2), (6, 6), (16, 3)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_equals_the_reference_token_by_token(
    experts: int, top_k: int, rows: int, normalise: bool
) -> None:
    block, x = _block(experts, top_k, normalise=normalise), _inputs(rows)
    wanted = [reference.sparse(v, _weights(block), "mlp", top_k, normalise) for v in x.numpy()]
    with exact():
        assert_close(block(x), np.stack(wanted), 1e-12)


@pytest.mark.parametrize("normalise", [False, True])
def test_router_weights(normalise: bool) -> None:
    block, x = _block(8, 3, normalise=normalise, dtype=torch.float32), _inputs(20).float()
    weights, experts = block.route(x)
    assert weights.dtype == torch.float32
    assert (weights.diff(dim=1) <= 0).all()  # best first
    for row, (shares, chosen) in enumerate(zip(weights, experts, strict=True)):
        scores = block.router.weight.double().numpy() @ x[row].double().numpy()
        wanted = reference.router_weights(scores, 3, normalise)
        assert set(chosen.tolist()) == set(wanted)
        for share, expert in zip(shares.tolist(), chosen.tolist(), strict=True):
            assert share == pytest.approx(wanted[expert], rel=1e-6)
        total = float(shares.sum())
        assert total == pytest.approx(1, rel=1e-6) if normalise else total < 0.999


def test_router_weights_are_float32_in_a_bfloat16_model() -> None:
    block = _block(8, 2, dtype=torch.bfloat16)
    x = _inputs(30).bfloat16()
    weights, _ = block.route(x)
    assert weights.dtype == torch.float32
    assert (weights != weights.bfloat16().float()).any()  # not merely rounded numbers
    assert block(x).dtype == torch.bfloat16


def test_experts_without_tokens_are_not_called() -> None:
    block, x = _block(16, 2), _inputs(3)
    _, experts = block.route(x)
    assert _rows_per_expert(block, x) == Counter(experts.flatten().tolist())
    assert len(_rows_per_expert(block, x)) < 16


def test_one_token() -> None:
    assert sorted(_rows_per_expert(_block(9, 4), _inputs(1)).values()) == [1, 1, 1, 1]


def test_all_tokens_to_one_expert() -> None:
    block, x = _block(6, 1), _inputs(10).abs()
    block.router.weight.zero_()
    block.router.weight[4] = 1.0
    assert _rows_per_expert(block, x) == {4: 10}
    assert_close(block(x), _each(block)[4](x), 1e-12)


def test_order_of_tokens_does_not_matter() -> None:
    block, x = _block(5, 2), _inputs(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_close(block(x[order]), block(x)[order], 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_router_and_experts_get_gradients(dtype: torch.dtype) -> None:
    """Of zero where no token was routed to an expert, as on any rank of several."""
    block, x = _block(8, 2, dtype=dtype).requires_grad_(True), _inputs(2).to(dtype)
    _, experts = block.route(x)
    block(x).square().sum().backward()
    assert block.router.weight.grad is not None
    assert block.router.weight.grad.abs().sum() > 0
    for number, expert in enumerate(_each(block)):
        for parameter in expert.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == (number in experts)


def _wide(dtype: torch.dtype) -> tuple[SparseMlp, Tensor]:
    """A block whose widths grouped products serve, and input of it."""
    config = MlpConfig(width=0, num_experts=6, experts_per_token=2, expert_width=8, sparse=(True,))
    torch.manual_seed(0)
    block = SparseMlp(16, config).requires_grad_(False)
    return block.to(dtype), torch.randn(9, 16).to(dtype)


@pytest.mark.parametrize("tokens", [9, 1])
def test_stacked_experts_are_trained_without_waiting_for_counts(tokens: int) -> None:
    """In grouped products, which give the gradients that each expert by itself gives."""
    (each, x), (grouped, _) = _wide(torch.float64), _wide(torch.float32)
    each.requires_grad_(True)(x[:tokens]).square().sum().backward()
    grouped.stack()
    grouped.requires_grad_(True)(x[:tokens].float()).square().sum().backward()
    assert isinstance(grouped.experts, StackedExperts)
    for name in PROJECTIONS:
        wanted = [gradient_of(expert.get_parameter(f"{name}.weight")) for expert in _each(each)]
        gradient = gradient_of(grouped.experts.get_parameter(name))
        torch.testing.assert_close(gradient.double(), torch.stack(wanted), atol=1e-5, rtol=1e-4)
    # Tensors without values have none to wait for.
    block, x = _wide(torch.bfloat16)
    block, x = block.to("meta"), x.to("meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        block(x)
    block.stack()
    block.requires_grad_(True)(x).square().sum().backward()


@pytest.mark.parametrize("size", [16, 13])
def test_stacked_experts_without_grouped_products(size: int) -> None:
    """Of float64, and of widths that they do not serve: one expert after the other."""
    dtype = torch.float64 if size == 16 else torch.float32
    config = MlpConfig(width=0, num_experts=6, experts_per_token=2, expert_width=8, sparse=(True,))
    torch.manual_seed(0)
    block, x = SparseMlp(size, config).to(dtype), torch.randn(3, size, dtype=dtype)
    wanted = block(x)
    wanted.square().sum().backward()
    router = block.router.weight.grad
    block.stack()
    block.zero_grad()
    actual = block(x)
    actual.square().sum().backward()
    torch.testing.assert_close(actual, wanted)
    torch.testing.assert_close(block.router.weight.grad, router)
    assert not may_group(dtype, size)


def test_grouped_experts_follow_autocast() -> None:
    block, x = _wide(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = block(x)
        block.stack()
        actual = block(x)
    assert_close(actual, wanted, 1e-6)
    assert (block(x) != wanted).any()
