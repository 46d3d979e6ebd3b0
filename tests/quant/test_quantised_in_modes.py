"""`quantise=` in every memory mode: codes of all layers, of a stream, or of a layer at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint import load_checkpoint
from neounify.checkpoint.names import layer_of
from neounify.checkpoint.quantised_layers import quant_modules
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.sizes import kept_weights
from neounify.checkpoint.staging import HostCopies
from neounify.errors import MemoryPlanError
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline, load
from neounify.quant.linear import QuantLinear
from neounify.quant.presets import QUANT_PRESETS
from neounify.serve.build import ServeConfig, build_service
from neounify.serve.memory import EngineMemory
from neounify.tasks.image import ImageRequest
from neounify.text import byte_tokenizer
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint
from support.lora_files import lora_tensors
from support.serving import collect, same_image, serve

pytestmark = pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning")

LAYERS = 4
DEEP = SMALL.replace(num_layers=LAYERS, vocab_size=512)
TARGETS = [
    "language_model.model.layers.0.self_attn.q_proj_mot_gen",
    "language_model.model.layers.2.mlp.down_proj",
]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    weights = {name: 0.1 * tensor for name, tensor in random_weights(DEEP).items()}
    folder = write_checkpoint(tmp_path_factory.mktemp("models") / "deep", DEEP, weights)
    byte_tokenizer().save(folder)
    return folder


def paint(pipe: Pipeline) -> Tensor:
    side = 2 * pipe.config.token_size
    pixels = pipe.generate("a boat", width=side, height=side, steps=2, guidance=2.0).pixels
    assert bool(pixels.isfinite().all())
    return pixels


def layer_bytes(model: NeoUnify) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if layer_of(name) is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", QUANT_PRESETS)
def test_every_mode_computes_the_same_bits(deep: Path, preset: str, dtype: str) -> None:
    whole = load(deep, dtype=dtype, quantise=preset, memory="all")
    expected, answer = paint(whole), whole.chat("what is it?", max_new_tokens=6).token_ids
    for memory, resident in (("stream", None), ("layers", 0), ("layers", 3)):
        pipe = load(
            deep,
            dtype=dtype,
            quantise=preset,
            memory=memory,  # type: ignore[arg-type]
            resident_layers=resident,
        )
        assert quant_modules(pipe.model).keys() == quant_modules(whole.model).keys()
        for _ in range(2):
            assert torch.equal(paint(pipe), expected), memory
        assert pipe.chat("what is it?", max_new_tokens=6).token_ids == answer


def test_sparse_layers_and_adapters(tmp_path: Path, deep: Path) -> None:
    config = CONFIGS["sparse"].replace(vocab_size=512)
    sparse = write_checkpoint(tmp_path / "sparse", config, random_weights(config))
    byte_tokenizer().save(sparse)
    save_file(lora_tensors(DEEP, TARGETS), tmp_path / "lora.safetensors")
    for folder, options in ((sparse, {}), (deep, {"lora": tmp_path / "lora.safetensors"})):
        pipes = [
            load(folder, dtype="bfloat16", quantise="int8", memory=memory, **options)  # type: ignore[arg-type]
            for memory in ("all", "stream", "layers")
        ]
        images = [paint(pipe) for pipe in pipes]
        assert torch.equal(images[1], images[0])
        assert torch.equal(images[2], images[0])


def test_codes_come_and_go(deep: Path) -> None:
    whole = layer_bytes(load(deep, dtype="bfloat16", quantise="int8", memory="all").model)
    pipe = load(deep, dtype="bfloat16", quantise="int8", memory="stream")
    paint(pipe)
    assert layer_bytes(pipe.model) == whole / 2
    pipe = load(deep, dtype="bfloat16", quantise="int8", memory="layers", resident_layers=1)
    most = 0

    def watch(*_: object) -> None:
        nonlocal most
        most = max(most, layer_bytes(pipe.model))

    for layer in pipe.model.layers:
        layer.register_forward_pre_hook(watch)
    paint(pipe)
    assert most == 2 * whole / (2 * LAYERS)


def test_layers_that_are_staged_are_quantised_where_they_arrive(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = paint(load(deep, dtype="bfloat16", quantise="int8", memory="all"))
    monkeypatch.setattr("neounify.checkpoint.layers.in_place", lambda device: False)
    monkeypatch.setattr("neounify.checkpoint.staging.DeviceCopies", lambda device: HostCopies())
    pipe = load(deep, dtype="bfloat16", quantise="int8", memory="layers", resident_layers=1)
    assert torch.equal(paint(pipe), expected)


@pytest.mark.parametrize("preset", [*QUANT_PRESETS, None])
def test_the_plan_counts_the_bytes_of_the_codes(deep: Path, preset: str | None) -> None:
    model = load_checkpoint(deep, dtype="bfloat16", quantise=preset).model
    kept = kept_weights(CheckpointFolder.open(deep), torch.bfloat16, quantise=preset)
    sizes: dict[object, int] = {}
    for name, tensor in model.state_dict().items():
        key: object = layer_of(name) or name.partition(".")[0]
        sizes[key] = sizes.get(key, 0) + tensor.nbytes
    assert kept.name == (preset or "bf16")
    for stream, layers in kept.weights.layers.items():
        assert list(layers) == [sizes[number, stream] for number in range(LAYERS)]
    assert kept.weights.embedding == sizes["embed_tokens"]
    assert kept.weights.lm_head == sizes["lm_head"]


@pytest.mark.parametrize("quantise", ["int8", "int8-all", None])
def test_the_plan_counts_adapters_beside_codes(
    deep: Path, tmp_path: Path, quantise: str | None
) -> None:
    """In float32, of every LoRA of a weight; those merged into plain weights leave nothing."""
    file = tmp_path / "lora.safetensors"
    save_file(lora_tensors(DEEP, [*TARGETS, "language_model.model.embed_tokens"]), file)
    loras: list[tuple[Path, float]] = [(file, 1.0), (file, 0.5)]
    loaded = load_checkpoint(deep, dtype="bfloat16", quantise=quantise, lora=loras)
    beside = [
        tensor
        for module in loaded.model.modules()
        if isinstance(module, QuantLinear) and module.down is not None
        for tensor in (module.down, module.up)
        if tensor is not None
    ]
    assert len(beside) == (0 if quantise is None else 4)
    assert loaded.kept().weights.adapters == sum(tensor.nbytes for tensor in beside)


def test_a_text_head_is_mapped_where_it_is_kept_as_it_is_stored(deep: Path) -> None:
    checkpoint, head = CheckpointFolder.open(deep), "lm_head.weight"

    def mapped(dtype: torch.dtype, **options: Any) -> bool:
        return kept_weights(checkpoint, dtype, **options).weights.head_mapped

    assert mapped(torch.float32)
    assert mapped(torch.float32, quantise="int8")
    assert not mapped(torch.bfloat16)
    assert not mapped(torch.float32, quantise="int8-all")
    assert not mapped(torch.float32, updates={head: 9})


def test_plain_layers_that_a_lora_updates_are_converted_from_their_slots(deep: Path) -> None:
    updates = {"layers.0.und.qkv.q_proj.weight": 9}
    weights = kept_weights(CheckpointFolder.open(deep), torch.float32, updates=updates).weights
    assert weights.staged == {"und": pytest.approx(weights.largest("und"))}
    assert weights.slots("und", unified=False) == pytest.approx(4 * weights.largest("und"))
    assert weights.slots("gen", unified=False) == 3 * weights.largest("gen")


def test_the_plan_of_codes_chooses_the_mode(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free(size: float) -> None:
        for module in ("plan", "rates"):
            monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: int(size))

    free(1e6)
    with pytest.raises(MemoryPlanError, match="peaks at"):
        load(deep, dtype="bfloat16", quantise="int8")
    pipe = load(deep, dtype="bfloat16", quantise="int8", plan="ignore")
    assert type(pipe.residency).__name__ == "LayerResidency"


def test_servers_quantise_in_every_mode(deep: Path) -> None:
    by_layers = EngineMemory(memory="layers", resident_layers=1)
    images = []
    for mode, memory in (
        ("colocate", EngineMemory()),
        ("colocate", by_layers),
        ("separate", EngineMemory()),
        ("separate", by_layers),
    ):
        config = ServeConfig(
            folder=deep,
            mode=mode,  # type: ignore[arg-type]
            quantise="int8",
            dtype="bfloat16",
            threads=1,
            memory=memory,
        )
        service = build_service(config)
        sampling = ImageSampling(steps=2).resolve(service.config, editing=False)
        request = ImageRequest(prompt="a boat", width=64, height=64, sampling=sampling, seed=3)
        images.append(serve(service, partial(collect, request=request)).images[0])
    for image in images[1:]:
        same_image(image, images[0])
