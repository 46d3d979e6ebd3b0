"""Loading of checkpoint folders as models, without a second copy of the weights."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor, nn

from neounify.checkpoint.dtypes import Dtype, DtypeChoice, bytes_in, check_dtype, choose_dtype
from neounify.checkpoint.lora_file import LoraPair, LoraSpec, read_loras
from neounify.checkpoint.names import stream_of, to_published
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import (
    NullResidency,
    Residency,
    Share,
    StoredWeight,
    StreamResidency,
    code_names,
)
from neounify.config import ModelConfig
from neounify.errors import RequestError, is_out_of_memory
from neounify.model import NeoUnify
from neounify.model.build import meta_model
from neounify.model.parts import StreamName
from neounify.runtime.memory_rows import Fitted, Kept
from neounify.runtime.plan import free_memory
from neounify.runtime.process import own_memory, return_freed_memory

Memory: TypeAlias = Literal["auto", "all", "stream", "layers"]
PlanUse: TypeAlias = Literal["check", "ignore"]
DECODED = "decoded"
"""The backend of quantised layers that makes plain weights of them."""
PLENTY, SPARE_BYTES = 2, 2**30
"""No plan is needed where so many times the weights, and as many bytes more, are free."""

log = logging.getLogger("neounify")


class LoadedCheckpoint(NamedTuple):
    """A model, the residency of its weights, the folder it came from, and its dtype.

    `kept` counts the bytes of its weights as they were loaded, for the memory plan.
    """

    model: NeoUnify
    residency: Residency
    checkpoint: CheckpointFolder
    dtype: DtypeChoice
    kept: Callable[[], Kept]


def load_model(
    folder: str | os.PathLike[str] | CheckpointFolder,
    *,
    config: str | os.PathLike[str] | None = None,
    dtype: Dtype = None,
    device: str | torch.device = "cpu",
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    verify: bool = False,
    quantise: str | None = None,
    backend: str = DECODED,
) -> NeoUnify:
    """The model of a checkpoint folder, all of it in memory; see `load_checkpoint`.

    Quantised weights are decoded unless a backend is named.
    """
    return load_checkpoint(
        folder,
        config=config,
        dtype=dtype,
        device=device,
        lora=lora,
        lora_strength=lora_strength,
        verify=verify,
        plan="ignore",
        quantise=quantise,
        backend=backend,
    ).model


def load_checkpoint(
    folder: str | os.PathLike[str] | CheckpointFolder,
    *,
    config: str | os.PathLike[str] | None = None,
    dtype: Dtype = None,
    device: str | torch.device = "cpu",
    lora: LoraSpec | Sequence[LoraSpec] | None = None,
    lora_strength: float = 1.0,
    memory: Memory = "all",
    resident_layers: int | None = None,
    plan: PlanUse = "check",
    verify: bool = False,
    shares: Mapping[str, Share] | None = None,
    quantise: str | None = None,
    backend: str = "auto",
    attention: str = "auto",
    before: Callable[[ModelConfig, torch.dtype], None] = lambda config, dtype: None,
) -> LoadedCheckpoint:
    """Load a checkpoint folder: the model in eval mode, no parameter requiring a gradient.

    folder may also be one .safetensors or .gguf file; `config` is then the folder with config.json.
    dtype: "float32", "bfloat16", "float16", "float64" or a torch dtype; "stored" is the one the
    layers are stored in, None or "auto" the fastest that is exact here (`choose_dtype`), which is
    logged. On the CPU, tensors stored in that dtype stay mapped: nothing is copied, pages are
    read when first touched. The file must not be overwritten in place while the model lives.
    All others are converted piece by piece, so the peak is little more than the bytes kept.

    backend: how layers with quantised weights compute, see `neounify.quant.backends`; "auto" is the
    best one here, "decoded" makes plain weights of them. quantise: a preset ("int8", "int8-all",
    "fp8", "w4-mixed", "w4") by which weights that are not quantised are, whenever they are read.
    lora: one LoRA file or a sequence of files or (file, strength) pairs, merged in order; beside
    the codes of layers that stay quantised. attention: the backend whose copies the plan counts.
    memory: "all" keeps everything; "stream" see StreamResidency, "layers" see LayerResidency, which
    keeps `resident_layers` of each stream, None as many as fit; "auto" the first that fits. Use the
    returned `residency` around every use of the model: weights may not be there before. plan:
    "check" refuses what does not fit before a weight is read (`checkpoint.fit`); "ignore" tries.
    shares: of the tensors named, only these parts are read. before: may refuse config and dtype.

    NaN and infinite weights are refused: every converted value is looked at, of mapped tensors
    the first 4 KiB; `verify=True` reads mapped tensors whole. Raises CheckpointError, ConfigError,
    RequestError, or MemoryPlanError, which an error of memory becomes too.
    """
    check_memory(memory, plan)
    checkpoint = _opened(folder, config)
    check_backend_used(checkpoint, quantise, backend)
    place = resolve_device(device)
    choice = choose_dtype(dtype, checkpoint, place.type)
    check_dtype(choice.dtype, place)
    before(checkpoint.config, choice.dtype)
    new = f", layers quantised to {quantise}" if quantise else ""
    log.info("loading %s in %s%s", checkpoint.path.name, choice, new)
    model = meta_model(checkpoint.config)
    shapes = _shapes(model)
    checkpoint.check(shapes)
    updates = read_loras(lora, lora_strength, shapes, checkpoint.config.family)
    decoded = backend == DECODED
    kept = _counted(checkpoint, choice.dtype, decoded, quantise, numbers_of(updates), shapes)
    fit = _fitted(checkpoint, kept, choice.dtype, place, memory, resident_layers, plan, attention)
    sources = stored_weights(checkpoint, shapes, updates, shares)
    coded = bool(quantise or (checkpoint.quantised and not decoded))
    with _within_memory(checkpoint, kept, place, fit, attention):
        small: dict[str, Tensor] = {}
        if coded:
            from neounify.checkpoint.quantised_layers import place_codes

            small = place_codes(model, sources, checkpoint, place, quantise, backend)
        _fill(model, sources, small, choice.dtype, place, fit.memory, verify=verify)
        model.compute_dtype = choice.dtype
        residency = _residency(model, sources, *fit[:2], backend if coded else DECODED)
    return LoadedCheckpoint(model.eval(), residency, checkpoint, choice, kept)


def numbers_of(updates: Mapping[str, Sequence[LoraPair]]) -> dict[str, int]:
    """How many numbers the LoRA pairs of each weight hold."""
    return {
        name: sum(pair.down.numel() + pair.up.numel() for pair in pairs)
        for name, pairs in updates.items()
    }


def _counted(
    checkpoint: CheckpointFolder,
    dtype: torch.dtype,
    decoded: bool,
    quantise: str | None,
    updates: Mapping[str, int],
    shapes: Mapping[str, torch.Size],
) -> Callable[[], Kept]:
    """A function that counts the weights, once, when they are first asked for."""

    @functools.cache
    def count() -> Kept:
        from neounify.checkpoint.sizes import kept_weights

        return kept_weights(
            checkpoint, dtype, decoded=decoded, quantise=quantise, updates=updates, shapes=shapes
        )

    return count


@contextmanager
def _within_memory(
    checkpoint: CheckpointFolder,
    kept: Callable[[], Kept],
    device: torch.device,
    fitted: Fitted,
    attention: str,
) -> Iterator[None]:
    """Context of reading weights: an error of memory becomes a MemoryPlanError, with advice."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        from neounify.checkpoint.fit import used_up

        gone = used_up(checkpoint, kept(), device, fitted, error, attention=attention)
        # The frames of the error hold tensors.
        raise gone from error.with_traceback(None)


