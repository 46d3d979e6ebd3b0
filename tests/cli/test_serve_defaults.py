"""Default options of `neounify serve` equal the defaults of the configs they fill."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from neounify.cli import serve
from neounify.cli.serve import (
    AccessOptions,
    EngineOptions,
    ListenOptions,
    SafetyOptions,
    ServeModelOptions,
)
from neounify.config.presets import TINY
from neounify.model.neo import NeoUnify
from neounify.runtime.plan import measured_plan
from neounify.serve.build import ServeConfig
from neounify.serve.http import HttpConfig
from neounify.serve.run import RunConfig


@pytest.mark.parametrize("mode", ["colocate", "separate"])
def test_engines(toy: Path, mode: str) -> None:
    model = ServeModelOptions(model=toy, mode=mode, device="cpu")
    default = ServeConfig(folder=toy, mode=mode)  # type: ignore[arg-type]
    assert serve._serve_config(model, EngineOptions()) == default


def test_http(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.KEYS_VARIABLE, raising=False)
    options = ListenOptions(name="toy")
    settings = serve._http_config(
        ServeModelOptions(model=toy), options, AccessOptions(), SafetyOptions()
    )
    hosts = settings.allowed_hosts
    assert settings == dataclasses.replace(HttpConfig(), model_name="toy", allowed_hosts=hosts)
    run = RunConfig(serve=ServeConfig(folder=toy))
    assert (options.host, options.port, options.page) == (run.host, run.port, run.page)
    assert options.drain_seconds == run.drain_seconds


def test_the_attention_backend_reaches_both_engines(toy: Path) -> None:
    config = serve._serve_config(ServeModelOptions(model=toy, attention="blocks"), EngineOptions())
    assert config.engines.plan(NeoUnify(TINY)).attention == "blocks"


def test_limits_of_the_engines_are_fields_of_the_plan(toy: Path) -> None:
    options = EngineOptions(cache_tokens=100, prefill_tokens=3, step_tokens=5)
    config = serve._serve_config(ServeModelOptions(model=toy), options)
    model = NeoUnify(TINY)
    plan = config.engines.plan(model)
    assert (plan.kv_blocks, plan.prefill_step_rows, plan.denoise_step_rows) == (6, 3, 5)
    default = serve._serve_config(ServeModelOptions(model=toy), EngineOptions()).engines.plan(model)
    assert default == measured_plan(TINY, model.device, model.compute_dtype)
