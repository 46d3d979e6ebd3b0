"""Steps shared by any jobs move each as it would move alone."""

from __future__ import annotations

from collections.abc import Generator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import neounify
from neounify.attention import BACKENDS, backends
from neounify.engine.denoiser import DenoiseJob, Denoiser, groups
from neounify.errors import ConfigError
from neounify.model import Layout, embed, neo
from neounify.model.parts import StreamName
from neounify.runtime.plan import ExecutionPlan
from support.denoising import denoised
from support.denoising import started as job


def jobs(pipe: neounify.Pipeline) -> list[DenoiseJob]:
    return [
        job(pipe, "a boat", 64, 4),
        job(pipe, "a house on a hill in the fog", 96, 7),
        job(pipe, "a cat", 64, 5, guidance=1.0),
        job(pipe, "a dog", 128, 3, guidance_interval=(0.5, 1.0)),
    ]


@pytest.mark.parametrize("share", ["none", "some", "all"])
def test_a_batch_changes_nothing(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, share: str
) -> None:
    """However many of the jobs are read side by side."""
    seen = [j.longest for j in jobs(pipe)]
    assert min(seen) < max(seen) <= 512
    monkeypatch.setattr(backends, "MAX_PREFIX", 1)
    alone = [denoised(Denoiser(pipe.model), [j])[0] for j in jobs(pipe)]
    monkeypatch.setattr(backends, "MAX_PREFIX", {"none": 1, "some": min(seen), "all": 512}[share])
    together = denoised(Denoiser(pipe.model), jobs(pipe), late=2)
    for expected, actual in zip(alone, together, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("short", [1, 512])
@pytest.mark.parametrize("norm", ["none", "global"])
def test_an_image_that_is_not_finite_fails_alone(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, short: int, norm: str
) -> None:
    monkeypatch.setattr(backends, "MAX_PREFIX", short)

    def three() -> list[DenoiseJob]:
        return [job(pipe, text, 64, 3, guidance_norm=norm) for text in ("a", "boat", "a cat")]

    expected = denoised(Denoiser(pipe.model), three())
    broken = three()
    broken[1].z[0, 0] = float("nan")
    actual = denoised(Denoiser(pipe.model), broken)
    assert not torch.isfinite(actual[1]).all()
    for index in (0, 2):
        torch.testing.assert_close(actual[index], expected[index], atol=1e-5, rtol=0)


def test_little_memory_means_more_calls(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = denoised(Denoiser(pipe.model), jobs(pipe))
    stepper = Denoiser(pipe.model, ExecutionPlan(prefix_rows=1))
    calls: list[int] = []
    layer_by_layer = pipe.model.layer_by_layer

    def counted(
        layout: Layout, *rest: Any
    ) -> Generator[None, None, dict[StreamName, torch.Tensor]]:
        calls.append(len(layout.documents))
        return layer_by_layer(layout, *rest)

    started = jobs(pipe)
    monkeypatch.setattr(pipe.model, "layer_by_layer", counted)
    actual = denoised(stepper, started)
    assert max(calls) == 2  # the guidance branches of one image
    for a, b in zip(expected, actual, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_pauses_between_layers_change_nothing(pipe: neounify.Pipeline) -> None:
    """Also with the steps of other jobs in them."""
    expected, started, others = jobs(pipe), jobs(pipe), jobs(pipe)
    stepper, pauses = Denoiser(pipe.model), 0
    for _ in range(2):
        Denoiser(pipe.model).step(expected)
        for _ in stepper.slices(started):
            pauses += 1
            if pauses < 4:
                stepper.step(others[:2])
    assert pauses >= 2 * pipe.config.num_layers
    for a, b in zip(expected, started, strict=True):
        assert torch.equal(a.z, b.z)
    for a, b in zip(expected, others[:2], strict=False):
        assert b.steps_done == 3 > a.steps_done


@torch.inference_mode()
def test_a_step_given_up_between_layers_has_moved_nothing(pipe: neounify.Pipeline) -> None:
    started = jobs(pipe)[:1]
    before = started[0].z.clone()
    stepper = Denoiser(pipe.model)
    next(iter(stepper.slices(started)))
    assert torch.equal(started[0].z, before)
    assert started[0].steps_done == 0
    stepper.step(started)
    again = jobs(pipe)[:1]
    Denoiser(pipe.model).step(again)
    assert torch.equal(started[0].z, again[0].z)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["auto", *BACKENDS])
def test_any_attention_backend_denoises_alike(pipe: neounify.Pipeline, name: str) -> None:
    expected, named = jobs(pipe)[:2], jobs(pipe)[:2]
    Denoiser(pipe.model).step(expected)
    Denoiser(pipe.model, ExecutionPlan(attention=name)).step(named)
    for a, b in zip(expected, named, strict=True):
        torch.testing.assert_close(b.z, a.z, atol=1e-5, rtol=0)


def test_an_unknown_attention_backend_is_refused(pipe: neounify.Pipeline) -> None:
    with pytest.raises(ConfigError, match="'flush' is unknown"):
        Denoiser(pipe.model, ExecutionPlan(attention="flush"))


@pytest.mark.parametrize(("rows", "planned"), [(32_768, 2), (1, 6)])
def test_alternating_steps_plan_each_call_once(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, rows: int, planned: int
) -> None:
    denoiser = Denoiser(pipe.model, ExecutionPlan(prefix_rows=rows))
    plans: list[int] = []
    plan = type(denoiser.backend).plan

    def counted(backend: Any, layout: Layout, *rest: Any) -> Any:
        plans.append(len(layout.documents))
        return plan(backend, layout, *rest)

    monkeypatch.setattr(type(denoiser.backend), "plan", counted)
    one, other = job(pipe, "a", 64, 4), job(pipe, "a boat", 96, 4)
    plans.clear()
    for _ in range(3):
        denoiser.step([one])
        denoiser.step([other])
    assert len(plans) == planned
    denoiser.step([one, other])
    kept = [run for runs in denoiser._calls for run in runs]
    assert len(kept) == len(set(kept)) == 4, "no call is kept that another one replaced"


@given(st.lists(st.integers(0, 20)), st.integers(1, 30))
def test_groups(sizes: list[int], limit: int) -> None:
    cut = list(groups(sizes, lambda size: size, limit))
    assert [size for group in cut for size in group] == sizes
    assert all(group for group in cut)
    assert all(sum(group) <= limit or len(group) == 1 for group in cut)
    assert all(sum(a) + b[0] > limit for a, b in pairwise(cut))


def test_rotations_are_computed_once_for_all_steps(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of attention and of patches; no step copies anything from the host."""
    calls: list[str] = []
    for module, name in ((neo, "attention_rotation"), (embed, "patch_rotation")):
        original = getattr(module, name)

        def count(*args: Any, name: str = name, original: Any = original, **kw: Any) -> Any:
            calls.append(name)
            return original(*args, **kw)

        monkeypatch.setattr(module, name, count)
    stepper, two = Denoiser(pipe.model), [job(pipe, "a", 64, 4), job(pipe, "a cat", 96, 4)]
    calls.clear()
    with torch.inference_mode():
        stepper.step(two)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            stepper.step(two)
            stepper.step(two)
    assert sorted(calls) == ["attention_rotation", "patch_rotation"]
    assert "aten::lift_fresh" not in {event.key for event in profiled.key_averages()}
