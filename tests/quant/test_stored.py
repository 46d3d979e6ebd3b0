"""Checkpoints with quantised weights, in the conventions of other tools, load as what they mean."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint import load_checkpoint, load_model, save_model, to_published
from neounify.checkpoint.quantise_files import STORED, quantise_checkpoint
from neounify.checkpoint.reader import CheckpointFolder, summarise
from neounify.errors import CheckpointError
from neounify.quant.formats import FourBits, Fp8Rows, Int8Rows, PublishedFormat, decode
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint

OURS = "layers.1.gen.out.mlp.gate_proj.weight"
WEIGHT = to_published(OURS)
MODULE = WEIGHT.removesuffix(".weight")
OTHER = to_published("layers.0.und.qkv.q_proj.weight")
ROTATED = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
PREFIX = "model.diffusion_model."

Tensors = dict[str, Tensor]


def description_of(module: str, description: dict[str, Any]) -> Tensors:
    text = json.dumps(description).encode()
    return {f"{module}.comfy_quant": torch.tensor(list(text), dtype=torch.uint8)}


def hadamard(size: int) -> np.ndarray[Any, Any]:
    four = np.ones((4, 4)) - 2 * np.fliplr(np.eye(4))
    matrix: np.ndarray[Any, Any] = np.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = np.kron(matrix, four / 2)
    return matrix


def coded(weight: Tensor, group: int = 1) -> tuple[Tensor, Tensor, np.ndarray[Any, Any]]:
    """int8 rows: codes, scales, and Ŵ in float64, by the formulas of the specification."""
    turn = np.kron(np.eye(weight.shape[1] // group), hadamard(group))
    rotated = weight.double().numpy() @ turn
    scale = (np.abs(rotated).max(axis=1, keepdims=True) / 127).astype(np.float32)
    codes = np.clip(np.rint(rotated / scale), -127, 127).astype(np.int8)
    meant = (codes * scale.astype(np.float64)) @ turn.T
    return torch.from_numpy(codes), torch.from_numpy(scale), meant


def int8_rows(weight: Tensor) -> tuple[Tensors, np.ndarray[Any, Any], dict[str, str]]:
    codes, scale, meant = coded(weight)
    tensors = {WEIGHT: codes, f"{MODULE}.weight_scale": scale}
    return tensors | description_of(MODULE, {"format": "int8_tensorwise", "other": 1}), meant, {}


def int8_rotated(weight: Tensor) -> tuple[Tensors, np.ndarray[Any, Any], dict[str, str]]:
    codes, scale, meant = coded(weight, group=16)
    tensors = {WEIGHT: codes, f"{MODULE}.weight_scale": scale}
    return tensors | description_of(MODULE, ROTATED), meant, {}


def int8_default_group(weight: Tensor) -> tuple[Tensors, np.ndarray[Any, Any], dict[str, str]]:
    tensors, meant, _ = int8_rotated(weight)
    return (
        tensors | description_of(MODULE, {"format": "int8_tensorwise", "convrot": True}),
        meant,
        {},
    )


def fp8_rows(weight: Tensor) -> tuple[Tensors, np.ndarray[Any, Any], dict[str, str]]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    tensors = {WEIGHT: codes, f"{MODULE}.weight_scale": scale}
    meant = codes.double().numpy() * scale.double().numpy()
    return tensors | description_of(MODULE, {"format": "float8_e4m3fn"}), meant, {}


def fp8_in_metadata(weight: Tensor) -> tuple[Tensors, np.ndarray[Any, Any], dict[str, str]]:
    codes, scale = (weight * 100).to(torch.float8_e4m3fn), torch.tensor(0.01)
    document = {"layers": {MODULE: {"format": "float8_e4m3fn"}}}
    tensors = {WEIGHT: codes, f"{MODULE}.weight_scale": scale}
    tensors[f"{MODULE}.input_scale"] = torch.tensor(3.0)
    meant = codes.double().numpy() * float(scale)
    return tensors, meant, {"_quantization_metadata": json.dumps(document)}


def fp8_in_prefixed_metadata(
    weight: Tensor,
) -> tuple[Tensors, np.ndarray[Any, Any], dict[str, str]]:
    tensors, meant, metadata = fp8_in_metadata(weight)
    prefixed = {key: text.replace(MODULE, PREFIX + MODULE) for key, text in metadata.items()}
    return tensors, meant, prefixed


def old_fp8(weight: Tensor) -> tuple[Tensors, np.ndarray[Any, Any], dict[str, str]]:
    codes, scale = (weight * 100).to(torch.float8_e4m3fn), torch.tensor([0.01])
    tensors = {WEIGHT: codes, f"{MODULE}.scale_weight": scale}
    tensors |= {f"{MODULE}.scale_input": torch.tensor(3.0)}
    tensors |= {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    return tensors, codes.double().numpy() * float(scale), {}


FORMS = [
    int8_rows,
    int8_rotated,
    int8_default_group,
    fp8_rows,
    fp8_in_metadata,
    fp8_in_prefixed_metadata,
    old_fp8,
]


def folder(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Path:
    write_checkpoint(path, SMALL, {"x": torch.zeros(1)})
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"} | metadata)
    return path


@pytest.mark.parametrize("prefix", ["", PREFIX, "diffusion_model."])
@pytest.mark.parametrize("form", FORMS)
def test_codes_become_the_weights_they_mean(
    tmp_path: Path, form: Callable[[Tensor], Any], prefix: str
) -> None:
    weights = random_weights(SMALL)
    new, meant, metadata = form(weights[WEIGHT])
    stored = {prefix + name: tensor for name, tensor in (weights | new).items()}
    model = load_model(folder(tmp_path / "model", stored, metadata), dtype="float32")
    actual = model.get_parameter(OURS)
    np.testing.assert_allclose(actual.numpy(), meant, rtol=0, atol=2e-6 * np.abs(meant).max())
    assert not np.array_equal(actual.numpy(), weights[WEIGHT].numpy())
    other = "layers.0.und.qkv.q_proj.weight"
    assert torch.equal(model.get_parameter(other), weights[to_published(other)])


def coded_as(description: dict[str, Any], path: Path) -> Path:
    """A checkpoint with codes of one weight, whose description says what they mean."""
    formats: list[PublishedFormat] = [Int8Rows(), Fp8Rows(), FourBits()]
    (format,) = (format for format in formats if format.name == description["format"])
    weights = random_weights(SMALL)
    codes = {f"{MODULE}.{name}": t for name, t in format.quantise(weights[WEIGHT]).items()}
    return folder(path, weights | codes | description_of(MODULE, description), {})


@pytest.mark.parametrize(
    "description",
    [
        {"format": "asym_w4a8_int8"},
        {"format": "asym_w4a8_int8", "convrot": False},
        {"format": "asym_w4a8_int8", "convrot": True, "convrot_groupsize": 4},
        {"format": "int8_tensorwise"},
        {"format": "int8_tensorwise", "convrot": True},
        {"format": "float8_e4m3fn"},
    ],
    ids=str,
)
def test_a_description_means_the_same_when_it_is_saved(
    tmp_path: Path, description: dict[str, Any]
) -> None:
    unknown = {"other": 1, "deeper": {"größe": [True, None, 0.5]}}
    first = coded_as(description | unknown, tmp_path / "first")
    expected = load_model(first, dtype="float32").get_parameter(OURS)
    saved = save_model(load_checkpoint(first).model, tmp_path / "saved")
    copied = quantise_checkpoint(CheckpointFolder.open(first), tmp_path / "copied", STORED)
    for path in (saved, copied):
        assert torch.equal(load_model(path, dtype="float32").get_parameter(OURS), expected)
        stored = load_file(path / "model.safetensors")[f"{MODULE}.comfy_quant"]
        written = json.loads(bytes(stored.tolist()))
        assert written.items() >= (description | unknown).items()


def test_a_description_too_long_to_be_read_is_not_written(tmp_path: Path) -> None:
    document = {"layers": {MODULE: {"format": "int8_tensorwise", "other": "x" * 5000}}}
    weights = random_weights(SMALL)
    codes, scale, _ = coded(weights[WEIGHT])
    weights |= {WEIGHT: codes, f"{MODULE}.weight_scale": scale}
    metadata = {"_quantization_metadata": json.dumps(document)}
    model = load_checkpoint(folder(tmp_path / "model", weights, metadata)).model
    with pytest.raises(CheckpointError, match=r"5,0\d\d bytes with the keys other; at most 4,096"):
        save_model(model, tmp_path / "saved")


def test_they_are_computed_in_bfloat16_and_dropped_by_stream(tmp_path: Path) -> None:
    weights = random_weights(SMALL, torch.bfloat16)
    new, meant, _ = int8_rotated(weights[WEIGHT].float())
    path = folder(tmp_path / "model", weights | new, {})
    loaded = load_checkpoint(path, dtype="stored", memory="stream", backend="decoded")
    assert loaded.dtype.dtype == torch.bfloat16
    parameter = loaded.model.get_parameter(OURS)
    assert parameter.numel() == 0
    with loaded.residency.use("gen"):
        assert parameter.dtype == torch.bfloat16
        np.testing.assert_allclose(parameter.float().numpy(), meant, rtol=4e-3, atol=1e-6)


def test_experts_may_be_quantised_one_by_one(tmp_path: Path) -> None:
    config = CONFIGS["sparse"]
    ours = "layers.0.gen.out.mlp.experts.2.down_proj.weight"
    name = to_published(ours)
    weights = random_weights(config)
    codes, scale, meant = coded(weights[name])
    weights |= {name: codes, f"{name}_scale": scale}
    weights |= description_of(name.removesuffix(".weight"), {"format": "int8_tensorwise"})
    model = load_model(write_checkpoint(tmp_path / "model", config, weights), dtype="float32")
    np.testing.assert_allclose(model.get_parameter(ours).numpy(), meant, rtol=0, atol=1e-6)


def test_codes_without_any_scale_are_the_values(tmp_path: Path) -> None:
    """Files of the older fp8 form may hold nothing but their marker."""
    weights = {name: x.to(torch.float8_e4m3fn) for name, x in random_weights(SMALL).items()}
    marker = {"scaled_fp8": torch.zeros(0).to(torch.float8_e4m3fn)}
    model = load_model(folder(tmp_path / "model", weights | marker, {}), dtype="float32")
    assert torch.equal(model.get_parameter(OURS), weights[WEIGHT].float())


def test_scales_count_for_the_fingerprint_and_not_for_the_parameters(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    new, _, _ = int8_rows(weights[WEIGHT])
    plain = CheckpointFolder.open(write_checkpoint(tmp_path / "plain", SMALL, weights))
    coded = CheckpointFolder.open(folder(tmp_path / "coded", weights | new, {}))
    assert summarise(plain).total.parameters == summarise(coded).total.parameters
    new[f"{MODULE}.weight_scale"] = new[f"{MODULE}.weight_scale"] * 2
    louder = CheckpointFolder.open(folder(tmp_path / "louder", weights | new, {}))
    assert coded.fingerprint() != louder.fingerprint()


def _without_scale(tensors: Tensors) -> None:
    del tensors[f"{MODULE}.weight_scale"]


def _two_scales(tensors: Tensors) -> None:
    tensors[f"{MODULE}.scale_weight"] = torch.tensor(1.0)


def _unknown(tensors: Tensors) -> None:
    tensors |= description_of(MODULE, {"format": "nf3"})


def _of_another_format(tensors: Tensors) -> None:
    tensors |= description_of(MODULE, {"format": "float8_e4m3fn"})


def _rotated_fp8(tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.float8_e4m3fn)
    tensors |= description_of(MODULE, {"format": "float8_e4m3fn", "convrot": True})


def _not_json(tensors: Tensors) -> None:
    tensors[f"{MODULE}.comfy_quant"] = torch.tensor([123, 34], dtype=torch.uint8)


def _long(tensors: Tensors) -> None:
    tensors[f"{MODULE}.comfy_quant"] = torch.zeros(5000, dtype=torch.uint8)


def _wide_codes(tensors: Tensors) -> None:
    tensors[WEIGHT] = tensors[WEIGHT].to(torch.int16)


def _no_channels(tensors: Tensors) -> None:
    tensors[WEIGHT] = torch.empty(10**12, 0, dtype=torch.int8)
    tensors[f"{MODULE}.weight_scale"] = torch.tensor(1.0)


def _no_codes(tensors: Tensors) -> None:
    tensors["somewhere.weight_scale"] = torch.ones(3, 1)


def _group_of(size: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors |= description_of(MODULE, ROTATED | {"convrot_groupsize": size})

    return change


def _scale_of(value: Tensor) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{MODULE}.weight_scale"] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_scale, "has no scale; expected"),
        (_two_scales, "has two scales"),
        (_unknown, "in the format 'nf3', which is not known; known are int8_tensorwise"),
        (_rotated_fp8, "is true, but weights in float8_e4m3fn are not rotated, only those in int8"),
        (_of_another_format, "are [48, 32] of torch.int8; expected [out, in] of torch.float8"),
        (_not_json, "not valid JSON"),
        (_long, "must be at most 4096 bytes of JSON"),
        (_wide_codes, "are [48, 32] of torch.int16"),
        (_no_channels, "are [1000000000000, 0] of torch.int8"),
        (_no_codes, "'somewhere' is described as quantised, but its weight is not there"),
        (_group_of(8), "convrot_groupsize 8 of"),
        (_group_of(64), "that divides its 32 channels"),
        (_group_of("16"), "must be a power of 4"),
        (_scale_of(torch.full((48, 1), float("nan"))), "negative or not finite"),
        (_scale_of(torch.full((48, 1), -1.0)), "negative or not finite"),
        (_scale_of(torch.ones(47, 1)), "is [47, 1] of torch.float32; expected [] or [48, 1]"),
        (_scale_of(torch.ones(48, 1).half()), "of torch.float16; expected"),
    ],
)
def test_damaged_ones_are_refused(
    tmp_path: Path, change: Callable[[Tensors], None], message: str
) -> None:
    weights = random_weights(SMALL)
    tensors = weights | int8_rotated(weights[WEIGHT])[0]
    change(tensors)
    path = folder(tmp_path / "model", tensors, {})
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        load_model(path)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("text", ["[]", '{"layers": 3}', '{"layers": {"x": []}}', "{" * 100_000])
def test_damaged_metadata_is_refused(tmp_path: Path, text: str) -> None:
    weights = random_weights(SMALL)
    path = folder(tmp_path / "model", weights, {"_quantization_metadata": text})
    with pytest.raises(CheckpointError):
        load_model(path)


def two_files(path: Path, descriptions: list[dict[str, Any]]) -> Path:
    """A rotated weight in each of two files, whose metadata describes the weights it is given."""
    weights = random_weights(SMALL)
    folder(path, {}, {})
    (path / "model.safetensors").unlink()
    shards: list[Tensors] = [dict(weights), {}]
    for name, shard in zip((WEIGHT, OTHER), shards, strict=True):
        codes, scale, _ = coded(weights[name], group=16)
        shards[0].pop(name)
        shard |= {name: codes, f"{name.removesuffix('weight')}weight_scale": scale}
    weight_map: dict[str, str] = {}
    for number, (shard, layers) in enumerate(zip(shards, descriptions, strict=True), start=1):
        name = f"model-{number:05d}-of-00002.safetensors"
        text = json.dumps({"layers": layers})
        save_file(shard, path / name, metadata={"_quantization_metadata": text})
        weight_map |= dict.fromkeys(shard, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)
    return path


def test_every_file_describes_its_weights(tmp_path: Path) -> None:
    other = OTHER.removesuffix(".weight")
    path = two_files(tmp_path / "both", [{MODULE: ROTATED}, {other: ROTATED}])
    quantised = CheckpointFolder.open(path).quantised
    assert {codes.label for codes in quantised.values()} == {"int8_tensorwise, rotated"}
    assert quantised.keys() == {WEIGHT, OTHER}
    plain = {"format": "int8_tensorwise"}
    path = two_files(tmp_path / "unlike", [{MODULE: ROTATED}, {other: ROTATED, MODULE: plain}])
    with pytest.raises(CheckpointError, match="in two ways"):
        CheckpointFolder.open(path)


def test_a_tensor_and_the_metadata_describe_a_weight_alike(tmp_path: Path) -> None:
    codes, scale, _ = coded(random_weights(SMALL)[WEIGHT], group=16)
    tensors = {WEIGHT: codes, f"{MODULE}.weight_scale": scale, **description_of(MODULE, ROTATED)}
    plain = {"format": "int8_tensorwise"}
    for name, theirs in (("alike", ROTATED), ("unlike", plain)):
        text = json.dumps({"layers": {MODULE: theirs}})
        folder(tmp_path / name, tensors, {"_quantization_metadata": text})
    (codes_read,) = CheckpointFolder.open(tmp_path / "alike").quantised.values()
    assert codes_read.label == "int8_tensorwise, rotated"
    with pytest.raises(CheckpointError, match=f"{MODULE}' is described in two ways"):
        CheckpointFolder.open(tmp_path / "unlike")


def test_a_tensor_that_is_there_with_and_without_a_prefix(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    path = folder(tmp_path / "model", weights | {PREFIX + WEIGHT: weights[WEIGHT].clone()}, {})
    with pytest.raises(CheckpointError, match="is there twice, once with a prefix"):
        load_model(path)


def four_bits(weight: Tensor) -> Tensors:
    """A weight in 4 bits under its names."""
    format = FourBits(16)
    tensors = {f"{MODULE}.{name}": tensor for name, tensor in format.quantise(weight).items()}
    return tensors | description_of(MODULE, format.describe())


def test_four_bits_become_the_weights_they_mean(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    path = folder(tmp_path / "model", weights | four_bits(weights[WEIGHT]), {})
    actual = load_model(path, dtype="float32").get_parameter(OURS)
    format = FourBits(16)
    expected = decode(format, format.quantise(weights[WEIGHT]))
    torch.testing.assert_close(actual.data, expected, rtol=0, atol=1e-6)
    stored = load_checkpoint(path).checkpoint.quantised[WEIGHT]
    assert (stored.label, stored.shape) == ("asym_w4a8_int8, rotated", (48, 32))


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_s_rel", None, "has no weight_s_rel, which its format asym_w4a8_int8 needs"),
        ("weight_s_channel", None, "has no weight_s_channel"),
        ("weight_s_rel", torch.ones(48, 3), "is [48, 3] of torch.float32; expected [48, 2] of"),
        ("weight_s_channel", torch.ones(47), "is [47] of torch.float32; expected [48]"),
        ("weight_s_channel", torch.full((48,), torch.inf), "negative or not finite"),
        ("weight_codebook", torch.arange(15.0), "is [15] of torch.float32; expected [16]"),
        ("weight_codebook", -torch.arange(16.0), "must be finite and sorted"),
        ("weight_codebook", torch.full((16,), torch.nan), "must be finite and sorted"),
        ("weight", torch.zeros(48, 16), "are [48, 16] of torch.float32; expected [out, in] of"),
        ("weight", torch.zeros(48, 7).to(torch.int8), "rows of 14 codes; expected a multiple of"),
    ],
)
def test_damaged_four_bits_are_refused(
    tmp_path: Path, part: str, value: Tensor | None, message: str
) -> None:
    weights = random_weights(SMALL)
    tensors = weights | four_bits(weights[WEIGHT])
    if value is None:
        del tensors[f"{MODULE}.{part}"]
    else:
        tensors[f"{MODULE}.{part}"] = value
    path = folder(tmp_path / "model", tensors, {})
    with pytest.raises(CheckpointError, match=re.escape(message)) as refused:
        load_checkpoint(path)
    assert MODULE in str(refused.value)
