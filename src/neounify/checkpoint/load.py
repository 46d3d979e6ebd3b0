"""Loading of checkpoint folders as models, without a second copy of the weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from neounify.checkpoint.dtypes import Dtype, DtypeChoice, choose_dtype
from neounify.checkpoint.lora import LoraSpec, read_loras
from neounify.checkpoint.names import stream_of, to_published
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import NullResidency, Residency, StreamResidency
from neounify.checkpoint.stored import StoredWeight
from neounify.config import ModelConfig
from neounify.errors import RequestError
from neounify.model import NeoUnify
from neounify.model.build import meta_model

Memory: TypeAlias = Literal["all", "stream"]

log = logging.getLogger("neounify")


class LoadedCheckpoint(NamedTuple):
    """A model, the residency of its weights, the folder it came from, and its dtype."""

    model: NeoUnify
    residency: Residency
    checkpoint: CheckpointFolder
    dtype: DtypeChoice


def load_model(
    folder: str | os.PathLike[str] | CheckpointFolder,
    *,
    dtype: Dtype = None,
    device: str | torch.device = "cpu",
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    verify: bool = False,
) -> NeoUnify:
    """The model of a checkpoint folder, all of it in memory; see `load_checkpoint`."""
    return load_checkpoint(
        folder,
        dtype=dtype,
        device=device,
        lora=lora,
        lora_strength=lora_strength,
        verify=verify,
    ).model


def load_checkpoint(
    folder: str | os.PathLike[str] | CheckpointFolder,
    *,
    dtype: Dtype = None,
    device: str | torch.device = "cpu",
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    memory: Memory = "all",
    verify: bool = False,
) -> LoadedCheckpoint:
    """Load a checkpoint folder: the model in eval mode, no parameter requiring a gradient.

    dtype: "float32", "bfloat16", "float16", "float64" or a torch dtype; "stored" is the one the
    layers are stored in, None or "auto" the fastest that is exact here (`choose_dtype`), which is
    logged. On the CPU, tensors stored in that dtype stay mapped: nothing is copied, pages are
    read when first touched. The file must not be overwritten in place while the model lives.
    All others are converted piece by piece, so the peak is little more than the bytes kept.

    lora: one LoRA file or a sequence of files or (file, strength) pairs, merged in order.
    memory="stream": see StreamResidency; use the returned `residency` around every use of the
    model. Rebuilt weights are then not there until their stream is first used.
    The returned `checkpoint` shares its mappings with the model.

    NaN and infinite weights are refused: every converted value is looked at, of mapped tensors
    the first 4 KiB. `verify=True` reads mapped tensors whole (the time to read the file once,
    and no memory).

    Raises CheckpointError, ConfigError, or RequestError for an unknown dtype, device or memory.
    """
    if memory not in get_args(Memory):
        raise RequestError(
            f"memory {memory!r} is unknown; known are {', '.join(get_args(Memory))}", param="memory"
        )
    # An opened folder is opened again: each model has mappings of its own, so that what one
    # writes to its weights neither shows in another nor is lost when another drops its pages.
    path = folder.path if isinstance(folder, CheckpointFolder) else folder
    checkpoint = CheckpointFolder.open(path)
    target_device = resolve_device(device)
    choice = choose_dtype(dtype, checkpoint, target_device.type)
    log.info("loading %s in %s", checkpoint.path.name, choice)
    model = meta_model(checkpoint.config)
    shapes = _shapes(model)
    checkpoint.check(shapes)
    updates = read_loras(lora, lora_strength, shapes)
    sources = {}
    for name in shapes:
        published = to_published(name)
        source = StoredWeight(checkpoint.file_of(published), published, updates.get(name, ()))
        sources[name] = source
    with torch.inference_mode(False), torch.no_grad():
        for name, source in sources.items():
            keep = memory == "all" or stream_of(name) == "shared"
            tensor = _first_values(source, choice.dtype, target_device, keep=keep, verify=verify)
            _assign(model, name, tensor)
    model.compute_dtype = choice.dtype
    if memory == "all" and target_device.type != "cpu":
        model.stack_experts()
    residency: Residency = NullResidency()
    if memory == "stream":
        residency = StreamResidency(model, sources)
    return LoadedCheckpoint(model.eval(), residency, checkpoint, choice)


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Our name → shape of every tensor the model of `config` has."""
    return _shapes(meta_model(config))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _first_values(
    source: StoredWeight, dtype: torch.dtype, device: torch.device, *, keep: bool, verify: bool
) -> Tensor:
    if source.is_view(dtype, device):
        if verify:
            source.verify()
        else:
            source.verify_sample()
        return source.view()
    if keep:
        return source.read(dtype, device)
    return torch.empty(0, dtype=dtype, device=device)


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    # Not load_state_dict(assign=True): it refuses the empty tensors of memory="stream".
    module, _, leaf = name.rpartition(".")
    parameter = nn.Parameter(tensor, requires_grad=False)
    model.get_submodule(module).register_parameter(leaf, parameter)


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of a name, tried out. Raises RequestError for one that cannot be used here."""
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(f"device {device!r} cannot be used here: {reason}") from error
    return resolved
