"""Tasks on devices other than the CPU: dtypes and operators that they need of one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

import neounify
from neounify.checkpoint import resolve_device
from neounify.cli.models import default_device
from neounify.config.presets import TINY
from neounify.errors import RequestError
from neounify.model import NeoUnify
from neounify.quant.blocks import BLOCK_FORMATS
from neounify.text import byte_tokenizer
from support.other_device import OtherDevice, watching

IMAGE = PIL.Image.new("RGB", (64, 64))
SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
SAMPLED: dict[str, Any] = {"max_new_tokens": 3, "temperature": 1.0}
TASKS: dict[str, Callable[[neounify.Pipeline], object]] = {
    "generate": lambda pipe: pipe.generate("a boat", **SMALL, guidance=2, solver="ab2"),
    "think": lambda pipe: pipe.generate("a boat", **SMALL, think=True, max_think_tokens=3),
    "norms": lambda pipe: pipe.generate("a boat", **SMALL, guidance_norm="cfg_zero_star"),
    "edit": lambda pipe: pipe.edit("blue", IMAGE, **SMALL, guidance=3, image_guidance=2),
    "chat": lambda pipe: pipe.chat("hi", [IMAGE], max_new_tokens=3),
    "batch": lambda pipe: pipe.chat_batch(["hi", "a longer one"], max_new_tokens=3),
    "sample": lambda pipe: pipe.chat("hi", **SAMPLED, top_k=5, min_p=0.1, repetition_penalty=1.2),
    "nucleus": lambda pipe: pipe.chat("hi", **SAMPLED, top_p=0.9),
    "interleave": lambda pipe: list(pipe.interleave("hi", [IMAGE], **SMALL, max_new_tokens=3)),
}
COMPOSITE = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")


def walked(task: str, dtype: torch.dtype, model: NeoUnify | None = None) -> OtherDevice:
    """The device after a task on it."""
    if model is None:
        model = NeoUnify(TINY).requires_grad_(False).eval().to("meta", dtype)
    pipe = neounify.Pipeline(model, byte_tokenizer())
    with OtherDevice() as device:
        TASKS[task](pipe)
    return device


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
    return bool(keys & {device, *COMPOSITE})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("task", TASKS)
def test_no_task_needs_float64_or_an_operator_that_mps_lacks(
    task: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    device = walked(task, dtype)
    assert {"aten.mm.default", "aten.addmm.default", "aten.embedding.default"} & set(
        device.operators
    )
    dtypes = {dtype for some in device.operators.values() for dtype in some}
    assert dtypes <= {dtype, torch.float32, torch.int64, torch.int32, torch.bool}
    assert [name for name in device.operators if not has_kernel(name, "MPS")] == []


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
