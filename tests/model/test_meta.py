"""Models without values, and copies of compiled ones."""

import copy
import random

import pytest
import torch
from torch import nn

from neounify.config.presets import PRESETS
from neounify.model import Document, Layout, NeoUnify, Text, build
from neounify.model.build import meta_model, without_values
from neounify.model.parts import UND
from neounify.model.stream import OutputMlp, QKVProjection
from support.attention import plan
from support.models import random_config, random_model


def test_a_meta_model_has_the_shapes_of_a_real_one() -> None:
    real, meta = NeoUnify(PRESETS["tiny"]), meta_model(PRESETS["tiny"])
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in real.state_dict().items()}
    assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == shapes
    assert all(p.is_meta and not p.requires_grad for p in meta.parameters())


def test_initialisation_is_skipped_only_inside() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with without_values():
        assert nn.Linear(3, 4).weight.is_meta
        nn.Embedding(3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert nn.Linear(3, 4).weight.abs().sum() > 0
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_copy_of_a_compiled_model_calls_its_own_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """As twins of post-training are: what is trained and what is not must not mix."""
    monkeypatch.setattr(torch, "compile", lambda half, dynamic: half)
    monkeypatch.setattr(build, "MIN_ROWS", 1)
    config = random_config(random.Random(0))
    model = random_model(config, 0, torch.float32)
    build.compile_streams(model)
    twin = copy.deepcopy(model)
    called: set[str] = set()
    for owner, each in (("model", model), ("twin", twin)):
        for half in (m for m in each.modules() if isinstance(m, QKVProjection | OutputMlp)):
            half.register_forward_hook(lambda *_, owner=owner: called.add(owner))
    for owner, each in (("model", model), ("twin", twin)):
        called.clear()
        layout = Layout([Document((Text(3),))])
        x = torch.zeros(3, config.hidden_size)
        each.backbone(layout, {UND: x}, plan(layout))
        assert called == {owner}
