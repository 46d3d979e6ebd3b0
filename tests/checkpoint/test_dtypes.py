"""The default dtype: the fastest exact one of the machine, whatever is stored."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path

import pytest
import torch

from neounify.checkpoint import (
    CheckpointFolder,
    choose_dtype,
    dtypes,
    load_checkpoint,
    load_model,
    stored_dtype,
    summarise,
    to_published,
)
from neounify.checkpoint.dtypes import multiplies
from neounify.errors import RequestError
from neounify.runtime.process import ControlGroup, memory_bytes
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint

INTEL = "Intel(R) Xeon(R) Processor"


def _folder(path: Path, und: torch.dtype, gen: torch.dtype, norm: torch.dtype) -> CheckpointFolder:
    weights = random_weights(SMALL)
    for name, value in weights.items():
        dtype = gen if "mot_gen" in name or "fm_modules" in name else und
        weights[name] = value.to(norm if "norm" in name else dtype)
    return CheckpointFolder.open(write_checkpoint(path / "model", SMALL, weights))


@pytest.mark.parametrize(
    ("und", "gen", "norm", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.float16, torch.float32, torch.float16),
        (torch.float16, torch.float32, torch.float32, torch.float16),
        (torch.float8_e4m3fn, torch.float32, torch.float32, torch.bfloat16),
        (torch.float8_e5m2, torch.float16, torch.float32, torch.bfloat16),
        (torch.float64, torch.float64, torch.float64, torch.float64),
    ],
)
def test_the_stored_dtype_is_that_of_the_layers(
    tmp_path: Path, und: torch.dtype, gen: torch.dtype, norm: torch.dtype, expected: torch.dtype
) -> None:
    checkpoint = _folder(tmp_path, und, gen, norm)
    assert stored_dtype(checkpoint) == expected
    assert choose_dtype("stored", checkpoint, "cpu").dtype == expected
    for dtype in (None, "auto"):
        assert choose_dtype(dtype, checkpoint, "cuda").dtype == expected


@pytest.mark.parametrize(
    ("dtype", "features", "fast"),
    [
        (torch.bfloat16, {"avx2": True}, False),
        (torch.bfloat16, {"avx512_f": True, "avx512_bf16": False}, False),
        (torch.bfloat16, {"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        (torch.bfloat16, {"avx512_bf16": True, "cpu_name": INTEL}, False),
        (torch.bfloat16, {"avx512_bf16": True, "amx_bf16": True, "cpu_name": INTEL}, True),
        (torch.bfloat16, {"neon": True, "bf16": True}, True),
        (torch.bfloat16, {}, False),
        (torch.float16, {"avx512_bf16": True, "amx_bf16": True}, False),
        (torch.float16, {"amx_fp16": True}, True),
    ],
)
def test_which_processors_multiply_half_precision(
    dtype: torch.dtype, features: dict[str, object], fast: bool
) -> None:
    assert multiplies(dtype, features) is fast


@pytest.mark.parametrize(
    ("stored", "fast", "memory", "expected", "reason"),
    [
        (torch.bfloat16, True, 10**12, torch.bfloat16, "as stored"),
        (torch.bfloat16, False, 10**12, torch.float32, "stored as bfloat16, in which"),
        (torch.float16, False, 10**12, torch.float32, "stored as float16, in which"),
        (torch.bfloat16, False, 10, torch.bfloat16, "as stored: .* would take 0 of 0 GB"),
        (torch.float32, False, 10, torch.float32, "as stored"),
    ],
)
def test_the_fastest_exact_dtype_of_a_cpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    stored: torch.dtype,
    fast: bool,
    memory: int,
    expected: torch.dtype,
    reason: str,
) -> None:
    monkeypatch.setattr(dtypes, "multiplies", lambda dtype: fast)
    monkeypatch.setattr(dtypes, "memory_bytes", lambda: memory)
    checkpoint = _folder(tmp_path, stored, stored, torch.float32)
    caplog.set_level(logging.INFO, "neounify")
    model = load_model(checkpoint)
    assert {p.dtype for p in model.parameters()} == {expected}
    (line,) = [r.getMessage() for r in caplog.records if r.name == "neounify"]
    name = str(expected).removeprefix("torch.")
    assert re.match(rf"loading model in {name} \({reason}", line)


def test_the_layout_of_u1_5_loads_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generation stream in float32, the rest in bfloat16, although most bytes are float32."""
    monkeypatch.setattr(dtypes, "multiplies", lambda dtype: True)
    checkpoint = _folder(tmp_path, torch.bfloat16, torch.float32, torch.bfloat16)
    loaded = load_checkpoint(checkpoint)
    assert loaded.dtype == (torch.bfloat16, "as stored")
    for name, parameter in loaded.model.named_parameters():
        stored = checkpoint.tensor(to_published(name))
        assert torch.equal(parameter, stored.bfloat16())
    streams = {row.stream: row for row in summarise(checkpoint).streams}
    layers = "layers.0.gen.out.mlp.up_proj.weight", "layers.0.und.out.mlp.up_proj.weight"
    assert [checkpoint.tensors[to_published(name)].format for name in layers] == ["F32", "BF16"]
    assert streams["gen"].bytes > 1.9 * streams["und"].bytes


def test_a_dtype_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    checkpoint = _folder(tmp_path, torch.bfloat16, torch.bfloat16, torch.bfloat16)
    assert str(choose_dtype("float16", checkpoint, "cpu")) == "float16 (as asked for)"
    with pytest.raises(RequestError, match=r"known are auto, stored, float32"):
        choose_dtype("float12", checkpoint, "cpu")


def test_a_choice_keeps_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = _folder(tmp_path, torch.float32, torch.float32, torch.float32)
    choice = choose_dtype(None, checkpoint, "cpu")
    assert choose_dtype(pickle.loads(pickle.dumps(choice)), checkpoint, "cuda") == choice
    caplog.set_level(logging.INFO, "neounify")
    assert load_checkpoint(checkpoint, dtype=choice).dtype == choice
    assert "loading model in float32 (as stored)" in caplog.text


def test_memory_is_no_more_than_the_control_group_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups: list[ControlGroup] = []
    monkeypatch.setattr("neounify.runtime.process.control_groups", lambda: groups)
    whole = memory_bytes()
    assert whole > 2**28
    groups.append(ControlGroup(limit=2**62, left=2**62))
    assert memory_bytes() == whole
    groups.append(ControlGroup(limit=2**28, left=0))
    assert memory_bytes() == 2**28
