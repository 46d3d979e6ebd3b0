"""Finite data without end: every epoch whole and in its own order, exact resume, clear errors."""

from __future__ import annotations

import time
from collections import Counter, deque
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import pytest

from neounify.config.presets import SCENES
from neounify.data.encode import Encoder
from neounify.data.loader import LoadedPack, LoaderConfig, Position, check_sources, load_packs
from neounify.data.sample import DataError, Sample
from neounify.data.shards import ShardData
from neounify.data.sources import JsonlData, JsonlSource, Mixture, SampleSource
from neounify.scenes.world import SceneDataset, scene_config
from neounify.scenes.world.samples import SceneData
from neounify.text import byte_tokenizer
from neounify.train.progress import Tally
from support.own_data import paint_record, png, text_record, write_lines, write_tar
from support.samples import build_mixture

ENCODER = Encoder(config=SCENES, tokenizer=byte_tokenizer())


def lines(folder: Path, count: int = 3) -> SampleSource:
    records = [text_record(f"question {n}", id=f"s{n}") for n in range(count)]
    write_lines(folder / "d.jsonl", records)
    return build_mixture([JsonlData(path=str(folder / "d.jsonl"))], 0)


def shard(folder: Path) -> SampleSource:
    members: dict[str, bytes] = {}
    for n in range(3):
        members |= {f"s{n}.png": png(64, 64, n), f"s{n}.txt": b"noise"}
    write_tar(folder / "d.tar", members)
    return build_mixture([ShardData(path=str(folder / "d.tar"))], 0)


def samples(loaded: list[LoadedPack]) -> list[str]:
    return [name for item in loaded for name in item.pack.samples]


@pytest.mark.parametrize("make", [lines, shard])
@pytest.mark.parametrize("workers", [0, 2])
def test_data_smaller_than_one_filling_goes_round(
    tmp_path: Path, make: type[SampleSource], workers: int
) -> None:
    config = LoaderConfig(tokens_per_pack=256, workers=workers, streams=2)
    loaded = list(islice(load_packs(make(tmp_path), ENCODER, config), 40))  # type: ignore[call-arg]
    drawn = Counter(samples(loaded))
    assert len(drawn) == 3
    # First-fit moves samples between packs, and some wait in the last window.
    assert min(drawn.values()) >= 0.6 * max(drawn.values()) > 2


def test_every_epoch_is_whole_and_in_its_own_order(tmp_path: Path) -> None:
    source = lines(tmp_path, 12)
    ids = [source[n].id for n in range(60)]
    epochs = [tuple(ids[12 * e : 12 * e + 12]) for e in range(5)]
    assert all(len(set(epoch)) == 12 for epoch in epochs)
    assert len(set(epochs)) == 5
    assert ids == [source[n].id for n in range(60)]


def test_ranks_and_workers_share_an_epoch_out(tmp_path: Path) -> None:
    source = lines(tmp_path, 8)
    drawn: Counter[str] = Counter()
    for rank in range(2):
        config = LoaderConfig(tokens_per_pack=64, workers=0, streams=2, rank=rank, ranks=2)
        drawn.update(samples(list(islice(load_packs(source, ENCODER, config), 200))))
    assert len(drawn) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_any_epoch_is_exact(tmp_path: Path, workers: int) -> None:
    write_lines(tmp_path / "d.jsonl", ["{broken", *(text_record(f"q{n}") for n in range(4))])
    source = JsonlSource(tmp_path / "d.jsonl")
    config = LoaderConfig(tokens_per_pack=100, workers=workers, streams=2, seed=5)
    whole = list(islice(load_packs(source, ENCODER, config), 36))
    for stop in (1, 5, 23):
        position = Position.from_json(whole[stop - 1].position.to_json())
        again = list(islice(load_packs(source, ENCODER, config, position), 36 - stop))
        assert [item.pack.ids.tolist() for item in again] == [
            item.pack.ids.tolist() for item in whole[stop:]
        ]
        # What was skipped before the stop is not counted again after it.
        assert [item.skipped for item in again] == [item.skipped for item in whole[stop:]]


