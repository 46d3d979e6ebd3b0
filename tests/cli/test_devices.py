"""Options that spread a model, or the engines of a server, over devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Run
from neounify.cli.command import UsageError
from neounify.cli.models import parse_devices
from neounify.cli.serve import _run_replicas, _serve_config
from neounify.cli.serve_options import EngineOptions, ReplicaOptions, ServeModelOptions
from neounify.serve import replicas
from neounify.serve.replicas import ReplicaConfig
from neounify.serve.run import RunConfig
from neounify.serve.safety.hooks import Hooks


def test_a_list_of_devices() -> None:
    assert parse_devices(None, "--devices") == ()
    assert parse_devices("cpu", "--devices") == ("cpu",)
    assert parse_devices("cuda:0, cuda:1", "--devices") == ("cuda:0", "cuda:1")
    for text in ("", "cpu,", ",cpu"):
        with pytest.raises(UsageError, match=r"--devices .* must be names of devices"):
            parse_devices(text, "--devices")


def test_devices_of_an_engine_make_two_engines(toy: Path) -> None:
    options = ServeModelOptions(
        model=toy, device="cpu", generation_devices="cpu,cpu", sequence_parallel=2
    )
    config = _serve_config(options, EngineOptions())
    assert config.mode == "separate"
    assert config.devices_of("und") == ("cpu",)
    assert config.devices_of("gen") == ("cpu", "cpu")
    assert config.sequence_parallel == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_parallel": 2}, "name them with --generation-devices"),
        ({"sequence_parallel": 2, "understanding_devices": "cpu,cpu"}, "--generation-devices"),
        ({"memory": "layers", "understanding_devices": "cpu,cpu"}, "engines on one device each"),
    ],
)
def test_settings_that_engines_would_not_use_are_refused(
    toy: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        _serve_config(ServeModelOptions(model=toy, device="cpu", **settings), EngineOptions())


def test_a_replica_reserves_the_gpus_of_both_groups(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ServeModelOptions(
        model=toy,
        understanding_devices="cuda:0,cuda:1",
        generation_devices="cuda:1,cuda:2,cuda:3,cpu",
    )
    config = RunConfig(serve=_serve_config(options, EngineOptions()))
    started: list[ReplicaConfig] = []
    monkeypatch.setattr(replicas, "run_replicas", lambda _, wanted, *rest: started.append(wanted))
    _run_replicas(config, ReplicaOptions(replicas=2), Hooks, lambda: None)
    (wanted,) = started
    assert (wanted.count, wanted.gpus) == (2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "cpu,cpu,cpu"), "understanding on 3 devices: the model's 2 key heads"),
        (("--devices", "cpu,cpu", "--device", "cpu"), "not both"),
        (("--devices", "cpu,nothing"), "device 'nothing' cannot be used here"),
        (("--devices", "cpu,cpu", "--memory", "stream"), "memory='stream': for one device, got 2"),
    ],
)
def test_devices_that_do_not_fit_are_one_error(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    ran = run("chat", "Hello", *arguments)
    assert ran.code != 0
    assert message in ran.err.replace("\n", " ")
    assert "Traceback" not in ran.err
