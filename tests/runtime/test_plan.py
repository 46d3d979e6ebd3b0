"""Limits of a model on a device: the same as ever on a CPU, and set in one place."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from neounify.config.presets import SCENES, U1_8B
from neounify.errors import ConfigError
from neounify.runtime.plan import (
    UNLIMITED,
    ExecutionPlan,
    free_memory,
    measured_plan,
    plan_execution,
    row_bytes,
)

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


def test_copies_and_cache_take_half_of_the_free_memory_at_most() -> None:
    token = SCENES.kv_bytes(4)
    plan = plan_execution(SCENES, CPU, torch.float32, free_bytes=2**23)
    assert plan.prefix_rows == 2**22 // token
    assert plan.kv_blocks == 2**22 // (16 * token)
    for free in (0, 1, token):
        least = plan_execution(SCENES, CPU, torch.float32, free_bytes=free)
        assert (least.prefix_rows, least.kv_blocks) == (1, 1)


def test_calls_take_half_of_the_free_memory_at_most() -> None:
    row = row_bytes(U1_8B, "gen", 2)
    assert row == 2 * (4 * 4096 + 2 * 4096 + 2 * 1024 + 3 * 12_288)
    plan = plan_execution(U1_8B, CPU, torch.bfloat16, free_bytes=2**31)
    assert plan.prefill_rows == plan.denoise_rows == int(2**30 // row)
    least = plan_execution(U1_8B, CPU, torch.bfloat16, free_bytes=1)
    assert least.prefill_rows == least.denoise_rows == 512


def test_small_differences_of_free_memory_leave_the_plan_as_it_is() -> None:
    plans = {
        plan_execution(U1_8B, CPU, torch.bfloat16, free_bytes=free)
        for free in (2**32, 2**32 + 5, 2**33 - 1)
    }
    assert {plan.kv_blocks for plan in plans} == {2**31 // (16 * U1_8B.kv_bytes(2))}
    assert len(plans) == 1
    plenty = plan_execution(U1_8B, CPU, torch.bfloat16, free_bytes=2**40)
    unknown = plan_execution(U1_8B, CPU, torch.bfloat16)
    assert dataclasses.replace(plenty, branch_rows=UNLIMITED) == unknown


def test_training_is_planned_alike_however_much_memory_is_free() -> None:
    plan = plan_execution(U1_8B, CPU, torch.bfloat16, free_bytes=0)
    assert plan.logits_rows == plan_execution(U1_8B, CPU, torch.bfloat16).logits_rows


def test_the_free_memory_of_a_cpu_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neounify.runtime.plan.available_bytes", lambda: 2**23)
    assert measured_plan(SCENES, CPU, torch.float32) == plan_execution(
        SCENES, CPU, torch.float32, free_bytes=2**23
    )
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("name", "least"),
    [
        (f.name, {"int": 1, "float": 0}[str(f.type)])
        for f in dataclasses.fields(ExecutionPlan)
        if f.type != "str"
    ],
)
def test_limits_too_low(name: str, least: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be at least {least}, got {least - 1}"):
        ExecutionPlan(**{name: least - 1})  # type: ignore[arg-type]
