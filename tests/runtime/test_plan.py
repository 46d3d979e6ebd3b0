"""Limits of a model on a device: the same as ever on a CPU, and set in one place."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from neounify.config.presets import SCENES, U1_8B
from neounify.engine.generation import GenerationSettings
from neounify.engine.understanding import UnderstandingSettings
from neounify.errors import ConfigError
from neounify.runtime.plan import ExecutionPlan, plan_execution

CPU = torch.device("cpu")


def test_limits_on_a_cpu() -> None:
    plan = plan_execution(SCENES, CPU, torch.float32)
    assert plan == ExecutionPlan(
        device="cpu",
        kv_blocks=2048,
        kv_block_size=16,
        prefill_rows=32_768,
        prefill_step_rows=512,
        denoise_rows=32_768,
        denoise_step_rows=1024,
        prefix_rows=32_768,
        logits_rows=2**26 // 512,
    )


def test_a_large_model_has_less_at_once() -> None:
    plan = plan_execution(U1_8B, CPU, torch.bfloat16)
    assert U1_8B.kv_bytes(2) == 2 * 42 * 8 * 128 * 2
    assert plan.prefix_rows == 2**31 // U1_8B.kv_bytes(2) == 12_483
    assert plan.logits_rows == 441


def test_copies_take_half_of_the_free_memory_at_most() -> None:
    token = SCENES.kv_bytes(4)
    plan = plan_execution(SCENES, CPU, torch.float32, free_bytes=2 * 100 * token)
    assert plan.prefix_rows == 100
    assert plan_execution(SCENES, CPU, torch.float32, free_bytes=0).prefix_rows == 1


def test_what_an_operator_sets_goes_before_the_plan() -> None:
    plan = plan_execution(SCENES, CPU, torch.float32)
    assert UnderstandingSettings().adjust(plan) == GenerationSettings().adjust(plan) == plan
    small = UnderstandingSettings(cache_tokens=100, block_size=8, prefill_tokens=3).adjust(plan)
    assert (small.kv_blocks, small.kv_block_size, small.prefill_step_rows) == (12, 8, 3)
    assert GenerationSettings(step_tokens=5).adjust(plan).denoise_step_rows == 5


@pytest.mark.parametrize(
    "name", [f.name for f in dataclasses.fields(ExecutionPlan) if f.type == "int"]
)
def test_limits_below_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        ExecutionPlan(**{name: 0})  # type: ignore[arg-type]
