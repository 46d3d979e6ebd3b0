"""Atomic saving of models as checkpoint folders of the published layout."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint.config_json import read_config, with_quantised, write_config
from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.names import each_expert, is_beside_codes, to_published
from neounify.config import ModelConfig
from neounify.config.families import FAMILIES
from neounify.errors import CheckpointError, RequestError
from neounify.files import atomic_folder, check_empty, write_json
from neounify.model import NeoUnify

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DESCRIPTION = ".comfy_quant"
"""End of the name of the tensor that describes a quantised weight."""


class SavesFiles(Protocol):
    """A tokenizer, as far as saving is concerned: writes its files into a folder."""

    def save(self, folder: Path, /) -> object: ...


def save_model(
    model: NeoUnify,
    folder: str | os.PathLike[str],
    *,
    config: ModelConfig | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: SavesFiles | None = None,
    extra_files: Mapping[str, str] | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    values: Iterator[Tensor] | None = None,
) -> Path:
    """Write config.json, weights, the tokenizer's files and `extra_files` (name → text).

    Quantised layers are written as they are, with the description of their format.
    One model.safetensors when the weights fit into `max_shard_bytes`, else shards and an index;
    a larger tensor gets a separate shard. `config` stands in for `model.config`; its stored
    torch_dtype follows the weights. They are cast to `dtype`. `values` are the tensors of a model
    that is cut over ranks or has none, whole and in the order of `expected_shapes`; they are read
    for one file after the other.

    Everything is first written beside the target, then moved into place: after an error (a full
    disk, say) whatever was there before is still there. A folder that is not empty is replaced
    only with `overwrite`. Returns the folder. Raises CheckpointError or RequestError.
    """
    if max_shard_bytes < 1:
        raise RequestError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    config = config or model.config
    tensors = _published_tensors(model, config, cut=values is not None)
    target, document = Path(folder).resolve(), _document(config, tensors, dtype)
    with new_checkpoint(target, document, tokenizer, extra_files, overwrite=overwrite) as aside:
        _write_weights(
            aside, _Tensors(tensors, dtype, values or iter(tensors.values())), max_shard_bytes
        )
    return target


@contextmanager
def new_checkpoint(
    target: Path,
    document: Mapping[str, Any],
    tokenizer: SavesFiles | None,
    extra_files: Mapping[str, str] | None,
    *,
    overwrite: bool,
) -> Iterator[Path]:
    """A folder beside `target` that takes its place at the end; the caller writes its weights.

    `document` is its config.json. Raises CheckpointError, also for a `target` that is not empty
    without `overwrite`.
    """
    check_empty(target, "a checkpoint", CheckpointError, overwrite=overwrite)
    with atomic_checkpoint(target) as aside:
        write_json(aside / "config.json", document)
        yield aside
        if tokenizer is not None:
            tokenizer.save(aside)
        _write_texts(extra_files or {}, aside)
        if finished_file := FAMILIES[read_config(document).family].finished_file:
            (aside / finished_file).touch()


def _published_tensors(model: NeoUnify, config: ModelConfig, *, cut: bool) -> dict[str, Tensor]:
    """The tensors of a model by published names; without values where it is cut over ranks."""
    from neounify.checkpoint.quantised_layers import describe, quant_modules

    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    absent = [name for name, tensor in state.items() if tensor.is_meta and not cut]
    if cut:
        state = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in state.items()}
    tensors = each_expert(state)
    expected: dict[str, tuple[int, ...]] = dict(expected_shapes(config))
    described: dict[str, Tensor] = {}
    for name, layer in quant_modules(model).items():
        weight = f"{name}.weight"
        if expected.get(weight) == layer.shape:
            del expected[weight]
            layout = layer.format.layout(layer.shape).items()
            expected |= {f"{name}.{part}": shape for part, (shape, _) in layout}
        module = to_published(weight, config.family).removesuffix(".weight")
        described[module + DESCRIPTION] = describe(module, layer)
    names = sorted(tensors.keys() | expected.keys())
    wrong = [n for n in names if n not in tensors or tensors[n].shape != expected.get(n)]
    absent += [name for name in wrong if name in tensors and not tensors[name].numel()]
    if absent:
        raise CheckpointError(
            f"{len(absent)} weights are not in memory, {absent[0]} first: load the model with "
            "memory='all' or 'stream' to save it"
        )
    if wrong:
        raise CheckpointError(f"{len(wrong)} tensors are not as the config says, {wrong[0]} first")
    family = config.family
    return {to_published(name, family): tensors[name] for name in expected} | described


def _document(
    config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Any]:
    document = copy.deepcopy(write_config(config))
    if not any(name.endswith(DESCRIPTION) for name in tensors):
        document = with_quantised(document, None)
    counts: Counter[torch.dtype] = Counter()
    for name, tensor in tensors.items():
        if _may_cast(tensor) and not is_beside_codes(name):
            counts[dtype or tensor.dtype] += tensor.numel()
    stored = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    if not config.published:
        document["torch_dtype"] = stored
    sections = [document, document.get("llm_config"), document.get("vision_config")]
    for section in sections:
        for key in ("torch_dtype", "dtype"):
            if isinstance(section, dict) and key in section:
                section[key] = stored
    return document


class _Tensors(NamedTuple):
    """Tensors by published names, the dtype they are cast to, and their values in this order."""

    tensors: Mapping[str, Tensor]
    dtype: torch.dtype | None
    values: Iterator[Tensor]

    def nbytes(self, name: str) -> int:
        return self.tensors[name].numel() * self._dtype(name).itemsize

    def next(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The values of the next tensors, whose names these are."""
        return {name: next(self.values).to(self._dtype(name)) for name in names}

    def _dtype(self, name: str) -> torch.dtype:
        tensor = self.tensors[name]
        return self.dtype if self.dtype and _may_cast(tensor) else tensor.dtype


def _may_cast(tensor: Tensor) -> bool:
    """Whether the values are plain numbers and no codes."""
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _write_weights(folder: Path, weights: _Tensors, max_shard_bytes: int) -> None:
    shards = _shards(weights, max_shard_bytes)
    if len(shards) == 1:
        write_shard(folder / SINGLE_FILE, weights.next(shards[0]))
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_shard(folder / file, weights.next(names))
        weight_map.update(dict.fromkeys(names, file))
    total = sum(map(weights.nbytes, weights.tensors))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


def _shards(weights: _Tensors, max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in weights.tensors:
        if shards[-1] and size + weights.nbytes(name) > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weights.nbytes(name)
    return shards


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    shard = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(shard, path, metadata={"format": "pt"})
    # The library makes files only their owner can read; the folder has the user's own choice.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    for name, text in texts.items():
        if Path(name).name != name or (folder / name).exists():
            raise CheckpointError(f"{name} cannot be added: not a plain name, or already written")
        (folder / name).write_text(text, encoding="utf-8")


@contextmanager
def atomic_checkpoint(target: Path) -> Iterator[Path]:
    """`atomic_folder` with CheckpointError for what cannot be written."""
    try:
        with atomic_folder(target) as aside:
            yield aside
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} could not be saved: {error}; what was there before is unchanged"
        ) from error
