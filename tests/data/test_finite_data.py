"""Finite data without end: every epoch whole and in its own order, exact resume, clear errors."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import pytest

from neounify.config.presets import SCENES
from neounify.data.arrays import JsonData
from neounify.data.encode import Encoder
from neounify.data.folders import CaptionData
from neounify.data.loader import LoadedPack, LoaderConfig, Position, check_sources, load_packs
from neounify.data.parquet import ParquetData
from neounify.data.reasons import reason_of
from neounify.data.sample import DataError, Sample
from neounify.data.shards import ShardData
from neounify.data.sources import JsonlData, JsonlSource, Mixture, SampleSource
from neounify.data.tables import CsvData
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
    (reason,) = tally.by_source()["d.jsonl"]
    assert reason.startswith("not JSON: ")
    assert tally.by_source() == {"d.jsonl": {reason: 1}}
    assert "2 of 3 samples usable (67 %), 1 listed in skipped.txt" in tally.summary()[0]
    assert tally.summary()[0].endswith(f"epochs: 1 {reason}")
    again = Tally(mixture.sources)
    again.load(tally.to_json())
    assert again.by_source() == tally.by_source()
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


def test_more_damaged_samples_than_the_recipe_allows_end_the_run(tmp_path: Path) -> None:
    broken = [text_record("a", imgae="x"), {"text": "b"}]
    write_lines(tmp_path / "d.jsonl", [*(text_record(f"q{n}") for n in range(8)), *broken])
    data = JsonlData(path=str(tmp_path / "d.jsonl"), max_skipped=0.15)
    mixture = build_mixture([data], 0)
    loaded = load_packs(mixture, ENCODER, LoaderConfig(tokens_per_pack=64, workers=0))
    tally = Tally(mixture.sources, [data])
    few = Tally(mixture.sources, [JsonlData(path="x", max_skipped=0.2)])
    for item in islice(loaded, 40):
        tally.add([item])
        few.add([item])
    few.check()
    words = r"d\.jsonl: 2 of 10 samples cannot be used \(20\.0%\).*max_skipped allows \(15\.0%\)"
    with pytest.raises(DataError, match=words) as raised:
        tally.check()
    assert "1 unknown field …; did you mean …" in str(raised.value)
    assert "1 a record of no known form" in str(raised.value)


def test_reasons_have_no_names_and_numbers() -> None:
    for message, reason in (
        ("the image 'a.png' has 1,234.5 pixels. Make it smaller", "the image … has N pixels"),
        ('a field "x" of 3', "a field … of N"),
        ("", "DataError"),
        ("x" * 1000, "x" * 99 + "…"),
    ):
        assert reason_of(DataError(message)) == reason
    assert reason_of(DataError("a.png: broken", "broken")) == "broken"
    assert reason_of(FileNotFoundError(2, "No such file", "/a/b")) == "No such file"


def table_of_rows(folder: Path) -> SampleSource:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"query": f"question {n}", "response": "yes", "id": f"s{n}"} for n in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet", row_group_size=3)
    return build_mixture([ParquetData(path=str(folder / "d.parquet"))], 0)


def array_of_records(folder: Path) -> SampleSource:
    records = [text_record(f"question {n}", id=f"s{n}") for n in range(40)]
    (folder / "d.json").write_text(json.dumps(records))
    return build_mixture([JsonData(path=str(folder / "d.json"))], 0)


def folder_of_captions(folder: Path) -> SampleSource:
    for n in range(12):
        (folder / f"s{n}.png").write_bytes(png(32, 32, n))
        (folder / f"s{n}.txt").write_text(f"noise {n}")
    return build_mixture([CaptionData(path=str(folder))], 0)


def rows_of_csv(folder: Path) -> SampleSource:
    (folder / "a.png").write_bytes(png())
    lines = "".join(f'a.png,"a wall,\n{n}",s{n}\n' for n in range(40))
    (folder / "d.csv").write_text("file_name,text,id\n" + lines)
    return build_mixture([CsvData(path=str(folder / "d.csv"))], 0)


@pytest.mark.parametrize("make", [table_of_rows, array_of_records, folder_of_captions, rows_of_csv])
def test_the_order_is_the_same_for_any_ranks_and_workers_and_resumes(
    tmp_path: Path, make: type[SampleSource]
) -> None:
    source = make(tmp_path)  # type: ignore[call-arg]
    alone = LoaderConfig(tokens_per_pack=192, streams=2, seed=5, workers=0)
    whole = [samples([item]) for item in islice(load_packs(source, ENCODER, alone), 24)]
    with_workers = replace(alone, workers=2)
    loaded = list(islice(load_packs(source, ENCODER, with_workers), 24))
    assert [samples([item]) for item in loaded] == whole
    position = Position.from_json(loaded[9].position.to_json())
    resumed = islice(load_packs(source, ENCODER, with_workers, position), 14)
    assert [samples([item]) for item in resumed] == whole[10:]
    for rank in range(2):
        config = replace(alone, rank=rank, ranks=2)
        mine = islice(load_packs(source, ENCODER, config), 12)
        assert [samples([item]) for item in mine] == whole[rank::2]
