"""`quantise`, `parity`, and the options --quantise and --backend."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import neounify
from neounify.bundled import bundled_model
from neounify.checkpoint import CheckpointFolder, load_checkpoint, save_model, to_published
from neounify.checkpoint.quantise_files import quantise_checkpoint
from neounify.checkpoint.quantised_layers import quant_modules
from neounify.checkpoint.sizes import kept_weights
from neounify.cli.parity import memory_of_both, scene_tasks
from neounify.config.model import CheckpointDefaults
from neounify.config.presets import SCENES, U1_8B
from neounify.errors import MemoryPlanError
from neounify.model import NeoUnify
from neounify.quant.formats import FourBits, Fp8Rows
from neounify.runtime.devices import Abilities
from neounify.runtime.memory_plan import Resident, default_image, peak_bytes, working_bytes
from neounify.runtime.process import OwnMemory
from support.checkpoint_folders import CONFIGS, random_weights, write_checkpoint
from support.device_abilities import pretending
from support.lora_files import lora_tensors

SMALL = ("--images", 2, "--cases", 0)


@pytest.fixture(scope="session")
def coded(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model in int8."""
    folder = tmp_path_factory.mktemp("models") / "coded"
    neounify.load(toy, quantise="int8").save(folder)
    return folder


def test_quantise_writes_what_quantising_at_load_gives(
    run_bare: Callable[..., Any], toy: Path
) -> None:
    for preset in ("int8-all", "w4-mixed"):
        ran = run_bare("quantise", toy, "--to", preset, "-o", preset, "--no-parity", "--json")
        assert ran.code == 0, ran.err
        assert ran.json["total"]["parameters"] == sum(
            p.numel() for p in neounify.load(toy).model.parameters()
        )
        loaded = load_checkpoint(toy, dtype="stored", quantise=preset).model
        theirs = save_model(loaded, Path("saved") / preset)
        stored = [load_file(Path(folder) / "model.safetensors") for folder in (preset, theirs)]
        assert stored[0].keys() == stored[1].keys()
        for name, a in stored[0].items():
            b = stored[1][name]
            assert a.dtype == b.dtype
            assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), name
        texts = [json.loads((Path(f) / "config.json").read_text()) for f in (preset, theirs)]
        assert texts[0]["neounify"]["quantised"] == texts[1]["neounify"]["quantised"]


