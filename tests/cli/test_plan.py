"""`neounify plan` for inference: the table, its choice, its notes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli.conftest import Run
from neounify.checkpoint.names import from_published, stream_of
from neounify.checkpoint.save import save_model
from neounify.config.presets import TINY
from neounify.model import NeoUnify
from neounify.runtime.devices import Abilities
from neounify.runtime.rates import Rates
from neounify.text import byte_tokenizer
from support.device_abilities import pretending

EIGHT_B = ("plan", "--preset", "8b", "--gpu", "24G", "--ram", "32G")


def test_the_table_of_the_8b_on_24_gb(run: Run) -> None:
    done = run(*EIGHT_B)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == (
        "8B, generate 2048×2048, 50 steps, guidance 4       RTX 4090 24 GB, PCIe 4 · 32 GB memory"
    )
    assert [" ".join(line.split()) for line in lines[2:]] == [
        "bf16 all 38.1 GB – – – does not fit",
        "bf16 stream ✓ 21.4 GB – – 1.13 61 s ≤ 40 tokens/s",
        "bf16 layers, r=0 5.9 GB 0.8 GB 16.2 GB 1.13 57 s ≤ 1.5 tokens/s",
        "int8 all 21.5 GB – – 1.13 57 s ≤ 75 tokens/s",
        "int8 stream 13.1 GB – – 1.13 59 s ≤ 75 tokens/s",
        "int8 layers, r=0 5.3 GB 0.4 GB 8.1 GB 1.13 57 s ≤ 3.0 tokens/s",
    ]


def test_json_has_the_same_numbers(run: Run) -> None:
    document = json.loads(run(*EIGHT_B, "--json").out)
    chosen = [row for row in document["rows"] if row["chosen"]]
    assert [(row["weights"], row["mode"]) for row in chosen] == [("bf16", "stream")]
    assert chosen[0]["peak"] == pytest.approx(21.4e9, abs=0.05e9)
    assert document["machine"]["device"] == 24 * 2**30


def test_more_images_take_more(run: Run) -> None:
    def peak(*options: object) -> float:
        rows = json.loads(run(*EIGHT_B, *options, "--json").out)["rows"]
        return float(rows[1]["peak"])

    assert peak("--task", "edit", "--references", 2) > peak("--task", "edit") > peak()
    assert peak("--size", "1024x1024") < peak()
    assert peak("--think", 1000) > peak()


def test_a_small_card_keeps_what_fits_of_the_layers(run: Run) -> None:
    done = run("plan", "--preset", "8b", "--gpu", "12G", "--ram", "32G")
    (line,) = [line for line in done.out.splitlines() if "✓" in line]
    assert line.startswith("bf16     layers, r=")
    assert "r=0" not in line


def test_where_the_weights_do_not_fit_int8_is_named(run: Run) -> None:
    done = run("plan", "--preset", "8b", "--gpu", "5.2G", "--ram", "32G")
    assert done.code == 0
    assert done.out.splitlines()[-1] == (
        "bf16 weights do not fit in 5.6 GB; int8 with --memory layers does, with a peak of 5.3 GB"
    )


def test_where_locked_memory_does_not_fit_the_host_is_named(run: Run) -> None:
    done = run("plan", "--preset", "8b", "--gpu", "12G", "--ram", "0.5G")
    assert done.code == 0
    assert done.out.splitlines()[-1] == (
        "bf16 weights do not fit: layers lock 0.8 GB of the host's memory, of which 0.5 GB are "
        "free; int8 with --memory layers does, with a peak of 5.3 GB"
    )
    done = run("plan", "--preset", "8b", "--gpu", "12G", "--ram", "0.2G")
    assert done.code == 1
    assert done.out.splitlines()[-1] == (
        "nothing fits: int8 with --memory layers locks 0.4 GB of the host's memory, of which 0.2 "
        "GB are free; take a host with more memory"
    )


def test_nothing_fits(run: Run) -> None:
    done = run("plan", "--preset", "8b", "--gpu", "2G", "--ram", "32G")
    assert done.code == 1
    assert done.out.splitlines()[-1] == (
        "nothing fits in 2.1 GB: the least is 5.3 GB, int8 with --memory layers; take a device or "
        "host of that size, or ask for a smaller --size"
    )


def test_a_folder_is_planned_from_its_headers(run: Run, toy: Path) -> None:
    done = run("plan", "--model", toy, "--gpu", "none", "--ram", "4G")
    assert done.code == 0
    assert "CPU, 4 GB memory" in done.out
    assert any(" all " in line and "✓" in line for line in done.out.splitlines())


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_the_gpu_of_this_machine_is_planned_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rates = Rates(name="the card", products=1e12, copies=1e10, memory=1e11)
    probed = []

    def probe(device: torch.device, dtype: torch.dtype) -> Rates:
        probed.append((device.type, dtype))
        return rates

    monkeypatch.setattr("neounify.cli.models.default_device", lambda: kind)
    monkeypatch.setattr("neounify.runtime.rates.probe", probe)
    answers = {"mem_get_info": (4 * 2**30, 2**34), "memory_reserved": 0, "memory_allocated": 0}
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.xpu.{name}", lambda device, answer=answer: answer)
    with pretending(Abilities(type=kind)):
        done = run("plan", "--ram", "8G", "--json")
        assert done.code == 0
        shown = run("plan", "--ram", "8G").out.splitlines()[0]
    gibibytes = {"mps": 8, "xpu": 4}[kind]
    assert shown.endswith(f"       the card {gibibytes} GB free · 8 GB memory")
    machine, rows = done.json["machine"], done.json["rows"]
    assert (machine["device"], machine["host"]) == (gibibytes * 2**30, 8 * 2**30)
    assert machine["unified"] is (kind == "mps")
    assert {row["mode"] for row in rows} == {"all", "stream"}
    assert rows[0]["weights"] == "fp32"
    assert probed == 2 * [(kind, torch.float32)]
    probed.clear()
    with pretending(Abilities(type=kind)):
        run("plan", "--preset", "8b", "--ram", "8G")
    assert probed == [(kind, torch.bfloat16)]


def test_memory_that_no_system_tells_is_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neounify.runtime.process.available_bytes", lambda: None)
    done = run("plan", "--gpu", "none")
    assert done.code == 2
    assert "does not say how much memory is free: name it with --ram" in done.err
    assert run("plan", "--gpu", "none", "--ram", "4G").code == 0


def test_a_stream_stored_in_float32_is_noted(run: Run, tmp_path: Path) -> None:
    save_model(NeoUnify(TINY).to(torch.bfloat16), tmp_path / "mixed", tokenizer=byte_tokenizer())
    file = tmp_path / "mixed" / "model.safetensors"
    tensors = load_file(file)
    generation = {n for n in tensors if stream_of(from_published(n) or "") == "gen"}
    save_file({n: t.float() if n in generation else t for n, t in tensors.items()}, file)
    done = run("plan", "--model", tmp_path / "mixed", "--gpu", "24G", "--ram", "32G")
    assert done.out.splitlines()[-1].startswith(
        "the generation stream is stored in float32: reading it takes 0.0 GB of cache;"
    )


def test_weights_that_do_not_fit_the_config_are_one_error(
    run_bare: Run, toy: Path, tmp_path: Path
) -> None:
    """Of a quantised file, whose codes are of more layers than the config has."""
    run_bare("quantise", toy, "--to", "int8", "-o", tmp_path / "int8", "--no-parity")
    config = tmp_path / "int8" / "config.json"
    document = json.loads(config.read_text())
    layers = document["llm_config"]["num_hidden_layers"]
    document["llm_config"]["num_hidden_layers"] = layers - 1
    config.write_text(json.dumps(document))
    done = run_bare("plan", "--model", tmp_path / "int8", "--gpu", "none", "--ram", "4G")
    assert done.code == 1
    assert "the weights do not fit the model in config.json" in done.err


def test_models_without_a_text_head_write_no_text(run_bare: Run, tmp_path: Path) -> None:
    model = NeoUnify(TINY.replace(lm_head=False))
    save_model(model, tmp_path / "headless", tokenizer=byte_tokenizer())
    done = run_bare("plan", "--model", tmp_path / "headless", "--gpu", "24G", "--ram", "32G")
    assert done.code == 0
    assert "tokens/s" not in done.out
    for options in (("--task", "chat"), ("--think", 10)):
        done = run_bare("plan", "--model", tmp_path / "headless", *options)
        assert done.code == 2
        assert "has no lm_head, so it writes no text" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--preset", "9b"), "--preset must be one of 8b, a3b"),
        (("--preset", "8b", "--gpu", "big"), "--gpu must be a number of GiB, as 24G"),
        (("--preset", "8b", "--gpu", "24G", "--ram", "0"), "--ram must be a number of GiB"),
        (("--preset", "8b", "--gpu", "24G", "--task", "sing"), "--task must be one of t2i"),
        (("--preset", "8b", "--size", "65x64"), "size 65x64: both sides must be multiples of 32"),
        (("--preset", "8b", "--model", "folder"), "give --preset 8b or --model folder, not both"),
        (("--gpus", "8"), "--gpus is for a training run"),
        (("--train", "run.toml"), "--train needs --gpus"),
    ],
)
def test_options_that_cannot_be_read(run_bare: Run, options: tuple[str, ...], message: str) -> None:
    done = run_bare("plan", *options)
    assert done.code in (1, 2)
    assert message in done.err
