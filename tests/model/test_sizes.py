"""Parameter counts of the published sizes, and inputs that do not fit the layout."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from neounify.checkpoint import expected_shapes, stream_of
from neounify.config import ModelConfig
from neounify.config.presets import PRESETS, U1_8B, U1_A3B
from neounify.model import Document, Image, Layout, Noise, Text
from support.models import Maker, batch_of, pack, random_config, random_model


def _parameters(config: ModelConfig) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name, shape in expected_shapes(config).items():
        counts[stream_of(name)] += math.prod(shape)
    return counts


def _billions(count: int) -> float:
    return round(count / 1e9, 3)


def test_parameters_of_the_dense_model() -> None:
    counts = _parameters(U1_8B)
    assert {stream: _billions(n) for stream, n in counts.items()} == {
        "und": 8.121,
        "gen": 8.186,
        "shared": 1.245,
    }
    assert _billions(counts.total()) == 17.552


def test_parameters_of_the_sparse_model() -> None:
    counts = _parameters(U1_A3B)
    assert round(counts.total() / 1e9) == 39
    mlp = U1_A3B.und_mlp
    idle = (mlp.num_experts - mlp.experts_per_token) * 3 * 2048 * mlp.expert_width * 48
    assert 2.5e9 < counts["und"] - idle + counts["shared"] < 3.5e9  # "A3B": 3 billion active


def test_the_smallest_preset_runs() -> None:
    config = PRESETS["tiny"]
    model = random_model(config, 0)
    maker = Maker(random.Random(0), config)
    documents = [[maker.text(2), *maker.clean((1, 2)), *maker.noisy((1, 1))]]
    logits, clean = pack(documents, config, torch.float32).run(model)
    assert clean is not None
    assert logits.isfinite().all()
    assert clean.isfinite().all()
    assert clean.shape == (1, 3 * 32 * 32)


@pytest.mark.parametrize(("count", "wanted"), [(3, 4), (5, 4)])
def test_a_wrong_number_of_token_ids_is_refused(count: int, wanted: int) -> None:
    model = random_model(random_config(random.Random(0)), 0)
    layout = Layout([Document((Text(wanted),))])
    with pytest.raises(ValueError, match=rf"{count} ids .* the layout: {wanted} ids"):
        model(batch_of(layout, torch.zeros(count, dtype=torch.int64)))


def test_an_image_of_another_size_is_refused() -> None:
    config = random_config(random.Random(0))
    model, side = random_model(config, 0), config.token_size
    layout = Layout([Document((Text(1), Image(2, 2)))])
    with pytest.raises(ValueError, match=r"images of 2x3 tokens do not fit .* images of 2x2"):
        model(
            batch_of(
                layout, torch.zeros(1, dtype=torch.int64), [torch.zeros(3, 2 * side, 3 * side)]
            )
        )


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_wrong_number_of_noisy_rows_fails(rows: int) -> None:
    config = random_config(random.Random(0))
    model = random_model(config, 0)
    layout = Layout([Document((Text(1), Noise(2, 2)))])
    z = torch.zeros(rows, 3 * config.token_size**2)
    one = torch.ones(1)
    with pytest.raises((ValueError, RuntimeError, TypeError)):  # TypeError: a checked shape
        model(batch_of(layout, torch.zeros(1, dtype=torch.int64), (), z, one, one))


def _silent_mismatches() -> dict[str, tuple[Layout, int, list[tuple[int, int]]]]:
    """Inputs with the right number of rows but the wrong grids: (layout, ids, image grids)."""
    return {
        "turned": (Layout([Document((Text(1), Image(3, 2)))]), 1, [(2, 3)]),
        "swapped": (Layout([Document((Image(1, 2), Image(2, 2), Text(1)))]), 1, [(2, 2), (1, 2)]),
        "text for image": (Layout([Document((Text(4), Image(1, 2)))]), 2, [(2, 2)]),
    }


@pytest.mark.parametrize("case", ["turned", "swapped", "text for image"])
def test_images_that_do_not_fit_the_layout_are_refused(case: str) -> None:
    config = random_config(random.Random(0))
    model, side = random_model(config, 0), config.token_size
    layout, ids, grids = _silent_mismatches()[case]
    images = [torch.zeros(3, rows * side, columns * side) for rows, columns in grids]
    with pytest.raises(ValueError):  # noqa: PT011
        model(batch_of(layout, torch.zeros(ids, dtype=torch.int64), images))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_noise_without_its_numbers_is_refused(count: int) -> None:
    config = random_config(random.Random(0))
    model = random_model(config, 0)
    layout = Layout([Document((Text(1), Noise(1, 1)))])
    numbers = (torch.zeros(1, 3 * config.token_size**2), torch.ones(1), torch.ones(1))[:count]
    with pytest.raises(ValueError):  # noqa: PT011
        model(batch_of(layout, torch.zeros(1, dtype=torch.int64), (), *numbers))