def _fill(
    model: NeoUnify,
    sources: Mapping[str, StoredWeight],
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory,
    *,
    verify: bool,
) -> None:
    """Give a model its weights, empty ones where they come later, and these other `tensors`."""
    for name, source in sources.items():
        keep = memory == "all" or stream_of(name) == "shared"
        kept = source.kept or dtype
        tensors |= _first_values(name, source, kept, device, keep=keep, verify=verify)
    for name, tensor in tensors.items():
        _assign(model, name, tensor)


def check_memory(memory: str, plan: str = "check") -> None:
    """RequestError for a mode or a use of the plan that is not known."""
    for param, value, known in (
        ("memory", memory, get_args(Memory)),
        ("plan", plan, get_args(PlanUse)),
    ):
        if value not in known:
            raise RequestError(
                f"{param} {value!r} is unknown; known are {', '.join(known)}", param=param
            )


def _fitted(
    checkpoint: CheckpointFolder,
    kept: Callable[[], Kept],
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory,
    resident_layers: int | None,
    plan: PlanUse,
    attention: str,
) -> Fitted:
    """The mode to load in, and the layers that stay. Raises MemoryPlanError.

    No plan is made where memory is far from full, or everything is to be tried.
    """
    own_memory()  # measured before weights are there
    if memory in ("auto", "all"):
        free = free_memory(device)
        plenty = free is None or PLENTY * bytes_in(checkpoint, dtype) + SPARE_BYTES < free
        if plenty or (memory == "all" and plan == "ignore"):
            return Fitted("all")
    if memory == "stream" and plan == "ignore":
        return Fitted("stream")
    from neounify.checkpoint.fit import fit_memory

    ignore = plan == "ignore"
    fitted = fit_memory(
        checkpoint, kept(), device, memory, resident_layers, attention=attention, ignore=ignore
    )
    log.info("memory=%r", fitted.memory)
    return fitted


