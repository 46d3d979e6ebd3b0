"""A checkpoint folder: config.json, one or many files of weights, and what is in them.

Everything in the folder is untrusted. Opening reads only the JSON files and the
headers of the weight files; weights are mapped, not read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neounify.checkpoint.config_json import config_of_tensors
from neounify.checkpoint.mapped import MappedFile, TensorInfo
from neounify.checkpoint.names import (
    EMBED_TOKENS,
    LM_HEAD,
    family_of,
    from_published,
    part_of,
    stream_of,
    to_published,
)
from neounify.config import ModelConfig
from neounify.config.families import FAMILIES, title_of
from neounify.errors import CheckpointError
from neounify.files import WEIGHT_FILES, read_json

if TYPE_CHECKING:  # Files without quantised weights do not wait for what reads these.
    from neounify.quant.stored import StoredCodes

DCP_METADATA, DCP_SUBFOLDER = ".metadata", "model"
"""File by which a torch distributed checkpoint (DCP) is known, and where a published one has it."""
MAX_CONFIG_BYTES = 4 * 2**20
MAX_INDEX_BYTES = 64 * 2**20
MAX_LISTED = 20
FINGERPRINT_BYTES = 4096
INDEX_SUFFIX = ".safetensors.index.json"

FLOW_HEAD_INPUT = "fm_modules.fm_head.0.weight"
PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Before the published names in files of other tools."""
QUANTISED = re.compile(
    r"_quantization_metadata|scaled_fp8|.*\.(comfy_quant|weight_scale|scale_weight)"
)
"""Names of tensors and metadata by which files with quantised weights are known."""


