"""Models with quantised layers: read, quantised while they are read, streamed, saved, adapted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint import (
    CheckpointFolder,
    LoraSpec,
    expected_shapes,
    load_checkpoint,
    load_model,
    save_model,
    summarise,
    to_published,
)
from neounify.checkpoint.quantised_layers import quant_modules
from neounify.errors import CheckpointError, ConfigError, RequestError
from neounify.lora.layers import LoraConfig, add_lora
from neounify.model import NeoUnify
from neounify.model.parts import GEN, UND
from neounify.pipeline import load
from neounify.quant.formats import CODEBOOK, FourBits, Fp8Rows, Int8Rows
from neounify.quant.linear import QuantEmbedding, QuantLinear
from neounify.quant.presets import QUANT_PRESETS, preset_formats
from neounify.text import byte_tokenizer
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint
from support.gguf_files import blocks, gguf_of
from support.lora_files import lora_tensors

LINEAR = "layers.1.gen.out.mlp.gate_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "plain"
    return write_checkpoint(folder, SMALL, random_weights(SMALL))


def quantised_folder(folder: Path, source: Path, preset: str) -> Path:
    return save_model(load_checkpoint(source, dtype="stored", quantise=preset).model, folder)


def layer_of(path: Path, **options: object) -> QuantLinear:
    layer = load_checkpoint(path, **options).model.get_submodule(LINEAR)  # type: ignore[arg-type]
    assert isinstance(layer, QuantLinear)
    return layer


# --- presets ---


def formats(preset: str, kind: str = "dense", **changes: object) -> dict[str, object]:
    config = CONFIGS[kind].replace(num_layers=3) if kind == "dense" else CONFIGS[kind]
    config = config.replace(**changes)
    shapes = {name: tuple(shape) for name, shape in expected_shapes(config).items()}
    return dict(preset_formats(preset, shapes, config.num_layers, tied=config.tie_embeddings))


@pytest.mark.parametrize("preset", QUANT_PRESETS)
def test_presets_take_the_linear_weights_of_the_layers(preset: str) -> None:
    chosen = formats(preset)
    layers = {name for name in chosen if name.startswith("layers.")}
    assert len(layers) == 3 * 2 * 7
    heads = {"embed_tokens.weight", "lm_head.weight"} if preset == "int8-all" else set()
    assert chosen.keys() - layers == heads


def test_the_formats_of_presets() -> None:
    assert set(map(repr, formats("int8").values())) == {repr(Int8Rows(16))}
    assert set(map(type, formats("fp8").values())) == {Fp8Rows}
    assert set(map(type, formats("w4").values())) == {FourBits}
    mixed = formats("w4-mixed")
    four = {name for name, format in mixed.items() if isinstance(format, FourBits)}
    assert {name.split(".")[1] for name in four} == {"1"}
    assert {name.split(".")[-2] for name in four} == {"q_proj", "k_proj", "gate_proj", "up_proj"}
    assert {type(mixed[name]) for name in mixed.keys() - four} == {Int8Rows}


def test_experts_are_quantised_and_routers_are_not() -> None:
    chosen = formats("int8", "sparse")
    assert "layers.0.gen.out.mlp.experts.2.down_proj.weight" in chosen
    assert not [name for name in chosen if "router" in name or "norm" in name]


def test_rows_that_have_no_groups_of_16_stay_in_8_bits() -> None:
    chosen = preset_formats("w4", {"layers.0.und.qkv.q_proj.weight": (8, 24)}, 1, tied=False)
    assert list(chosen.values()) == [Int8Rows(4)]


def test_a_tied_embedding_stays() -> None:
    chosen = formats("int8-all", "tied")
    assert all(name.startswith("layers.") for name in chosen)


def test_the_embedding_of_a_model_without_a_text_head_is_quantised() -> None:
    chosen = formats("int8-all", lm_head=False)
    assert {name for name in chosen if not name.startswith("layers.")} == {"embed_tokens.weight"}


def test_a_model_without_a_text_head_embeds_by_codes(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    del weights[to_published("lm_head.weight")]
    plain = write_checkpoint(tmp_path / "plain", SMALL, weights)
    model = load_model(quantised_folder(tmp_path / "coded", plain, "int8-all"), backend="auto")
    assert not model.config.lm_head
    embedding = model.get_submodule("embed_tokens")
    assert isinstance(embedding, QuantEmbedding)
    wanted = weights[to_published("embed_tokens.weight")][[5, 1]]
    torch.testing.assert_close(embedding(torch.tensor([5, 1])), wanted, rtol=0, atol=0.02)


# --- reading ---


@pytest.mark.parametrize(
    ("preset", "kind"),
    [*((preset, "dense") for preset in QUANT_PRESETS), ("int8", "sparse"), ("w4", "bias")],
)
def test_what_is_saved_is_read_again(tmp_path: Path, preset: str, kind: str) -> None:
    config = CONFIGS[kind]
    source = write_checkpoint(tmp_path / "plain", config, random_weights(config))
    first = quantised_folder(tmp_path / "first", source, preset)
    loaded = load_checkpoint(first, dtype="float32")
    assert quant_modules(loaded.model)
    again = save_model(loaded.model, tmp_path / "again")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, again))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert json.loads((first / "config.json").read_text()) == json.loads(
        (again / "config.json").read_text()
    )


@pytest.mark.parametrize("preset", QUANT_PRESETS)
def test_files_have_the_published_keys(tmp_path: Path, plain: Path, preset: str) -> None:
    folder = quantised_folder(tmp_path / "coded", plain, preset)
    module = to_published(f"{LINEAR}.weight").removesuffix(".weight")
    stored = load_file(folder / "model.safetensors")
    description = json.loads(bytes(stored[f"{module}.comfy_quant"].tolist()))
    rotated = {"convrot": True, "convrot_groupsize": 16}
    if preset == "fp8":
        assert description == {"format": "float8_e4m3fn"}
    elif preset == "w4":
        assert description == {"format": "asym_w4a8_int8"} | rotated
        assert stored[f"{module}.weight"].shape == (48, 16)
        assert stored[f"{module}.weight_{CODEBOOK.removeprefix('weight_')}"].shape == (16,)
    else:
        assert description == {"format": "int8_tensorwise"} | rotated
        assert stored[f"{module}.weight"].dtype == torch.int8
        assert stored[f"{module}.weight_scale"].shape == (48, 1)
    entry = json.loads((folder / "config.json").read_text())["neounify"]["quantised"]
    assert entry == {
        "preset": preset,
        "from": CheckpointFolder.open(plain).fingerprint(),
        "version": 1,
    }


def test_codes_stay_mapped_and_are_computed_with(tmp_path: Path, plain: Path) -> None:
    folder = quantised_folder(tmp_path / "coded", plain, "int8")
    layer = layer_of(folder, backend="reference")
    decoded = load_model(folder, dtype="float32")
    assert not quant_modules(decoded)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), decoded.get_submodule(LINEAR)(x), rtol=0, atol=1e-5)
    checkpoint = CheckpointFolder.open(folder)
    published = to_published(f"{LINEAR}.weight")
    layer.get_parameter("weight").data[0, 0] += 1  # copied on write, so the file is as it was
    assert int(checkpoint.tensor(published)[0, 0]) == int(layer.get_parameter("weight")[0, 0]) - 1


def test_they_are_computed_in_bfloat16(tmp_path: Path, plain: Path) -> None:
    folder = quantised_folder(tmp_path / "coded", plain, "int8")
    assert load_checkpoint(folder, dtype="stored").model.compute_dtype == torch.bfloat16


def test_the_summary_counts_the_weights_and_names_the_formats(tmp_path: Path, plain: Path) -> None:
    before = summarise(CheckpointFolder.open(plain)).total
    for preset in QUANT_PRESETS:
        summary = summarise(
            CheckpointFolder.open(quantised_folder(tmp_path / preset, plain, preset))
        )
        assert summary.total.parameters == before.parameters
        assert summary.total.bytes < before.bytes
        assert any("rotated" in row.dtype for row in summary.rows) == (preset != "fp8")


def test_an_embedding_of_codes(tmp_path: Path, plain: Path) -> None:
    model = load_model(quantised_folder(tmp_path / "coded", plain, "int8-all"), backend="auto")
    assert isinstance(model.get_submodule("lm_head"), QuantLinear)
    embedding = model.get_submodule("embed_tokens")
    assert isinstance(embedding, QuantEmbedding)
    rows = embedding(torch.tensor([5, 1]))
    wanted = random_weights(SMALL)[to_published("embed_tokens.weight")][[5, 1]]
    torch.testing.assert_close(rows, wanted, rtol=0, atol=0.02)
    assert model.to(torch.bfloat16).compute_dtype == torch.bfloat16
    assert model.device.type == "cpu"


def test_codes_come_and_go_with_their_stream(tmp_path: Path, plain: Path) -> None:
    folder = quantised_folder(tmp_path / "coded", plain, "w4")
    expected = layer_of(folder)
    loaded = load_checkpoint(folder, memory="stream")
    layer = loaded.model.get_submodule(LINEAR)
    x = torch.randn(5, 32)
    for stream in (UND, GEN, UND, GEN):
        with loaded.residency.use(stream):
            if stream == GEN:
                assert torch.equal(layer(x), expected(x))


# --- quantised while they are read ---


def test_a_plain_checkpoint_is_quantised_as_it_is_read(tmp_path: Path, plain: Path) -> None:
    fresh, stored = (
        layer_of(plain, quantise="int8"),
        layer_of(quantised_folder(tmp_path / "coded", plain, "int8")),
    )
    for name, tensor in fresh.tensors().items():
        assert torch.equal(tensor, stored.tensors()[name])


def test_what_is_quantised_already_keeps_its_format(tmp_path: Path, plain: Path) -> None:
    folder = quantised_folder(tmp_path / "coded", plain, "fp8")
    assert isinstance(layer_of(folder, quantise="int8-all").format, Fp8Rows)
    with pytest.raises(RequestError, match="applies to is quantised already"):
        load_checkpoint(folder, quantise="int8")


@pytest.mark.parametrize("preset", ["w4", None])
def test_a_model_by_streams_is_saved_whole(tmp_path: Path, preset: str | None) -> None:
    config = SMALL.replace(vocab_size=512)
    folder = write_checkpoint(tmp_path / "plain", config, random_weights(config))
    if preset is not None:
        folder = quantised_folder(tmp_path / "coded", folder, preset)
    byte_tokenizer().save(folder)
    load(folder, dtype="bfloat16", memory="all").save(tmp_path / "all")
    pipe = load(folder, dtype="bfloat16", memory="stream")
    with pipe.residency.use(UND):
        pass
    pipe.save(tmp_path / "stream")
    whole, streamed = (tmp_path / name / "model.safetensors" for name in ("all", "stream"))
    assert whole.read_bytes() == streamed.read_bytes()
    layers = load(folder, dtype="bfloat16", memory="layers", resident_layers=1)
    with pytest.raises(CheckpointError, match="memory='all' or 'stream' to save it"):
        layers.save(tmp_path / "layers")


def test_requests_that_cannot_be_met(plain: Path) -> None:
    for options, message in (
        ({"quantise": "int3"}, "preset 'int3' is unknown; known are int8, int8-all"),
        ({"backend": "fast"}, "backend 'fast' of quantised layers is unknown"),
        ({"quantise": "int8", "backend": "decoded"}, "cannot be used with backend='decoded'"),
    ):
        with pytest.raises(RequestError, match=message):
            load_checkpoint(plain, **options)  # type: ignore[arg-type]


# --- adapters ---


@pytest.mark.parametrize("backend", ["reference", "torch", "decoded"])
def test_a_lora_is_beside_codes_and_in_plain_weights(
    tmp_path: Path, plain: Path, backend: str
) -> None:
    folder = quantised_folder(tmp_path / "coded", plain, "int8")
    target = to_published(f"{LINEAR}.weight").removesuffix(".weight")
    norm = to_published("layers.0.und.qkv.q_proj.weight").removesuffix(".weight")
    tensors = lora_tensors(SMALL, [target, norm])
    save_file(tensors, tmp_path / "lora.safetensors")
    lora: list[LoraSpec] = [(tmp_path / "lora.safetensors", 0.5), tmp_path / "lora.safetensors"]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    plain_y, y = (
        load_checkpoint(folder, dtype="float32", backend=backend, lora=loras)
        .model.get_submodule(LINEAR)(x)
        .double()
        for loras in (None, lora)
    )
    down, up = (tensors[f"{target}.lora_{half}.weight"].double() for half in ("down", "up"))
    update = x.double() @ (1.5 * 2.0 * up @ down).t()
    torch.testing.assert_close(y - plain_y, update, rtol=0, atol=1e-3)


def embedded(model: NeoUnify) -> Tensor:
    """The rows of some tokens."""
    rows: Tensor = model.get_submodule("embed_tokens")(torch.tensor([5, 0, 95]))
    return rows


@pytest.mark.parametrize("stored", ["int8-all", "gguf", None])
def test_a_lora_changes_an_embedding_of_codes(
    tmp_path: Path, plain: Path, stored: str | None
) -> None:
    name = to_published("embed_tokens.weight")
    target = name.removesuffix(".weight")
    tensors = lora_tensors(SMALL, [target])
    save_file(tensors, tmp_path / "lora.safetensors")
    folder = plain
    if stored == "gguf":
        weights = random_weights(SMALL)
        embedding = blocks(weights.pop(name), "Q8_0")[0]
        file = gguf_of(weights)
        file.tensors.append((name, embedding))
        folder = file.write(tmp_path / "model.gguf")
    elif stored is not None:
        folder = quantised_folder(tmp_path / "coded", plain, stored)
    options: dict[str, Any] = {"dtype": "float32", "config": plain}
    options["quantise"] = None if stored else "int8-all"
    before = load_checkpoint(folder, **options).model
    assert isinstance(before.get_submodule("embed_tokens"), QuantEmbedding)
    after = load_checkpoint(folder, lora=tmp_path / "lora.safetensors", **options).model
    down, up = (tensors[f"{target}.lora_{half}.weight"] for half in ("down", "up"))
    update = 2.0 * up[[5, 0, 95]] @ down
    change = embedded(after) - embedded(before)
    # What is quantised with its update is rounded with it.
    tolerance = 1e-5 if stored else 0.02 * float(update.abs().max())
    torch.testing.assert_close(change, update, rtol=0, atol=tolerance)


def test_a_model_with_adapters_beside_codes_cannot_be_saved(tmp_path: Path, plain: Path) -> None:
    folder = quantised_folder(tmp_path / "coded", plain, "int8")
    target = to_published(f"{LINEAR}.weight").removesuffix(".weight")
    save_file(lora_tensors(SMALL, [target]), tmp_path / "lora.safetensors")
    model = load_checkpoint(folder, lora=tmp_path / "lora.safetensors").model
    with pytest.raises(CheckpointError, match="has an adapter beside its codes"):
        save_model(model, tmp_path / "saved")
    merged = load_model(folder, lora=tmp_path / "lora.safetensors")
    saved = save_model(merged, tmp_path / "saved")
    assert "quantised" not in json.loads((saved / "config.json").read_text()).get("neounify", {})


def test_adapters_are_trained_on_plain_weights(tmp_path: Path, plain: Path) -> None:
    model = load_checkpoint(quantised_folder(tmp_path / "coded", plain, "int8")).model
    with pytest.raises(ConfigError, match="quantised"):
        add_lora(model, LoraConfig(rank=2))
