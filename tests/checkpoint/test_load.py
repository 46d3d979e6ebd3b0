"""Loading: right values in the right dtype, no copies where none are needed, no ruined weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from neounify.checkpoint import CheckpointFolder, load_checkpoint, load_model, to_published
from neounify.config import MlpConfig, ModelConfig
from neounify.errors import CheckpointError, ConfigError, RequestError
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint

LM_HEAD = "language_model.lm_head.weight"
UP_PROJ = "language_model.model.layers.1.mlp_mot_gen.up_proj.weight"

WIDE = ModelConfig(
    hidden_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=1024,
    und_mlp=MlpConfig(width=2560),
    gen_mlp=MlpConfig(width=2560),
    vision_hidden_size=16,
    flow_head_width=64,
)
"""About 18 million parameters: enough to tell one copy of them from two."""


def test_every_kind_of_model_loads_as_stored(any_config: ModelConfig, tmp_path: Path) -> None:
    weights = random_weights(any_config, torch.bfloat16)
    model = load_model(write_checkpoint(tmp_path / "any", any_config, weights), dtype="stored")
    state = model.state_dict()
    assert {to_published(name) for name in state} == weights.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, weights[to_published(name)])
    assert not model.training
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert model.config == any_config


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", torch.float16])
def test_casts(tmp_path: Path, stored: torch.dtype, wanted: str | torch.dtype) -> None:
    weights = random_weights(SMALL, stored)
    folder = write_checkpoint(tmp_path / "cast", SMALL, weights)
    dtype = wanted if isinstance(wanted, torch.dtype) else getattr(torch, wanted)
    for name, tensor in load_model(folder, dtype=wanted).state_dict().items():
        assert torch.equal(tensor, weights[to_published(name)].to(dtype))


def test_matching_tensors_are_not_copied(small: Path) -> None:
    model, _, checkpoint, *_ = load_checkpoint(small, dtype="float32")
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == checkpoint.tensor(to_published(name)).data_ptr()


def test_writing_to_a_loaded_model_leaves_the_file_alone(small: Path) -> None:
    before = (small / "model.safetensors").read_bytes()
    model = load_model(small)
    for parameter in model.parameters():
        parameter.add_(1)
    assert (small / "model.safetensors").read_bytes() == before


def test_models_from_one_opened_folder_do_not_share_weights(small: Path) -> None:
    checkpoint = CheckpointFolder.open(small)
    first = load_model(checkpoint)
    name = "image_head.linear2.weight"
    first.get_parameter(name).fill_(3)
    second = load_model(checkpoint, dtype="bfloat16")
    assert (first.get_parameter(name) == 3).all()
    assert second.get_parameter(name).abs().max() <= 1


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_storage_becomes_bfloat16(tmp_path: Path, stored: torch.dtype) -> None:
    weights = random_weights(SMALL, stored)
    model = load_model(write_checkpoint(tmp_path / "f8", SMALL, weights), dtype="stored")
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, weights[to_published(name)].to(torch.bfloat16))


def test_unaligned_tensors_load(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    folder = write_checkpoint(tmp_path / "odd", SMALL, weights)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" "
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    checkpoint = CheckpointFolder.open(folder)
    assert not checkpoint.file_of(LM_HEAD).is_view(LM_HEAD)
    for memory in ("all", "stream"):
        loaded = load_checkpoint(checkpoint, memory=memory)
        with loaded.residency.use("und"), loaded.residency.use("gen"):
            for name, tensor in loaded.model.state_dict().items():
                assert torch.equal(tensor, weights[to_published(name)])


def test_usable_inside_inference_mode(small: Path) -> None:
    with torch.inference_mode():
        model = load_model(small, dtype="bfloat16")
    assert not any(p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float12", "int8", torch.int8, torch.complex64, "torch.float32"])
def test_unknown_dtypes(small: Path, dtype: str | torch.dtype) -> None:
    with pytest.raises(
        RequestError, match="known are auto, stored, float32, bfloat16, float16, float64"
    ):
        load_model(small, dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", ""])
def test_unusable_devices(small: Path, device: str) -> None:
    with pytest.raises(RequestError, match="cannot be used here"):
        load_model(small, device=device)


def test_unknown_memory(small: Path) -> None:
    with pytest.raises(RequestError, match="known are auto, all, stream"):
        load_checkpoint(small, memory="some")  # type: ignore[arg-type]


def test_weights_that_do_not_fit_the_model(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    del weights[UP_PROJ]
    folder = write_checkpoint(tmp_path / "bad", SMALL, weights)
    with pytest.raises(CheckpointError, match=f"1 missing:\n  {UP_PROJ}"):
        load_model(folder)


def test_pixel_head_config_with_flow_head_weights(tmp_path: Path) -> None:
    config = CONFIGS["pixel"]
    folder = write_checkpoint(tmp_path / "bad", config, random_weights(SMALL))
    with pytest.raises(CheckpointError, match=r"missing:\n  fm_modules\.fm_head\.conv1\.bias"):
        load_model(folder)


def test_inconsistent_config(small: Path) -> None:
    text = (small / "config.json").read_text()
    (small / "config.json").write_text(text.replace('"head_dim": 8', '"head_dim": 6'))
    with pytest.raises(ConfigError, match="head_dim 6 must be a multiple of 8"):
        load_model(small)


# Values that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_values_are_found_where_tensors_are_cast(tmp_path: Path, value: float) -> None:
    weights = random_weights(SMALL)
    weights[UP_PROJ][-1, -1] = value
    folder = write_checkpoint(tmp_path / "nan", SMALL, weights)
    with pytest.raises(CheckpointError, match=f"'{UP_PROJ}' holds NaN or infinite values"):
        load_model(folder, dtype="bfloat16")


def test_bad_values_in_mapped_tensors(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    weights[LM_HEAD][0, 5] = float("nan")
    folder = write_checkpoint(tmp_path / "start", SMALL, weights)
    with pytest.raises(CheckpointError, match=f"'{LM_HEAD}' holds NaN"):
        load_model(folder)
    weights[LM_HEAD][0, 5] = 0
    weights[LM_HEAD][-1, -1] = float("nan")
    folder = write_checkpoint(tmp_path / "end", SMALL, weights)
    load_model(folder)
    with pytest.raises(CheckpointError, match=f"'{LM_HEAD}' holds NaN"):
        load_model(folder, verify=True)


def test_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    weights[LM_HEAD][0, 0] = 1e6
    folder = write_checkpoint(tmp_path / "large", SMALL, weights)
    with pytest.raises(CheckpointError, match=r"does not fit in torch\.float16.* wider dtype"):
        load_model(folder, dtype="float16")


# Memory


MEASURE = """
import json, sys
from pathlib import Path
from neounify.checkpoint import load_model

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

