"""An address that is in use is reported before anything else is done."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from neounify.serve import run as running
from neounify.serve.build import ServeConfig
from neounify.serve.run import AddressError, RunConfig, bound


def test_a_port_in_use_is_reported_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loads(_: ServeConfig) -> None:
        raise AssertionError("the model is loaded for nothing")

    monkeypatch.setattr(running, "build_service", loads)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressError, match=rf"127\.0\.0\.1 port {port} is in use.*--port"):
            running.run(RunConfig(serve=ServeConfig(folder=Path("model")), port=port))


def test_an_address_of_another_machine_is_reported() -> None:
    with pytest.raises(AddressError, match="cannot listen at 203"), bound("203.0.113.7", 20871):
        pass
    with pytest.raises(AddressError, match="is no address"), bound("no.such.host.invalid", 20871):
        pass


def test_no_connection_succeeds_before_the_server_listens() -> None:
    with bound("localhost", 0) as sockets:
        port = next(one.getsockname()[1] for one in sockets if one.family == socket.AF_INET)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
