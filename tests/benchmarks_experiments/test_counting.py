"""Operations of the benchmark's figures, and the table of the recorded run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from benchmarks.__main__ import redrawn
from benchmarks.counting import denoise, operators, prefill
from benchmarks.speed import GRIDS, PREFIXES, decoding, operations

from neounify.cache.key_values import new_paged_cache
from neounify.config.presets import BENCH
from neounify.engine.messages import LocalTransport
from neounify.engine.sequences import PagedCaches
from neounify.model import Image, NeoUnify, Text
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


@pytest.mark.parametrize("paged", [False, True])
def test_operators_of_a_decoding_step(paged: bool) -> None:
    """A layer runs 51 operators for a token, 57 on a paged cache; the rest of a step some 50."""
    counts = {}
    for layers in (2, 4):
        model = NeoUnify(BENCH.replace(num_layers=layers)).requires_grad_(False).eval()
        model.fuse()
        with torch.inference_mode():
            pool = new_paged_cache(model, 16, 16)
            caches = PagedCaches(pool, LocalTransport()) if paged else None
            engine = decoding(model, 1, caches)
            counts[layers] = operators(engine.step)
    more = counts[4] - counts[2]
    assert more <= 2 * (57 if paged else 51)
    assert counts[2] - more <= 56


def test_the_table_of_the_docs_is_that_of_the_record(tmp_path: Path) -> None:
    record = ROOT / "benchmarks/results/cpu-2-cores.json"
    copy = shutil.copy(record, tmp_path / "figures.json")
    table = redrawn(Path(copy))
    assert table in (ROOT / "docs/benchmarks.md").read_text()
    assert Path(copy).read_text() == record.read_text()
