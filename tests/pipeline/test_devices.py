"""Tasks on devices other than the CPU: dtypes and operators that they need of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch.optim import adam

import neounify
from neounify.checkpoint import resolve_device
from neounify.cli.models import default_device
from neounify.config import ModelConfig, VideoConfig
from neounify.config.presets import TINY
from neounify.data.encode import Encoder
from neounify.data.loader import make_pack
from neounify.data.sample import Sample, SampleClip, SampleImage, SampleText, Turn
from neounify.errors import RequestError
from neounify.model import NeoUnify, stream
from neounify.model.build import computing_in
from neounify.quant import backends
from neounify.quant.blocks import BLOCK_FORMATS
from neounify.quant.rotation import hadamard
from neounify.runtime.devices import Abilities
from neounify.runtime.plan import ExecutionPlan
from neounify.text import Tokenizer, byte_tokenizer
from neounify.train.loss import Counts, LossConfig, Metrics, loss_of
from neounify.train.optim import Ema, OptimizerConfig, OptimizerName, OptimizerSet, take_step
from neounify.video.clip import Video
from support import pixelumm
from support.codes import with_codes
from support.device_abilities import pretending
from support.models import SPARSE_MLP
from support.other_device import OtherDevice, watching

IMAGE = PIL.Image.new("RGB", (64, 64))
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
LONGER: dict[str, Any] = SMALL | {"steps": 4, "guidance": 2}
SAMPLED: dict[str, Any] = {"max_new_tokens": 3, "temperature": 1.0}
TASKS: dict[str, Callable[[neounify.Pipeline], object]] = {
    "generate": lambda pipe: pipe.generate("a boat", **SMALL, guidance=2, solver="ab2"),
    "dpm2m": lambda pipe: pipe.generate("a boat", **LONGER, solver="dpm2m"),
    "unipc": lambda pipe: pipe.generate("a boat", **LONGER, solver="unipc"),
    "cache": lambda pipe: pipe.generate("a boat", **LONGER, step_cache=0.1, step_cache_warm=1),
    "reuse": lambda pipe: pipe.generate("a boat", **LONGER, guidance_reuse=2, guidance_stop=0.01),
    "think": lambda pipe: pipe.generate("a boat", **SMALL, think=True, max_think_tokens=3),
    "norms": lambda pipe: pipe.generate("a boat", **SMALL, guidance_norm="cfg_zero_star"),
    "edit": lambda pipe: pipe.edit("blue", IMAGE, **SMALL, guidance=3, image_guidance=2),
    "chat": lambda pipe: pipe.chat("hi", [IMAGE], max_new_tokens=3),
    "batch": lambda pipe: pipe.chat_batch(["hi", "a longer one"], max_new_tokens=3),
    "sample": lambda pipe: pipe.chat("hi", **SAMPLED, top_k=5, min_p=0.1, repetition_penalty=1.2),
    "nucleus": lambda pipe: pipe.chat("hi", **SAMPLED, top_p=0.9),
    "interleave": lambda pipe: list(pipe.interleave("hi", [IMAGE], **SMALL, max_new_tokens=3)),
}
CLIP = Video(torch.zeros(8, 64, 64, 3, dtype=torch.uint8), fps=Fraction(8))
CLIPS: dict[str, Callable[[neounify.Pipeline], object]] = {
    "generate": lambda pipe: pipe.generate("a star", **SMALL, frames=8, fps=8, guidance=2),
    "continue": lambda pipe: pipe.generate("a star", condition=CLIP, **SMALL, frames=4, fps=8),
    "chat": lambda pipe: pipe.chat("what moves?", video=CLIP, tubes=True, max_new_tokens=3),
}
ABLE = (*TINY.capabilities, "generate_video", "continue_video")
FRAMES = VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True)
UNIPC: dict[str, Any] = {"width": 64, "height": 48, "steps": 4, "frames": 8, "fps": 12}
KINDS: dict[str, tuple[ModelConfig, dict[str, Callable[[neounify.Pipeline], object]]]] = {
    "sparse": (
        TINY.replace(und_mlp=SPARSE_MLP, gen_mlp=SPARSE_MLP),
        {name: TASKS[name] for name in ("generate", "edit", "chat", "interleave")},
    ),
    "pixel": (
        TINY.replace(image_head="pixel"),
        {name: TASKS[name] for name in ("generate", "edit")},
    ),
    "pixelumm": (
        pixelumm.SMALL,
        {
            "generate": lambda pipe: pipe.generate("a boat", **LONGER),
            "chat": TASKS["chat"],
            "clip": lambda pipe: pipe.generate("a boat", **UNIPC),
            "clip by dpm2m": lambda pipe: pipe.generate("a boat", **UNIPC, solver="dpm2m"),
            "tubes": lambda pipe: pipe.chat("why?", video=CLIP, tubes=True, max_new_tokens=3),
        },
    ),
    "frame by frame": (
        TINY.replace(video=FRAMES, capabilities=ABLE),
        {
            "generate": lambda pipe: pipe.generate("a", **SMALL, frames=3, fps=8, guidance=2),
            "continue": lambda pipe: pipe.generate("a", condition=CLIP, **SMALL, frames=2, fps=8),
        },
    ),
}
"""Models of other parts than those of the toy, and what is walked of each."""
PIXELS = np.zeros((64, 64, 3), np.uint8)
ASK = Turn("user", (SampleText("a star"),))
T2I = Sample("t2i", (ASK, Turn("assistant", (SampleImage(PIXELS, "target"),))))
VQA = Sample(
    "vqa",
    (
        Turn("user", (SampleImage(PIXELS, "input"), SampleText("What?"))),
        Turn("assistant", (SampleText("a star", True),)),
    ),
)
MOVING = SampleClip(np.zeros((8, 64, 64, 3), np.uint8), "target", fps=8)
T2V = Sample("t2v", (ASK, Turn("assistant", (MOVING,))))
TUBES = TINY.replace(video=VideoConfig(tube_frames=4, und=True), capabilities=ABLE)
TRAINED: dict[str, tuple[ModelConfig, Sequence[Sample]]] = {
    "images": (TINY, (T2I, VQA)),
    "clips": (TUBES, (T2I, VQA, T2V)),
    "sparse": (KINDS["sparse"][0], (T2I, VQA)),
    "pixel": (KINDS["pixel"][0], (T2I, VQA)),
    "linear": (pixelumm.CONFIG.replace(template=TINY.template), (T2I, VQA, T2V)),
    "frame by frame": (KINDS["frame by frame"][0], (T2V,)),
}
"""Models and the samples of a training step."""
randn = torch.randn
CODES = ("generate", "edit", "chat", "batch")
"""Tasks of a model of codes."""
WITH_FLOAT8 = (Abilities(type="cuda", capability=(9, 0)), Abilities(type="xpu", float64=False))
COMPOSITE = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")


def meta_model(dtype: torch.dtype, config: ModelConfig = TINY) -> NeoUnify:
    return NeoUnify(config).requires_grad_(False).eval().to("meta", dtype)


def walked(
    task: Callable[[neounify.Pipeline], object],
    model: NeoUnify,
    monkeypatch: pytest.MonkeyPatch,
    tokenizer: Tokenizer | None = None,
) -> OtherDevice:
    """The device after a task on it."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    pipe = neounify.Pipeline(model, tokenizer or byte_tokenizer())
    with OtherDevice() as device:
        task(pipe)
    return device


