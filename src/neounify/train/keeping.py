"""Stages that keep weights otherwise than as float32 shards on the devices: the model spread anew.

Frozen weights may be in bfloat16, or in host memory if nothing calls them. Adapters stay whole on
every rank, beside the shards of the weights that they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count, takewhile

import torch
from torch import Tensor, nn

from neounify.checkpoint.names import of_expert, stream_of
from neounify.distributed.parallelize import Parallel, parallelize
from neounify.distributed.shards import local, mesh_of, place, whole
from neounify.lora.layers import HALVES, add_lora, lora_layers, merged_weight, weight_name
from neounify.model.build import meta_model, without_values
from neounify.model.neo import NeoUnify
from neounify.train.recipe import StageRecipe
from neounify.train.setup import Keeping, TrainSetup, freeze


def setup_for(stage: StageRecipe, setup: TrainSetup, seed: int) -> TrainSetup:
    """The setup of a run with the weights as a stage keeps them; collective.

    The same setup where ranks hold the whole model, and where the stage before had them so. The
    adapters of a stage are drawn from `seed`. Raises ConfigError as `add_lora` does.
    """
    unused = tuple(stage.method.unused_streams(stage))
    keeping: Keeping = ()
    if stage.frozen_weights != "float32" or unused:
        keeping = stage.freeze, stage.freeze_last_layers, stage.frozen_weights, unused
    if stage.lora is not None:
        keeping = "adapters", stage.name
    if not setup.parallel.cut or keeping == setup.keeping:
        return setup
    return replace(setup, parallel=_spread(stage, setup.parallel, seed), keeping=keeping)


@torch.no_grad()
def _spread(stage: StageRecipe, parallel: Parallel, seed: int) -> Parallel:
    """The model spread anew over its ranks; weights move one by one, gathered in between."""
    before = parallel.objective.model
    device = before.device
    model = meta_model(before.config)
    model.stack_experts()
    if stage.lora is None:
        freeze(model, stage.freeze, stage.freeze_last_layers)
    else:
        add_lora(model, stage.lora, seed)
    unused = stage.method.unused_streams(stage)
    for name, parameter in model.named_parameters():
        frozen = not parameter.requires_grad and stream_of(weight_name(name)) not in unused
        if frozen and stage.frozen_weights == "bfloat16":
            parameter.data = parameter.data.bfloat16()
    after = parallelize(
        model,
        parallel.ranks,
        parallel.shape,
        device=device,
        bfloat16=stage.precision == "bfloat16",
        unused=unused,
        uncut=[p for name, p in model.named_parameters() if name.endswith(HALVES)],
    )

    def empty(tensor: Tensor) -> Tensor:
        mesh = mesh_of(tensor)
        on_host = mesh is not None and mesh.device_type == "cpu"
        return torch.empty_like(tensor, device="cpu" if on_host else device)

    model._apply(empty)
    value = _values_of(before)
    for name, parameter in model.named_parameters():
        if not name.endswith(HALVES):
            local(parameter).copy_(value(name)[place(parameter)])
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.begin(generator)
    model.compute_dtype = before.compute_dtype
    model.train()
    return after


def _values_of(model: NeoUnify) -> Callable[[str], Tensor]:
    """The weights of a model by name, gathered; experts joined or apart, whichever it has.

    Collective. Of the experts of a projection, the last one that was asked for stays in memory.
    """
    parameters = dict(model.named_parameters())
    joined = [(name, p) for name, p in parameters.items() if of_expert(name, 0)]
    stacks = {of_expert(name, n): (name, n) for name, p in joined for n in range(len(p))}
    kept: dict[str, Tensor] = {}

    def value(name: str) -> Tensor:
        if name in parameters:
            return whole(parameters[name])
        if name not in stacks:  # joined here, apart in the model
            names = (of_expert(name, number) or "" for number in count())
            parts = takewhile(lambda part: part in parameters, names)
            return torch.stack([whole(parameters[part]) for part in parts])
        stack, expert = stacks[name]
        if stack not in kept:
            kept.clear()
            kept[stack] = whole(parameters[stack])
        return kept[stack][expert]

    return value


@torch.no_grad()
def merge_adapters(model: NeoUnify) -> None:
    """Fold all adapters into the weights, of which each rank has its part; those are frozen.

    A model that is cut is spread anew before it is called again (`setup_for`).
    """
    for name, layer in lora_layers(model).items():
        weight = layer.weight
        rows, columns = place(weight)
        down, up = layer.lora_A[:, columns], layer.lora_B[rows]
        local(weight).copy_(merged_weight(local(weight), down, up, layer.scale))
        with without_values():
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight, plain.bias = weight, layer.bias
        model.set_submodule(name, plain.train(layer.training))
