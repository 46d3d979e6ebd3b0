"""Frozen weights of a stage on many ranks: in bfloat16, or in host memory if nothing calls them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from neounify.checkpoint.names import stream_of
from neounify.distributed.parallelize import Parallel, parallelize
from neounify.distributed.shards import local, mesh_of, place, whole
from neounify.model.build import meta_model
from neounify.train.recipe import StageRecipe
from neounify.train.setup import Keeping, TrainSetup, freeze


def setup_for(stage: StageRecipe, setup: TrainSetup) -> TrainSetup:
    """The setup of a run with the frozen weights as a stage keeps them; collective.

    The same setup where ranks hold the whole model, and where the stage before had them so.
    """
    unused = tuple(stage.method.unused_streams(stage))
    keeping: Keeping = ()
    if stage.frozen_weights != "float32" or unused:
        keeping = stage.freeze, stage.freeze_last_layers, stage.frozen_weights, unused
    if not setup.parallel.cut or keeping == setup.keeping:
        return setup
    return replace(setup, parallel=_spread(stage, setup.parallel), keeping=keeping)


@torch.no_grad()
def _spread(stage: StageRecipe, parallel: Parallel) -> Parallel:
    """The model spread anew over its ranks; weights move one by one, gathered in between."""
    before = parallel.objective.model
    device = before.device
    model = meta_model(before.config)
    model.stack_experts()
    freeze(model, stage.freeze, stage.freeze_last_layers)
    unused = stage.method.unused_streams(stage)
    for name, parameter in model.named_parameters():
        on_devices = stream_of(name) not in unused
        if on_devices and not parameter.requires_grad and stage.frozen_weights == "bfloat16":
            parameter.data = parameter.data.bfloat16()
    after = parallelize(
        model,
        parallel.ranks,
        parallel.shape,
        device=device,
        bfloat16=stage.precision == "bfloat16",
        unused=unused,
    )

    def empty(tensor: Tensor) -> Tensor:
        mesh = mesh_of(tensor)
        on_host = mesh is not None and mesh.device_type == "cpu"
        return torch.empty_like(tensor, device="cpu" if on_host else device)

    model._apply(empty)
    for (_, old), (_, new) in zip(before.named_parameters(), model.named_parameters(), strict=True):
        local(new).copy_(whole(old)[place(new)])
    model.compute_dtype = before.compute_dtype
    model.train()
    return after
