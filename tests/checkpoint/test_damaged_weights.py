"""Damaged files of weights by the thousand: an error or a model, and memory within their size."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from neounify.checkpoint import load_model, to_published, write_config
from neounify.checkpoint.mapped import MappedFile
from neounify.errors import CheckpointError
from neounify.quant.blocks import BlockRows
from support.checkpoint_folders import SMALL, random_weights
from support.gguf_files import STRING, GgufFile, Stored, array, gguf_of, value

EDGES = (0, 1, 2, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
MEMORY_PER_BYTE, MEMORY = 40, 200_000
"""Bytes of memory per byte of a file, and in all, that reading its header may take."""

Damage = Callable[[bytearray, random.Random], None]


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(len(data))] = draw.randrange(256)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(4, len(data)) :]


def _edge(data: bytearray, draw: random.Random) -> None:
    """An extreme number in the place of another."""
    code = draw.choice(("<I", "<Q"))
    size = struct.calcsize(code)
    at = draw.randrange(4, len(data) - size)
    data[at : at + size] = struct.pack(code, draw.choice(EDGES) % 256**size)


def _remove(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(4, len(data) - 1)
    del data[at : at + draw.randint(1, 16)]


def _repeat(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(4, len(data) - 1)
    data[at:at] = data[at : at + draw.randint(1, 64)]


DAMAGES: tuple[Damage, ...] = (_flip, _cut, _edge, _edge, _remove, _repeat)


def damaged(content: bytes, seed: int, limit: int | None = None) -> bytes:
    """The content with one or two kinds of damage in its first `limit` bytes."""
    draw = random.Random(seed)
    data, rest = bytearray(content[:limit]), content[limit:] if limit else b""
    for damage in draw.sample(DAMAGES, draw.randint(1, 2)):
        if len(data) > 64:
            damage(data, draw)
    return bytes(data) + rest


def _gguf() -> GgufFile:
    pairs = [
        ("general.architecture", value(STRING, "anything")),
        ("general.alignment", value(4, 32)),
        ("tokens", array(STRING, "a", "bc", "")),
        ("comfy.gguf.orig_shape.c", array(5, 2, 3, 32)),
    ]
    file = gguf_of({"a": torch.ones(4, 8), "b": torch.ones(3).half()}, pairs=pairs)
    file.tensors.append(("c", Stored((32, 6), 8, bytes(34 * 6))))
    file.tensors.append(("d", Stored((256, 2), 12, bytes(144 * 2))))
    return file


def _read_whole(file: MappedFile) -> None:
    """Every tensor of a file that was accepted, decoded; they lie in the file and fill it once."""
    size = file.path.stat().st_size
    assert sum(info.nbytes for info in file.tensors.values()) <= size
    for name, info in file.tensors.items():
        assert 0 <= info.start <= info.stop <= size
        stored = file.tensor(name)
        if info.blocks is not None:
            assert BlockRows(info.blocks).dequantise({"weight": stored}).numel() == info.numel
        else:
            assert stored.shape == info.shape


def _problem(read: Callable[[], object]) -> str:
    """The message of the one error that damage may raise; "" where there is none."""
    try:
        read()
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "seeds", [range(400), pytest.param(range(400, 10_400), marks=pytest.mark.slow)], ids=len
)
def test_damaged_gguf_files(tmp_path: Path, seeds: range) -> None:
    content = _gguf().content()
    header = content.index(bytes(34 * 6)) - 192
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    _read_whole(MappedFile(path))
    refused = 0
    tracemalloc.start()
    try:
        for seed in seeds:
            data = damaged(content, seed, header)
            path.write_bytes(data)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            problem = _problem(lambda: _read_whole(MappedFile(path)))
            refused += bool(problem)
            assert len(problem) < 2000
            peak = tracemalloc.get_traced_memory()[1] - before
            assert peak < MEMORY_PER_BYTE * len(data) + MEMORY, seed
    finally:
        tracemalloc.stop()
    # Most damage is seen; bytes of names may change unseen.
    assert len(seeds) * 0.6 < refused < len(seeds)


# --- safetensors with quantised weights ---

CODED = {
    "layers.0.gen.out.mlp.gate_proj.weight": "int8_tensorwise",
    "layers.1.und.qkv.q_proj.weight": "float8_e4m3fn",
}


def _quantised() -> bytes:
    tensors = random_weights(SMALL)
    for ours, format in CODED.items():
        name = to_published(ours)
        weight = tensors[name]
        scale = weight.abs().amax(dim=1, keepdim=True) / 100
        codes = weight / scale
        eight = torch.int8 if format == "int8_tensorwise" else torch.float8_e4m3fn
        tensors[name] = codes.to(eight)
        tensors[f"{name}_scale"] = scale
        text = json.dumps({"format": format}).encode()
        module = name.removesuffix(".weight")
        tensors[f"{module}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
    return save(tensors, metadata={"format": "pt"})


def _one_entry(header: dict[str, dict[str, object]], draw: random.Random) -> None:
    """Damage to what the header says of one tensor, mostly of a quantised one."""
    names = [n for n in header if n != "__metadata__"]
    quantised = [n for n in names if "scale" in n or "comfy" in n or header[n]["dtype"] != "F32"]
    name = draw.choice(quantised if draw.random() < 0.8 else names)
    entry = header[name]
    match draw.randrange(5):
        case 0:
            del header[name]
        case 1:
            entry["dtype"] = draw.choice(("I8", "U8", "F8_E4M3", "F8_E5M2", "F32", "F4", "BOOL"))
        case 2:
            entry["shape"] = draw.choice(([], [1], [2**40, 2**40], [48, 0], [-1, 32], "x", [1.5]))
        case 3:
            entry["data_offsets"] = draw.choice(([0, 0], [0, 2**62], [5], [64, 0], None))
        case 4:
            header[name.replace("weight", draw.choice(("weight_scale", "comfy_quant", "x")))] = (
                entry
            )


def damaged_safetensors(content: bytes, seed: int) -> bytes:
    draw = random.Random(seed)
    if draw.random() < 0.3:
        return damaged(content, seed)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    if draw.random() < 0.3:
        name = draw.choice([n for n in header if n.endswith(("weight_scale", "comfy_quant"))])
        start, stop = header[name]["data_offsets"]
        wrong = (struct.pack("<f", float("nan")), struct.pack("<f", float("inf")), b"\xff{}[")
        data[start:stop] = (draw.choice(wrong) * (stop - start))[: stop - start]
    else:
        _one_entry(header, draw)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 1060), marks=pytest.mark.slow)], ids=len
)
def test_damaged_quantised_safetensors(tmp_path: Path, seeds: range) -> None:
    content = _quantised()
    (tmp_path / "config.json").write_text(json.dumps(write_config(SMALL)))
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    load_model(tmp_path)
    refused = 0
    for seed in seeds:
        path.write_bytes(damaged_safetensors(content, seed))
        problem = _problem(lambda: load_model(tmp_path))
        refused += bool(problem)
        assert not problem or str(tmp_path) in problem, seed
    assert refused > len(seeds) * 0.6
