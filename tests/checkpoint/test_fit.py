"""The mode that "auto" takes, and the refusal of what does not fit, before a weight is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import neounify
from neounify.attention import copied_tokens
from neounify.checkpoint import NullResidency, StreamResidency, load_checkpoint
from neounify.checkpoint.fit import fit_engines, fit_memory, fit_two
from neounify.checkpoint.fit import peaks as fit_peaks
from neounify.checkpoint.layers import LayerResidency
from neounify.checkpoint.reader import CheckpointFolder
from neounify.checkpoint.residency import StoredWeight
from neounify.checkpoint.sizes import kept_weights
from neounify.config import MlpConfig, VideoConfig, VideoDefaults
from neounify.errors import MemoryPlanError, OutOfMemory, RequestError
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline, load
from neounify.runtime.devices import Abilities
from neounify.runtime.memory_plan import (
    STREAMS,
    Mode,
    Resident,
    Task,
    default_task,
    peak_bytes,
    weight_bytes,
    working_bytes,
)
from neounify.runtime.plan import ExecutionPlan
from neounify.runtime.process import OwnMemory
from neounify.runtime.rates import UNKNOWN, Machine
from neounify.text import byte_tokenizer
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.device_abilities import pretending

WIDE = SMALL.replace(hidden_size=256, num_layers=8, vocab_size=512)
WIDE = WIDE.replace(sampling=neounify.config.CheckpointDefaults(image_size=(128, 128)))


@pytest.fixture(autouse=True)
def usual_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process takes PROCESS in every plan; that of the tests is far larger."""
    monkeypatch.setattr("neounify.runtime.rates.own_memory", lambda: OwnMemory(0, 0))


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


def free(monkeypatch: pytest.MonkeyPatch, size: float | None) -> None:
    available = None if size is None else int(size)
    for module in ("plan", "rates"):
        monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: available)


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


def test_auto_has_room_for_the_default_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a model of videos, whose images alone would fit in every case with all weights there."""
    config = WIDE.replace(
        video=VideoConfig(tube_frames=4),
        capabilities=(*WIDE.capabilities, "generate_video"),
        sampling=replace(WIDE.sampling, video=VideoDefaults(size=(128, 128))),
    )
    folder = write_checkpoint(tmp_path / "moving", config, random_weights(config))
    checkpoint, cpu = CheckpointFolder.open(folder), torch.device("cpu")
    kept = kept_weights(checkpoint, torch.float32)
    none: Resident = {"und": 0, "gen": 0}

    def peak(task: Task, mode: Mode) -> float:
        working = working_bytes(config, task, 4)
        return peak_bytes(kept.weights, mode, working, none, unified=True)

    modes: tuple[Mode, ...] = ("all", "stream", "layers")
    image, clip = default_task(WIDE), default_task(config)
    for mode in modes:
        assert peak(clip, mode) > peak(image, "all")
        free(monkeypatch, peak(clip, mode) + 1)
        assert fit_memory(checkpoint, kept, cpu, "auto").memory == mode
    free(monkeypatch, peak(image, "all") + 1)
    assert fit_memory(checkpoint, kept, cpu, "auto").memory == "all"
    assert "images fit in the memory that is free, but not a video of 96 frames" in caplog.text
    free(monkeypatch, peak(image, "layers") / 2)
    for fit in (fit_memory, fit_engines):
        with pytest.raises(MemoryPlanError, match="nothing fits"):
            fit(checkpoint, kept, cpu, "auto")
    shown = fit_peaks(NeoUnify(config), None, ExecutionPlan())
    assert "a video of 96 frames of 128×128 peaks at" in shown


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


def test_systems_that_tell_no_memory(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, None)
    for memory in ("stream", "layers"):
        with pytest.raises(RequestError, match=r"plan='ignore' \(--plan ignore\) loads without"):
            load(wide, dtype="float32", memory=memory)
    pipe = load(wide, dtype="float32", memory="layers", plan="ignore")
    assert isinstance(pipe.residency, LayerResidency)
    assert pipe.residency.resident == {"und": 0, "gen": 0}
    layers = load(wide, dtype="float32", memory="layers", plan="ignore", resident_layers=3)
    assert layers.residency.resident == {"und": 3, "gen": 3}  # type: ignore[attr-defined]


# --- what a refusal names ---


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are those of the model alone: the process would be most of one so small."""
    monkeypatch.setattr("neounify.runtime.memory_plan.PROCESS", 0)


Refused = Callable[..., str]


