"""Loading: dtypes, memory by stream, a saved pipeline comes back the same."""

import copy
import logging
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import neounify
from neounify.attention import BACKENDS
from neounify.checkpoint import CheckpointFolder
from neounify.config.presets import TINY
from neounify.engine.messages import LocalTransport
from neounify.engine.understanding import UnderstandingEngine
from neounify.errors import CheckpointError, ConfigError, RequestError, TokenizerError
from neounify.model import NeoUnify
from neounify.serve.build import ServeConfig, build_service
from neounify.text import byte_tokenizer


@pytest.fixture(scope="session")
def folder(pipe: neounify.Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    pipe.save(path)
    return path


def generated(pipe: neounify.Pipeline) -> torch.Tensor:
    return pipe.generate("a boat", width=64, height=64, steps=3, seed=2).pixels


def test_saved_and_loaded_is_the_same(pipe: neounify.Pipeline, folder: Path) -> None:
    loaded = neounify.load(folder)
    assert loaded.config == pipe.config
    ours, theirs = pipe.model.state_dict(), loaded.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # Mapped weights lie elsewhere in memory, and some processors' products round by alignment.
    torch.testing.assert_close(generated(loaded), generated(pipe), rtol=0, atol=1e-5)
    assert loaded.chat("hi", max_new_tokens=5) == pipe.chat("hi", max_new_tokens=5)


def test_system_message_belongs_to_the_checkpoint(pipe: neounify.Pipeline, tmp_path: Path) -> None:
    other = neounify.Pipeline(pipe.model, pipe.tokenizer, system_message="Paint in blue.")
    other.save(tmp_path / "model")
    assert not torch.allclose(
        generated(neounify.load(tmp_path / "model")), generated(pipe), atol=1e-3
    )
    mine = generated(neounify.load(tmp_path / "model"))
    torch.testing.assert_close(mine, generated(other), rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory", ["stream", "layers"])
def test_every_memory_multiplies_by_the_same_library(
    folder: Path, memory: Literal["stream", "layers"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neounify.model.neo.onednn_is_faster", lambda: True)
    monkeypatch.setattr("neounify.model.stream.ONEDNN_PRODUCTS", 1)
    lean = neounify.load(folder, dtype="float32", memory=memory)
    layer = lean.model.get_submodule("layers.0.und.qkv.q_proj")
    assert isinstance(layer.forward, partial)
    assert torch.equal(generated(neounify.load(folder, dtype="float32")), generated(lean))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_by_stream_changes_no_result(folder: Path, dtype: str) -> None:
    full = neounify.load(folder, dtype=dtype)
    lean = neounify.load(folder, dtype=dtype, memory="stream")
    assert torch.equal(generated(full), generated(lean))
    assert full.chat("hi", max_new_tokens=5) == lean.chat("hi", max_new_tokens=5)
    parts = lean.interleave("tell", width=32, height=32, steps=2, max_new_tokens=5, max_images=1)
    assert list(parts)


@pytest.mark.parametrize("name", BACKENDS)
def test_attention_backend_by_name(folder: Path, name: str) -> None:
    pipe = neounify.load(folder, attention=name)
    used = UnderstandingEngine(pipe.model, LocalTransport(), plan=pipe._plan)
    assert pipe._plan.attention == used.backend.name == name
    expected = generated(neounify.load(folder))
    torch.testing.assert_close(generated(pipe), expected, rtol=0, atol=1e-5)


def test_unknown_attention_backend(tmp_path: Path) -> None:
    """Refused before a checkpoint is looked for."""
    with pytest.raises(ConfigError, match="'flush' is unknown; known are auto, sdpa, blocks"):
        neounify.load(tmp_path / "absent", attention="flush")


def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    exact, rounded = (
        generated(neounify.load(folder)),
        generated(neounify.load(folder, dtype="bfloat16")),
    )
    assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_fingerprint_names_the_weights(folder: Path, tmp_path: Path) -> None:
    first = neounify.load(folder)
    assert first.fingerprint == neounify.load(folder, dtype="bfloat16").fingerprint
    torch.manual_seed(1)
    neounify.Pipeline(NeoUnify(TINY), byte_tokenizer()).save(tmp_path / "other")
    assert neounify.load(tmp_path / "other").fingerprint != first.fingerprint


def test_what_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, TokenizerError)):
        neounify.load(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="bfloat16"):
        neounify.load(folder, dtype="float3")
    with pytest.raises(CheckpointError):
        neounify.load(folder).save(folder)


def test_a_tokenizer_larger_than_the_model_is_refused(pipe: neounify.Pipeline) -> None:
    small = NeoUnify(TINY.replace(vocab_size=100))
    with pytest.raises(RequestError, match="100"):
        neounify.Pipeline(small, pipe.tokenizer)


def test_nan_weights_are_found_in_use_or_by_verification(
    pipe: neounify.Pipeline, tmp_path: Path
) -> None:
    for name, call in (
        ("layers.1.und.out.mlp.up_proj.weight", lambda p: p.chat("hi", max_new_tokens=1)),
        ("layers.1.gen.out.mlp.up_proj.weight", generated),
    ):
        model = copy.deepcopy(pipe.model)
        with torch.no_grad():
            model.get_parameter(name)[-1, -1] = float("nan")
        folder = tmp_path / name
        neounify.Pipeline(model, pipe.tokenizer).save(folder)
        with pytest.raises(CheckpointError, match="NaN"):
            call(neounify.load(folder))
        with pytest.raises(CheckpointError, match="up_proj"):
            neounify.load(folder, verify=True)


COMPARE = """
import sys, torch, neounify
def paint(**options):
    pipe = neounify.load(sys.argv[1], **options)
    return pipe.generate("a boat", width=64, height=64, steps=2).pixels
assert torch.allclose(paint(), paint(compile=True), atol=1e-4)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_generates_the_same(folder: Path) -> None:
    # In a separate process: the shape checks of the tests cannot be compiled.
    subprocess.run([sys.executable, "-c", COMPARE, str(folder)], check=True)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of all checkpoints that are opened from now on."""
    paths: list[Path] = []
    read = CheckpointFolder.open

    def counting(path: Any, config: Any) -> CheckpointFolder:
        paths.append(Path(path))
        return read(path, config)

    monkeypatch.setattr(CheckpointFolder, "open", counting)
    return paths


def test_a_checkpoint_is_opened_once_to_choose_its_dtype_and_load(
    folder: Path, opened: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "neounify")
    pipe = neounify.load(folder)
    assert opened == [folder]
    assert str(pipe.loaded_dtype) == "float32 (as stored)"
    assert "loading model in float32 (as stored)" in caplog.text


@pytest.mark.parametrize("mode", ["colocate", "separate"])
def test_a_service_opens_its_checkpoint_once(
    folder: Path, opened: list[Path], mode: Literal["colocate", "separate"]
) -> None:
    service = build_service(ServeConfig(folder=folder, mode=mode, threads=1))
    assert opened == [folder]
    assert service.processor.dtype == torch.float32


def test_a_pipeline_of_a_model_in_memory_has_no_reason_for_its_dtype(
    pipe: neounify.Pipeline,
) -> None:
    assert pipe.loaded_dtype is None
