"""The rule by which layers are compiled unless a caller says otherwise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neounify.config.presets import TINY
from neounify.model import NeoUnify, build
from neounify.model.build import compiles_by_default
from neounify.model.stream import Layer
from neounify.runtime.devices import Abilities


def large(monkeypatch: pytest.MonkeyPatch, device: str = "cuda", triton: bool = True) -> NeoUnify:
    """A model that counts as large, as if on a device."""
    here = Abilities(type=device, compiler="" if triton else "the package triton")
    monkeypatch.setattr(build, "abilities", lambda device: here)
    monkeypatch.setattr(NeoUnify, "device", torch.device(device))
    monkeypatch.setattr(build, "COMPILED_WEIGHTS", 1000)
    return NeoUnify(TINY)


def test_large_models_on_a_gpu_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = large(monkeypatch)
    assert compiles_by_default(model, resident=True)
    assert not compiles_by_default(model, resident=False)
    monkeypatch.setattr(build, "COMPILED_WEIGHTS", 10**9)
    assert not compiles_by_default(model, resident=True)


@pytest.mark.parametrize(("device", "triton"), [("cpu", True), ("mps", True), ("cuda", False)])
def test_elsewhere_they_are_not(device: str, triton: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not compiles_by_default(large(monkeypatch, device, triton), resident=True)


def test_layers_that_come_and_go_or_are_adapted_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapted(nn.Linear):
        pass

    hooked, adapted = large(monkeypatch), NeoUnify(TINY)
    hooked.layers[0].register_forward_pre_hook(lambda *_: None)
    layer = adapted.layers[0]
    assert isinstance(layer, Layer)
    layer["und"].qkv.q_proj = Adapted(8, 8)
    assert not compiles_by_default(hooked, resident=True)
    assert not compiles_by_default(adapted, resident=True)