def check_mps(device: OtherDevice, dtypes: set[torch.dtype]) -> None:
    """mps has all operators and dtypes that were used: these, and those of numbers and masks."""
    assert {"aten.mm.default", "aten.addmm.default", "aten.embedding.default"} & set(
        device.operators
    )
    used = {dtype for some in device.operators.values() for dtype in some}
    assert used <= {*dtypes, torch.float32, torch.int64, torch.int32, torch.bool}
    assert [name for name in device.operators if not has_kernel(name, "MPS")] == []


@cache
def native_functions() -> dict[str, dict[str, Any]]:
    """Operator → its entry in torch's list of kernels."""
    yaml = pytest.importorskip("yaml", reason="needs the package pyyaml")
    spec = find_spec("torchgen")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "packaged" / "ATen" / "native"
    entries = yaml.safe_load((folder / "native_functions.yaml").read_text("utf-8"))
    return {entry["func"].partition("(")[0]: entry for entry in entries}


def has_kernel(operator: str, device: str) -> bool:
    """Whether torch lists a kernel of a type of device, or one for all types."""
    functions = native_functions()
    entry = functions[operator.removeprefix("aten.").removesuffix(".default")]
    entry = functions[entry["structured_delegate"]] if "structured_delegate" in entry else entry
    kernels = entry.get("dispatch", {"CompositeImplicitAutograd": ""})
    keys = {key.strip() for group in kernels for key in group.split(",")}
    if "ufunc_inner_loop" in entry:  # from which kernels of these two are generated
        keys |= {"CPU", "CUDA"}
    return bool(keys & {device, *COMPOSITE})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("task", TASKS)
