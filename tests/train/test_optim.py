"""Muon in bfloat16 and float32: updates against a float64 reference, states, the choice."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from neounify.train import muon as module
from neounify.train.muon import Muon, orthogonal
from neounify.train.optim import OptimizerConfig, OptimizerSet, load_optimizers

SHAPES = [(24, 24), (16, 48), (48, 16)]
RATE, MOMENTUM, DECAY = 1e-2, 0.95, 0.1


def matrices(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def reference(start: list[Tensor], gradients: list[list[Tensor]]) -> list[Tensor]:
    """Muon of Moonlight (arXiv 2502.16982) in float64."""
    reached = []
    for index, matrix in enumerate(start):
        weight, buffer = matrix.double(), torch.zeros_like(matrix, dtype=torch.float64)
        for step in gradients:
            gradient = step[index].double()
            buffer = MOMENTUM * buffer + (1 - MOMENTUM) * gradient
            x = MOMENTUM * buffer + (1 - MOMENTUM) * gradient
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            weight = weight * (1 - RATE * DECAY) - RATE * 0.2 * math.sqrt(max(weight.shape)) * x
        reached.append(weight)
    return reached


def choose(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(module, "multiplies", lambda dtype: native)


def muon(parameters: list[Parameter]) -> Muon:
    settings = {"lr": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    return Muon([{"params": parameters}], **settings)


@pytest.mark.parametrize(("native", "tolerance"), [(True, 2e-2), (False, 1e-4)])
def test_updates_are_those_of_a_float64_reference(
    monkeypatch: pytest.MonkeyPatch, native: bool, tolerance: float
) -> None:
    choose(monkeypatch, native)
    start, gradients = matrices(), [matrices(seed) for seed in (1, 2, 3)]
    parameters = [Parameter(matrix.clone()) for matrix in start]
    optimizer = muon(parameters)
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    for parameter, want, before in zip(parameters, reference(start, gradients), start, strict=True):
        moved, wanted = parameter.detach().double() - before, want - before
        assert (moved - wanted).norm() < tolerance * wanted.norm()


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 4, 16)])
def test_a_stack_is_a_batch_of_matrices(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    stack = Parameter(start.clone())
    each = [Parameter(matrix.clone()) for matrix in start]
    stack.grad = gradient
    for one, of_it in zip(each, gradient, strict=True):
        one.grad = of_it.clone()
    muon([stack]).step()
    muon(each).step()
    torch.testing.assert_close(stack.detach(), torch.stack([one.detach() for one in each]))


def test_singular_values_become_about_one() -> None:
    for matrix in matrices():
        values = torch.linalg.svdvals(orthogonal(matrix))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_a_matrix_of_zeros_has_no_update() -> None:
    assert not orthogonal(torch.zeros(4, 6)).any()


@pytest.mark.parametrize("native", [True, False])
def test_states_load_into_either_precision(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    names = [f"layers.0.gen.out.matrix{index}" for index in range(len(SHAPES))]
    config = OptimizerConfig(name="muon", learning_rate=RATE)

    def optimizers(start: list[Tensor]) -> tuple[dict[str, Parameter], OptimizerSet]:
        parameters = {n: Parameter(m.clone()) for n, m in zip(names, start, strict=True)}
        return parameters, OptimizerSet(parameters, config)

    def step(parameters: dict[str, Parameter], one: OptimizerSet, seed: int) -> None:
        for parameter, gradient in zip(parameters.values(), matrices(seed), strict=True):
            parameter.grad = gradient
        one.step()

    choose(monkeypatch, native)
    parameters, one = optimizers(matrices())
    step(parameters, one, 1)
    reached = [parameter.detach().clone() for parameter in parameters.values()]
    saved = copy.deepcopy(one.state())
    again, other = optimizers(reached)
    load_optimizers([other], saved, [names])
    step(parameters, one, 2)
    step(again, other, 2)
    assert all(torch.equal(again[name], parameters[name]) for name in names)
    choose(monkeypatch, not native)
    there, third = optimizers(reached)
    load_optimizers([third], saved, [names])
    step(there, third, 2)
    for name in names:
        torch.testing.assert_close(there[name], parameters[name], atol=2e-3, rtol=0)
