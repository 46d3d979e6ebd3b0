"""Experts of codes as stacks: grouped products of slices against each expert by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from neounify.checkpoint import CheckpointFolder, load_checkpoint, save_model
from neounify.checkpoint.gguf_save import save_gguf
from neounify.checkpoint.quantise_files import quantise_checkpoint
from neounify.cli.inspect import _quantised
from neounify.config import MlpConfig
from neounify.engine.graphs import recordable
from neounify.model.stream import PROJECTIONS, Experts
from neounify.quant import experts as experts_module
from neounify.quant.backends import choose_backend
from neounify.quant.blocks import BLOCK_FORMATS, BlockRows
from neounify.quant.experts import QuantExperts, stack_codes
from neounify.quant.linear import QuantLinear
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.gguf_files import random_blocks
from support.other_device import watching

EXPERTS = 6
MLP = MlpConfig(
    width=64, num_experts=EXPERTS, experts_per_token=2, expert_width=32, sparse=(True,) * 3
)
SPARSE = SMALL.replace(num_layers=3, und_mlp=replace(MLP, sparse=(True, True, False)), gen_mlp=MLP)
PUBLISHED = ("int8", "int8-all", "fp8", "w4-mixed", "w4")
GGUF = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
MIDDLE = "layers.1.gen.out.mlp"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts") / "plain"
    return write_checkpoint(folder, SPARSE, random_weights(SPARSE))


@pytest.fixture
def grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are grouped as on a GPU; torch's grouped product runs on a CPU too."""
    monkeypatch.setattr(experts_module, "groups_on", lambda device: True)


def coded_folder(folder: Path, plain: Path, preset: str) -> Path:
    write: Any = save_gguf if preset in GGUF else quantise_checkpoint
    return write(CheckpointFolder.open(plain), folder, preset)


def experts_of(model: nn.Module) -> Experts:
    experts = model.get_submodule(f"{MIDDLE}.experts")
    assert isinstance(experts, Experts)
    return experts