def test_no_task_needs_float64_or_an_operator_that_mps_lacks(
    task: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_mps(walked(TASKS[task], meta_model(dtype), monkeypatch), {dtype})


@pytest.mark.parametrize("task", CLIPS)
def test_no_clip_needs_more(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = meta_model(torch.bfloat16, TUBES)
    check_mps(walked(CLIPS[task], model, monkeypatch), {torch.bfloat16})


def even_slices(rows: torch.Tensor, ends: torch.Tensor) -> Sequence[torch.Tensor]:
    """Slices of experts where no value says how many rows each has."""
    ends.tolist()
    return rows.tensor_split(len(ends))


@pytest.mark.parametrize(
    ("kind", "task"), [(kind, task) for kind, (_, tasks) in KINDS.items() for task in tasks]
)
def test_no_kind_of_model_needs_more(
    kind: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_slices", even_slices)
    config, tasks = KINDS[kind]
    tokenizer = pixelumm.vision_tokenizer(tmp_path) if kind == "pixelumm" else None
    model = meta_model(torch.bfloat16, config)
    check_mps(walked(tasks[task], model, monkeypatch, tokenizer), {torch.bfloat16})


@pytest.mark.parametrize("task", CODES)
def test_no_model_of_codes_needs_more_than_int8(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending(Abilities(type="mps", float64=False)):
        model = with_codes(meta_model(torch.bfloat16), "int8-all", torch.device("mps"))
    hadamard.cache_clear()
    device = walked(TASKS[task], model, monkeypatch)
    check_mps(device, {torch.bfloat16, torch.int8})
    assert any(torch.int8 in dtypes for dtypes in device.operators.values())


@pytest.mark.parametrize("task", ["generate", "chat"])
@pytest.mark.parametrize("preset", ["fp8", "w4"])
@pytest.mark.parametrize("here", WITH_FLOAT8, ids=lambda here: here.type)
def test_no_model_of_codes_with_float8_needs_float64(
    here: Abilities, preset: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "has_kitchen", lambda: False)
    with pretending(here):
        model = with_codes(meta_model(torch.bfloat16), preset, torch.device(here.type))
    hadamard.cache_clear()
    device = walked(TASKS[task], model, monkeypatch)
    used = {dtype for some in device.operators.values() for dtype in some}
    assert torch.float8_e4m3fn in used
    assert torch.float64 not in used
    if here.type == "cuda":  # torch's list has few of the kernels of xpu
        assert [name for name in device.operators if not has_kernel(name, "CUDA")] == []


def trained(model: NeoUnify, samples: Sequence[Sample], optimizer: OptimizerConfig) -> OtherDevice:
    """The device after a training step on it, with its mean of weights and its report."""
    encoder = Encoder(config=model.config, tokenizer=byte_tokenizer())
    pack = make_pack([encoder(sample, np.random.default_rng(0)) for sample in samples])
    counts, draws, plan = Counts.of([pack]), HostGenerator(), ExecutionPlan()
    with OtherDevice() as device:
        metrics, log = Metrics("meta"), Metrics("meta")
        with computing_in(model, torch.bfloat16):
            loss = loss_of(model, pack, LossConfig(), counts, draws, metrics, plan)
        loss.backward()
        parameters = dict(model.named_parameters())
        _, _, taken = take_step([OptimizerSet(parameters, optimizer)])
        assert taken
        Ema(model, 0.99).update()
        log.merge(metrics)
        assert log.report() == {}  # what comes from the device is zero here
    return device


class HostGenerator(torch.Generator):
    """Of the meta device, which has none: draws come from the host's."""

    device = torch.device("meta")


def drawn_on_host(*size: Any, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """`torch.randn` for such a generator."""
    return randn(*size, generator=generator).to(device)


@pytest.mark.parametrize(
    ("kind", "optimizer"), [*((kind, "adamw") for kind in TRAINED), ("images", "muon")]
)
def test_no_training_step_needs_float64(
    kind: str, optimizer: OptimizerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, samples = TRAINED[kind]
    model = meta_model(torch.float32, config).requires_grad_(True).train()
    monkeypatch.setattr(stream, "_slices", even_slices)
    monkeypatch.setattr(torch, "randn", drawn_on_host)
    # mps has the fused step, by this very check; meta does not pass it.
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda parameter: None)
    with pretending(Abilities(type="mps", float64=False)):
        device = trained(model, samples, OptimizerConfig(name=optimizer))
    check_mps(device, {torch.bfloat16, torch.uint8})
    assert "aten.index_add_.default" in device.operators


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_are_decoded_on_mps(name: str) -> None:
    format = BLOCK_FORMATS[name]
    with watching() as device:
        format.decode(torch.empty(4, format.nbytes, dtype=torch.uint8, device="meta"))
    dtypes = {dtype for some in device.operators.values() for dtype in some}
    assert dtypes <= {torch.float32, torch.float16, torch.int8, torch.uint8}
    assert [name for name in device.operators if not has_kernel(name, "MPS")] == []
    assert device.waits == []


def test_what_a_device_lacks_is_seen() -> None:
    with OtherDevice() as device:
        torch.ones(3, device="meta", dtype=torch.float64).cumsum(0)
    assert device.operators["aten.cumsum.default"] == {torch.float64}
    assert not has_kernel("aten.geqrf.default", "MPS")
    assert has_kernel("aten.geqrf.default", "CUDA")


def test_the_default_device_is_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(
            torch.accelerator,
            "current_accelerator",
            lambda check_available, kind=kind: torch.device(kind),
        )
        assert default_device() == kind
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert default_device() == "cpu"


@pytest.mark.parametrize("name", ["mps", "xpu", "cuda:7", "tpu", "meta"])
def test_devices_that_are_not_here(name: str) -> None:
    with pytest.raises(RequestError, match=f"device '{name}' cannot be used here"):
        resolve_device(name)