class CheckpointFolder:
    """The opened folder. Make one with `CheckpointFolder.open(path)`.

    `path` is the folder, or the one file of weights whose config.json is in the folder `home`.
    `tensors` maps published names to what is stored; `config` is the model that
    config.json describes, with the flow head's width taken from the weights, since
    config.json does not say it, and without text where the weights lack lm_head. `quantised` says
    how weights stored as codes are decoded; scales and descriptions are not in `tensors`.
    """

    def __init__(
        self, path: Path, home: Path, document: dict[str, Any], files: Iterable[MappedFile]
    ) -> None:
        self.path, self.home = path, home
        self.document = document
        self._files: dict[str, MappedFile] = {}
        self._stored: dict[str, str] = {}
        for file in files:
            for stored in file.tensors:
                name = _without_prefix(stored)
                if name in self._files:
                    raise CheckpointError(f"{path}: {name!r} is there twice, once with a prefix")
                self._files[name], self._stored[name] = file, stored
        every = {name: file.tensors[self._stored[name]] for name, file in self._files.items()}
        self.quantised: Mapping[str, StoredCodes] = {}
        metadata = [key for file in set(self._files.values()) for key in file.metadata]
        if any(QUANTISED.fullmatch(name) for name in (*every, *metadata)):
            every = self._read_quantised(every)
        if any(info.blocks for info in every.values()):
            self.quantised = {**self.quantised, **_block_codes(every)}
        self.tensors: Mapping[str, TensorInfo] = every
        self.config = self._config()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None
    ) -> CheckpointFolder:
        """Open a folder with config.json and weights, or one file of weights.

        `config` is the folder with config.json; by default it is the folder, or that of the file.
        Raises CheckpointError when files are missing, damaged or contradict each other, and
        ConfigError when config.json describes no model this package can build.
        """
        home = checkpoint_home(path, config)
        model = Path(path).resolve()
        document = read_document(_inside(home, "config.json"), MAX_CONFIG_BYTES)
        files = _open_files(model) if model.is_dir() else [MappedFile(model)]
        return cls(model, home, document, files)

    def file_of(self, name: str) -> MappedFile:
        """The mapped file that holds a tensor (published name)."""
        return self._files[name]

    def stored_name(self, name: str) -> str:
        """The name of a tensor (published name) in its file, where it may have a prefix."""
        return self._stored[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor (published name), as a view of its file where possible; codes as stored."""
        return self._files[name].tensor(self._stored[name])

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor (published name), of codes that of the weight they stand for."""
        codes = self.quantised.get(name)
        return self.tensors[name].shape if codes is None else codes.shape

    def release(self, name: str) -> None:
        """Drop a tensor's pages from resident memory; they are read again when touched."""
        self._files[name].release(self._stored[name])

    def fingerprint(self) -> str:
        """A sha256 that identifies a checkpoint without reading it whole.

        It covers config.json (normalised), every tensor's name, dtype and shape, and the first
        4 KiB of every tensor's data. It does not change with the sharding, and it is no proof
        that all bytes are equal.
        """
        digest = hashlib.sha256()
        digest.update(json.dumps(self.document, sort_keys=True, separators=(",", ":")).encode())
        for name in sorted(self._files):
            file, stored = self._files[name], self._stored[name]
            info = file.tensors[stored]
            line = json.dumps([name, info.format, info.shape])
            digest.update(line.encode())
            digest.update(file.head(stored, FINGERPRINT_BYTES))
        return digest.hexdigest()

    def check(self, expected: Mapping[str, torch.Size]) -> None:
        """Compare the stored tensors with a model's: our name → shape.

        Raises CheckpointError that lists the missing, unexpected and wrong-shape tensors, and
        those that are not floating point. With tied embeddings, a stored lm_head that equals
        the embedding is accepted (and not used).
        """
        family = self.config.family
        try:
            wanted = {to_published(name, family): tuple(shape) for name, shape in expected.items()}
        except KeyError as error:
            raise CheckpointError(
                f"{self.path}: config.json describes a part that {title_of(family)} checkpoints do "
                f"not have: {error.args[0]}"
            ) from error
        unexpected = sorted(self.tensors.keys() - wanted.keys())
        if LM_HEAD in unexpected and self._has_equal_lm_head():
            unexpected.remove(LM_HEAD)
        both = sorted(wanted.keys() & self.tensors.keys())
        wrong_shape = [
            f"{name}: stored {list(self.shape_of(name))}, expected {list(wanted[name])}"
            for name in both
            if self.shape_of(name) != wanted[name]
        ]
        not_float = [
            f"{name}: {self.tensors[name].format}"
            for name in both
            if name not in self.quantised and not self.tensors[name].dtype.is_floating_point
        ]
        problems = [
            *_listed("missing", sorted(wanted.keys() - self.tensors.keys())),
            *_listed("unexpected", [_explained(name) for name in unexpected]),
            *_listed("of the wrong shape", wrong_shape),
            *_listed("not floating point", not_float),
        ]
        if problems:
            raise CheckpointError(
                f"{self.path}: the weights do not fit the model in config.json\n"
                + "\n".join(problems)
            )

    def _read_quantised(self, every: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Read how quantised weights are decoded; the tensors without what describes them."""
        from neounify.quant.stored import described, read_quantised

        shapes = {name: (info.shape, info.dtype) for name, info in every.items()}
        metadata = [file.metadata for file in set(self._files.values())]
        self.quantised = read_quantised(self.path, shapes, metadata, self.tensor, _without_prefix)
        beside = described(every, self.quantised)
        return {name: info for name, info in every.items() if name not in beside}

    def _has_equal_lm_head(self) -> bool:
        if not self.config.tie_embeddings or EMBED_TOKENS not in self.tensors:
            return False
        if LM_HEAD in self.quantised or EMBED_TOKENS in self.quantised:
            return False
        head, embedding = self.tensors[LM_HEAD], self.tensors[EMBED_TOKENS]
        if head.shape != embedding.shape or head.dtype != embedding.dtype:
            return False
        pieces = zip(
            self.tensor(LM_HEAD).split(1024), self.tensor(EMBED_TOKENS).split(1024), strict=True
        )
        equal = all(torch.equal(a, b) for a, b in pieces)
        self.release(LM_HEAD)
        self.release(EMBED_TOKENS)
        return equal

    def _config(self) -> ModelConfig:
        shapes = {name: self.shape_of(name) for name in self.tensors}
        config = config_of_tensors(self.document, family_of(self.tensors), shapes)
        if LM_HEAD not in self.tensors and not config.tie_embeddings:
            config = config.replace(lm_head=False)
        first = self.tensors.get(FLOW_HEAD_INPUT)
        if config.image_head != "flow" or first is None or len(first.shape) != 2:
            return config
        return config.replace(flow_head_width=first.shape[0])


def _block_codes(tensors: Mapping[str, TensorInfo]) -> dict[str, StoredCodes]:
    """Name of each weight in blocks of a GGUF file → what it is."""
    from neounify.quant.blocks import BlockRows
    from neounify.quant.stored import StoredCodes

    return {
        name: StoredCodes(BlockRows(info.blocks), info.shape, {})
        for name, info in tensors.items()
        if info.blocks is not None
    }


def _without_prefix(name: str) -> str:
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def checkpoint_home(
    path: str | os.PathLike[str], config: str | os.PathLike[str] | None = None
) -> Path:
    """The folder of config.json and the tokenizer of a model, which is a folder or a file.

    It is `config`, by default the folder, or that of the file. Raises CheckpointError, also for a
    torch distributed checkpoint, which is to be converted.
    """
    model = Path(path)
    if not model.is_dir() and not (model.is_file() and model.suffix.lower() in WEIGHT_FILES):
        what = "is not a model" if model.exists() else "does not exist"
        raise CheckpointError(
            f"{model} {what}; expected a folder with config.json and *.safetensors, or a "
            ".safetensors or .gguf file"
        )
    model = model.resolve()
    if is_dcp(model) and not files_ending(model, ".safetensors"):
        bases = ", ".join(f"{f.base} for {f.title}" for f in FAMILIES.values() if f.base)
        raise CheckpointError(
            f"{model} is a torch distributed checkpoint; convert it once, if you trust where it "
            f"came from: neounify convert {model} OUT --from-dcp --config FOLDER, where FOLDER "
            f"holds config.json and the tokenizer of its language model ({bases})"
        )
    if config is None:
        home = model if model.is_dir() else model.parent
        if not os.path.lexists(home / "config.json"):
            raise CheckpointError(_without_config(model, home))
        return home
    if not Path(config).is_dir():
        raise CheckpointError(f"config {config} is not a folder with config.json and a tokenizer")
    return Path(config).resolve()


def _without_config(model: Path, home: Path) -> str:
    """Message about a model without config.json."""
    what, owner = f"{home / 'config.json'} is missing; a checkpoint folder needs it", "its model"
    if model.is_file():
        what = f"{model} is one file of weights, and {home} holds no config.json"
    for family in FAMILIES.values():
        if model.is_dir() and family.base and (home / family.finished_file).is_file():
            what = f"{home} is a {family.title} checkpoint without config.json"
            owner = family.base
    return (
        f"{what}: name the folder with config.json and the tokenizer of {owner}, as config= or "
        "--config"
    )


def is_dcp(folder: Path) -> bool:
    """Whether a folder is a torch distributed checkpoint, or holds one in `model/`."""
    return any((place / DCP_METADATA).is_file() for place in (folder / DCP_SUBFOLDER, folder))


def read_document(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint folder. Raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a checkpoint folder needs it")
    return read_json(path, limit, CheckpointError)


def files_ending(folder: Path, ending: str) -> list[Path]:
    """Files of a folder with this ending, in upper or lower case, sorted; without hidden ones."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.lower().endswith(ending) and not path.name.startswith(".")
    )


def listed(items: list[str]) -> list[str]:
    """Indented lines for an error message: at most 20 items, then how many more there are."""
    lines = [f"  {item}" for item in items[:MAX_LISTED]]
    if len(items) > MAX_LISTED:
        lines.append(f"  … and {len(items) - MAX_LISTED} more")
    return lines


def _listed(what: str, items: list[str]) -> list[str]:
    return [f"{len(items)} {what}:", *listed(items)] if items else []


def _explained(name: str) -> str:
    if name == LM_HEAD:
        return f"{name} (config.json ties it to the embedding, but the two differ)"
    return name if from_published(name) else f"{name} (not a name of this layout)"


def _open_files(folder: Path) -> list[MappedFile]:
    single = folder / "model.safetensors"
    if single.exists():
        return [MappedFile(_inside(folder, single.name))]
    indices = files_ending(folder, INDEX_SUFFIX)
    if indices:
        preferred = folder / f"model{INDEX_SUFFIX}"
        return _open_shards(folder, preferred if preferred in indices else indices[0])
    files = files_ending(folder, ".safetensors")
    if len(files) == 1:
        return [MappedFile(_inside(folder, files[0].name))]
    if files:
        raise CheckpointError(
            f"{folder} holds {len(files)} weight files but no model{INDEX_SUFFIX} to say which "
            "tensor is where; download it too"
        )
    ggufs = files_ending(folder, ".gguf")
    if len(ggufs) == 1:
        return [MappedFile(_inside(folder, ggufs[0].name))]
    if ggufs:
        raise CheckpointError(
            f"{folder} holds {len(ggufs)} GGUF files; name the one to use, such as {ggufs[0]}"
        )
    pickles = [file.name for file in files_ending(folder, ".bin")]
    if pickles:
        raise CheckpointError(
            f"{folder} holds {pickles[0]} but no *.safetensors; pickle files can run code when "
            "read and are never opened, so convert it where it came from"
        )
    raise CheckpointError(f"{folder} holds no weights: expected model.safetensors or shards")


def _open_shards(folder: Path, index: Path) -> list[MappedFile]:
    weight_map = read_document(_inside(folder, index.name), MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object, tensor name → file name")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{index}: the file of {name!r} must be a name, found {shard!r}")
    paths = {shard: _inside(folder, shard) for shard in sorted(set(weight_map.values()))}
    missing = [shard for shard, path in paths.items() if not path.exists()]
    if missing:
        lines = "\n".join(listed(missing))
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(paths)} weight files that {index.name} names are "
            f"missing; download them:\n{lines}"
        )
    files = {shard: MappedFile(path) for shard, path in paths.items()}
    absent = [
        f"{name} in {shard}"
        for name, shard in weight_map.items()
        if name not in files[shard].tensors
    ]
    unnamed = [
        f"{name} in {shard}"
        for shard, file in files.items()
        for name in file.tensors
        if weight_map.get(name) != shard
    ]
    problems = [
        *_listed("named in the index but not in the file", absent),
        *_listed("in a file but not named in the index", unnamed),
    ]
    if problems:
        raise CheckpointError(f"{index} does not fit its files\n" + "\n".join(problems))
    return list(files.values())


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of a (resolved) folder, refusing every name or link that leads out of it.

    One link out is right: a download cache keeps files as `snapshots/X/NAME`, links to
    `blobs/…` beside `snapshots`.
    """
    plain = name not in ("", ".", "..") and not any(c in name for c in "/\\:\0")
    if not plain:
        raise CheckpointError(f"{folder}: {name!r} is not a plain file name inside the folder")
    path = folder / name
    if not path.is_symlink():
        return path
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is a link to a file that is not there") from error
    if target.parent not in homes:
        raise CheckpointError(f"{path} is a link that leads out of the folder, to {target}")
    return path


STREAMS = ("und", "gen", "shared", "unknown")


@dataclass(frozen=True)
class SummaryRow:
    """All tensors of one part of one stream in one dtype or format; `bytes` as stored."""

    stream: str
    part: str
    dtype: str
    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Rows in order of stream and part; tensors that fit no model are of the stream "unknown"."""

    rows: tuple[SummaryRow, ...]

    def of_stream(self, stream: str) -> SummaryRow:
        """The sum of one stream's rows; part and dtype say which ones went in."""
        return _total(stream, [row for row in self.rows if row.stream == stream])

    @property
    def streams(self) -> tuple[SummaryRow, ...]:
        """One sum per stream that has rows."""
        present = {row.stream for row in self.rows}
        return tuple(self.of_stream(stream) for stream in STREAMS if stream in present)

    @property
    def total(self) -> SummaryRow:
        """The sum of all rows."""
        return _total("all", self.rows)


