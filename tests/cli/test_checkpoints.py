"""`toy`, `inspect` and `convert`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neounify
from neounify.checkpoint import CheckpointFolder, to_published


def test_a_toy_works_and_says_that_it_is_untrained(run_bare: Callable[..., Any]) -> None:
    ran = run_bare("toy", "mine")
    assert ran.code == 0
    assert "UNTRAINED" in ran.err
    assert "neounify generate" in ran.err
    assert run_bare("generate", "a boat", "--model", "mine").code == 0
    assert run_bare("chat", "hello", "--model", "mine", "--max-new-tokens", 3).code == 0
    again = run_bare("toy", "mine")
    assert again.code == 1
    assert "not empty" in again.err
    assert run_bare("toy", "mine", "--overwrite").code == 0


def test_toys_of_one_seed_are_equal(run_bare: Callable[..., Any]) -> None:
    prints = [
        run_bare("toy", f"toy{number}", "--seed", seed, "--json").json["fingerprint"]
        for number, seed in enumerate((1, 1, 2))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_inspect_counts_what_the_model_has(run: Callable[..., Any], toy: Path) -> None:
    report = run("inspect", "--json").json
    pipe = neounify.load(toy, device="cpu")
    total = sum(p.numel() for p in pipe.model.parameters())
    assert report["total"]["parameters"] == total
    assert sum(row["parameters"] for row in report["rows"]) == total
    assert {row["stream"] for row in report["streams"]} == {"und", "gen", "shared"}
    assert report["fingerprint"] == pipe.fingerprint
    assert report["complete"] is True
    assert report["config"]["hidden_size"] == pipe.config.hidden_size
    table = run("inspect", toy)
    assert table.code == 0
    assert f"{total:,}" in table.out
    assert "understanding" in table.out


def test_inspect_shows_what_is_missing(run: Callable[..., Any], toy: Path) -> None:
    shutil.copytree(toy, "broken")
    weights = load_file("broken/model.safetensors")
    del weights[to_published("und_norm.weight")]
    save_file(weights, "broken/model.safetensors")
    ran = run("inspect", "broken")
    assert ran.code == 1
    assert "1 missing" in ran.err
    assert "generation" in ran.out


def test_convert_to_bfloat16_in_small_files(run: Callable[..., Any], toy: Path) -> None:
    ran = run("convert", toy, "half", "--dtype", "bfloat16", "--max-shard-size", "500KB", "--json")
    assert ran.code == 0
    assert len(ran.json["files"]) > 1
    assert ran.json["total"]["dtype"] == "bfloat16"
    before, after = CheckpointFolder.open(toy), CheckpointFolder.open("half")
    assert before.tensors.keys() == after.tensors.keys()
    for name in before.tensors:
        assert torch.equal(before.tensor(name).bfloat16(), after.tensor(name))
    again = run("convert", toy, "half")
    assert again.code == 1
    assert "--overwrite" in again.err
    assert run("convert", toy, toy, "--overwrite").code == 1
    assert run("generate", "a boat", "--model", "half", "--steps", 1).code == 0


def test_convert_merges_lora(run: Callable[..., Any], toy: Path) -> None:
    before = CheckpointFolder.open(toy)
    name = next(n for n in before.tensors if "mlp" in n and len(before.tensors[n].shape) == 2)
    rows, columns = before.tensors[name].shape
    up, down = torch.randn(rows, 2), torch.randn(2, columns)
    target = name.removesuffix(".weight")
    save_file({f"{target}.lora_up.weight": up, f"{target}.lora_down.weight": down}, "l.safetensors")
    assert run("convert", toy, "merged", "--lora", "l.safetensors:0.5").code == 0
    merged = CheckpointFolder.open("merged")
    want = before.tensor(name) + 0.5 * up @ down
    assert torch.allclose(merged.tensor(name), want, atol=1e-5)
    ran = run("generate", "a boat", "--lora", "l.safetensors:0.5", "--steps", 1, "--json")
    lora = ran.json["files"][0]["record"]["model"]["lora"]
    assert lora == [{"file": "l.safetensors", "strength": 0.5}]


@pytest.mark.parametrize("name", ["nope.png", "text.txt", "broken.png", "nowhere"])
def test_inspect_says_what_a_thing_is_not(run_bare: Callable[..., Any], name: str) -> None:
    for file in ("text.txt", "broken.png"):
        Path(file).write_text("text", encoding="utf-8")
    ran = run_bare("inspect", name)
    assert ran.code == 1
    assert ran.err.startswith(f"error: {name} is n")
    assert "--" not in ran.err


def test_a_model_is_named_as_it_was_given(
    run_bare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "error: --model nowhere does not exist" in run_bare("chat", "a", "-m", "nowhere").err
    assert "error: MODEL nowhere does not exist" in run_bare("convert", "nowhere", "out").err
    monkeypatch.setenv("NEOUNIFY_MODEL", "nowhere")
    assert "error: NEOUNIFY_MODEL nowhere does not exist" in run_bare("chat", "a").err


def test_inspect_tells_the_sizes_of_the_layout_of_u1_5(
    run_bare: Callable[..., Any], toy: Path
) -> None:
    shutil.copytree(toy, "published")
    weights = load_file("published/model.safetensors")
    for name, tensor in weights.items():
        if "mot_gen" not in name and "fm_modules" not in name:
            weights[name] = tensor.bfloat16()
    save_file(weights, "published/model.safetensors")
    report = run_bare("inspect", "published", "--json").json
    assert report["computed_in"] == "bfloat16"
    sizes = {row["stream"]: (row["dtype"], row["bytes"]) for row in report["streams"]}
    parameters = {row["stream"]: row["parameters"] for row in report["streams"]}
    assert sizes == {
        "und": ("bfloat16", 2 * parameters["und"]),
        "gen": ("float32", 4 * parameters["gen"]),
        "shared": ("bfloat16", 2 * parameters["shared"]),
    }
    assert "computed in │ bfloat16" in " ".join(run_bare("inspect", "published").out.split())


def test_inspect_names_the_trained_sizes(run_bare: Callable[..., Any], toy: Path) -> None:
    assert "64x64, 96x96, 128x64" in run_bare("inspect").out
    assert "not recorded" in run_bare("inspect", toy).out
