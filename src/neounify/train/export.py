"""Export of trained weights as a checkpoint of the published layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.names import of_expert
from neounify.checkpoint.save import save_model
from neounify.distributed.parallelize import whole
from neounify.model.neo import NeoUnify
from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE
from neounify.train.setup import TrainSetup


def export_model(setup: TrainSetup, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the weights as they are now, cast to `dtype`, over what is in a folder; collective.

    The first rank writes. Tensors are gathered one after the other, and its memory holds those of
    one file at most. Raises CheckpointError.
    """
    model, ranks = setup.model, setup.ranks
    values = _gathered(model)

    def save() -> None:
        try:
            if ranks.first:
                save_model(
                    model,
                    folder,
                    tokenizer=setup.tokenizer,
                    extra_files={SYSTEM_MESSAGE_FILE: setup.system_message},
                    overwrite=True,
                    dtype=dtype,
                    values=values if ranks.size > 1 else None,
                )
        finally:
            # The other ranks take part in gathering all, the first in what an error left.
            for _ in values if ranks.size > 1 else ():
                pass

    ranks.together(save)


def _gathered(model: NeoUnify) -> Iterator[Tensor]:
    """The tensors in the order in which they are saved, on the CPU; collective."""
    state = model.state_dict()
    joined = [(name, tensor) for name, tensor in state.items() if of_expert(name, 0)]
    stacks = {of_expert(n, expert): (n, expert) for n, t in joined for expert in range(len(t))}
    gathered: dict[str, Tensor] = {}
    for name in expected_shapes(model.config):
        stored, expert = stacks.get(name, (name, None))
        if stored not in gathered:
            # The stacks of a layer's experts stay until all experts are read.
            module = stored.rpartition(".")[0]
            gathered = {
                n: tensor for n, tensor in gathered.items() if n.rpartition(".")[0] == module
            }
            gathered[stored] = whole(state[stored])
        yield (gathered[stored] if expert is None else gathered[stored][expert]).cpu()