@pytest.fixture
def refused(bare: None, wide: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """The refusal by `fit_memory` or `fit_engines` of a mode on a device, in so much memory."""
    checkpoint = CheckpointFolder.open(wide)
    kept = kept_weights(checkpoint, torch.float32)

    def refusal(fit: Any, kind: str, size: float, memory: str, *count: int, **options: Any) -> str:
        free(monkeypatch, size)
        with pretending(Abilities(type=kind)), pytest.raises(MemoryPlanError) as caught:
            fit(checkpoint, kept, torch.device(kind), memory, *count, **options)
        return str(caught.value)

    return refusal


def test_devices_without_layers_are_not_told_to_take_them(
    refused: Refused, peaks: dict[str, float]
) -> None:
    size = peaks["layers"] + 1
    assert size < peaks["stream"]
    assert "memory='layers' would fit" in refused(fit_memory, "cpu", size, "all")
    for memory in ("all", "stream"):
        message = refused(fit_memory, "mps", size, memory)
        assert "; nothing fits: int8 weights with memory='stream' peak" in message
    assert "layers" not in message
    message = refused(fit_memory, "mps", peaks["stream"] + 1, "all")
    assert "memory='stream' would fit" in message


def test_servers_are_told_to_take_what_servers_take(
    refused: Refused, peaks: dict[str, float]
) -> None:
    # By layers each stream of one process may take half: too little, even in int8.
    size = 6e6
    assert peaks["layers"] < size < peaks["stream"] < peaks["all"]
    for memory in ("all", "layers", "auto"):
        message = refused(fit_engines, "cpu", size, memory)
        assert "nothing fits: int8 weights with memory='layers' peak" in message
        assert ("0.0 GB are free for each stream" in message) is (memory != "all")
    size = (peaks["stream"] + peaks["layers"]) / 2
    message = refused(fit_engines, "cpu", size, "all", role="gen")
    assert re.search("wide with memory='all' peaks.*; memory='layers' would fit", message)
    message = refused(fit_engines, "mps", 5e6, "all", role="gen")
    assert "nothing fits: int8 weights with memory='all' peak" in message
    with pytest.raises(RequestError, match="not on mps; take memory='all'"):
        refused(fit_engines, "mps", 1e9, "layers")


def test_a_number_of_layers_is_named_with_the_one_that_fits(
    refused: Refused, peaks: dict[str, float]
) -> None:
    size = (peaks["stream"] + peaks["layers"]) / 2
    message = refused(fit_memory, "cpu", size, "layers", WIDE.num_layers)
    assert "memory='layers', resident_layers=8 peaks" in message
    assert "memory='layers', resident_layers=0 would fit" in message


def test_locked_memory_that_does_not_fit_is_the_reason(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the peak fits on the device, and the locked buffers not on the host."""
    monkeypatch.setattr("neounify.checkpoint.fit.GB", 1e6)
    checkpoint = CheckpointFolder.open(wide)
    kept = kept_weights(checkpoint, torch.float32)
    locked = max(kept.weights.locked(stream) for stream in STREAMS)

    def refusal(host: float) -> str:
        machine = Machine(device=1e12, host=host, rates=UNKNOWN)
        monkeypatch.setattr("neounify.checkpoint.fit.this_machine", lambda *_: machine)
        with pytest.raises(MemoryPlanError) as caught:
            fit_memory(checkpoint, kept, torch.device("cuda"), "layers", 0)
        return str(caught.value)

    message = refusal(locked - 1)
    assert f"resident_layers=0 locks {locked / 1e6:.1f} GB of the host's memory, and " in message
    assert " GB of it are free; memory='all' would fit" in message
    monkeypatch.setattr("neounify.checkpoint.fit.machine_modes", lambda machine: ("layers",))
    assert "nothing fits: int8 weights with memory='layers', resident_layers=0 lock" in refusal(1e3)


def test_an_engine_of_one_stream_is_judged_by_it(
    bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WIDE.replace(und_mlp=MlpConfig(width=1024))
    folder = write_checkpoint(tmp_path / "unequal", config, random_weights(config))
    checkpoint, cpu = CheckpointFolder.open(folder), torch.device("cpu")
    kept = kept_weights(checkpoint, torch.float32)
    working = working_bytes(config, default_task(config), 4)
    und, gen = (
        peak_bytes(kept.weights, "stream", {name: a}, unified=True) for name, a in working.items()
    )
    assert gen < und
    free(monkeypatch, (gen + und) / 2)
    fitted = fit_engines(checkpoint, kept, cpu, "all", role="gen")
    assert (fitted.memory, fitted.peak) == ("stream", gen)
    with pytest.raises(MemoryPlanError, match="memory='all' peaks"):
        fit_engines(checkpoint, kept, cpu, "all", role="und")


def test_two_models_fit_at_once(
    bare: None, wide: Path, peaks: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, cpu = CheckpointFolder.open(wide), torch.device("cpu")
    kept = kept_weights(checkpoint, torch.float32)
    two = ([checkpoint] * 2, [kept] * 2, cpu)
    fits = {}
    for size in (2 * peaks["all"], peaks["all"] + peaks["stream"], 2 * peaks["layers"]):
        free(monkeypatch, size + 1)
        first, second = fit_two(*two)
        assert first.peak is not None
        assert second.peak is not None
        assert first.peak + second.peak <= size + 1
        fits[size] = (first.memory, second.memory)
    assert list(fits.values()) == [("all", "all"), ("all", "stream"), ("layers", "layers")]
    free(monkeypatch, 2 * peaks["layers"] - 1)
    assert peaks["stream"] < 2 * peaks["layers"]
    with pytest.raises(MemoryPlanError, match=r"wide and wide do not .*GB are free beside the fir"):
        fit_two(*two)


def test_resident_layers_fit_with_branches_apart(
    bare: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the error while weights are read names the peak of the row that was chosen."""
    monkeypatch.setattr("neounify.checkpoint.fit.GB", 1e6)
    sampling = neounify.config.CheckpointDefaults(image_size=(4096, 4096))
    config = WIDE.replace(sampling=sampling)
    folder = write_checkpoint(tmp_path / "large", config, random_weights(config))
    byte_tokenizer().save(folder)
    checkpoint, cpu = CheckpointFolder.open(folder), torch.device("cpu")
    kept = kept_weights(checkpoint, torch.float32)
    task = default_task(config)

    def peak(count: int, rows: int) -> float:
        a = working_bytes(config, task, 4, branch_rows=rows)["gen"]
        return peak_bytes(kept.weights, "layers", {"gen": a}, {"gen": count}, unified=True)

    apart, together = peak(4, 1), peak(0, 10**9)
    assert apart < together
    free(monkeypatch, apart + 1)
    fitted = fit_memory(checkpoint, kept, cpu, "layers")
    assert fitted.resident["gen"] == 4
    assert fitted.peak == apart

    def fail(*_: object, **__: object) -> None:
        free(monkeypatch, 1e6)
        raise MemoryError

    monkeypatch.setattr("neounify.checkpoint.load._first_values", fail)
    with pytest.raises(MemoryPlanError, match=f"'layers' peaks at {apart / 1e6:.1f} GB, and the"):
        load(folder, dtype="float32", memory="layers")


def test_the_plan_of_an_error_has_the_limits_of_the_calls() -> None:
    sampling = neounify.config.CheckpointDefaults(image_size=(4096, 4096))
    model = NeoUnify(WIDE.replace(sampling=sampling))
    weights = weight_bytes(model.config, 4)
    for rows in (1, 10**9):
        working = working_bytes(model.config, default_task(model.config), 4, branch_rows=rows)
        expected = peak_bytes(weights, "all", working, unified=True) / 1e9
        shown = fit_peaks(model, None, ExecutionPlan(branch_rows=rows))
        assert f"an image of 4096×4096 peaks at {expected:.1f} GB by the plan" in shown


def test_copies_of_the_attention_backend_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = neounify.config.CheckpointDefaults(image_size=(1024, 1024))
    config = WIDE.replace(sampling=sampling)
    folder = write_checkpoint(tmp_path / "model", config, random_weights(config))
    byte_tokenizer().save(folder)
    weights = kept_weights(CheckpointFolder.open(folder), torch.float32).weights
    task = default_task(config)
    copying = replace(task, copied_tokens=copied_tokens("varlen"))
    sizes = [
        peak_bytes(weights, "all", working_bytes(config, t, 4), unified=True)
        for t in (task, copying)
    ]
    free(monkeypatch, sizes[0] + 1)
    assert sizes[0] + 1 < sizes[1]
    load(folder, dtype="float32", memory="all")
    with pytest.raises(MemoryPlanError, match="memory='all' peaks"):
        load(folder, dtype="float32", memory="all", attention="varlen")


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


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("options", [{}, {"quantise": "int8"}], ids=["plain", "int8"])
def test_the_plan_of_an_error_is_that_of_the_weights_in_use(
    wide: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr("neounify.checkpoint.fit.GB", 1e6)
    pipe: Pipeline = load(wide, dtype="float32", memory="stream", **options)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pipe.model, "embed_noisy", fail)
    weights = kept_weights(CheckpointFolder.open(wide), torch.float32, **options).weights
    working = working_bytes(WIDE, default_task(WIDE), 4)
    expected = peak_bytes(weights, "stream", working, unified=True)
    with pytest.raises(OutOfMemory, match=rf"128×128 peaks at {expected / 1e6:.1f} GB by the plan"):
        pipe.generate("a boat", width=128, height=128, steps=2)


@pytest.mark.usefixtures("bare")
def test_resident_layers_count_in_the_plan_of_an_error_while_loading(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neounify.checkpoint.fit.GB", 1e6)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("neounify.checkpoint.load._first_values", fail)
    with pytest.raises(MemoryPlanError) as caught:
        load(wide, dtype="float32", memory="layers", plan="ignore", resident_layers=5)
    weights = kept_weights(CheckpointFolder.open(wide), torch.float32).weights
    working = working_bytes(WIDE, default_task(WIDE), 4)
    five, none = (
        peak_bytes(weights, "layers", working, {"und": n, "gen": n}, unified=True) / 1e6
        for n in (5, 0)
    )
    message = str(caught.value)
    assert f"by the plan memory='layers' peaks at {five:.1f} GB" in message
    assert f"; memory='layers', resident_layers=0 peaks at {none:.1f} GB" in message


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
    # As many layers were to stay as fit: all.
    fewer = ", resident_layers=0" if memory == "layers" else ""
    assert f"int8 weights and memory='layers'{fewer} peaks at" in message
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