def test_quantise_writes_gguf_files_as_convert_does(
    run_bare: Callable[..., Any], toy: Path, coded: Path
) -> None:
    ran = run_bare("quantise", toy, "--to", "Q5_0", "-o", "five", "--no-parity", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["files"] == ["model-Q5_0.gguf"]
    assert run_bare("convert", toy, "same", "--to", "q5_0").code == 0
    files = [Path(folder) / "model-Q5_0.gguf" for folder in ("five", "same")]
    assert files[0].read_bytes() == files[1].read_bytes()
    ran = run_bare("quantise", coded, "--to", "q8_0", "-o", "out", "--no-parity")
    assert ran.code != 0
    assert "is quantised already" in ran.err


def test_codes_are_aligned_and_shards_are_bounded(run_bare: Callable[..., Any], toy: Path) -> None:
    ran = run_bare("quantise", toy, "-o", "out", "--no-parity", "--max-shard-size", "200KB")
    assert ran.code == 0, ran.err
    assert len(list(Path("out").glob("model-*-of-*.safetensors"))) > 1
    checkpoint = CheckpointFolder.open("out")
    for name in checkpoint.quantised:
        assert checkpoint.tensors[name].start % 64 == 0
    assert quant_modules(neounify.load("out").model)


def test_a_model_of_codes_is_not_quantised_again(run_bare: Callable[..., Any], coded: Path) -> None:
    ran = run_bare("quantise", coded, "--to", "w4", "-o", "out", "--no-parity")
    assert ran.code != 0
    assert "is quantised already" in ran.err
    assert not Path("out").exists()
    ran = run_bare("quantise", coded, "--to", "int3", "-o", "out")
    assert "preset 'int3' is unknown" in ran.err


def test_convert_merges_a_lora_into_codes(run_bare: Callable[..., Any], coded: Path) -> None:
    target = "language_model.model.layers.0.mlp_mot_gen.down_proj"
    config = CheckpointFolder.open(coded).config
    save_file(lora_tensors(config, [target]), "lora.safetensors")
    options = ("--lora", "lora.safetensors:0.5")
    ran = run_bare("convert", coded, "merged", *options, "--to", "stored", "--json")
    assert ran.code == 0, ran.err
    before, after = (load_file(Path(f) / "model.safetensors") for f in (coded, Path("merged")))
    assert after[f"{target}.weight"].dtype == torch.int8
    assert before.keys() == after.keys()
    assert not torch.equal(before[f"{target}.weight"], after[f"{target}.weight"])
    assert run_bare("generate", "a boat", "--model", "merged", "--steps", 2).code == 0
    ran = run_bare("convert", coded, "x", *options, "--to", "stored", "--dtype", "bfloat16")
    assert "--dtype and --to are two forms" in ran.err


def test_quantise_writes_a_report_of_parity(run_bare: Callable[..., Any], toy: Path) -> None:
    ran = run_bare("quantise", toy, "--to", "w4", "-o", "out", *SMALL)
    assert ran.code == 0, ran.err
    report = json.loads(Path("out/parity/report.json").read_text())
    assert report["about"]["second"] == "out"
    assert 0.02 < report["weights"]["mlp"] < 0.1
    assert report["weights"]["norm"] == 0
    assert 0 < report["logits"] < 1
    assert report["clean"].keys() == {"0.1", "0.4", "0.7"}
    assert all(0 < error < 1 for error in report["clean"].values())
    assert report["tokens"]["n"] > 8
    assert len(report["psnr"]) == 2
    assert "greedy tokens that agree" in Path("out/parity/report.md").read_text()
    with Image.open("out/parity/images.png") as sheet:
        assert sheet.width > 500


def test_a_model_equals_itself(run_bare: Callable[..., Any], coded: Path) -> None:
    ran = run_bare("parity", coded, coded, "-o", "same", *SMALL, "--json")
    assert ran.code == 0, ran.err
    report = ran.json
    assert set(report["weights"].values()) == {0.0}
    assert report["logits"] == 0
    assert set(report["clean"].values()) == {0.0}
    assert report["tokens"]["correct"] == report["tokens"]["n"]
    assert report["psnr"] == [100, 100]


def test_parity_of_other_shapes_is_refused(
    run_bare: Callable[..., Any], toy: Path, tmp_path: Path
) -> None:
    ran = run_bare("parity", toy, bundled_model(), "-o", "out", *SMALL)
    assert ran.code != 0
    assert "cannot be compared weight by weight" in ran.err


def test_parity_of_a_model_without_images_is_refused_first(
    run_bare: Callable[..., Any], toy: Path, tmp_path: Path
) -> None:
    """Before anything is written; without the comparison it is quantised."""
    pipe = neounify.load(toy)
    config = pipe.config.replace(capabilities=("chat",))
    neounify.Pipeline(NeoUnify(config).eval(), pipe.tokenizer).save(tmp_path / "chats")
    refused = run_bare("quantise", tmp_path / "chats", "--to", "int8", "--output", "out", *SMALL)
    assert refused.code != 0
    assert "which this model cannot; leave it out with --no-parity" in refused.err
    assert not Path("out").exists()
    parity = run_bare("parity", tmp_path / "chats", toy, "-o", "out", *SMALL)
    assert "the comparison generates images" in parity.err
    command = ("quantise", tmp_path / "chats", "--to", "int8", "--output", "out", "--no-parity")
    assert run_bare(*command).code == 0


def test_parity_has_both_models_in_its_plan(
    run_bare: Callable[..., Any], toy: Path, coded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first one, by streams, has nothing in memory yet."""
    monkeypatch.setattr("neounify.runtime.memory_plan.PROCESS", 0)
    checkpoints = [CheckpointFolder.open(path) for path in (toy, coded)]
    monkeypatch.setattr("neounify.runtime.rates.own_memory", lambda: OwnMemory(0, 0))
    working = working_bytes(checkpoints[0].config, default_image(checkpoints[0].config), 4)
    none: Resident = {"und": 0, "gen": 0}
    first, second = (
        {
            mode: peak_bytes(kept.weights, mode, working, none, unified=True)
            for mode in ("all", "stream", "layers")
        }
        for kept in (kept_weights(checkpoint, torch.float32) for checkpoint in checkpoints)
    )
    device = torch.device("cpu")

    def modes(size: float) -> list[Any]:
        for module in ("plan", "rates"):
            monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: int(size))
        ways = memory_of_both(checkpoints, torch.float32, device, "auto")
        assert all(way["plan"] == "ignore" for way in ways)
        return [way["memory"] for way in ways]

    assert modes(first["all"] + second["all"] + 1) == ["all", "all"]
    assert modes(first["all"] + second["stream"] + 1) == ["all", "stream"]
    with pytest.raises(MemoryPlanError, match="do not fit at once"):
        modes(first["layers"] + second["layers"] - 1)
    ran = run_bare("parity", toy, coded, "-o", "out", *SMALL)
    assert ran.code == 1
    assert "do not fit at once" in ran.err


def test_inspect_shows_formats_and_backends(run_bare: Callable[..., Any], coded: Path) -> None:
    report = run_bare("inspect", coded, "--json").json
    assert {row["dtype"] for row in report["rows"]} >= {"int8_tensorwise, rotated"}
    assert list(report["quantised"]) == ["int8_tensorwise, rotated"]
    assert "backend of int8_tensorwise" in run_bare("inspect", coded).out


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained model never ends its answers, so they end early."""
    monkeypatch.setattr("neounify.scenes.bench.subject.MAX_ANSWER_TOKENS", 4)


@pytest.mark.usefixtures("short_answers")
def test_the_report_has_scenebench(run_bare: Callable[..., Any], toy: Path, coded: Path) -> None:
    ran = run_bare("parity", toy, coded, "-o", "out", "--images", 1, "--cases", 1)
    assert ran.code == 0, ran.err
    bench = json.loads(Path("out/report.json").read_text())["bench"]
    tasks = {name.partition("/")[0] for name in bench}
    assert tasks == {"paint", "vqa", "all"}
    for side in ("first", "second"):
        counts = {name: rates[side]["n"] for name, rates in bench.items()}
        assert counts.pop("all") == len(counts) == 18
        assert set(counts.values()) == {1}
    assert "| SceneBench, % (95 %) | first | second |" in Path("out/report.md").read_text()


def test_scenebench_asks_what_a_model_can_answer() -> None:
    assert scene_tasks(SCENES) == ("paint", "vqa")
    assert scene_tasks(SCENES.replace(lm_head=False)) == ("paint",)
    assert scene_tasks(SCENES.replace(capabilities=("generate",))) == ("paint",)
    assert scene_tasks(SCENES.replace(capabilities=("chat",))) == ("vqa",)
    large = CheckpointDefaults(image_size=(96, 96))
    assert scene_tasks(SCENES.replace(patch_size=24, sampling=large)) == ()
    assert scene_tasks(U1_8B) == ()


@pytest.mark.usefixtures("short_answers")
def test_a_quantised_model_is_evaluated(run_bare: Callable[..., Any], coded: Path) -> None:
    sizes = ("--cases", 1, "--steps", 1, "--tasks", "paint,vqa,edit")
    ran = run_bare("eval", "--model", coded, *sizes)
    assert ran.code == 0, ran.err
    report = json.loads(Path("out/eval/report.json").read_text())
    assert report["about"]["model"]["fingerprint"] == CheckpointFolder.open(coded).fingerprint()
    assert "(layers stored as int8_tensorwise, rotated)" in ran.err
    assert {score["strict"]["n"] for score in report["scores"]} == {1}
    assert len(report["scores"]) == 19


@pytest.fixture
def on_mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """mps as the default device of commands, with its abilities but no memory; no device is it."""
    for module in ("cli.parity", "cli.models"):
        monkeypatch.setattr(f"neounify.{module}.default_device", lambda: "mps")
    monkeypatch.setattr("neounify.checkpoint.resolve_device", torch.device)
    with pretending(Abilities(type="mps", float64=False), host=True):
        yield


@pytest.mark.usefixtures("on_mps")
@pytest.mark.parametrize("preset", ["fp8", "w4"])
def test_codes_that_the_default_device_cannot_hold(
    run_bare: Callable[..., Any], toy: Path, preset: str
) -> None:
    ran = run_bare("quantise", toy, "--to", preset, "-o", "here", *SMALL, "--device", "mps")
    assert "cannot be held on mps" in ran.err
    assert not Path("here").exists()
    ran = run_bare("quantise", toy, "--to", preset, "-o", "out", *SMALL)
    assert ran.code == 0, ran.err
    assert "compared on the CPU: mps cannot hold codes of these weights" in ran.err
    about = json.loads(Path("out/parity/report.json").read_text())["about"]
    assert about["device"] == "cpu"
    (shown,) = run_bare("inspect", "out", "--json").json["quantised"].values()
    assert shown == "none: mps cannot hold it; --backend decoded makes plain weights"


@pytest.mark.usefixtures("on_mps")
def test_inspect_shows_what_a_device_takes(
    run_bare: Callable[..., Any], coded: Path, tmp_path: Path
) -> None:
    shown = run_bare("inspect", coded, "--json").json["quantised"]
    assert shown == {"int8_tensorwise, rotated": "reference"}
    config = CONFIGS["sparse"].replace(tie_embeddings=True)
    weights = random_weights(config)
    name = to_published("embed_tokens.weight")
    codes = Fp8Rows().quantise(weights.pop(name))
    module = name.removesuffix(".weight")
    weights |= {f"{module}.{part}": tensor for part, tensor in codes.items()}
    plain = write_checkpoint(tmp_path / "plain", config, weights)
    quantise_checkpoint(CheckpointFolder.open(plain), tmp_path / "experts", "int8")
    shown = run_bare("inspect", "experts", "--json").json["quantised"]
    assert shown["int8_tensorwise, rotated"] == "reference, torch (grouped_mm)"
    shown = run_bare("inspect", "plain", "--json").json["quantised"]
    assert shown == {"float8_e4m3fn": "decoded"}


@pytest.mark.parametrize("backend", ["auto", "reference", "w8a8", "decoded"])
def test_commands_run_quantised_models(
    run_bare: Callable[..., Any], coded: Path, backend: str
) -> None:
    options = ("--model", coded, "--backend", backend)
    ran = run_bare("generate", "a boat", *options, "--steps", 2)
    assert ran.code == 0
    assert "(layers stored as int8_tensorwise, rotated)" in ran.err
    assert run_bare("chat", "hello", *options, "--max-new-tokens", 3).code == 0


def test_commands_quantise_a_model_as_it_is_read(run_bare: Callable[..., Any], toy: Path) -> None:
    ran = run_bare("generate", "a boat", "--model", toy, "--quantise", "w4", "--steps", 2)
    assert ran.code == 0, ran.err
    assert "(as stored), layers quantised to w4" in ran.err
    ran = run_bare("generate", "a boat", "--model", toy, "--quantise", "w5")
    assert "preset 'w5' is unknown" in ran.err
    ran = run_bare("chat", "hello", "--model", toy, "--backend", "fast")
    assert "backend 'fast' of quantised layers is unknown" in ran.err


def test_a_quantised_model_of_four_bits_generates(toy: Path) -> None:
    pipe = neounify.load(toy, quantise="w4")
    formats = {type(layer.format) for layer in quant_modules(pipe.model).values()}
    assert FourBits in formats
    image = pipe.generate("a boat", steps=2).images[0]
    edited = pipe.edit("make it red", image, steps=2).images[0]
    assert edited.size == image.size