def routed(counts: list[int], width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows in the order of the experts, so many for each, and where their slices end."""
    rows = torch.randn(sum(counts), width, generator=torch.Generator().manual_seed(7))
    return rows.to(dtype), torch.tensor(counts).cumsum(0).int()


def compare(experts: Experts, dtype: torch.dtype, bound: float) -> None:
    """Stacked against each expert on its own decoded weights, in float64."""
    stacked = QuantExperts(experts)
    for counts in ([3, 0, 20, 1, 0, 9], [0, 2, 0, 0, 1, 0], [1, 1, 1, 1, 1, 0]):
        rows, ends = routed(counts, SPARSE.hidden_size, dtype)
        parts = []
        for expert, x in zip(experts, rows.double().split(counts), strict=True):
            layers: list[Any] = [expert.get_submodule(name) for name in PROJECTIONS]
            gate, up, down = (layer.decoded().double() for layer in layers)
            parts.append((nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T)
        expected, y = torch.cat(parts), stacked(rows, ends)
        assert y.dtype == dtype
        assert y.shape == expected.shape
        largest = float(expected.abs().max())
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=bound * largest)


@pytest.mark.parametrize("preset", [*PUBLISHED, *GGUF])
def test_every_format_computes_as_each_expert_by_itself(
    tmp_path: Path, plain: Path, preset: str
) -> None:
    folder = coded_folder(tmp_path / "coded", plain, preset)
    model = load_checkpoint(folder, dtype="float32", backend="reference").model
    compare(experts_of(model), torch.float32, 2e-6)
    compare(experts_of(model), torch.bfloat16, 2e-2)


@pytest.mark.parametrize("name", [n for n, f in BLOCK_FORMATS.items() if f.elements == 256])
def test_blocks_of_256_channels(name: str) -> None:
    """Against the values of the `gguf` package."""
    width, columns, counts = 16, 256, [2, 0, 7]
    stored, values = random_blocks((len(counts), width, columns), name)
    codes = torch.frombuffer(bytearray(stored.data), dtype=torch.uint8).view(3, width, -1)
    format, experts = BlockRows(BLOCK_FORMATS[name]), Experts(nn.Module() for _ in counts)
    for expert, weight in zip(experts, codes, strict=True):
        for projection in PROJECTIONS:
            chosen = choose_backend("reference", format, (width, columns), torch.device("cpu"))
            layer = QuantLinear(format, (width, columns), None, chosen)
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
            expert.register_module(projection, layer)
    rows, ends = routed(counts, columns, torch.float32)
    y = QuantExperts(experts).product("gate_proj", rows, ends)
    weights = torch.from_numpy(values)
    parts = [x @ weight.T for x, weight in zip(rows.split(counts), weights, strict=True)]
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


class Sizes(TorchDispatchMode):
    """The largest result of floating point that an operator made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype in (torch.float32, torch.float64):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("preset", ["int8", "fp8", "w4", "q5_1"])
def test_no_more_than_a_slice_of_the_stack_is_decoded(
    tmp_path: Path, plain: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = coded_folder(tmp_path / "coded", plain, preset)
    experts = experts_of(load_checkpoint(folder, dtype="float32", backend="reference").model)
    whole = QuantExperts(experts)
    slices = 8 * EXPERTS * SPARSE.hidden_size  # eight rows of each expert
    assert slices == EXPERTS * SPARSE.hidden_size * MLP.expert_width / 4
    for counts in ([5, 0, 3, 1, 0, 2], [0, 2, 0, 0, 1, 0]):
        rows, ends = routed(counts, SPARSE.hidden_size, torch.float32)
        expected = whole(rows, ends)
        with monkeypatch.context() as patch:
            patch.setattr(experts_module, "DEVICE_SLICE_ELEMENTS", slices)
            with Sizes() as sizes:
                y = whole(rows, ends)
        assert 0 < sizes.largest <= slices
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.usefixtures("grouping")
def test_experts_are_stacked_on_load_and_saved_one_by_one(tmp_path: Path, plain: Path) -> None:
    folder = coded_folder(tmp_path / "coded", plain, "w4")
    for source, options in ((folder, {}), (plain, {"quantise": "w4"})):
        model = load_checkpoint(source, dtype="float32", **options).model  # type: ignore[arg-type]
        experts = experts_of(model)
        assert isinstance(experts, QuantExperts)
        codes = experts._stacks["gate_proj"]
        assert codes["weight"].shape == (EXPERTS, MLP.expert_width, SPARSE.hidden_size // 2)
        assert codes["weight_s_channel"].shape == (EXPERTS, MLP.expert_width)
        name = f"{MIDDLE}.experts.3.gate_proj.weight"
        assert model.get_parameter(name).data_ptr() == codes["weight"][3].data_ptr()
        apart = load_checkpoint(source, dtype="float32", backend="w8a8", **options).model  # type: ignore[arg-type]
        files = [
            save_model(network, tmp_path / f"{number}{len(options)}") / "model.safetensors"
            for number, network in enumerate((model, apart))
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.usefixtures("grouping")
def test_moves_keep_the_stack(tmp_path: Path, plain: Path) -> None:
    model = load_checkpoint(coded_folder(tmp_path / "coded", plain, "int8")).model
    experts = experts_of(model)
    assert isinstance(experts, QuantExperts)
    rows, ends = routed([3, 0, 2, 4, 0, 1], SPARSE.hidden_size, torch.bfloat16)
    expected = experts(rows, ends)
    model.to(torch.float64).to(torch.bfloat16)
    stack = experts._stacks["up_proj"]["weight_scale"]
    assert stack.dtype == torch.float32
    layer: Any = experts[5].get_submodule("up_proj")
    assert layer.tensors()["weight_scale"].data_ptr() == stack[5].data_ptr()
    assert torch.equal(experts(rows, ends), expected)


@pytest.mark.usefixtures("grouping")
def test_what_is_not_stacked(tmp_path: Path, plain: Path) -> None:
    folder = coded_folder(tmp_path / "coded", plain, "int8")
    model = load_checkpoint(folder, dtype="float32", backend="w8a8").model
    assert type(experts_of(model)) is Experts
    assert not recordable(model)
    layer: Any = experts_of(model)[2].get_submodule("up_proj")
    layer.add_adapters([(torch.zeros(1, 32), torch.zeros(32, 1), 1.0)], torch.device("cpu"))
    stack_codes(model, "auto")
    assert type(experts_of(model)) is Experts
    other = model.get_submodule("layers.1.und.out.mlp.experts")
    assert isinstance(other, QuantExperts)
    assert recordable(load_checkpoint(folder, dtype="float32").model)


def test_widths_that_grouped_products_do_not_take_run_one_by_one(tmp_path: Path) -> None:
    """Rows of 36 channels are no multiple of 16 bytes in bfloat16."""
    config = SPARSE.replace(und_mlp=replace(SPARSE.und_mlp, num_experts=2, expert_width=36))
    folder = write_checkpoint(tmp_path / "plain", config, random_weights(config))
    model = load_checkpoint(folder, dtype="bfloat16", quantise="int8").model
    experts = model.get_submodule("layers.1.und.out.mlp.experts")
    assert isinstance(experts, Experts)
    rows, ends = routed([3, 2], config.hidden_size, torch.bfloat16)
    expected, stacked = experts(rows, ends), QuantExperts(experts)
    assert not stacked.grouped(torch.bfloat16)
    assert torch.equal(stacked(rows, ends), expected)


@pytest.mark.usefixtures("grouping")
def test_inspect_says_how_experts_run(tmp_path: Path, plain: Path) -> None:
    checkpoint = CheckpointFolder.open(coded_folder(tmp_path / "coded", plain, "fp8"))
    assert _quantised(checkpoint) == {"float8_e4m3fn": "reference, torch (grouped_mm)"}


@pytest.mark.usefixtures("grouping")
@pytest.mark.parametrize("preset", ["int8", "fp8", "w4", "q5_1"])
def test_stacks_wait_nowhere_and_need_no_float64(tmp_path: Path, plain: Path, preset: str) -> None:
    folder = coded_folder(tmp_path / "coded", plain, preset)
    model = load_checkpoint(folder, dtype="bfloat16").model.to("meta")
    for counts in ([5, 0, 3, 1, 0, 2], [0, 2, 0, 0, 1, 0]):
        rows, ends = (t.to("meta") for t in routed(counts, SPARSE.hidden_size, torch.bfloat16))
        with watching() as device:
            y = experts_of(model)(rows, ends)
        assert y.shape == rows.shape
        assert device.waits == []
        assert torch.float64 not in {t for some in device.operators.values() for t in some}
