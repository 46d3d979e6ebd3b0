"""The mode that "auto" takes, and the refusal of what does not fit, before a weight is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import neounify
from neounify.checkpoint import NullResidency, StreamResidency, load_checkpoint
from neounify.checkpoint.layers import LayerResidency
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import StoredWeight
from neounify.checkpoint.sizes import kept_weights
from neounify.errors import MemoryPlanError, OutOfMemory, RequestError
from neounify.pipeline import Pipeline, load
from neounify.runtime.memory_plan import default_task, peak_bytes, working_bytes
from neounify.text import byte_tokenizer
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint

WIDE = SMALL.replace(hidden_size=256, num_layers=8, vocab_size=512)
WIDE = WIDE.replace(sampling=neounify.config.CheckpointDefaults(image_size=(128, 128)))


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    folder = write_checkpoint(tmp_path / "wide", WIDE, random_weights(WIDE))
    byte_tokenizer().save(folder)
    return folder


@pytest.fixture
def peaks(wide: Path) -> dict[str, float]:
    """The predicted peak of every mode, with no layers resident."""
    kept = kept_weights(CheckpointFolder.open(wide), torch.float32)
    working = working_bytes(WIDE, default_task(WIDE), 4)
    return {
        mode: peak_bytes(kept.weights, mode, working, {"und": 0, "gen": 0}, unified=True)
        for mode in ("all", "stream", "layers")
    }


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    for module in ("plan", "rates"):
        monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: int(size))


def no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        raise AssertionError("a weight is read")

    monkeypatch.setattr("neounify.checkpoint.load._first_values", read)


def test_plenty_of_memory_needs_no_plan(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neounify.checkpoint.fit.fit_memory", lambda *_: pytest.fail("planned"))
    assert isinstance(load(wide, dtype="float32").residency, NullResidency)


def test_auto_takes_the_first_mode_that_fits(
    wide: Path, peaks: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert peaks["all"] > peaks["stream"] > peaks["layers"]
    for mode, kind in (
        ("all", NullResidency),
        ("stream", StreamResidency),
        ("layers", LayerResidency),
    ):
        free(monkeypatch, peaks[mode] + 1)
        residency = load(wide, dtype="float32", memory="auto").residency
        assert type(residency) is kind
    assert isinstance(residency, LayerResidency)
    assert residency.resident["gen"] < WIDE.num_layers


def test_what_does_not_fit_is_refused_with_what_would(
    wide: Path, peaks: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(monkeypatch, peaks["stream"] + 1)
    no_weight_is_read(monkeypatch)
    with pytest.raises(MemoryPlanError, match="memory='stream' would fit, with a peak"):
        load(wide, dtype="float32", memory="all")


def test_nothing_fits(wide: Path, peaks: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 1e6)
    with monkeypatch.context() as patch:
        no_weight_is_read(patch)
        with pytest.raises(MemoryPlanError, match="nothing fits: int8 weights with mem"):
            load(wide, dtype="float32")
    pipe = load(wide, dtype="float32", plan="ignore")
    assert isinstance(pipe.residency, LayerResidency)
    assert pipe.residency.resident == {"und": 0, "gen": 0}


def test_names_are_checked(wide: Path) -> None:
    with pytest.raises(RequestError, match="memory 'most' is unknown; known are auto, all, stream"):
        load_checkpoint(wide, memory="most")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="plan 'none' is unknown; known are check, ignore"):
        load_checkpoint(wide, plan="none")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning")
def test_an_error_of_memory_tells_the_plan(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Pipeline = load(wide, dtype="float32", memory="stream")

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(pipe.model, "embed_noisy", fail)
    message = (
        r"no memory is left to .*; an image of 128×128 peaks at \d\.\d GB by the plan of "
        r"memory='stream', the actual peak so far is \d\.\d GB"
    )
    with pytest.raises(OutOfMemory, match=message):
        pipe.generate("a boat", width=64, height=64, steps=2)


ERRORS = [
    MemoryError(),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate"
        " memory: you tried to allocate 68719476736 bytes."
    ),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nGPU 0 has 23.6 GiB"),
]


@pytest.mark.parametrize("error", ERRORS, ids=["python", "host", "device"])
@pytest.mark.parametrize("memory", ["all", "layers"])
def test_an_error_of_memory_while_loading_is_one_with_advice(
    wide: Path, monkeypatch: pytest.MonkeyPatch, memory: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("neounify.checkpoint.load._first_values", fail)
    with pytest.raises(MemoryPlanError) as caught:
        load(wide, dtype="float32", memory=memory, plan="ignore")  # type: ignore[arg-type]
    message = str(caught.value)
    start = "wide: memory was used up while its weights were read ("
    assert message.startswith(start + (str(error).partition("\n")[0] or "out of memory"))
    assert re.search(rf"by the plan memory='{memory}' peaks at \d\.\d GB, and the actual", message)
    assert "\n" not in message
    smaller = [mode for mode in ("stream", "layers") if f"; memory={mode!r} peaks" in message]
    assert smaller == (["stream"] if memory == "all" else [])
    assert "int8 weights and memory='layers' peaks at" in message
    assert caught.value.__cause__ is error
    assert error.__traceback__ is None


def test_other_errors_of_loading_stay(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("neounify.checkpoint.load._first_values", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        load(wide, dtype="float32")


def test_weights_that_come_later_find_no_memory(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe: Pipeline = load(wide, dtype="bfloat16", memory="stream")

    def fail(*_: object, **__: object) -> None:
        raise ERRORS[1]

    monkeypatch.setattr(StoredWeight, "read", fail)
    message = r"no memory is left for the weights of the stream 'und'; an image .* memory='stream'"
    with pytest.raises(OutOfMemory, match=message):
        pipe.chat("hello", max_new_tokens=2)
