"""Models without values."""

import torch
from torch import nn

from neounify.config.presets import PRESETS
from neounify.model import NeoUnify
from neounify.model.build import meta_model, without_values


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
