"""Operations of the benchmark's figures, and the table of the recorded run."""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.__main__ import redrawn
from benchmarks.counting import denoise, prefill
from benchmarks.speed import GRIDS, PREFIXES, operations

from neounify.config.presets import BENCH
from neounify.model import Image, Text
from neounify.model.build import meta_model
from neounify.model.layout import Grid
from neounify.train.speed import attention

ROOT = Path(__file__).parents[2]


def test_only_visible_pairs_count() -> None:
    model = meta_model(BENCH)
    once, twice = (prefill(model, [Text(n)]) for n in (100, 200))
    logits = 2 * BENCH.vocab_size * BENCH.hidden_size
    # Weights grow with the tokens; what is left of twice is 200 · 201 / 2 - 2 · 100 · 101 / 2.
    assert twice - 2 * once + logits == attention(BENCH, 100 * 100)
    apart = prefill(model, [Text(4), Image(2, 3), Text(5)])
    joined = prefill(model, [Text(9), Image(2, 3)])
    # The image is seen by the text behind it, or sees it in front: the same pairs.
    assert apart == joined
    behind = [denoise(model, Grid(2, 2), [n]) for n in (0, 7)]
    assert behind[1] - behind[0] == attention(BENCH, 4 * 7)


def test_a_step_counts_its_branches() -> None:
    model = meta_model(BENCH)
    name, grid = next(iter(GRIDS.items()))
    single = [denoise(model, grid, [n]) for n in PREFIXES]
    assert max(single) < operations(model, name) < sum(single)


def test_the_table_of_the_docs_is_that_of_the_record(tmp_path: Path) -> None:
    record = ROOT / "benchmarks/results/cpu-2-cores.json"
    copy = shutil.copy(record, tmp_path / "figures.json")
    table = redrawn(Path(copy))
    assert table in (ROOT / "docs/benchmarks.md").read_text()
    assert Path(copy).read_text() == record.read_text()
