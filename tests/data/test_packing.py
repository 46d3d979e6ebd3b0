"""Packs: full, complete, apart from each other, and at exactly resumable positions."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neounify.config import MlpConfig, ModelConfig
from neounify.config.presets import SCENES, TINY, U1_8B, U1_A3B
from neounify.data.encode import Encoder
from neounify.data.loader import (
    LoadedPack,
    LoaderConfig,
    Position,
    load_packs,
    make_pack,
)
from neounify.data.packing import Drawn, cost_of, fill_packs, first_fit
from neounify.data.sample import DataError, Sample
from neounify.model.build import meta_model
from neounify.model.layout import Document, Image, Layout, Noise, Text
from neounify.scenes.world import SceneDataset, scene_config
from neounify.text import byte_tokenizer
from neounify.train.speed import attention, layer_weights

TOKENIZER = byte_tokenizer(
    [SceneDataset(9, scene_config("default"))[n].text() for n in range(200)], 400
)
ENCODER = Encoder(config=SCENES, tokenizer=TOKENIZER)
SOURCE = SceneDataset(0, scene_config("default"))
EXPERTS = MlpConfig(
    width=64,
    num_experts=4,
    experts_per_token=2,
    expert_width=16,
    sparse=tuple(n % 2 == 0 for n in range(TINY.num_layers)),
)
SPARSE = TINY.replace(und_mlp=EXPERTS)
PAINTINGS = SceneDataset(0, scene_config("default"), {"t2i": 1.0})


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=60),
    st.integers(50, 120),
    st.integers(50, 120),
)
def test_every_item_lies_in_one_bin_within_both_bounds(
    items: list[tuple[int, int]], capacity: int, bound: int
) -> None:
    bins = first_fit([rows for rows, _ in items], [cost for _, cost in items], capacity, bound)
    assert sorted(item for numbers in bins for item in numbers) == list(range(len(items)))
    for number, earlier in enumerate(bins):
        rows, cost = (sum(items[item][which] for item in earlier) for which in (0, 1))
        assert rows <= capacity
        assert cost <= bound
        # First fit: the costliest item of a later bin would not have fitted an earlier one.
        for later in bins[number + 1 :]:
            before = [i for i in earlier if (-items[i][1], i) < (-items[later[0]][1], later[0])]
            rows, cost = (sum(items[i][which] for i in [*before, later[0]]) for which in (0, 1))
            assert rows > capacity or cost > bound


def test_an_item_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        first_fit([3, 11], [1, 1], 10, 5)
    with pytest.raises(ValueError, match="does not fit"):
        first_fit([3, 4], [1, 6], 10, 5)


def test_packs_cost_no_more_than_their_rows_do_on_average() -> None:
    # Ten cheap and ten dear documents: by rows alone the dear ones would share packs.
    lengths, costs = [50] * 20, [50.0] * 10 + [100.0] * 10
    drawn = Drawn().plus(lengths, costs)
    packs = fill_packs(lengths, costs, 100, drawn)
    assert [sum(costs[n] for n in pack) for pack in packs] == [150.0] * 10
    # What was drawn before counts too: among dearer documents the bound is higher.
    packs = fill_packs(lengths, costs, 100, drawn.plus([10_000], [30_000.0]))
    assert max(sum(costs[n] for n in pack) for pack in packs) == 200.0


@pytest.mark.parametrize(("config", "kappa"), [(U1_8B, 23_552), (U1_A3B, 6_944)])
def test_rows_of_the_published_models_cost_as_many_pairs(config: ModelConfig, kappa: int) -> None:
    assert config.pairs_per_row == kappa
    layout = Layout([Document((Text(5), Image(2, 2), Noise(2, 2)))])
    pairs = 15 + 4 * 9 + 4 * 13
    assert cost_of(layout, kappa) == pytest.approx(13 + pairs / kappa)


@pytest.mark.parametrize("config", [SCENES, TINY, SPARSE])
def test_the_cost_of_a_row_is_that_of_the_models_matrices(config: ModelConfig) -> None:
    model = meta_model(config)
    expected = layer_weights(model, "und") / (attention(config, 1) / 2)
    assert config.pairs_per_row == pytest.approx(expected)


def test_a_pack_is_its_documents_side_by_side() -> None:
    documents = [ENCODER(SOURCE[n], np.random.default_rng(n)) for n in range(12)]
    pack = make_pack(documents)
    assert pack.length == sum(d.length for d in documents)
    assert pack.ids.tolist() == [i for d in documents for i in d.ids]
    first = 0
    rows = []
    for d, (start, stop) in zip(documents, pack.layout["und"].ranges, strict=True):
        assert (start, stop) == (first, first + d.document.und_length())
        rows += [first + row for row in d.label_rows]
        first = stop
    assert pack.label_rows.tolist() == rows
    assert len(pack.targets) == len(pack.layout["gen"].grids) == len(pack.target_tasks)
    assert len(pack.images) == len(pack.layout["und"].grids)


def test_packs_are_at_least_97_percent_full() -> None:
    packs = list(
        islice(load_packs(SOURCE, ENCODER, LoaderConfig(tokens_per_pack=1024, workers=0)), 60)
    )
    assert sum(p.pack.length for p in packs) / (60 * 1024) > 0.97


def test_every_sample_comes_exactly_once() -> None:
    loads = islice(load_packs(SOURCE, ENCODER, LoaderConfig(tokens_per_pack=1024, workers=0)), 50)
    numbers = [int(s.split("-")[-1]) for item in loads for s in item.pack.samples]
    assert len(set(numbers)) == len(numbers)
    # What is missing waits in the packs of the last window, none of an earlier one.
    missing = set(range(max(numbers))) - set(numbers)
    later = islice(
        load_packs(SOURCE, ENCODER, LoaderConfig(tokens_per_pack=1024, workers=0)), 50, 100
    )
    assert missing <= {int(s.split("-")[-1]) for item in later for s in item.pack.samples}


def _signature(item: LoadedPack) -> tuple[object, ...]:
    return (tuple(item.pack.samples), item.pack.ids.tolist(), item.pack.label_rows.tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_position_resumes_exactly(workers: int) -> None:
    config = LoaderConfig(tokens_per_pack=512, workers=workers, streams=2, seed=3)
    whole = list(islice(load_packs(SOURCE, ENCODER, config), 45))
    for stop in (1, 7, 33):
        position = Position.from_json(whole[stop - 1].position.to_json())
        again = list(islice(load_packs(SOURCE, ENCODER, config, position), 45 - stop))
        assert [_signature(i) for i in again] == [_signature(i) for i in whole[stop:]]


def packs_of(count: int, ranks: int, workers: int, **changes: int) -> list[LoadedPack]:
    """The first packs of all ranks together, in the order of the run."""
    config = LoaderConfig(tokens_per_pack=300, workers=workers, streams=4, ranks=ranks, **changes)
    each = [
        islice(load_packs(SOURCE, ENCODER, replace(config, rank=rank)), count // ranks)
        for rank in range(ranks)
    ]
    return [item for together in zip(*each, strict=True) for item in together]


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0), (2, 1), (4, 0), (1, 3)])
def test_neither_ranks_nor_workers_change_a_pack(ranks: int, workers: int) -> None:
    one = [_signature(item) for item in packs_of(24, 1, 0)]
    assert [_signature(item) for item in packs_of(24, ranks, workers)] == one


@pytest.mark.parametrize(
    "parts",
    [
        ((2, 4), (4, 2), (1, 4), (2, 6)),
        # Of other numbers of packs per step: after three packs two ranks begin with the fourth.
        ((1, 3), (2, 4), (4, 3), (2, 4), (1, 1)),
    ],
)
def test_a_run_goes_on_with_another_number_of_ranks(parts: tuple[tuple[int, int], ...]) -> None:
    config = LoaderConfig(tokens_per_pack=300, workers=0, streams=4)
    count = sum(ranks * each for ranks, each in parts)
    whole = [_signature(i) for i in islice(load_packs(SOURCE, ENCODER, config), count)]
    position, seen = None, []
    for ranks, each in parts:
        on = replace(config, ranks=ranks)
        read = [
            list(islice(load_packs(SOURCE, ENCODER, replace(on, rank=r), position), each))
            for r in range(ranks)
        ]
        seen += [_signature(item) for together in zip(*read, strict=True) for item in together]
        position = Position.merged([items[-1].position for items in read])
        position = Position.from_json(position.to_json())
    assert seen == whole


def test_a_position_of_an_earlier_version_is_read() -> None:
    record = {"turn": 1, "workers": [[3, [1], 0], [2, [], 1]]}
    position = Position.from_json(record)
    assert position.to_json() == {"turn": 1, "streams": [[3, [1], 0, 0, 0.0], [2, [], 1, 0, 0.0]]}
    with pytest.raises(DataError, match="damaged"):
        Position.from_json({"turn": 0, "streams": [[7, [1, 3], 2, 5]]})


def test_ranks_that_cannot_share_the_streams_are_refused() -> None:
    config = LoaderConfig(tokens_per_pack=300, workers=0, streams=4, ranks=3)
    with pytest.raises(DataError, match="4 data streams cannot be shared by 3 ranks"):
        next(load_packs(SOURCE, ENCODER, config))


def test_ranks_share_the_samples_out() -> None:
    seen = []
    for rank in range(2):
        config = LoaderConfig(tokens_per_pack=512, workers=0, streams=2, rank=rank, ranks=2)
        packs = islice(load_packs(SOURCE, ENCODER, config), 10)
        seen.append({int(s.split("-")[-1]) for item in packs for s in item.pack.samples})
    assert {n % 2 for n in seen[0]} == {0}
    assert {n % 2 for n in seen[1]} == {1}


class _Damaged:
    """Every third sample is damaged; or all of them."""

    size = None

    def __init__(self, *, every: int) -> None:
        self.every = every

    def __getitem__(self, index: int) -> Sample:
        if index % self.every == 0:
            raise DataError(f"broken {index}")
        return SOURCE[index]


def test_damaged_samples_are_skipped_and_listed() -> None:
    packs = list(
        islice(
            load_packs(_Damaged(every=3), ENCODER, LoaderConfig(tokens_per_pack=512, workers=0)), 10
        )
    )
    listed = [one.message for item in packs for one in item.skipped]
    assert "sample 3: broken 3" in listed
    used = {int(s.split("-")[-1]) for item in packs for s in item.pack.samples}
    assert used
    assert not any(n % 3 == 0 for n in used)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_yields_nothing_is_an_error(workers: int) -> None:
    config = LoaderConfig(tokens_per_pack=512, workers=workers)
    with pytest.raises(DataError, match="cannot be used"):
        next(load_packs(_Damaged(every=1), ENCODER, config))


def test_a_sample_over_the_budget_is_counted_as_damaged() -> None:
    config = LoaderConfig(tokens_per_pack=90, workers=0)
    packs = list(islice(load_packs(SOURCE, ENCODER, config), 40))
    assert any("a pack 90" in one.message for item in packs for one in item.skipped)


@pytest.mark.parametrize(
    "record", [{}, {"turn": 0, "streams": []}, {"turn": 2, "streams": [[0, [], 0]]}, None, 3]
)
def test_damaged_positions_are_refused(record: object) -> None:
    with pytest.raises(DataError, match="position"):
        Position.from_json(record)


def test_another_number_of_streams_is_refused() -> None:
    config = LoaderConfig(tokens_per_pack=512, workers=2, streams=2)
    with pytest.raises(DataError, match="same number"):
        next(load_packs(SOURCE, ENCODER, config, Position.start(1)))


ORPHANS = """
import os, signal
from neounify.data.encode import Encoder
from neounify.data.loader import LoaderConfig, load_packs
from neounify.model.build import meta_model
from neounify.model.layout import Document, Image, Layout, Noise, Text
from neounify.scenes.world import SceneDataset, scene_config
from neounify.config import MlpConfig, ModelConfig
from neounify.config.presets import SCENES, TINY, U1_8B, U1_A3B
from neounify.text import byte_tokenizer
from neounify.train.speed import attention, layer_weights

if __name__ == "__main__":
    encoder = Encoder(config=SCENES, tokenizer=byte_tokenizer())
    source = SceneDataset(0, scene_config("easy"), {"text": 1})
    packs = load_packs(source, encoder, LoaderConfig(tokens_per_pack=512, workers=1))
    next(packs)
    print("reading", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_killed_trainer_end_too(tmp_path: Path) -> None:
    script = tmp_path / "reads.py"
    script.write_text(ORPHANS)
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, start_new_session=True
    )
    said, _ = process.communicate(timeout=120)
    assert said == b"reading\n"
    for _ in range(200):
        left = subprocess.run(["ps", "--no-headers", "-g", str(process.pid)], capture_output=True)
        if not left.stdout.strip():
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {left.stdout.decode()}")


def test_a_image_with_several_draws_of_noise_is_sent_once() -> None:
    encoder = replace(ENCODER, noise_draws=3)
    pack = make_pack([encoder(PAINTINGS[n], np.random.default_rng(n)) for n in range(12)])
    assert len(pack.targets) == 36
    sent = pickle.loads(pickle.dumps(pack))
    assert len({id(image) for image in sent.targets}) == 12
    assert all(map(np.array_equal, sent.targets, pack.targets))
