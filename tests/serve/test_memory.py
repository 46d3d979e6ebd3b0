"""Servers by layers, and the memory of step caches in their limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import neounify
from neounify.checkpoint import CheckpointFolder
from neounify.checkpoint.gguf_save import save_gguf
from neounify.checkpoint.load import SPARE_BYTES
from neounify.checkpoint.quantise_files import quantise_checkpoint
from neounify.checkpoint.sizes import kept_weights
from neounify.errors import CheckpointError, MemoryPlanError, RequestError
from neounify.flow.sampling import ImageSampling
from neounify.runtime.memory_plan import default_task, peak_bytes, working_bytes
from neounify.runtime.process import OwnMemory
from neounify.serve.build import Mode, ServeConfig, build_service
from neounify.serve.memory import SMALL, EngineMemory, _is_small, cached_tokens
from neounify.tasks.chat import make_chat_request
from neounify.tasks.image import ImageRequest
from support.lora_files import lora_tensors
from support.serving import collect, same_image, serve


def image_request(pipe: neounify.Pipeline, **sampling: Any) -> ImageRequest:
    resolved = ImageSampling(steps=3, guidance=2.0, **sampling).resolve(pipe.config, editing=False)
    return ImageRequest(prompt="a boat", width=128, height=96, sampling=resolved)


@pytest.mark.parametrize("mode", ["colocate", "separate"])
def test_a_server_by_layers_answers_as_the_pipeline(
    pipe: neounify.Pipeline, folder: Path, mode: Mode
) -> None:
    memory = EngineMemory(memory="layers", resident_layers=1)
    request = image_request(pipe)
    chat = make_chat_request("Hello", [], max_new_tokens=4)
    service = build_service(ServeConfig(folder=folder, mode=mode, dtype="float32", memory=memory))

    async def both(service: Any) -> Any:
        return await collect(service, request), await collect(service, chat)

    image, text = serve(service, both)
    plain = neounify.load(folder, dtype="float32")
    expected = plain.generate("a boat", width=128, height=96, steps=3, guidance=2.0).pixels[0]
    same_image(image.images[0], expected)
    assert text.text == plain.chat("Hello", max_new_tokens=4).text


def test_engines_take_what_fits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(free: float, role: Any = None, **memory: Any) -> dict[str, Any]:
        for module in ("rates", "plan"):
            monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: int(free))
        return EngineMemory(**memory).of_load(folder, None, "float32", "cpu", role)

    assert loaded(1e10)["memory"] == "all"
    assert loaded(1e10, "und")["memory"] == "stream"
    assert loaded(1e10, "gen", memory="layers")["memory"] == "layers"
    assert loaded(1e10, memory="layers", resident_layers=1)["resident_layers"] == 1
    with pytest.raises(MemoryPlanError, match="nothing fits"):
        loaded(1e6)
    assert loaded(1e6, plan="ignore")["memory"] == "layers"
    with pytest.raises(RequestError, match="memory='stream' is not for a server"):
        loaded(1e10, memory="stream")
    with pytest.raises(RequestError, match="memory 'some' is unknown"):
        EngineMemory(memory="some")  # type: ignore[arg-type]


def test_adapters_beside_codes_count(
    pipe: neounify.Pipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is quantised, whose memory holds its codes but not the LoRA beside them."""
    file = tmp_path / "lora.safetensors"
    targets = [f"language_model.model.layers.{n}.mlp.down_proj" for n in range(2)]
    save_file(lora_tensors(pipe.config, targets, rank=8192), file)
    checkpoint = CheckpointFolder.open(folder)
    kept = kept_weights(checkpoint, torch.float32, quantise="int8")
    monkeypatch.setattr("neounify.runtime.rates.own_memory", lambda: OwnMemory(0, 0))
    working = working_bytes(pipe.config, default_task(pipe.config), 4)
    enough = peak_bytes(kept.weights, "all", working, unified=True) + 1
    for module in ("rates", "plan"):
        monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: int(enough))
    memory = EngineMemory(memory="all")
    place = (folder, None, "float32", "cpu")
    assert memory.of_load(*place, quantise="int8")["memory"] == "all"
    with pytest.raises(MemoryPlanError, match="memory='all' peaks"):
        memory.of_load(*place, quantise="int8", lora=((file, 1.0),))


def test_a_config_of_fewer_layers_is_one_error(
    pipe: neounify.Pipeline, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = quantise_checkpoint(CheckpointFolder.open(folder), tmp_path / "codes", "int8")
    document = json.loads((target / "config.json").read_text())
    document["llm_config"]["num_hidden_layers"] -= 1
    (target / "config.json").write_text(json.dumps(document))
    monkeypatch.setattr("neounify.serve.memory._is_small", lambda *_: False)
    with pytest.raises(CheckpointError, match="the weights do not fit the model in "):
        EngineMemory().of_load(target, None, "float32", "cpu")


@pytest.mark.parametrize("preset", ["int8", "q8_0"])
def test_files_of_all_kinds_have_a_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    write = save_gguf if preset == "q8_0" else quantise_checkpoint
    target = write(CheckpointFolder.open(folder), tmp_path / preset, preset)
    (file,) = [*target.glob("*.gguf"), *target.glob("*.safetensors")]
    assert (file.suffix == ".gguf") is (preset == "q8_0")
    enough = SMALL * file.stat().st_size + SPARE_BYTES
    for model in (target, file):
        for free, small in ((enough, False), (enough + 1, True)):
            monkeypatch.setattr("neounify.serve.memory.free_memory", lambda device, free=free: free)
            assert _is_small(model, torch.device("cpu")) is small


def test_step_caches_count_as_image_tokens(pipe: neounify.Pipeline, folder: Path) -> None:
    """Of TINY in float32, a token's caches of two branches are 2 · 4 · 64 · 4 bytes, its state
    24 · 3072."""
    plain, cached = image_request(pipe), image_request(pipe, step_cache=0.1)
    width, kept = pipe.config.token_width, 2 * 4 * pipe.config.hidden_size * 4
    assert cached_tokens(pipe.processor, cached.sampling, 1000) == round(1000 * kept / (24 * width))
    service = build_service(ServeConfig(folder=folder, dtype="float32"))
    tokens = 12 * pipe.config.token_size**2 // pipe.config.token_size**2
    assert service._tokens_of(plain) == tokens
    assert service._tokens_of(cached) == tokens + round(tokens * kept / (24 * width))
