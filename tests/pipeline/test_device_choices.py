"""What a device cannot run is refused in one sentence before weights are read, or falls back.

No device is needed: `neounify.runtime.devices.ask` answers for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.attention import BACKENDS, select
from neounify.checkpoint import CheckpointFolder
from neounify.checkpoint.dtypes import check_dtype
from neounify.checkpoint.load import load_checkpoint, stored_weights
from neounify.checkpoint.quantise_files import quantise_checkpoint
from neounify.engine.graphs import cuda_recorder, recorder_for, rerun_recorder
from neounify.errors import ConfigError, NeounifyError, RequestError
from neounify.model.build import check_compile
from neounify.pipeline import load
from neounify.quant import backends
from neounify.quant.backends import check_held, choose_backend
from neounify.quant.blocks import BLOCK_FORMATS, BlockRows
from neounify.quant.formats import FourBits, Fp8Rows, Int8Rows, WeightFormat
from neounify.quant.stored import StoredCodes
from neounify.runtime import devices
from neounify.runtime.devices import Abilities
from neounify.serve.build import ServeConfig, build_service
from neounify.serve.engines import EngineConfig
from neounify.text import byte_tokenizer
from neounify.train.loss import Metrics
from neounify.train.recipe import read_recipe
from neounify.train.setup import check_stages
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.device_abilities import pretending
from support.rank_recipes import write_recipe

pytestmark = pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning")

NO_COMPILER = "a C++ compiler (g++)"
DEVICES: dict[str, Abilities] = {
    "cpu": Abilities(type="cpu"),
    "cpu without compiler": Abilities(type="cpu", compiler=NO_COMPILER),
    "pascal": Abilities(type="cuda", capability=(6, 1), compiler="a GPU of 7.0 or more"),
    "volta": Abilities(type="cuda", capability=(7, 0)),
    "turing": Abilities(type="cuda", capability=(7, 5)),
    "ampere": Abilities(type="cuda", capability=(8, 0)),
    "ada": Abilities(type="cuda", capability=(8, 9)),
    "hopper": Abilities(type="cuda", capability=(9, 0)),
    "rocm": Abilities(type="cuda", capability=(9, 4), rocm=True),
    "mps": Abilities(type="mps", float64=False, compiler="kernels for mps devices"),
    "xpu": Abilities(type="xpu"),
    "arc": Abilities(type="xpu", float64=False, compiler="the package triton"),
}
Use = Callable[[str], torch.device]


@pytest.fixture
def use() -> Iterator[Use]:
    """Makes a device of the list the one that is here, until another takes its place."""
    with ExitStack() as stack:

        def choose(name: str) -> torch.device:
            stack.close()
            stack.enter_context(pretending(DEVICES[name]))
            return torch.device(DEVICES[name].type)

        yield choose


# --- what is refused ---


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("attention", ["auto", *BACKENDS])
def test_attention(use: Use, name: str, attention: str) -> None:
    device = use(name)
    lacking = ("pascal", "volta", "turing", "rocm", "mps", "xpu", "arc")
    if attention == "varlen" and name in lacking:
        with pytest.raises(ConfigError, match=r"'varlen' has no kernel for .*; use 'sdpa'"):
            select(device, torch.bfloat16, 64, attention)
        return
    assert select(device, torch.bfloat16, 64, attention).device == device
    if attention == "varlen" and device.type == "cuda":
        with pytest.raises(ConfigError, match=r"needs bfloat16 or float16, not torch\.float32"):
            select(device, torch.float32, 64, attention)


@pytest.mark.parametrize("name", DEVICES)
def test_graphs_are_recorded_on_cuda_and_rerun_elsewhere(use: Use, name: str) -> None:
    device = use(name)
    expected = cuda_recorder if device.type == "cuda" else rerun_recorder
    assert recorder_for(device) is expected


@pytest.mark.parametrize("name", DEVICES)
def test_compile(use: Use, name: str) -> None:
    device = use(name)
    if DEVICES[name].compiler:
        with pytest.raises(ConfigError, match=r"compile on \w+ needs .*, which is not here"):
            check_compile(device)
    else:
        check_compile(device)


@pytest.mark.parametrize("name", DEVICES)
def test_dtypes(use: Use, name: str) -> None:
    device = use(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_dtype(dtype, device)
    if name in ("mps", "arc"):
        with pytest.raises(RequestError, match=f"float64: {device.type} does not compute in it"):
            check_dtype(torch.float64, device)
    else:
        check_dtype(torch.float64, device)


# --- backends of codes ---

BLOCKS = BlockRows(next(iter(BLOCK_FORMATS.values())))
FORMATS: dict[str, WeightFormat] = {
    "int8": Int8Rows(64),
    "w4": FourBits(64),
    "fp8": Fp8Rows(),
    "gguf": BLOCKS,
}
PACKED = {"int8": "_weight_int8pack_mm"}
INT8 = {"int8": "_int_mm", "w4": "_int_mm"}
INT8_FP8 = {**INT8, "fp8": "scaled_mm"}
CHOSEN: dict[str, dict[str, dict[str, str] | None]] = {
    "cpu": {"auto": PACKED, "torch": {**PACKED, "fp8": "scaled_mm"}, "w8a8": INT8},
    "pascal": {"auto": {}, "torch": None, "w8a8": None},
    "volta": {"auto": {}, "torch": None, "w8a8": None},
    "turing": {"auto": INT8, "torch": INT8, "w8a8": INT8},
    "ampere": {"auto": INT8, "torch": INT8, "w8a8": INT8},
    "ada": {"auto": INT8_FP8, "torch": INT8_FP8, "w8a8": INT8},
    "hopper": {"auto": INT8_FP8, "torch": INT8_FP8, "w8a8": INT8},
    "rocm": {"auto": INT8, "torch": INT8, "w8a8": INT8},
    "mps": {"auto": {}, "torch": None, "w8a8": None},
    "xpu": {"auto": {}, "torch": None, "w8a8": None},
    "arc": {"auto": {}, "torch": None, "w8a8": None},
}
"""Operators by device, backend and format, `reference` for those left out; None: refused."""


@pytest.mark.parametrize(("name", "format"), list(itertools.product(CHOSEN, FORMATS)))
def test_backends(use: Use, name: str, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_kitchen", lambda: False)
    device = use(name)
    for backend, operators in {**CHOSEN[name], "reference": {}}.items():
        if operators is None:
            with pytest.raises(RequestError, match=f"'{backend}' .* no products on {device.type}"):
                choose_backend(backend, FORMATS[format], (256, 256), device)
        else:
            chosen = choose_backend(backend, FORMATS[format], (256, 256), device)
            assert chosen.operator == operators.get(format, "reference")


@pytest.mark.parametrize(
    ("shape", "operators"),
    [((256, 72), INT8), ((72, 256), INT8), ((256, 100), {}), ((100, 256), {})],
    ids=str,
)
def test_shapes_that_gpus_do_not_multiply(
    use: Use, shape: tuple[int, int], operators: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "has_kitchen", lambda: False)
    device = use("hopper")
    for backend, format in itertools.product(("auto", "torch", "w8a8"), FORMATS):
        chosen = choose_backend(backend, FORMATS[format], shape, device)
        assert chosen.operator == operators.get(format, "reference")
    device = use("cpu")
    assert choose_backend("w8a8", FORMATS["int8"], shape, device).operator == "_int_mm"
    assert choose_backend("torch", FORMATS["fp8"], shape, device).operator == "scaled_mm"


@pytest.mark.parametrize("name", CHOSEN)
def test_comfy_kitchen(use: Use, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_kitchen", lambda: True)
    device = use(name)
    if device.type == "cuda":
        for backend in ("auto", "comfy-kitchen"):
            assert choose_backend(backend, Int8Rows(64), (256, 256), device).name == "comfy-kitchen"
        assert choose_backend("comfy-kitchen", Fp8Rows(), (256, 256), device).name == "reference"
    else:
        with pytest.raises(RequestError, match="has no products on"):
            choose_backend("comfy-kitchen", Int8Rows(64), (256, 256), device)


@pytest.mark.parametrize(("name", "format"), list(itertools.product(CHOSEN, FORMATS)))
def test_formats_that_cannot_be_held(use: Use, name: str, format: str) -> None:
    device = use(name)
    if name == "mps" and format in ("fp8", "w4"):
        with pytest.raises(RequestError, match="cannot be held on mps, which has no float8"):
            check_held(FORMATS[format], device)
    else:
        check_held(FORMATS[format], device)


# --- before weights are read ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = SMALL.replace(vocab_size=512, num_layers=3)
    path = write_checkpoint(tmp_path / "model", config, random_weights(config))
    byte_tokenizer().save(path)
    return path


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that are not here are taken as they are, and reading a weight fails the test."""
    for module in ("checkpoint.load", "pipeline.loading", "serve.memory"):
        monkeypatch.setattr(f"neounify.{module}.resolve_device", torch.device)
    monkeypatch.setattr("neounify.serve.memory.free_memory", lambda device: None)
    monkeypatch.setattr("neounify.checkpoint.load.free_memory", lambda device: None)

    def fill(*_: Any, **__: Any) -> None:
        pytest.fail("weights were read")

    monkeypatch.setattr("neounify.checkpoint.load._fill", fill)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mps", {"attention": "varlen"}, "'varlen' has no kernel for mps"),
        ("xpu", {"attention": "varlen"}, "'varlen' has no kernel for xpu"),
        ("turing", {"attention": "varlen"}, "no kernel for cuda of compute capability 7.5"),
        ("rocm", {"attention": "varlen"}, "no kernel for ROCm"),
        ("hopper", {"attention": "varlen", "dtype": "float32"}, "bfloat16 or float16"),
        ("mps", {"compile": True}, "compile on mps needs kernels for mps devices"),
        ("arc", {"compile": True}, "compile on xpu needs the package triton"),
        ("cpu without compiler", {"compile": True}, "compile on cpu needs a C.. compiler"),
        ("mps", {"dtype": "float64"}, "mps does not compute in it; take float32"),
        ("arc", {"dtype": "float64"}, "xpu does not compute in it; take float32"),
        ("mps", {"memory": "layers"}, "memory='layers' works on cpu and cuda, not on mps"),
        ("mps", {"memory": "layers", "plan": "ignore"}, "works on cpu and cuda"),
        ("mps", {"quantise": "fp8"}, "cannot be held on mps"),
        ("mps", {"quantise": "w4"}, "cannot be held on mps"),
        ("mps", {"quantise": "w4-mixed"}, "cannot be held on mps"),
        ("mps", {"quantise": "int8", "backend": "w8a8"}, "no products on mps"),
        ("xpu", {"quantise": "int8", "backend": "torch"}, "no products on xpu"),
        ("volta", {"quantise": "int8", "backend": "w8a8"}, "cuda of compute capability 7.0"),
    ],
)
def test_a_load_is_refused(
    use: Use, folder: Path, name: str, settings: dict[str, Any], message: str
) -> None:
    device = use(name)
    with pytest.raises(NeounifyError, match=message) as raised:
        load(folder, device=device.type, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("stored", ["fp8", "w4"])
def test_codes_in_float8_are_refused_on_mps(
    use: Use, folder: Path, tmp_path: Path, stored: str
) -> None:
    quantise_checkpoint(CheckpointFolder.open(folder), tmp_path / "codes", stored)
    device = use("mps")
    with pytest.raises(RequestError, match="backend='decoded' for stored ones"):
        load_checkpoint(tmp_path / "codes", device=device)


def test_codes_that_a_device_cannot_hold_are_decoded_on_the_host(
    use: Use, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantise_checkpoint(CheckpointFolder.open(folder), tmp_path / "codes", "fp8")
    checkpoint = CheckpointFolder.open(tmp_path / "codes")
    name = "layers.0.und.qkv.q_proj.weight"
    source = stored_weights(checkpoint, [name])[name]
    assert source.codes is not None
    decoded: list[str] = []
    original = StoredCodes.decode

    def decode(self: StoredCodes, codes: torch.Tensor, start: int) -> torch.Tensor:
        decoded.append(codes.device.type)
        return original(self, codes, start)

    monkeypatch.setattr(StoredCodes, "decode", decode)
    monkeypatch.setattr("neounify.checkpoint.residency.all_finite", lambda tensor: True)
    for here in ("mps", "hopper"):
        use(here)
        source.read(torch.float32, torch.device("meta"))
    assert decoded == ["cpu", "meta"]


@pytest.mark.usefixtures("no_weights")
def test_a_server_is_refused(use: Use, folder: Path) -> None:
    use("mps")
    engines = EngineConfig(limits={"attention": "varlen"})
    with pytest.raises(ConfigError, match="'varlen' has no kernel for mps"):
        build_service(ServeConfig(folder=folder, device="mps", engines=engines))


@pytest.mark.parametrize("setting", ['attention = "varlen"', "compile = true"])
def test_a_stage_is_refused(use: Use, tmp_path: Path, setting: str) -> None:
    path = write_recipe(tmp_path / "r.toml", steps=1)
    path.write_text(path.read_text() + setting + "\n")
    recipe = read_recipe(path)
    with pytest.raises(ConfigError, match=r"stage a: (attention 'varlen'|compile on cuda)"):
        check_stages(recipe, SMALL, use("pascal"))
    check_stages(recipe, SMALL, use("cpu"))


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_trains(use: Use, tmp_path: Path, name: str) -> None:
    recipe = read_recipe(write_recipe(tmp_path / "r.toml", steps=1))
    device = use(name)
    check_stages(recipe, SMALL, device)
    exact = DEVICES[name].float64
    assert Metrics("meta").text.dtype == (torch.float64 if exact else torch.float32)


def test_this_machine() -> None:
    here = devices.ask(torch.device("cpu"))
    assert (here.type, here.capability, here.rocm, here.float64) == ("cpu", (0, 0), False, True)
    assert str(here) == "cpu"
    assert here.by_layers
    assert here.float8
