"""Which parameters a loss reaches, and that the gradients are the right ones."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from neounify.checkpoint import stream_of
from neounify.config import FlowConfig, MlpConfig, ModelConfig
from neounify.model import NeoUnify
from neounify.model.parts import UND
from support import reference
from support.attention import plan
from support.models import Maker, Packed, exact, pack, random_config, random_model

LAYERS = 2


def _setup(
    head: str = "flow", dtype: torch.dtype = torch.float64
) -> tuple[ModelConfig, NeoUnify, Packed]:
    rng = random.Random(head)
    config = random_config(
        rng,
        num_layers=LAYERS,
        hidden_size=16,
        head_dim=8,
        image_head=head,
        patch_size=4,
        merge=2,
        attention_bias=True,
        tie_embeddings=False,
        und_mlp=MlpConfig(width=20),
        gen_mlp=MlpConfig(width=12),
        flow=FlowConfig(noise_scale_embedding=True),
    )
    maker = Maker(rng, config)
    documents: list[list[reference.Span]] = [
        [maker.text(3), *maker.clean((1, 2)), maker.text(2), *maker.noisy((2, 2))],
        [maker.text(2), *maker.noisy((1, 2), copy=True), maker.text(2)],
        [maker.text(4)],
    ]
    return config, random_model(config, 3, dtype, grad=True), pack(documents, config, dtype)


def _reached(model: NeoUnify, loss: Tensor) -> set[str]:
    """The parameters that a loss has a gradient other than zero for."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name
        for name, grad in zip(parameters, grads, strict=True)
        if grad is not None and bool(grad.any())
    }


def test_a_loss_on_text_reaches_the_und_stream_alone() -> None:
    _, model, packed = _setup()
    logits, _ = packed.run(model)
    wanted = {n for n, _ in model.named_parameters() if stream_of(n) != "gen"}
    assert _reached(model, logits.square().sum()) == wanted


def test_a_loss_on_images_reaches_gen_and_through_the_prefix_und() -> None:
    _, model, packed = _setup()
    _, clean = packed.run(model)
    assert clean is not None
    last = f"layers.{LAYERS - 1}.und."
    # Of the last layer, gen tokens take keys and values from the prefix and nothing else.
    taken = ("input_norm", "k_proj", "k_norm", "k_norm_hw", "v_proj")
    wanted = {
        name
        for name, _ in model.named_parameters()
        if not name.startswith(("lm_head", "und_norm"))
        and (not name.startswith(last) or name.removeprefix(f"{last}qkv.").split(".")[0] in taken)
    }
    assert _reached(model, clean.square().sum()) == wanted


def test_a_loss_on_noise_without_a_prefix_leaves_und_alone() -> None:
    config, model, _ = _setup()
    maker = Maker(random.Random(0), config)
    documents: list[list[reference.Span]] = [
        [*maker.noisy((2, 2)), *maker.clean((1, 1))],
        [maker.text(3)],
    ]
    _, clean = pack(documents, config, torch.float64).run(model)
    assert clean is not None
    reached = _reached(model, clean.square().sum())
    assert reached == {n for n, _ in model.named_parameters() if stream_of(n) == "gen"}


def test_no_gradient_crosses_from_one_document_to_another() -> None:
    _, model, packed = _setup()
    embedded = {n: x.detach().requires_grad_() for n, x in model.embed(packed.batch()).items()}
    hidden = model.backbone(packed.layout, embedded, plan(packed.layout))
    start, stop = packed.layout["und"].ranges[1]
    grad_und, grad_gen = torch.autograd.grad(
        hidden[UND][start:stop].square().sum(), list(embedded.values()), allow_unused=True
    )
    rows = grad_und.abs().amax(dim=1) > 0
    assert rows.nonzero().flatten().tolist() == list(range(start, stop))
    assert grad_gen is None or not grad_gen.any()


def test_a_model_trains_after_inference() -> None:
    config, model, packed = _setup()
    maker = Maker(random.Random(1), config)
    other = pack([[maker.text(2), *maker.clean((1, 2)), maker.text(1)]], config, torch.float64)
    with torch.inference_mode():
        packed.run(model)
    logits, _ = other.run(model)
    logits.sum().backward()


def test_a_layout_used_for_inference_serves_training_too() -> None:
    _, model, packed = _setup()
    with torch.inference_mode():
        packed.run(model)
    logits, _ = packed.run(model)
    logits.sum().backward()


@pytest.mark.parametrize("head", ["flow", "pixel"])
def test_gradients_equal_finite_differences(head: str) -> None:
    _, model, packed = _setup(head)
    generator = torch.Generator().manual_seed(0)
    shapes = [x.shape for x in packed.run(model) if x is not None]
    weights = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def loss() -> Tensor:
        logits, clean = packed.run(model)
        assert clean is not None
        return (logits * weights[0]).sum() + (clean * weights[1]).sum()

    step = 1e-5
    with exact():
        loss().backward()
        with torch.no_grad():
            parameters = list(model.named_parameters())
            for name, parameter in random.Random(head).sample(parameters, 12):
                direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                direction /= direction.norm()
                assert parameter.grad is not None
                slope = float((parameter.grad * direction).sum())
                parameter.add_(step * direction)
                above = float(loss())
                parameter.sub_(2 * step * direction)
                below = float(loss())
                parameter.add_(step * direction)
                assert slope == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-6), (
                    name
                )
