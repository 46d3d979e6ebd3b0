"""Models in one file of weights, with --config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from neounify.checkpoint import to_published
from support.gguf_files import gguf_of

HEAD = to_published("lm_head.weight")


@pytest.fixture
def file(toy: Path, tmp_path: Path) -> Path:
    return gguf_of(load_file(toy / "model.safetensors"), "diffusion_model.").write(
        tmp_path / "toy.gguf"
    )


@pytest.fixture
def headless(toy: Path, tmp_path: Path) -> Path:
    weights = load_file(toy / "model.safetensors")
    return gguf_of({n: w for n, w in weights.items() if n != HEAD}).write(tmp_path / "images.gguf")


def test_commands_take_one_file(run_bare: Callable[..., Any], toy: Path, file: Path) -> None:
    model = ("--model", file, "--config", toy)
    ran = run_bare("generate", "a boat", *model, "--steps", 1, "--json")
    assert ran.json["files"][0]["record"]["model"]["folder"] == "toy.gguf"
    plain = run_bare("chat", "hello", "--model", toy, "--max-new-tokens", 3)
    assert run_bare("chat", "hello", *model, "--max-new-tokens", 3).out == plain.out
    refused = run_bare("generate", "a boat", "--model", file)
    assert refused.code == 1
    assert "holds no config.json: name the folder" in refused.err
    assert "--config" in refused.err


def test_inspect_reads_one_file(run_bare: Callable[..., Any], toy: Path, file: Path) -> None:
    folder = run_bare("inspect", toy, "--json").json
    single = run_bare("inspect", file, "--config", toy, "--json").json
    assert single["folder"] == "toy.gguf"
    assert {**single, "folder": "toy"} == folder
    assert run_bare("inspect", file).code == 1
    missing = run_bare("inspect", "nowhere.gguf", "--config", toy)
    assert "error: MODEL nowhere.gguf does not exist" in missing.err


def test_plan_reads_one_file(run_bare: Callable[..., Any], toy: Path, file: Path) -> None:
    machine = ("--gpu", "none", "--ram", "4G", "--json")
    planned = run_bare("plan", "--model", file, "--config", toy, *machine).json
    of_folder = run_bare("plan", "--model", toy, *machine).json
    assert planned["model"] == "toy.gguf"
    # Times follow from rates that are measured anew.
    kept = [
        [{key: row[key] for key in ("weights", "mode", "peak")} for row in plan["rows"]]
        for plan in (planned, of_folder)
    ]
    assert kept[0] == kept[1]


def test_a_gguf_file_is_compared_with_its_weights(run_bare: Callable[..., Any], toy: Path) -> None:
    assert run_bare("convert", toy, "small", "--to", "q8_0").code == 0
    small = ("small/model-Q8_0.gguf", "--config", toy)
    sizes = ("--images", 1, "--cases", 0, "--json")
    report = run_bare("parity", toy, *small, *sizes, "--output", "report").json
    assert 0 < report["weights"]["attention"] < 0.01
    generated = ("--steps", 1, "--json", "--backend", "decoded")
    assert run_bare("generate", "a boat", "--model", *small, *generated).code == 0


def test_other_files_are_no_models(run_bare: Callable[..., Any], toy: Path) -> None:
    Path("weights.bin").write_bytes(b"PK")
    ran = run_bare("generate", "a boat", "--model", "weights.bin", "--config", toy)
    assert ran.code == 1
    assert "weights.bin is not a model; a model is a folder" in ran.err


def test_a_model_without_lm_head(run_bare: Callable[..., Any], toy: Path, headless: Path) -> None:
    model = ("--model", headless, "--config", toy)
    inspected = run_bare("inspect", headless, "--config", toy)
    assert inspected.code == 0
    assert "no: there is no lm_head" in " ".join(inspected.out.split())
    assert run_bare("generate", "a boat", *model, "--steps", 1).code == 0
    sizes = ("--images", 1, "--cases", 1, "--json")
    report = run_bare("parity", headless, headless, "--config", toy, *sizes).json
    assert report["tokens"] is None
    assert {name.partition("/")[0] for name in report["bench"]} == {"paint", "all"}
    for command in (("chat", "hello"), ("story", "a tale"), ("generate", "a boat", "--think")):
        ran = run_bare(*command, *model)
        assert ran.code == 1
        assert "has no lm_head, so it writes no text" in ran.err


def test_convert_to_gguf_and_back(run_bare: Callable[..., Any], toy: Path) -> None:
    ran = run_bare("convert", toy, "small", "--to", "q8_0", "--json")
    assert ran.json["files"] == ["model-Q8_0.gguf"]
    assert "Q8_0" in ran.json["total"]["dtype"]
    assert run_bare("generate", "a boat", "--model", "small", "--steps", 1).code == 0
    assert run_bare("convert", "small", "again", "--to", "Q8_0").code == 0
    first, second = (Path(name, "model-Q8_0.gguf") for name in ("small", "again"))
    assert first.read_bytes() == second.read_bytes()
    single = ("convert", first, "plain", "--config", toy, "--dtype", "float32", "--json")
    assert run_bare(*single).json["files"] == ["model.safetensors"]
    plain = load_file("plain/model.safetensors")
    before = load_file(toy / "model.safetensors")
    assert plain.keys() == before.keys()
    for name, tensor in before.items():
        assert (plain[name] - tensor).abs().max() <= 0.01 * tensor.abs().max()


def test_convert_refuses_what_does_not_go_together(run_bare: Callable[..., Any], toy: Path) -> None:
    for wrong, message in (
        (("--to", "q3"), "'q3' is no GGUF format written here"),
        (("--to", "q8_0", "--dtype", "float32"), "give one"),
        (("--to", "q8_0", "--lora-form", "peft"), "no model is written"),
    ):
        ran = run_bare("convert", toy, "out", *wrong)
        assert ran.code != 0
        assert message in ran.err
        assert not Path("out").exists()
