"""Stored data: what was written is read back, damage is named and never fatal."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neounify.data.records import RecordRules
from neounify.data.sample import DataError, Sample, SampleImage, SampleText, Turn
from neounify.data.shards import ShardSource
from neounify.data.sizes import crop_to, nearest_bucket
from neounify.data.sources import BLOCK, JsonlSource, Mixture, SampleSource
from neounify.image import TRAINING_BUCKETS
from neounify.scenes.world import SceneDataset, scene_config
from support.samples import write_sample, write_shard

SCENES = SceneDataset(0, scene_config("default"))
GOOD = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
PAINT = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}]}
SAMPLES = [SCENES[n] for n in range(12)]


def shape(sample: Sample) -> object:
    """All of a sample, comparable."""
    return sample.task, [(turn.role, _parts(turn)) for turn in sample.turns]


def _parts(turn: Turn) -> list[object]:
    """Parts, text that touches joined, as the published schema joins it."""
    content: list[object] = []
    for touching, parts in groupby(turn.parts, key=lambda part: isinstance(part, SampleText)):
        if touching:
            texts = [p for p in parts if isinstance(p, SampleText)]
            content.append(("".join(p.text for p in texts), texts[0].loss))
        else:
            content += [(p.role, p.pixels().tolist()) for p in parts if isinstance(p, SampleImage)]
    return content


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [write_sample(s, tmp_path, f"s{n}") for n, s in enumerate(SAMPLES)]
    text = "\n\n".join(json.dumps(r, ensure_ascii=False) for r in records)
    (tmp_path / "data.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def test_json_lines_come_back_as_written(folder: Path) -> None:
    source = JsonlSource(folder)
    assert isinstance(source, SampleSource)
    assert source.size == 12
    for n in (5, *reversed(range(12))):
        assert shape(source[n]) == shape(SAMPLES[n])
    again = pickle.loads(pickle.dumps(source))
    assert shape(again[3]) == shape(SAMPLES[3])


def test_shards_come_back_as_written(tmp_path: Path) -> None:
    write_shard(SAMPLES[:7], tmp_path / "a.tar")
    write_shard(SAMPLES[7:], tmp_path / "b.tar")
    source = ShardSource([tmp_path / "a.tar", tmp_path / "b.tar"])
    assert isinstance(source, SampleSource)
    assert source.size == 12
    assert [shape(source[n]) for n in range(12)] == [shape(s) for s in SAMPLES]
    assert source.damage == []
    renamed = ShardSource([tmp_path / "a.tar"], rules=RecordRules(task="interleave"))
    assert {renamed[n].task for n in range(7)} == {"interleave"}


def _tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def _png() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def test_pairs_of_image_and_caption_are_text_to_image_samples(tmp_path: Path) -> None:
    _tar(tmp_path / "a.tar", {"x/1.png": _png(), "x/1.txt": b" a red wall\n"})
    sample = ShardSource([tmp_path / "a.tar"])[0]
    assert sample.task == "t2i"
    assert sample.text("user") == "a red wall"
    assert sample.images[0].pixels().shape == (10, 20, 3)


def test_a_cut_off_shard_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    write_shard(SAMPLES, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 7])
    source = ShardSource([path])
    assert 3 < source.size <= 12
    assert shape(source[0]) == shape(SAMPLES[0])
    with pytest.raises(DataError, match=r"a\.tar"):
        _ = [source[n] for n in range(source.size)]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.json": b"{"}, "1: "),
        ({"1.json": b"[" * 100_000}, "1: "),
        ({"1.txt": b"words"}, "neither a json record nor an image"),
        ({"1.png": b"no image", "1.txt": b"x"}, r"1\.png"),
        (
            {"1.json": json.dumps({**PAINT, "image": ["../../etc/passwd"]}).encode()},
            "not in the shard",
        ),
    ],
)
def test_damaged_members_are_named(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    _tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        ShardSource([tmp_path / "a.tar"])[0]


def test_shards_without_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample"):
        ShardSource([])
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b not a tar")
    with pytest.raises(DataError, match="uncompressed tar"):
        ShardSource([tmp_path / "a.tar"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2"),
        ("[1]", "line 2: a record is a JSON list"),
        ('{"conversations": []}', "line 2"),
        (json.dumps({**GOOD, "task": "sing"}), "line 2: the task 'sing' is unknown"),
        (json.dumps({**PAINT, "image": "none.png"}), "line 2: .*none.png"),
        (json.dumps({**PAINT, "image": "../outside.png"}), "line 2: .*outside the data folder"),
        (json.dumps({**PAINT, "image": "/etc/passwd"}), "line 2: .*outside the data folder"),
        (json.dumps({**PAINT, "image": "broken.png"}), "line 2: .*broken.png"),
        (json.dumps({**PAINT, "image": "empty.png"}), "line 2: .*empty.png"),
        (json.dumps({**PAINT, "image": "half.png"}), "line 2: .*half.png"),
        (json.dumps({**PAINT, "image": "link.png"}), "line 2: .*outside the data folder"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_damaged_line_is_named_and_others_stay(tmp_path: Path, line: str, message: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "outside.png").write_bytes(_png())
    (folder / "broken.png").write_bytes(b"\x89PNG broken")
    (folder / "empty.png").write_bytes(b"")
    (folder / "half.png").write_bytes(_png()[:300])
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "d.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}")
    source = JsonlSource(folder)
    with pytest.raises(DataError, match=message):
        source[1]
    assert source[0].task == source[2].task == "text"


def test_data_without_lines_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not there"):
        JsonlSource(tmp_path / "none")
    with pytest.raises(DataError, match="holds no data: no files"):
        JsonlSource(tmp_path)
    (tmp_path / "e.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match="holds no samples"):
        JsonlSource(tmp_path)


class _Counted:
    def __init__(self, size: int | None) -> None:
        self.size = size

    def __getitem__(self, index: int) -> Sample:
        turns = (
            Turn("user", (SampleText("x"),)),
            Turn("assistant", (SampleText(str(index), loss=True),)),
        )
        return Sample("text", turns)


def test_a_mixture_keeps_its_weights_in_every_block() -> None:
    mixture = Mixture([(_Counted(7), 3.0), (_Counted(None), 1.0), (_Counted(1), 1e-9)], seed=4)
    for block in range(3):
        drawn = Counter(mixture.describe(block * BLOCK + n)[0] for n in range(BLOCK))
        assert drawn == {0: 767, 1: 256, 2: 1}


def test_a_mixture_goes_through_a_source_before_it_starts_again() -> None:
    mixture = Mixture([(_Counted(7), 3.0), (_Counted(None), 1.0)], seed=4)
    drawn = [mixture.describe(n) for n in range(2 * BLOCK)]
    first = [number for source, number in drawn if source == 0]
    for epoch in range(len(first) // 7):
        assert sorted(first[epoch * 7 : epoch * 7 + 7]) == list(range(7))
    endless = [number for source, number in drawn if source == 1]
    assert endless == list(range(len(endless)))


def test_a_mixture_is_a_function_of_seed_and_number() -> None:
    make = lambda seed: Mixture([(_Counted(50), 1.0), (_Counted(None), 1.0)], seed)  # noqa: E731
    forward = [make(1).describe(n) for n in range(300)]
    one = pickle.loads(pickle.dumps(make(1)))
    assert [one.describe(n) for n in reversed(range(300))] == forward[::-1]
    assert [make(2).describe(n) for n in range(300)] != forward


@pytest.mark.parametrize("weights", [[], [0.0], [-1.0, 2.0], [float("nan")]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match="weights above 0"):
        Mixture([(_Counted(3), w) for w in weights], 0)


def test_buckets_are_chosen_by_shape_and_filled() -> None:
    assert nearest_bucket(1000, 1000, TRAINING_BUCKETS) == (2048, 2048)
    assert nearest_bucket(1920, 1080, TRAINING_BUCKETS) == (2720, 1536)
    assert nearest_bucket(100, 900, TRAINING_BUCKETS) == (1152, 3456)
    assert nearest_bucket(60, 60, [(64, 64), (128, 128)]) == (64, 64)
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 255
    cut = np.asarray(crop_to(Image.fromarray(image), (32, 32)))
    assert cut.shape == (32, 32, 3)
    assert (cut[:, 2:-2] == 255).all()
