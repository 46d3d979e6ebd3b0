"""Documents padded side by side: when it pays, and what crosses between them."""

from __future__ import annotations

import random

import pytest
import torch

from neounify.attention.padded import PaddedAttention, by_size
from neounify.model import Document, Image, Layout, Noise, Text
from neounify.model.parts import GEN, UND
from neounify.model.stream import Projected
from support.attention import CPU, HEADS, WIDTH, plan, rows, streams


def documents(rng: random.Random, number: int) -> list[Document]:
    """Image generation, understanding, an edit with a clean copy behind the noise, plain text."""
    kinds = [
        lambda: (Text(rng.randint(3, 9)), Noise(2, 3)),
        lambda: (Text(2), Image(2, 2), Text(rng.randint(1, 9))),
        lambda: (Text(2), Image(3, 1), Text(4), Noise(2, 2), Image(2, 2), Text(3), Noise(1, 2)),
        lambda: (Text(rng.randint(1, 12)),),
    ]
    return [Document(rng.choice(kinds)()) for _ in range(number)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nan_in_one_document_reaches_no_other(dtype: torch.dtype) -> None:
    layout = Layout([Document((Text(n), Noise(1, 2))) for n in (3, 7, 4, 5)])
    attend = plan(layout)
    assert isinstance(attend, PaddedAttention)
    inputs = {n: Projected(*(y.detach() for y in x)) for n, x in streams(layout, 1, dtype).items()}
    expected = attend(0, inputs)
    start, stop = layout[UND].ranges[1]
    for x in inputs[UND]:
        x[start:stop] = float("nan")
    actual = attend(0, inputs)
    for name, bad in ((UND, slice(start, stop)), (GEN, slice(2, 4))):
        others = torch.ones(actual[name].shape[0], dtype=torch.bool)
        others[bad] = False
        assert not torch.isfinite(actual[name][bad]).any()
        assert torch.equal(actual[name][others], expected[name][others])


def test_half_precision_is_close() -> None:
    layout = Layout(documents(random.Random(0), 12))
    exact, inputs = plan(layout)(0, streams(layout)), streams(layout, dtype=torch.bfloat16)
    rounded = plan(layout)(0, inputs)
    torch.stack([(x.double() ** 2).sum() for x in rounded.values()]).sum().backward()
    for name, x in exact.items():
        assert torch.allclose(x, rounded[name].double(), atol=0.05)
    assert all(y.grad is not None and y.grad.isfinite().all() for x in inputs.values() for y in x)


def test_untrained_inputs_have_no_gradient() -> None:
    """Backward does not pass through a frozen understanding stream because of the other one."""
    layout = Layout(documents(random.Random(0), 12))
    results = []
    for name in ("auto", "blocks"):
        inputs = streams(layout, 1)
        inputs[UND] = Projected(*(x.detach() for x in inputs[UND]))
        out = plan(layout, name=name)(0, inputs)
        assert not out[UND].requires_grad
        out[GEN].square().sum().backward()
        results.append([out[UND], out[GEN].detach(), *(x.grad for x in inputs[GEN])])
    assert len(results[0]) == 5
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    inputs[UND] = inputs[UND]._replace(k=inputs[UND].k.clone().requires_grad_())
    assert plan(layout)(0, inputs)[UND].requires_grad


def test_one_stream_alone() -> None:
    text = Layout([Document((Text(n),)) for n in (3, 4, 5)])
    out = plan(text)(0, {UND: rows(12, 1)})
    assert set(out) == {UND}
    assert out[UND].shape == (12, HEADS, WIDTH)


@pytest.mark.parametrize("lengths", [[100], [2000, 2000]], ids=["one document", "long documents"])
def test_where_padding_would_not_pay(lengths: list[int]) -> None:
    layout = Layout([Document((Text(n),)) for n in lengths])
    assert PaddedAttention.plan(layout, None, CPU) is None


def test_documents_are_padded_beside_those_of_their_length() -> None:
    sizes = [(4, 4), (9, 400), (9, 90), (18, 210), (5, 5), (5, 50), (40, 200)]
    assert by_size(sizes) == [[0, 4], [1], [2], [3], [5], [6]]
    rng = random.Random(3)
    frame = Text(3), Noise(2, 2), Image(2, 2)
    clips = [Document((Text(5), *(frame * n))) for n in (1, 9, 2, 8)]
    layout = Layout([*documents(rng, 6), *clips, *documents(rng, 6)])
    attend, inputs = plan(layout), streams(layout, 1)
    assert isinstance(attend, PaddedAttention)
    padded, blocks = attend(0, inputs), plan(layout, name="blocks")(0, inputs)
    for name in (UND, GEN):
        assert torch.allclose(padded[name], blocks[name], atol=1e-12)


def test_a_plan_from_inference_serves_training() -> None:
    layout = Layout(documents(random.Random(1), 8))
    with torch.inference_mode():
        attend = plan(layout)
    assert isinstance(attend, PaddedAttention)
    sum(x.square().sum() for x in attend(0, streams(layout)).values()).backward()  # type: ignore[union-attr]


def test_long_documents_are_padded_where_their_blocks_are_short() -> None:
    frame = Text(10), Noise(4, 4), Image(4, 4)
    clip = Document((Text(20), *(frame * 16)))
    assert isinstance(plan(Layout([clip, clip])), PaddedAttention)
    assert isinstance(plan(Layout([clip])), PaddedAttention)
    longer = Document((Text(20), *(frame * 60)))
    image = Document((Text(120), Noise(24, 24)))
    for layout in (Layout([clip, longer]), Layout([image, image])):
        assert not isinstance(plan(layout), PaddedAttention)
