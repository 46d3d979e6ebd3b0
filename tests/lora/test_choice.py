"""Which layers get adapters, and configs that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neounify.errors import ConfigError
from neounify.lora import LoraConfig, add_lora, lora_layers
from support.adapted import adapted
from support.checkpoint_folders import CONFIGS, SMALL
from support.models import one_thread, random_model  # noqa: F401


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        (
            {"streams": ("und",), "modules": ("q_proj",)},
            ["layers.0.und.qkv.q_proj", "layers.1.und.qkv.q_proj"],
        ),
        (
            {"modules": ("v_proj",), "layers": (1, 2)},
            ["layers.1.und.qkv.v_proj", "layers.1.gen.qkv.v_proj"],
        ),
        (
            {"modules": ("image head", "lm_head"), "layers": (0, 1)},
            ["lm_head", "image_head.linear1", "image_head.linear2"],
        ),
        ({"streams": (), "modules": ("lm head",)}, ["lm_head"]),
    ],
)
def test_what_is_chosen(fields: dict[str, Any], chosen: list[str]) -> None:
    assert add_lora(random_model(SMALL, 0), LoraConfig(**fields)) == chosen


def test_the_default_is_attention_and_mlps_of_both_streams() -> None:
    names = add_lora(random_model(CONFIGS["sparse"], 0), LoraConfig())
    assert all("_proj" in name for name in names)
    dense = 3  # und layer 1
    assert len(names) == 2 * 2 * 4 + dense + 3 * (4 + 3 + 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules": ("q_proj", "eyes")}, r"\['eyes'\]; linear layers .*'image head'"),
        ({"modules": ("patch embedding",)}, "alone take adapters"),
        ({"streams": ("und",), "modules": ("linear1",)}, r"streams \['und'\]"),
        ({"layers": (0, 3)}, "of only 2"),
    ],
)
def test_a_wrong_choice_is_refused(fields: dict[str, Any], message: str) -> None:
    model = random_model(SMALL, 0)
    with pytest.raises(ConfigError, match=message):
        add_lora(model, LoraConfig(**fields))
    assert not lora_layers(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"dropout": 1.0},
        {"streams": ("eyes",)},
        {"modules": ()},
        {"layers": (2, 2)},
        {"layers": (-1, 2)},
        {"depth": 3},
    ],
)
def test_wrong_configs_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        LoraConfig(**fields)


def test_adapters_are_not_stacked() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="already"):
        add_lora(model, LoraConfig())


def test_the_seed_decides() -> None:
    first, second, other = (random_model(SMALL, 0) for _ in range(3))
    state = torch.random.get_rng_state()
    for model, seed in ((first, 1), (second, 1), (other, 2)):
        add_lora(model, LoraConfig(), seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    values = [
        model.state_dict()["layers.0.und.qkv.q_proj.lora_A"] for model in (first, second, other)
    ]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])
