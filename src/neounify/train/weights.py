"""Initial weights of a run, by rows of one parameter after the other: nothing holds a whole model.

Fresh ones are those of `new_model`; a checkpoint's may be changed by the recipe, or have rows of
tables added. Every rank reads the rows that it holds (`fill`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neounify.checkpoint.load import expected_shapes, stored_weights
from neounify.checkpoint.names import of_expert
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import Share
from neounify.config import ModelConfig
from neounify.distributed.shards import local, place
from neounify.model.build import is_initializer, meta_model
from neounify.model.neo import NeoUnify
from neounify.text.tokenizer import Tokenizer, byte_of_character

RESIDUAL = ("o_proj.weight", "down_proj.weight")
"""Weights that write into the residual stream: scaled by 1/√(2 · layers), as in GPT-2."""
CPU = torch.device("cpu")
NOTHING = slice(0, 0)


class Weights(Protocol):
    """Values of the parameters of a model, whose `shapes` are by name.

    Each is read once, in the order of the model, since fresh values follow one sequence of
    random numbers.
    """

    @property
    def shapes(self) -> Mapping[str, torch.Size]: ...

    def read(self, name: str, rows: slice) -> Tensor:
        """Rows of a parameter, float32 on the CPU. Raises CheckpointError."""
        ...


@torch.no_grad()
def fill(model: NeoUnify, weights: Weights, device: torch.device) -> None:
    """Give a model without values those of this rank, on a device. Raises CheckpointError."""
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    joined = [(n, p) for n, p in parameters.items() if of_expert(n, 0)]
    stacks = {of_expert(name, n): (p, n) for name, p in joined for n in range(len(p))}
    for name in weights.shapes:
        if name in parameters:
            rows, *others = place(parameters[name])
            part = (slice(None), *others)
            local(parameters[name]).copy_(weights.read(name, rows)[part])
            continue
        stack, expert = stacks[name]
        experts, *others = place(stack)
        if expert in range(experts.start, experts.stop):
            values = weights.read(name, slice(None))
            local(stack)[expert - experts.start].copy_(values[tuple(others)])
        else:
            weights.read(name, NOTHING)
    model.requires_grad_(True).train()


def new_model(config: ModelConfig, seed: int) -> NeoUnify:
    """A model with fresh weights, the same for the same seed; float32 on the CPU."""
    model = meta_model(config)
    fill(model, FreshWeights(config, seed), CPU)
    return model


class FreshWeights:
    """Random weights, drawn whole whatever is read of them: the same on any number of ranks."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.shapes = config, expected_shapes(config)
        self._numbers = torch.Generator().manual_seed(seed)
        # The values that modules give themselves are replaced; they come first in the sequence.
        with torch.device("meta"), _Drawn(self._numbers):
            NeoUnify(config)

    def read(self, name: str, rows: slice) -> Tensor:
        values = torch.empty(self.shapes[name])
        if values.ndim >= 2:
            nn.init.normal_(values, std=self._deviation(name), generator=self._numbers)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        return values[rows]

    def _deviation(self, name: str) -> float:
        std = 1 / math.sqrt(self.shapes[name][1:].numel())
        if name.endswith(RESIDUAL):
            return std / math.sqrt(2 * self.config.num_layers)
        if name == "embed_tokens.weight":
            return 0.5
        return std / 2 if name == "lm_head.weight" else std


class _Drawn(TorchFunctionMode):
    """Lets the functions of torch.nn.init draw their numbers from a generator, and drops them."""

    def __init__(self, numbers: torch.Generator) -> None:
        super().__init__()
        self._numbers = numbers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        arguments = dict(kwargs or {})
        if not is_initializer(func):
            return func(*args, **arguments)
        tensor = arguments.pop("tensor") if "tensor" in arguments else args[0]
        if func.__name__ in ("uniform_", "normal_", "kaiming_uniform_"):
            arguments["generator"] = self._numbers
        func(torch.empty(tensor.shape, device="cpu"), *args[1:], **arguments)
        return tensor


class CheckpointWeights:
    """The weights of a checkpoint folder, decoded and cast. Raises CheckpointError."""

    def __init__(self, checkpoint: CheckpointFolder) -> None:
        self.config, self.shapes = checkpoint.config, expected_shapes(checkpoint.config)
        checkpoint.check(self.shapes)
        self._stored = stored_weights(checkpoint, self.shapes)

    def read(self, name: str, rows: slice) -> Tensor:
        places = range(*rows.indices(self.shapes[name][0]))
        part = replace(self._stored[name], share=Share(0, places))
        values = part.read(torch.float32, CPU)
        part.file.release(part.name)  # pages beside the part, which the system mapped too
        return values


class ChangedWeights:
    """The weights of a checkpoint for another config; what the config adds has fresh ones, but
    layers are repeated."""

    def __init__(self, old: CheckpointWeights, config: ModelConfig, seed: int) -> None:
        self._old, self._fresh = old, FreshWeights(config, seed)
        self.shapes = self._fresh.shapes
        self._origins = _layer_origins(old.config.num_layers, config.num_layers)

    def read(self, name: str, rows: slice) -> Tensor:
        fresh = self._fresh.read(name, rows)
        origin, repeats = _origin(name, self._origins)
        if self._old.shapes.get(origin) != self.shapes[name]:
            return fresh
        if repeats and name.endswith(RESIDUAL):
            return fresh.zero_()
        return self._old.read(origin, rows)


def _layer_origins(old: int, new: int) -> list[int]:
    """The old layer that each new one is copied from; where there are more, spread evenly."""
    return [number * old // new for number in range(new)] if new > old else list(range(new))


def _origin(name: str, origins: Sequence[int]) -> tuple[str, bool]:
    """The parameter that a new one is copied from, and whether its layer repeats the one before.

    A repeated layer starts with nothing to add to its input, so a deeper model begins with the
    results of the old one (LLaMA Pro, arXiv 2401.02415).
    """
    if not name.startswith("layers."):
        return name, False
    _, number, rest = name.split(".", 2)
    layer = int(number)
    origin = origins[layer]
    return f"layers.{origin}.{rest}", layer > 0 and origins[layer - 1] == origin


_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


class GrownWeights:
    """Weights with table rows for the ids that a tokenizer gained.

    A new token is read as its lower-case spelling if that was one token, else as the mean of the
    tokens that it joins; as an answer, each is as likely as the mean token.
    """

    def __init__(self, weights: Weights, config: ModelConfig, old: Tokenizer, new: Tokenizer):
        self.shapes = expected_shapes(config)
        self._weights, self._old, self._new = weights, old, new

    def read(self, name: str, rows: slice) -> Tensor:
        if name not in (_EMBEDDING, _HEAD):
            return self._weights.read(name, rows)
        before = self._weights.read(name, slice(None))
        table = torch.empty(self.shapes[name])
        table[: len(before)] = before
        for token in range(self._old.vocab_size, self._new.vocab_size):
            joined = _parts(self._new.token_bytes(token), self._old) if name == _EMBEDDING else ...
            table[token] = before[joined].mean(0)
        return table[rows]


def _parts(token: bytes, old: Tokenizer) -> list[int]:
    """The ids of an older tokenizer that a token stands for."""
    try:
        text = token.decode()
    except UnicodeDecodeError:  # a part of a character
        spelt = {byte: character for character, byte in byte_of_character().items()}
        return [old.id(spelt[byte]) for byte in token]
    lower = old.encode(text.lower())
    return lower if len(lower) == 1 else old.encode(text)
