"""Clips in the layout: positions, who sees whom, the order of kinds, and a layer over them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from neounify.config import VideoConfig
from neounify.model import Document, Image, Layout, ModelBatch, NeoUnify, Noise, Span, Text
from neounify.model.layout import Grid
from neounify.model.parts import GEN, UND
from support import reference
from support.attention import plan
from support.models import (
    assert_close,
    by_stream,
    exact,
    facts_of,
    one_thread,
    random_config,
    random_model,
    weights_of,
)

__all__ = ["one_thread"]  # a fixture

CPU = torch.device("cpu")
FPS = (24.0, 12.0, 30.0, 16.0, 60.0, 23.976)


def _document(rng: random.Random) -> list[reference.ClipSpan]:
    """Text, an image, tubes of a clip and noise, in frames of two pixels a side per token."""

    def pixels(*shape: int) -> reference.Array:
        rows, columns = rng.choice([(1, 2), (2, 1), (2, 3)])
        return np.zeros((*shape, 3, 2 * rows, 2 * columns))

    def text() -> reference.ClipSpan:
        return reference.Text([1] * rng.randint(1, 3))

    tube = pixels(2)
    spans: list[reference.ClipSpan] = [text(), reference.Tube(tube), text(), reference.Tube(tube)]
    if rng.random() < 0.5:
        spans += [reference.Clean(pixels(), "an image"), text()]
    if rng.random() < 0.3:
        spans += [reference.Noisy(pixels(), "noise", 0.5, 1.0)]
    elif rng.random() < 0.8:
        clip = pixels(2 * rng.randint(1, 4))
        spans += [reference.NoisyClip(clip, 2, rng.choice(FPS), 0.5, 1.0)] * rng.randint(1, 2)
    return spans


def _spans(document: list[reference.ClipSpan]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for span in document:
        if isinstance(span, reference.Text):
            spans.append(Text(len(span.ids)))
        elif isinstance(span, reference.Tube):
            *_, height, width = span.frames.shape
            spans.append(Image(height // 2, width // 2, 1))
        elif isinstance(span, reference.NoisyClip):
            frames, _, height, width = span.frames.shape
            spans.append(Noise(height // 2, width // 2, frames // 2, 24 / span.fps))
        else:
            _, height, width = span.pixels.shape
            kind = Noise if isinstance(span, reference.Noisy) else Image
            spans.append(kind(height // 2, width // 2))
    return tuple(spans)


def _documents(seed: int) -> list[list[reference.ClipSpan]]:
    rng = random.Random(seed)
    return [_document(rng) for _ in range(3)]


@pytest.mark.parametrize("seed", range(20))
def test_positions_equal_the_reference(seed: int) -> None:
    documents = _documents(seed)
    layout = Layout(Document(_spans(document)) for document in documents)
    und, gen = by_stream(reference.tokens_of(documents, 2))
    assert layout[UND].positions.dtype == torch.int64
    assert layout[UND].positions.tolist() == [list(token.position) for token in und]
    wanted = np.array([token.position for token in gen]).reshape(-1, 3).astype(np.float32)
    np.testing.assert_array_equal(layout[GEN].positions.float().numpy(), wanted)


@pytest.mark.parametrize("seed", range(10))
def test_blocks_say_who_sees_whom(seed: int) -> None:
    documents = _documents(100 + seed)
    layout = Layout(Document(_spans(document)) for document in documents)
    und, gen = by_stream(reference.tokens_of(documents, 2))
    mask = np.zeros((len(und) + len(gen),) * 2, dtype=bool)
    for name, offset in ((UND, 0), (GEN, len(und))):
        for block in layout[name].blocks:
            first = layout[UND].ranges[block.document][0]
            for row in range(offset + block.start, offset + block.stop):
                mask[row, first : row + 1 if block.causal else first + block.visible] = True
                if name == GEN:
                    mask[row, offset + block.start : offset + block.stop] = True
    tokens = und + gen
    np.testing.assert_array_equal(mask, reference.mask_of(tokens, tokens))


@pytest.mark.parametrize("seed", range(3))
def test_a_layer_over_clips_equals_the_reference(seed: int) -> None:
    config = random_config(random.Random(seed), num_layers=1)
    model = random_model(config, seed, torch.float64)
    documents = _documents(200 + seed)
    tokens = reference.tokens_of(documents, 2)
    numbers = np.random.default_rng(seed)
    xs = [numbers.normal(size=(len(document), config.hidden_size)) for document in tokens]
    wanted: list[list[reference.Array]] = [[], []]
    for x, document in zip(xs, tokens, strict=True):
        after, _ = reference.layer(list(x), document, 0, weights_of(model), facts_of(config))
        for row, token in zip(after, document, strict=True):
            wanted[token.gen].append(row)
    flat = [token for document in tokens for token in document]
    every = np.concatenate(xs)
    und, gen = (
        torch.from_numpy(np.array([x for x, t in zip(every, flat, strict=True) if t.gen == is_gen]))
        for is_gen in (False, True)
    )
    layout = Layout(Document(_spans(document)) for document in documents)
    with exact():
        hidden = _layer(model, layout, und, gen)
    # Positions between whole numbers are float32.
    assert_close(hidden[0], np.stack(wanted[0]), 1e-10)
    assert_close(hidden[1], np.stack(wanted[1]), 1e-6)


def _layer(
    model: NeoUnify, layout: Layout, und: torch.Tensor, gen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    work = model.some_layers(layout, {UND: und, GEN: gen}, plan(layout), range(1))
    try:
        next(work)
    except StopIteration as end:
        return end.value[UND], end.value[GEN]
    raise AssertionError("one layer has no pause")


def test_whole_steps_keep_the_dtype_and_values_of_positions() -> None:
    clip = Layout([Document((Text(2), Noise(2, 2, 3, 2.0)))])[GEN].positions
    assert clip.dtype == torch.int64
    assert clip[:, 0].tolist() == [2] * 4 + [4] * 4 + [6] * 4
    image = Document((Text(3), Noise(1, 2)))
    alone = Layout([image])[GEN].positions
    beside = Layout([Document((Noise(1, 1, 2, 0.8),)), image])[GEN].positions
    assert alone.dtype == torch.int64
    assert beside.dtype == torch.float32
    assert torch.equal(beside[2:], alone.float())


@pytest.mark.parametrize("fps", FPS)
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (30, 4)])
def test_the_time_behind_a_clip_is_the_published_one(fps: float, rows: int, columns: int) -> None:
    clip = reference.NoisyClip(np.zeros((6, 3, 2 * rows, 2 * columns)), 2, fps, 0.5, 1.0)
    (tokens,) = reference.tokens_of([[reference.Text([1] * 7), clip]], 2)
    wanted = reference.next_time(token.position for token in tokens[7:])
    noise = Noise(rows, columns, 3, 24 / fps)
    assert noise.next_t(7) == wanted
    document = Document((Text(7), noise))
    assert document.bound_t == max(wanted, 7)
    # Nothing sees the noise: a clean copy stands where it stood.
    assert document.end_t == 7


def test_kinds_are_picked_and_put_in_order() -> None:
    layout = Layout(
        [Document((Text(1), Image(1, 2, 1), Image(1, 1), Text(2), Noise(1, 1, 2), Noise(1, 2)))]
    )
    und = layout[UND]
    mixed = ["a", "b", "c", "image", "tube", "tube"]
    order = und.order_on(CPU)
    assert order is not None
    assert [mixed[row] for row in order] == ["a", "tube", "tube", "image", "b", "c"]
    assert und.grids_of("tube") == [Grid(1, 2, 1)]
    assert und.grids_of("image") == [Grid(1, 1)]
    gen = layout[GEN]
    picked = gen.rows_of("tube", CPU)
    assert picked is not None
    assert picked.tolist() == [0, 1]
    images = Layout([Document((Noise(2, 2),))])[GEN]
    assert images.rows_of("image", CPU) is None
    assert images.order_on(CPU) is None


def test_attention_over_a_long_clip_needs_no_square_mask() -> None:
    """A clip of 37,440 tokens is one block that sees one range."""
    layout = Layout([Document((Text(28), Noise(30, 52, 24)))])
    (block,) = layout[GEN].blocks
    assert (block.length, block.visible, block.causal) == (37_440, 28, False)
    assert layout.pairs(GEN) == 37_440 * (37_440 + 28)


def test_heads_predict_some_rows_of_images_and_clips() -> None:
    video = VideoConfig(tube_frames=2)
    config = random_config(random.Random(0), image_head="flow", video=video)
    model = random_model(config, 0)
    grids = [Grid(1, 2), Grid(1, 2, 2), Grid(2, 2)]
    hidden = torch.randn(10, config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = model.clean_prediction(hidden, grids)
    assert whole.shape == (10, config.tube_width)
    assert whole[:2, config.token_width :].abs().max() == 0
    assert whole[2:6].abs().min(dim=0).values.max() > 0
    for rows in (range(5), range(1, 4), range(4, 10), range(2, 6)):
        part = model.clean_prediction(hidden[rows.start : rows.stop], grids, rows)
        torch.testing.assert_close(part, whole[rows.start : rows.stop])


@pytest.mark.parametrize("head", ["flow", "pixel"])
def test_a_frame_with_the_weights_of_images_is_an_image(head: str) -> None:
    """The first frame is predicted as the image is that stands there; with two, each is read."""
    video = VideoConfig(tube_frames=1, image_weights=True)
    config = random_config(random.Random(0), image_head=head, patch_embed="conv", video=video)
    model = random_model(config, 0)
    assert not {"gen_tube", "video_head"} & {name for name, _ in model.named_children()}
    pixels = torch.randn(12, config.token_width, generator=torch.Generator().manual_seed(0))

    def predicted(*noise: Noise) -> torch.Tensor:
        layout = Layout([Document((Text(2), *noise))])
        count = len(noise)
        batch = ModelBatch(
            layout=layout,
            attend=plan(layout),
            ids=torch.tensor([1, 2]),
            z=pixels[: layout[GEN].length],
            t=torch.full((count,), 0.5),
            noise_scale=torch.ones(count),
        )
        clean = model(batch).clean
        assert clean is not None
        return clean

    image = predicted(Noise(2, 3))
    assert torch.equal(predicted(Noise(2, 3, 1)), image)
    both = predicted(Noise(2, 3, 2, 1.0))
    assert both.shape == (12, config.token_width)
    assert (both[:6] - image).abs().max() > 1e-4  # the frames see each other
    beside = predicted(Noise(2, 3), Noise(2, 3, 1))
    torch.testing.assert_close(beside[:6], image)