def _opened(
    folder: str | os.PathLike[str] | CheckpointFolder, config: str | os.PathLike[str] | None
) -> CheckpointFolder:
    # An opened folder is opened again: each model has separate mappings, so that what one
    # writes to its weights neither shows in another nor is lost when another drops its pages.
    if isinstance(folder, CheckpointFolder):
        return CheckpointFolder.open(folder.path, folder.home)
    return CheckpointFolder.open(folder, config)


def check_quantised(quantise: str | None, backend: str) -> None:
    """Raise RequestError for an unknown preset or backend, and for two that exclude each other."""
    if quantise is None and backend in ("auto", DECODED):
        return
    from neounify.quant.backends import check_backend
    from neounify.quant.presets import check_preset

    check_backend(backend)
    if quantise is None:
        return
    check_preset(quantise)
    if backend == DECODED:
        raise RequestError(
            f"quantise={quantise!r} cannot be used with backend='decoded', which makes plain "
            "weights of codes",
            param="quantise",
        )


def check_backend_used(checkpoint: CheckpointFolder, quantise: str | None, backend: str) -> None:
    """Raise the errors of `check_quantised`, and RequestError for a backend without codes."""
    check_quantised(quantise, backend)
    if backend in ("auto", DECODED) or quantise is not None or checkpoint.quantised:
        return
    raise RequestError(
        f"backend {backend!r} is one of quantised weights, and {checkpoint.path.name} has none: "
        "leave it out, or quantise the weights",
        param="backend",
    )


def stored_weights(
    checkpoint: CheckpointFolder,
    names: Iterable[str],
    updates: Mapping[str, tuple[LoraPair, ...]] | None = None,
    shares: Mapping[str, Share] | None = None,
) -> dict[str, StoredWeight]:
    """Where a checkpoint holds tensors (our names), with updates of them and the parts to read."""
    sources = {}
    for name in names:
        published = to_published(name, checkpoint.config.family)
        sources[name] = StoredWeight(
            checkpoint.file_of(published),
            checkpoint.stored_name(published),
            (updates or {}).get(name, ()),
            checkpoint.quantised.get(published),
            (shares or {}).get(name),
        )
    return sources


def _residency(
    model: NeoUnify,
    sources: Mapping[str, StoredWeight],
    memory: Memory,
    resident: Mapping[StreamName, int],
    backend: str,
) -> Residency:
    """The residency of a mode; a model that is whole is fused, its experts of codes are stacked."""
    model.multiply_fast()
    if memory == "stream":
        return StreamResidency(model, sources)
    if memory == "layers":
        from neounify.checkpoint.layers import LayerResidency

        return LayerResidency(model, sources, resident)
    model.fuse()
    if backend != DECODED:
        from neounify.quant.experts import stack_codes

        stack_codes(model, backend)
    if any(source.format is not None for source in sources.values()):
        return_freed_memory()
    return NullResidency()


def expected_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Our name → shape of every tensor the model of `config` has."""
    return _shapes(meta_model(config))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _first_values(
    name: str,
    source: StoredWeight,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep: bool,
    verify: bool,
) -> dict[str, Tensor]:
    """The tensors that a weight becomes, by our names; empty ones unless mapped or to `keep`."""
    if source.format is not None:
        names = code_names(name, source)
        if keep:
            return {names[part]: t for part, t in source.read_codes(device).items()}
        layout = source.format.layout(tuple(source.shape))
        return {
            names[part]: torch.empty(0, dtype=t, device=device) for part, (_, t) in layout.items()
        }
    if source.is_view(dtype, device):
        if verify:
            source.verify()
        else:
            source.verify_sample()
        return {name: source.view()}
    if keep:
        return {name: source.read(dtype, device)}
    return {name: torch.empty(0, dtype=dtype, device=device)}


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
        if reason.startswith("Expected one of"):
            # torch's own list has every type that it was ever built for.
            reason = "a device is cpu, cuda:N, mps or xpu"
        raise RequestError(f"device {device!r} cannot be used here: {reason}") from error
    return resolved
