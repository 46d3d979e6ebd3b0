"""Documents padded side by side give what they give block by block."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from neounify.model import Document, Image, Layout, Noise, Text
from neounify.model.attention import Projected, shared_attention

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def documents(rng: random.Random, number: int) -> list[Document]:
    """Painting, reading, editing with a clean copy behind the noise, plain text."""
    kinds = [
        lambda: (Text(rng.randint(3, 9)), Noise(2, 3)),
        lambda: (Text(2), Image(2, 2), Text(rng.randint(1, 9))),
        lambda: (Text(2), Image(3, 1), Text(4), Noise(2, 2), Image(2, 2), Text(3), Noise(1, 2)),
        lambda: (Text(rng.randint(1, 12)),),
    ]
    return [Document(rng.choice(kinds)()) for _ in range(number)]


def rows(number: int, seed: int, dtype: torch.dtype) -> Projected:
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        values = torch.randn(number, heads, WIDTH, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    return Projected(draw(HEADS), draw(KV_HEADS), draw(KV_HEADS))


def attend(layout: Layout, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of both streams, and the gradients of all inputs of a fixed loss."""
    und, gen = rows(layout.und_length, 1, dtype), rows(layout.gen_length, 2, dtype)
    outputs = [x for x in shared_attention(und, gen, layout, None, 0) if x is not None]
    torch.stack([(x.double() ** 2).sum() for x in outputs]).sum().backward()
    gradients = [x.grad for x in (*und, *gen)]
    return [x.detach() for x in outputs], [g for g in gradients if g is not None]


@pytest.mark.parametrize("seed", range(5))
def test_padded_equals_blocks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = documents(random.Random(seed), 12)
    padded = Layout(packed)
    assert padded.padding(torch.device("cpu")) is not None
    blocks = Layout(packed)
    monkeypatch.setattr(blocks, "padding", lambda device: None)
    for mine, theirs in zip(attend(padded), attend(blocks), strict=True):
        assert len(mine) == len(theirs)
        for a, b in zip(mine, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nan_in_one_document_reaches_no_other(dtype: torch.dtype) -> None:
    layout = Layout([Document((Text(n), Noise(1, 2))) for n in (3, 7, 4, 5)])
    assert layout.padding(torch.device("cpu")) is not None
    und, gen = (
        Projected(*(x.detach() for x in rows(n, 1, dtype)))
        for n in (layout.und_length, layout.gen_length)
    )
    expected = shared_attention(und, gen, layout, None, 0)
    for x in und:
        x[layout.und_ranges[1][0] : layout.und_ranges[1][1]] = float("nan")
    found = shared_attention(und, gen, layout, None, 0)
    start, stop = layout.und_ranges[1]
    for mine, theirs, bad in zip(found, expected, (slice(start, stop), slice(2, 4)), strict=True):
        assert mine is not None
        assert theirs is not None
        others = torch.ones(mine.shape[0], dtype=torch.bool)
        others[bad] = False
        assert not torch.isfinite(mine[bad]).any()
        assert torch.equal(mine[others], theirs[others])


def test_half_precision_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(documents(random.Random(0), 12))
    exact, _ = attend(layout)
    rounded, gradients = attend(layout, torch.bfloat16)
    for a, b in zip(exact, rounded, strict=True):
        assert torch.allclose(a, b.double(), atol=0.05)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_what_nobody_trains_has_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen understanding stream is not walked back through because of the other one."""
    packed = documents(random.Random(0), 12)
    padded, blocks = Layout(packed), Layout(packed)
    assert padded.padding(torch.device("cpu")) is not None
    monkeypatch.setattr(blocks, "padding", lambda device: None)
    found = []
    for layout in (padded, blocks):
        und, gen = (rows(n, 1, torch.float64) for n in (layout.und_length, layout.gen_length))
        frozen = Projected(*(x.detach() for x in und))
        und_out, gen_out = shared_attention(frozen, gen, layout, None, 0)
        assert und_out is not None
        assert gen_out is not None
        assert not und_out.requires_grad
        gen_out.square().sum().backward()
        found.append([und_out, gen_out.detach(), *(x.grad for x in gen if x.grad is not None)])
    assert len(found[0]) == 5
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    keys_trained = Projected(frozen.q, frozen.k.clone().requires_grad_(), frozen.v)
    und_out, _ = shared_attention(keys_trained, gen, padded, None, 0)
    assert und_out is not None
    assert und_out.requires_grad


def test_one_stream_alone() -> None:
    text = Layout([Document((Text(n),)) for n in (3, 4, 5)])
    und, gen = shared_attention(rows(12, 1, torch.float64), None, text, None, 0)
    assert gen is None
    assert und is not None
    assert und.shape == (12, HEADS, WIDTH)


@pytest.mark.parametrize(
    "lengths",
    [[100], [2000, 2000], [400, 1, 1, 1, 1, 1, 1, 1]],
    ids=["one document", "long documents", "uneven documents"],
)
def test_where_padding_would_not_pay(lengths: list[int]) -> None:
    layout = Layout([Document((Text(n),)) for n in lengths])
    assert layout.padding(torch.device("cpu")) is None


def test_a_padding_made_in_inference_serves_training() -> None:
    layout = Layout(documents(random.Random(1), 8))
    with torch.inference_mode():
        layout.padding(torch.device("cpu"))
    attend(layout)
