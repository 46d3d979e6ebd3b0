"""GGUF files load as what they mean; files that lie are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neounify.checkpoint import (
    expected_shapes,
    load_checkpoint,
    load_model,
    to_published,
    write_config,
)
from neounify.checkpoint.lora_file import read_loras
from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.reader import CheckpointFolder, summarise
from neounify.checkpoint.residency import Share, StoredWeight
from neounify.errors import CheckpointError
from neounify.quant.linear import QuantLinear
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint
from support.gguf_files import (
    ARRAY,
    F32,
    STRING,
    GgufFile,
    Stored,
    array,
    blocks,
    gguf_of,
    plain,
    random_blocks,
    value,
)
from support.lora_files import lora_tensors

WIDE = SMALL.replace(hidden_size=256)
OURS = "layers.1.gen.out.mlp.gate_proj.weight"
NAME = to_published(OURS)
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
REFERENCE = pytest.mark.usefixtures("reference")


@pytest.fixture
def reference() -> Any:
    return pytest.importorskip("gguf", reason="needs the package gguf")


def home(path: Path, config: Any = SMALL) -> Path:
    """A folder with config.json alone."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(write_config(config)))
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_plain_tensors_are_mapped(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    weights = random_weights(SMALL, dtype)
    file = gguf_of(weights, prefix).write(tmp_path / "model.gguf")
    loaded = load_checkpoint(file, config=home(tmp_path / "home"), dtype="stored")
    assert loaded.dtype.dtype == dtype
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[to_published(name)])
    folder = write_checkpoint(tmp_path / "plain", SMALL, weights)
    assert loaded.checkpoint.fingerprint() == CheckpointFolder.open(folder).fingerprint()


@REFERENCE
@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_blocks_become_the_weights_they_mean(tmp_path: Path, prefix: str, kind: str) -> None:
    weights = random_weights(SMALL)
    stored, meant = blocks(weights[NAME], kind)
    file = gguf_of({n: w for n, w in weights.items() if n != NAME}, prefix)
    file.tensors.append((prefix + NAME, stored))
    path = file.write(tmp_path / "model.gguf")
    model = load_model(path, config=home(tmp_path / "home"), dtype="float32")
    np.testing.assert_array_equal(model.get_parameter(OURS).numpy(), meant)
    assert torch.equal(model.embed_tokens.weight, weights[to_published("embed_tokens.weight")])


@REFERENCE
@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256(tmp_path: Path, kind: str) -> None:
    weights = random_weights(WIDE)
    stored, meant = random_blocks(weights[NAME].shape, kind)
    file = gguf_of({n: w for n, w in weights.items() if n != NAME})
    file.tensors.append((NAME, stored))
    path = file.write(tmp_path / "model.gguf")
    config = home(tmp_path / "home", WIDE)
    loaded = load_checkpoint(path, config=config, memory="stream", backend="decoded")
    assert loaded.checkpoint.tensors[NAME].format == kind
    with loaded.residency.use("gen"):
        actual = loaded.model.get_parameter(OURS)
        assert torch.equal(actual, torch.from_numpy(meant).to(actual.dtype))
    kept = load_checkpoint(path, config=config, memory="stream")
    layer = kept.model.get_submodule(OURS.removesuffix(".weight"))
    assert isinstance(layer, QuantLinear)
    with kept.residency.use("gen"):
        assert layer.get_parameter("weight").dtype == torch.uint8
        assert torch.equal(layer.decoded(), torch.from_numpy(meant))
    row = next(r for r in summarise(loaded.checkpoint).rows if r.dtype == kind)
    assert (row.parameters, row.bytes) == (meant.size, len(stored.data))