small, *cases = sys.argv[1:]
load_model(small, dtype="bfloat16")  # what a first load allocates for good is not counted
for case in cases:
    folder, dtype = case.split(":")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    model = load_model(folder, dtype=dtype, verify=True)
    kept = sum(p.nbytes for p in model.parameters())
    print(json.dumps([status("VmHWM") - before, kept]))
    del model
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_that_of_the_weights_kept(tmp_path: Path, small: Path) -> None:
    weights = random_weights(WIDE)
    single = write_checkpoint(tmp_path / "single", WIDE, weights)
    half = write_checkpoint(
        tmp_path / "half", WIDE, {name: t.to(torch.bfloat16) for name, t in weights.items()}
    )
    cases = [f"{half}:float32", f"{single}:bfloat16", f"{single}:float32"]
    # In a separate process: here, memory freed by other tests would hide what loading takes.
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), *cases], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (up, up_kept), (down, down_kept), (mapped, mapped_kept) = map(
        json.loads, result.stdout.splitlines()
    )
    assert up < 1.1 * up_kept
    assert down < 1.1 * down_kept
    assert mapped < 0.2 * mapped_kept


def test_a_file_saved_by_another_library_call(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "again", SMALL, random_weights(SMALL))
    save_file(random_weights(SMALL, seed=1), folder / "model.safetensors")
    model = load_model(folder)
    assert torch.equal(model.lm_head.weight, random_weights(SMALL, seed=1)[LM_HEAD])
