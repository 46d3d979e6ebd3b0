"""Run logging: counted operations, speeds, the line, the bar."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neounify.config import MlpConfig
from neounify.config.presets import SCENES
from neounify.data.encode import Encoder
from neounify.data.loader import Pack, make_pack
from neounify.data.sources import JsonlSource
from neounify.model import Document, Image, Layout, NeoUnify, Noise, Text
from neounify.model.parts import GEN, UND
from neounify.model.stream import SparseMlp
from neounify.scenes.world import SceneDataset, scene_config
from neounify.text import byte_tokenizer
from neounify.train.log import Log
from neounify.train.loss import Counts, LossConfig, loss_of
from neounify.train.progress import Progress
from neounify.train.recipe import StageRecipe
from neounify.train.setup import freeze
from neounify.train.speed import (
    Meter,
    StepOperations,
    attention,
    matmul_rate,
    peak_memory,
    weights,
)
from neounify.train.weights import new_model
from support.own_data import text_record, write_lines

CPU = torch.device("cpu")
STAGE = StageRecipe(name="a-stage", steps=10)
SPEEDS = (
    "tokens_per_second",
    "images_per_second",
    "operations_per_second",
    "matmul_share",
    "peak_memory_gb",
    "seconds_left",
)


def made(head: str = "flow") -> NeoUnify:
    return new_model(SCENES.replace(num_layers=2, image_head=head), 0)


def packed() -> Pack:
    """One story: text to learn, images to read and to generate."""
    encoder = Encoder(config=SCENES, tokenizer=byte_tokenizer())
    source = SceneDataset(0, scene_config("easy"), {"interleave": 1.0})
    return make_pack([encoder(source[0], np.random.default_rng(0))])


def run(
    console: Console, folder: Path, skipped: Mapping[str, Mapping[str, int]] | None = None
) -> str:
    """What two steps and a report put on a console."""
    log, progress, pack = Log(folder, console, tensorboard=False), Progress(), packed()
    operations = StepOperations(made()).of(pack)
    with log.live():
        log.stage(STAGE, progress, Meter(torch.device("cpu"), "float32", progress))
        for _ in range(2):
            progress.step += 1
            progress.stage_step += 1
            progress.tokens += pack.length
            progress.images += len(pack.targets)
            progress.seconds += 2.0
            log.step(progress, STAGE, operations)
        metrics, shown = {"text/loss": 0.5}, {"text": "text/loss"}
        log.report(progress, STAGE, metrics, 1e-3, 1.0, skipped, headline=shown)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("head", ["flow", "pixel"])
@pytest.mark.parametrize("frozen", [(), ("gen",), ("und", "shared"), ("und",), ("shared",)])
def test_operations_are_those_torch_counts(head: str, frozen: tuple[str, ...]) -> None:
    """But for attention, which torch does not count on a CPU, and the embeddings of t and σ.

    One document: several are padded, and then gradients that are zero are computed too.
    """
    model, pack = made(head), packed()
    freeze(model, frozen)
    with FlopCounterMode(display=False) as counter:
        generator = torch.Generator().manual_seed(0)
        loss_of(model, pack, LossConfig(), Counts.of([pack]), generator).backward()
    count = StepOperations(model)
    attended = sum(
        attention(model.config, pack.layout.pairs(s)) * (1 + 2 * part.flows)
        for s, part in count.layers.items()
    )
    assert count.of(pack) - attended == pytest.approx(counter.get_total_flops(), rel=0.015)


def test_pairs_are_those_that_see_each_other() -> None:
    layout = Layout([Document((Text(5), Image(2, 2), Text(3), Noise(2, 2))), Document((Text(2),))])
    text = sum(range(1, 6)) + sum(range(10, 13)) + sum(range(1, 3))
    assert layout.pairs(UND) == text + 4 * (5 + 4)
    assert layout.pairs(GEN) == 4 * (12 + 4)


def test_a_sparse_token_passes_its_experts_only() -> None:
    config = MlpConfig(width=0, num_experts=8, experts_per_token=2, expert_width=16)
    assert weights(SparseMlp(32, config)) == 8 * 32 + 2 * 3 * 32 * 16
    assert weights(nn.LayerNorm(32)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_machine_is_measured_without_a_trace(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert 1e8 < matmul_rate(CPU, dtype) < 1e15
    assert torch.equal(torch.get_rng_state(), before)


def test_peak_memory_is_in_bytes() -> None:
    tensor = torch.ones(2**26)
    assert 2**28 <= peak_memory(CPU) < 2**40
    del tensor


def test_a_report_holds_speeds_since_the_last_one(tmp_path: Path) -> None:
    run(Console(file=io.StringIO()), tmp_path)
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert set(SPEEDS) <= set(record)
    pack = packed()
    assert record["tokens_per_second"] == pytest.approx(pack.length / 2)
    assert record["images_per_second"] == pytest.approx(len(pack.targets) / 2)
    assert record["operations_per_second"] == pytest.approx(StepOperations(made()).of(pack) / 2)
    assert 0 < record["matmul_share"] < 1
    assert record["seconds_left"] == pytest.approx(8 * 2.0)


def test_the_line_says_what_the_log_does(tmp_path: Path) -> None:
    line = run(Console(file=io.StringIO(), width=400), tmp_path).splitlines()[-1]
    for piece in ("2/10", "text 0.5000", "tokens/s", "images/s", "% of matmul", "GiB"):
        assert piece in line
    assert line.endswith("0:16 left")


def test_a_report_counts_skipped_samples_by_reason(tmp_path: Path) -> None:
    skipped = {"a": {"the caption is empty": 5, "x": 1}, "b": {"the caption is empty": 2}}
    line = run(Console(file=io.StringIO(), width=400), tmp_path, skipped).splitlines()[-1]
    assert "8 damaged samples skipped (7 the caption is empty, and 1 other reasons)" in line
    record = json.loads((tmp_path / "log.jsonl").read_text())
    assert record["skipped"] == {"a": 6, "b": 2}
    assert record["skipped_by_reason"] == skipped


def test_files_and_fields_that_are_not_read_are_shown(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [text_record("x")])
    source = JsonlSource(tmp_path / "d.jsonl")
    source.damage.append("e.jsonl: cut off")
    source.rules.unread.update(("width", "[b]"))
    console = Console(file=io.StringIO(), width=400)
    log = Log(tmp_path / "run", console, tensorboard=False)
    log.files(Progress(), [source])
    assert isinstance(console.file, io.StringIO)
    assert "skipped e.jsonl: cut off" in console.file.getvalue()
    assert "d.jsonl: fields that are not read: [b], width" in console.file.getvalue()
    assert "width" in (tmp_path / "run" / "warnings.jsonl").read_text()
    assert (tmp_path / "run" / "skipped.txt").read_text() == "e.jsonl: cut off\n"


def test_a_terminal_shows_a_bar_and_gets_its_cursor_back(tmp_path: Path) -> None:
    shown = run(Console(file=io.StringIO(), force_terminal=True, width=120), tmp_path)
    assert "━" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


@pytest.mark.parametrize("kind", ["no terminal", "quiet"])
def test_elsewhere_there_is_no_bar(tmp_path: Path, kind: str) -> None:
    quiet = kind == "quiet"
    shown = run(Console(file=io.StringIO(), force_terminal=quiet, quiet=quiet), tmp_path)
    assert "━" not in shown
    assert "\x1b" not in shown
    assert bool(shown) != quiet


def test_a_run_that_breaks_leaves_no_bar(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    log = Log(tmp_path, console, tensorboard=False)
    with pytest.raises(KeyboardInterrupt), log.live():
        raise KeyboardInterrupt
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")
