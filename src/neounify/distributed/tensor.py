"""Tensor parallelism of the understanding stream: each rank holds some of the heads.

Projections to queries, keys, values and into the MLPs are cut by rows, those back by columns, with
one sum over the ranks each; the text head by vocabulary, its logits gathered; experts in their
width, so that all ranks route alike. The embedding, the norms and the generation stream are whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neounify.checkpoint.residency import Share
from neounify.config import ModelConfig
from neounify.distributed.group import Group, share
from neounify.errors import ConfigError
from neounify.model.neo import NeoUnify
from neounify.model.parts import UND
from neounify.model.stream import Layer, SparseMlp

_CUT = re.compile(
    rf"layers\.\d+\.{UND}\.(?:qkv\.[qkv]_proj|out\.(o)_proj|out\.mlp\.(?:.+\.)?(gate|up|down)_proj)"
    r"\.(weight|bias)"
)


def check_degree(config: ModelConfig, ranks: int, what: str = "understanding") -> None:
    """Raise ConfigError where the key heads of a model cannot be shared by so many ranks."""
    heads = config.num_kv_heads
    if heads % ranks:
        fitting = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"{what} on {ranks} devices: the model's {heads} key heads are shared evenly by "
            f"{', '.join(fitting[:-1])} or {fitting[-1]} devices"
            if len(fitting) > 1
            else f"{what} on {ranks} devices: the model has one key head, so it needs one device"
        )


def shares(config: ModelConfig, shapes: Mapping[str, torch.Size], group: Group) -> dict[str, Share]:
    """What a rank holds of the model's tensors (name → shape) that are cut, by name."""
    if group.size == 1:
        return {}
    cut: dict[str, Share] = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight":
            cut[name] = Share(0, share(shape[0], group.rank, group.size))
        elif match := _CUT.fullmatch(name):
            out, mlp, kind = match.groups()
            columns = out == "o" or mlp == "down"
            if columns and kind == "bias":
                continue
            # Attention is cut between heads: queries go with the key head that they share.
            dim = 1 if columns else 0
            unit = 1 if mlp else shape[dim] // config.num_kv_heads
            places = share(shape[dim] // unit, group.rank, group.size)
            cut[name] = Share(dim, range(places.start * unit, places.stop * unit))
    return cut


def join(model: NeoUnify, group: Group) -> None:
    """Make a model with its shares of the weights compute what the whole one does; in place.

    From then on its understanding stream is collective: all ranks pass it the same tokens.
    """
    if group.size == 1:
        return
    model.kv_heads = model.config.num_kv_heads // group.size

    def add(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        group.add_(out)
        return out

    for layer in model.layers:
        assert isinstance(layer, Layer)
        stream, half = layer[UND], layer[UND].out
        half.o_proj.register_forward_hook(add)
        if half.o_proj.bias is not None and not group.first:
            half.o_proj.register_parameter("bias", None)
        last = half.mlp if isinstance(half.mlp, SparseMlp) else half.mlp.down_proj
        last.register_forward_hook(add)
        for module in stream.modules():
            if isinstance(module, nn.Linear) and module.weight.ndim == 2:  # else not read yet
                module.out_features, module.in_features = module.weight.shape
    if not model.config.tie_embeddings:
        model.lm_head.register_forward_hook(_vocabulary(model.config.vocab_size, group))


def _vocabulary(size: int, group: Group) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that gathers logits [n, share] of all ranks to [n, size]."""
    counts = [len(share(size, rank, group.size)) for rank in range(group.size)]

    def gather(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        return group.join_rows(out.transpose(0, 1), counts).transpose(0, 1)

    return gather
