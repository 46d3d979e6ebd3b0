"""Export of trained weights as a checkpoint of the published layout: of a model, or of a state."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.names import current_name, of_expert
from neounify.checkpoint.save import save_model
from neounify.distributed.shards import whole
from neounify.distributed.states import StoredTensors
from neounify.errors import CheckpointError
from neounify.lora.layers import HALVES, LoraConfig, merged_weight
from neounify.model.build import meta_model
from neounify.model.neo import NeoUnify
from neounify.pipeline.pipeline import SYSTEM_MESSAGE_FILE
from neounify.train.recipe import Recipe
from neounify.train.setup import TrainSetup, start_of
from neounify.train.state import config_of, open_state


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


def export_state(
    recipe: Recipe, folder: Path, state: Path, target: Path, dtype: torch.dtype
) -> None:
    """Write the EMA of a saved state of a run's `folder`, its adapters merged, cast to `dtype`.

    Tensors are read one after the other; memory holds those of one file at most, and no model.
    Raises CheckpointError.
    """
    start = start_of(recipe, folder)
    parts, facts = open_state(state, ("model", "ema"))
    config = config_of(state, facts, start.config)
    try:
        stage = recipe.stages[facts["progress"]["stage"]]
    except (KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{state} does not fit this run: {error!r}") from error
    config = stage.method.checkpoint_config(config)
    shapes = expected_shapes(config)
    weights = _StateWeights(state, parts, stage.lora)
    save_model(
        meta_model(config),
        target,
        tokenizer=start.tokenizer,
        extra_files={SYSTEM_MESSAGE_FILE: start.system_message},
        overwrite=True,
        dtype=dtype,
        values=(weights.read(name, shape) for name, shape in shapes.items()),
    )


class _StateWeights:
    """Weights of a state by the names of `expected_shapes`: the mean where there is one."""

    def __init__(
        self, state: Path, parts: dict[str, StoredTensors], lora: LoraConfig | None
    ) -> None:
        self._state, self._lora = state, lora
        # Later ones replace earlier ones: the mean is of what was trained.
        stored = [parts[name] for name in ("model", "ema")]
        self._read = {
            current_name(name): (partial(one.read, name), one.shapes[name])
            for one in stored
            for name in one.shapes
        }
        self._stacks = {
            part: (name, expert)
            for name, (_, shape) in self._read.items()
            if of_expert(name, 0)
            for expert in range(shape[0])
            if (part := of_expert(name, expert))
        }

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """One weight. Raises CheckpointError where the state lacks it or has another shape."""
        try:
            weight = self._weight(name)
        except KeyError as error:
            text = f"{self._state} does not fit this run: it lacks {name}"
            raise CheckpointError(text) from error
        if weight.shape != shape:
            raise CheckpointError(
                f"{self._state} does not fit this run: {name} has shape {list(weight.shape)}, "
                f"the model {list(shape)}"
            )
        return weight

    def _weight(self, name: str) -> Tensor:
        if name in self._stacks:
            stack, expert = self._stacks[name]
            read, (_, *sizes) = self._read[stack]
            where = (slice(expert, expert + 1), *(slice(0, size) for size in sizes))
            return read(where).squeeze(0)
        weight = self._read[name][0]()
        module = name.removesuffix(".weight")
        if self._lora is None or module + HALVES[0] not in self._read:
            return weight
        down, up = (self._read[module + half][0]() for half in HALVES)
        return merged_weight(weight, down, up, self._lora.scale)