@REFERENCE
@pytest.mark.parametrize("ours", ["gen_patch.patch.weight", "embed_tokens.weight"])
def test_a_shape_that_was_lost_is_restored(tmp_path: Path, ours: str) -> None:
    """Tools that cannot cut blocks from short rows store a weight as rows of 256."""
    name = to_published(ours)
    weights = random_weights(WIDE)
    shape = weights[name].shape
    stored, meant = blocks(weights[name].reshape(-1, 256), "Q8_0")
    pairs = [(f"comfy.gguf.orig_shape.{name}", array(5, *shape))]
    file = gguf_of({n: w for n, w in weights.items() if n != name}, pairs=pairs)
    file.tensors.append((name, stored))
    path = file.write(tmp_path / "model.gguf")
    model = load_model(path, config=home(tmp_path / "home", WIDE), dtype="float32")
    np.testing.assert_array_equal(model.get_parameter(ours).numpy(), meant.reshape(shape))


@REFERENCE
def test_experts(tmp_path: Path) -> None:
    config = CONFIGS["sparse"]
    ours = "layers.0.und.out.mlp.experts.2.gate_proj.weight"
    weights = random_weights(config)
    stored, meant = blocks(weights[to_published(ours)], "Q5_0")
    file = gguf_of({n: w for n, w in weights.items() if n != to_published(ours)})
    file.tensors.append((to_published(ours), stored))
    path = file.write(tmp_path / "model.gguf")
    model = load_model(path, config=home(tmp_path / "home", config), dtype="float32")
    np.testing.assert_array_equal(model.get_parameter(ours).numpy(), meant)


def test_values_of_the_header_are_not_relied_on(tmp_path: Path) -> None:
    """Any architecture, any other key, other alignments and the older version."""
    weights = random_weights(SMALL)
    pairs = [
        ("general.architecture", value(STRING, "something_else")),
        ("general.alignment", value(4, 64)),
        ("tokens", array(STRING, *("word", "ẅörd") * 50)),
        ("nested", struct.pack("<IIQ", ARRAY, ARRAY, 1) + array(5, 1, 2, 3)[4:]),
        ("flag", value(7, True)),
        ("number", value(12, 0.5)),
    ]
    for version in (2, 3):
        file = gguf_of(weights, pairs=pairs, alignment=64, version=version)
        path = file.write(tmp_path / f"{version}.gguf")
        tensors = MappedFile(path)
        shapes = {name: info.shape for name, info in tensors.tensors.items()}
        assert shapes == {name: tuple(w.shape) for name, w in weights.items()}
        assert torch.equal(tensors.tensor(NAME), weights[NAME])