def summarise(checkpoint: CheckpointFolder) -> Summary:
    """Tensors, parameters and bytes of a checkpoint folder; reads headers only."""
    sums: dict[tuple[int, str, str], list[int]] = {}
    for published, info in checkpoint.tensors.items():
        name = from_published(published)
        stream = "unknown" if name is None else stream_of(name)
        part = "unknown" if name is None else part_of(name)
        codes = checkpoint.quantised.get(published)
        dtype = codes.label if codes else str(info.dtype).removeprefix("torch.")
        row = sums.setdefault((STREAMS.index(stream), part, dtype), [0, 0, 0])
        row[0] += 1
        row[1] += math.prod(checkpoint.shape_of(published))
        row[2] += info.nbytes + (codes.bytes_beside if codes else 0)
    return Summary(
        tuple(
            SummaryRow(STREAMS[stream], part, dtype, *sums[stream, part, dtype])
            for stream, part, dtype in sorted(sums)
        )
    )


def _total(stream: str, rows: Iterable[SummaryRow]) -> SummaryRow:
    rows = list(rows)
    dtypes = sorted({row.dtype for row in rows})
    return SummaryRow(
        stream=stream,
        part="all",
        dtype=", ".join(dtypes),
        tensors=sum(row.tensors for row in rows),
        parameters=sum(row.parameters for row in rows),
        bytes=sum(row.bytes for row in rows),
    )
