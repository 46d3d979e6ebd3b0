"""Positions, blocks and orders of packed documents."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from neounify.model import Document, Image, Layout, Noise, Text
from neounify.model.layout import Grid, grid_patches
from neounify.model.parts import GEN, UND
from support import reference
from support.models import Maker, by_stream, pack, random_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("seed", range(20))
def test_positions_equal_the_reference(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    maker = Maker(rng, config)
    documents = [maker.document() for _ in range(rng.randint(1, 4))]
    layout = pack(documents, config, torch.float32).layout
    und, gen = by_stream(reference.tokens_of(documents, config.token_size))
    assert layout["und"].positions.tolist() == [list(token.position) for token in und]
    assert layout["gen"].positions.tolist() == [list(token.position) for token in gen]
    assert (layout["und"].length, layout["gen"].length) == (len(und), len(gen))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_say_who_sees_whom(seed: int) -> None:
    """The table of `sees`, read off the blocks without running anything."""
    rng = random.Random(50 + seed)
    config = random_config(rng)
    maker = Maker(rng, config)
    documents = [maker.document() for _ in range(3)]
    layout = pack(documents, config, torch.float32).layout
    und, gen = by_stream(reference.tokens_of(documents, config.token_size))
    mask = np.zeros((len(und) + len(gen),) * 2, dtype=bool)
    for block in layout["und"].blocks:
        first = layout["und"].ranges[block.document][0]
        for row in range(block.start, block.stop):
            mask[row, first : row + 1 if block.causal else first + block.visible] = True
    for block in layout["gen"].blocks:
        first = layout["und"].ranges[block.document][0]
        rows = slice(len(und) + block.start, len(und) + block.stop)
        mask[rows, first : first + block.visible] = True
        mask[rows, rows] = True
    tokens = und + gen
    np.testing.assert_array_equal(mask, reference.mask_of(tokens, tokens))
    covered = [row for b in layout["und"].blocks for row in range(b.start, b.stop)]
    assert covered == list(range(len(und)))
    covered = [row for b in layout["gen"].blocks for row in range(b.start, b.stop)]
    assert covered == list(range(len(gen)))
    for block in layout["und"].blocks:
        first = layout["und"].ranges[block.document][0]
        assert block.visible == block.stop - first


def test_a_clean_copy_stands_where_its_noise_stood() -> None:
    layout = Layout([Document((Text(2), Noise(2, 3), Noise(2, 3), Image(2, 3), Text(1)))])
    clean = layout["und"].positions[2:8]
    assert torch.equal(layout["gen"].positions, torch.cat([clean, clean]))
    assert clean[:, 0].tolist() == [2] * 6
    assert clean[:, 1:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert layout["und"].positions[8].tolist() == [3, 0, 0]
    assert layout.documents[0].end_t == 4


def test_an_image_of_any_size_is_one_step_of_time() -> None:
    for image in (Image(1, 1), Image(7, 2)):
        assert Document((Text(3), image, Text(2))).end_t == 6
    assert Document((Text(1), Image(2, 2)), past=9, start_t=5).end_t == 7


def test_documents_continue_from_a_cache() -> None:
    document = Document((Text(2), Image(1, 2), Noise(1, 1)), past=10, start_t=4)
    layout = Layout([Document((Text(3),)), document])
    assert layout["und"].positions[:, 0].tolist() == [0, 1, 2, 4, 5, 6, 6]
    assert layout["gen"].positions.tolist() == [[7, 0, 0]]
    assert [(b.start, b.stop, b.visible, b.causal) for b in layout["und"].blocks] == [
        (0, 3, 3, True),
        (3, 5, 12, True),
        (5, 7, 14, False),
    ]
    assert [(b.document, b.visible) for b in layout["gen"].blocks] == [(1, 14)]
    assert layout["und"].ranges == [(0, 3), (3, 7)]
    assert layout.last_rows() == [2, 6]


def test_empty_text_is_nothing() -> None:
    layout = Layout([Document((Text(0), Image(1, 1), Text(0), Text(2)))])
    assert layout["und"].positions.tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert len(layout["und"].blocks) == 2


def test_order_puts_text_and_images_into_their_rows() -> None:
    layout = Layout(
        [Document((Text(2), Image(1, 2), Text(1))), Document((Image(2, 1), Noise(1, 1), Text(1)))]
    )
    mixed = ["a", "b", "c", "d", "I", "J", "K", "L"]  # all text, then all image tokens
    order = layout[UND].order_on(CPU)
    assert order is not None
    assert [mixed[row] for row in order] == ["a", "b", "I", "J", "c", "K", "L", "d"]
    assert layout[UND].grids == [Grid(1, 2), Grid(2, 1)]
    assert layout[GEN].grids == [Grid(1, 1)]
    assert Layout([Document((Text(4), Noise(1, 1)))])[UND].order_on(CPU) is None
    assert Layout([Document((Image(2, 2),))])[UND].order_on(CPU) is None


def test_places_of_patches_inside_tokens() -> None:
    cells = grid_patches((Grid(1, 2), Grid(2, 1)), 2, CPU)
    assert cells.shape == (4, 4, 2)
    assert cells[0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert cells[1].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert cells[3].tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