def test_a_damaged_sample_is_new_once_and_then_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [text_record("a"), "{broken", text_record("b")])
    mixture = Mixture([(JsonlSource(tmp_path / "d.jsonl"), 1.0)], 0)
    loaded = list(
        islice(load_packs(mixture, ENCODER, LoaderConfig(tokens_per_pack=64, workers=0)), 40)
    )
    tally = Tally(mixture.sources)
    new = [one for item in loaded for one in tally.add([item])]
    assert [one.message.count("d.jsonl, line 2") for one in new] == [1]
    assert tally.skipped[0] > 5
    assert tally.by_source() == {"d.jsonl": 1}
    assert "2 of 3 samples usable (67 %), 1 listed in skipped.txt" in tally.summary()[0]
    again = Tally(mixture.sources)
    again.load(tally.to_json())
    assert again.add(loaded) == []


def test_an_endless_source_keeps_its_order() -> None:
    scenes = SceneDataset(0, scene_config("easy"))
    mixture = build_mixture([SceneData(world="easy")], 9)
    assert [mixture[n].id for n in (0, 1, 1500)] == [scenes[n].id for n in (0, 1, 1500)]


class _Faulty:
    """Sample 5 raises what no source should raise."""

    size = None

    def __getitem__(self, index: int) -> Sample:
        if index == 5:
            raise KeyError("colour")
        return SceneDataset(0, scene_config("easy"), {"text": 1.0})[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unexpected_error_of_one_sample_is_named_and_skipped(workers: int) -> None:
    packs = load_packs(_Faulty(), ENCODER, LoaderConfig(tokens_per_pack=512, workers=workers))
    messages = [one.message for item in islice(packs, 3) for one in item.skipped]
    assert messages == ["sample 5: KeyError: 'colour'"]


def test_a_worker_that_is_killed_ends_loading_with_one_message() -> None:
    source = SceneDataset(0, scene_config("easy"), {"text": 1.0})
    before = set(active_children())
    packs = load_packs(source, ENCODER, LoaderConfig(tokens_per_pack=128, workers=1, prefetch=1))
    next(packs)
    (worker,) = set(active_children()) - before
    worker.kill()
    began = time.monotonic()
    with pytest.raises(DataError, match="a process that loads data has failed") as raised:
        deque(packs, maxlen=0)
    assert time.monotonic() - began < 120
    assert "\n" not in str(raised.value)


def test_a_source_without_a_usable_sample_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "bad.jsonl", [paint_record("x", "none.png") for _ in range(70)])
    write_lines(tmp_path / "good.jsonl", [text_record("x")])
    recipes = [JsonlData(path=str(tmp_path / f"{name}.jsonl")) for name in ("good", "bad")]
    with pytest.raises(DataError, match=r"bad\.jsonl: cannot use any of 50 of 70 .*none\.png"):
        check_sources(build_mixture(recipes, 0), ENCODER)
    check_sources(build_mixture(recipes[:1], 0), ENCODER)


def test_one_usable_sample_among_the_first_is_enough(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [*["{broken"] * 20, text_record("x")])
    check_sources(Mixture([(JsonlSource(tmp_path / "d.jsonl"), 1.0)], 0), ENCODER)


def test_a_sample_longer_than_a_pack_is_reported_with_both_ways_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(512, 512))
    short = Encoder(config=SCENES, tokenizer=byte_tokenizer(), max_tokens=200)
    for record, setting in (
        (paint_record("x", "a.png"), "bound images by target_pixels"),
        (text_record("<image>what?", image="a.png"), "bound images by input_pixels"),
        (text_record("word " * 300), "split the record"),
    ):
        write_lines(tmp_path / "d.jsonl", [record])
        mixture = Mixture([(JsonlSource(tmp_path / "d.jsonl"), 1.0)], 0)
        with pytest.raises(DataError, match=setting) as raised:
            check_sources(mixture, short)
        for part in ("tokens_per_pack 200", "Raise tokens_per_pack to at least", "line 1"):
            assert part in str(raised.value)