def test_a_folder_may_hold_one_gguf_file(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    folder = home(tmp_path / "model")
    gguf_of(weights).write(folder / "weights-F32.gguf")
    assert torch.equal(load_model(folder).get_parameter(OURS), weights[NAME])
    assert torch.equal(load_model(folder / "weights-F32.gguf").get_parameter(OURS), weights[NAME])
    gguf_of(weights).write(folder / "weights-F16.gguf")
    with pytest.raises(CheckpointError, match="holds 2 GGUF files; name the one to use"):
        load_model(folder)


def test_a_single_file_needs_a_config(tmp_path: Path) -> None:
    file = gguf_of(random_weights(SMALL)).write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"holds no config\.json: name the folder"):
        load_model(file)
    with pytest.raises(CheckpointError, match="is not a folder with"):
        load_model(file, config=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf does not exist"):
        load_model(tmp_path / "nowhere.gguf", config=tmp_path)


def test_names_of_another_model_are_listed(tmp_path: Path) -> None:
    weights = {"blk.0.attn_q.weight": torch.zeros(32, 32)}
    file = gguf_of(weights).write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight \(not a name of this layou"):
        load_model(file, config=home(tmp_path / "home"))


def test_codes_that_are_not_finite(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    data = (struct.pack("<e", float("nan")) + b"\1" * 32) * (weights[NAME].numel() // 32)
    file = gguf_of({n: w for n, w in weights.items() if n != NAME})
    file.tensors.append((NAME, Stored(weights[NAME].shape[::-1], 8, data)))
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="holds NaN or infinite values"):
        load_model(path, config=home(tmp_path / "home"))


@REFERENCE
def test_loras_and_shares_of_blocks(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    stored, meant = blocks(weights[NAME], "Q8_0")
    file = gguf_of({n: w for n, w in weights.items() if n != NAME})
    file.tensors.append((NAME, stored))
    path = file.write(tmp_path / "model.gguf")
    lora = tmp_path / "lora.safetensors"
    save_file(lora_tensors(SMALL, [NAME.removesuffix(".weight")]), lora)
    plain_folder = write_checkpoint(
        tmp_path / "plain", SMALL, weights | {NAME: torch.from_numpy(meant)}
    )
    expected = load_model(plain_folder, dtype="float32", lora=lora).get_parameter(OURS)
    model = load_model(path, config=plain_folder, dtype="float32", lora=lora)
    assert torch.equal(model.get_parameter(OURS), expected)
    codes = CheckpointFolder.open(path, plain_folder).quantised[NAME]
    for share in (Share(0, range(8, 20)), Share(1, range(8, 20))):
        source = StoredWeight(MappedFile(path), NAME, codes=codes, share=share)
        part = source.read(torch.float32, torch.device("cpu"))
        assert torch.equal(part, share.of(torch.from_numpy(meant)))


@REFERENCE
def test_loras_and_shares_of_rows_of_another_length(tmp_path: Path) -> None:
    name, config = NAME, SMALL.replace(hidden_size=40)
    weights = random_weights(config)
    stored, meant = blocks(weights[name].reshape(-1, 32), "Q8_0")
    values = torch.from_numpy(meant.reshape(weights[name].shape))
    pairs = [(f"comfy.gguf.orig_shape.{name}", array(5, *weights[name].shape))]
    file = gguf_of({n: w for n, w in weights.items() if n != name}, pairs=pairs)
    file.tensors.append((name, stored))
    path = file.write(tmp_path / "model.gguf")
    plain_folder = write_checkpoint(tmp_path / "plain", config, weights | {name: values})
    lora = tmp_path / "lora.safetensors"
    save_file(lora_tensors(config, [name.removesuffix(".weight")]), lora)
    expected = load_model(plain_folder, dtype="float32", lora=lora).get_parameter(OURS)
    model = load_model(path, config=plain_folder, dtype="float32", lora=lora)
    torch.testing.assert_close(model.get_parameter(OURS), expected, rtol=0, atol=1e-6)
    codes = CheckpointFolder.open(path, plain_folder).quantised[name]
    for share in (Share(0, range(8, 20)), Share(1, range(8, 20))):
        source = StoredWeight(MappedFile(path), name, codes=codes, share=share)
        part = source.read(torch.float32, torch.device("cpu"))
        assert torch.equal(part, share.of(values))
    updates = read_loras(lora, 1.0, expected_shapes(config))[OURS]
    source = StoredWeight(MappedFile(path), name, updates, codes)
    staged = source.decode(source.view().clone(), torch.float32)
    torch.testing.assert_close(staged, expected, rtol=0, atol=1e-6)


# --- files that lie ---


def _file(stored: Stored | None = None, **fields: Any) -> GgufFile:
    return GgufFile([("x", stored or plain(torch.ones(32, 32)))], **fields)


def _shape(*sizes: int) -> list[tuple[str, bytes]]:
    return [("comfy.gguf.orig_shape.x", array(5, *sizes))]


ONES = plain(torch.ones(4, 32)).data
NESTED = [("n", struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 50)]
LYING: dict[str, tuple[GgufFile, str]] = {
    "version 1": (_file(version=1), "it has version 1"),
    "big endian": (_file(version=3 << 24), "it has version 50331648"),
    "tensors": (_file(claimed_tensors=2**40), "claims 1099511627776 tensors, more than"),
    "one tensor more": (_file(claimed_tensors=2), "'' has 0 dimensions"),
    "pairs": (_file(claimed_pairs=2**63), "claims 9223372036854775808 values, more than"),
    "type": (_file(Stored((32,), 9, ONES)), "has the GGUF type 9, which this package does not"),
    "unknown type": (_file(Stored((32,), 2**31, ONES)), "type 2147483648"),
    "no dimensions": (_file(Stored((), F32, ONES)), "has 0 dimensions"),
    "many dimensions": (_file(Stored((1,) * 9, F32, ONES)), "has 9 dimensions"),
    "a dimension of 0": (_file(Stored((32, 0), F32, b"")), "cannot have the dimensions 32x0"),
    "huge": (
        _file(Stored((2**32, 2**32), F32, ONES)),
        r"ends at byte 737869762948382\d+",
    ),
    "absurd": (_file(Stored((2**63,) * 8, F32, ONES)), r"ends at byte \d+, the file has"),
    "half a block": (_file(Stored((48, 2), 8, ONES)), "must be a multiple of 32"),
    "not aligned": (_file(Stored((32,), F32, ONES, offset=8)), "is not aligned to 32 bytes"),
    "outside": (_file(Stored((32,), F32, ONES, offset=2**20)), "ends at byte 1048768, the file"),
    "far outside": (_file(Stored((32,), F32, ONES, offset=2**63)), "ends at byte 92233720368547"),
    "cut off": (_file(Stored((32, 5), F32, ONES)), "ends at byte 736, the file has 608"),
    "overlap": (
        GgufFile([("a", plain(torch.ones(64))), ("b", Stored((32,), F32, b"", offset=32))]),
        "'b' overlaps 'a'",
    ),
    "twice": (GgufFile([("a", plain(torch.ones(8)))] * 2), "a tensor is there twice"),
    "key twice": (_file(pairs=[("k", value(4, 1))] * 2), "the key 'k' is there twice"),
    "no UTF-8": (GgufFile([(b"\xff", plain(torch.ones(8)))]), "is not UTF-8"),
    "long name": (GgufFile([("n" * 2000, plain(torch.ones(8)))]), "a name has 2000 bytes"),
    "alignment": (_file(pairs=[("general.alignment", value(4, 33))]), "a power of two to 65536"),
    "no alignment": (_file(pairs=[("general.alignment", value(4, 0))]), "got 0"),
    "alignment text": (_file(pairs=[("general.alignment", value(STRING, "32"))]), "got 0"),
    "value": (_file(pairs=[("k", struct.pack("<I", 13))]), "a value has the type 13"),
    "nested": (_file(pairs=NESTED), "nested too deep"),
    "array": (_file(pairs=[("k", struct.pack("<IIQ", ARRAY, 10, 2**61))]), "past the end of the"),
    "texts": (_file(pairs=[("k", struct.pack("<IIQ", ARRAY, STRING, 2**61))]), "elements of an ar"),
    "shape": (_file(pairs=_shape(3, 5)), "3x5 does not fit the stored 32x32"),
    "negative shape": (_file(pairs=_shape(-32, -32)), "-32x-32 does not fit"),
    "shape of text": (
        _file(pairs=[("comfy.gguf.orig_shape.x", value(STRING, "a", "b"))]),
        "must be an array of 1 to 8 integers",
    ),
}


@pytest.mark.parametrize("case", LYING)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    file, message = LYING[case]
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=message) as refused:
        MappedFile(path)
    assert str(path) in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_header_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    pairs = [("tokens", array(STRING, "a", "b")), ("general.alignment", value(4, 32))]
    content = _file(pairs=pairs).content()
    for length in [*range(4, 200), len(content) - 1]:
        (tmp_path / "model.gguf").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is not a whole GGUF file"):
            MappedFile(tmp_path / "model.gguf")


# --- without lm_head ---


def without_lm_head(path: Path, write: Callable[..., Any] = write_checkpoint) -> Path:
    weights = random_weights(SMALL)
    del weights[to_published("lm_head.weight")]
    write(path, SMALL, weights)
    return path


def test_without_lm_head_a_model_writes_no_text(tmp_path: Path) -> None:
    checkpoint = CheckpointFolder.open(without_lm_head(tmp_path / "model"))
    assert not checkpoint.config.lm_head
    model = load_model(checkpoint)
    assert not hasattr(model, "lm_head")
    with pytest.raises(RuntimeError, match="no lm_head"):
        model.logits(torch.zeros(1, 32))


def test_a_tied_model_needs_no_lm_head(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    weights = random_weights(config)
    model = load_model(write_checkpoint(tmp_path / "model", config, weights), dtype="float32")
    assert model.config.lm_head
    assert model.logits(torch.zeros(1, 32)).shape == (1, 96)
    assert not any("lm_head" in name for name in weights)
