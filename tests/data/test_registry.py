"""The table of data formats: a new one is a file with a source and its config, and one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic.dataclasses import dataclass

from neounify.config.ranges import STRICT, Count
from neounify.data.configs import FORMATS, DataConfig, read_data
from neounify.data.sample import DataError, Sample, SampleText, Turn
from neounify.data.shards import ShardData
from neounify.data.sources import JsonlData
from neounify.errors import ConfigError
from neounify.scenes.world.samples import SceneData
from neounify.train.recipe import Recipe, recipe_from_table
from neounify.train.setup import StageSources


class _Numbers:
    """Questions after numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise DataError(f"there is no sample {index}")
        question = Turn("user", (SampleText(f"{index} + 1?"),))
        return Sample("text", (question, Turn("assistant", (SampleText(str(index + 1), True),))))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NumberData(DataConfig):
    kind: Literal["numbers"] = "numbers"
    size: Count

    def build(self) -> _Numbers:
        return _Numbers(self.size)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "numbers", f"{__name__}:NumberData")


def recipe(*data: Any) -> Recipe:
    stage = {"name": "a", "steps": 1, "data": list(data)}
    return recipe_from_table({"name": "x", "model": {"preset": "scenes"}, "stages": [stage]})


def test_a_new_format_is_drawn_from_like_any_other() -> None:
    described = recipe({"kind": "numbers", "size": 5, "weight": 3}, {"world": "easy"})
    numbers, scenes = described.stages[0].data
    assert numbers == NumberData(size=5, weight=3.0)
    assert scenes == SceneData(world="easy")
    mixture = StageSources(described).of(described.stages[0])
    drawn = [mixture[index] for index in range(40)]
    assert any(sample.text("user") == "4 + 1?" for sample in drawn)


def test_configs_are_read_by_their_kind(tmp_path: Path) -> None:
    assert read_data({}) == SceneData()
    assert read_data({"kind": "jsonl", "path": "x", "ignore": ["a"]}) == JsonlData(
        path="x", ignore=("a",)
    )
    assert read_data({"kind": "shards", "path": "x*.tar"}) == ShardData(path="x*.tar")
    with pytest.raises(DataError, match="is not there"):
        read_data({"kind": "jsonl", "path": str(tmp_path / "none")}).build()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "jsonlines"}, "unknown data 'jsonlines'; did you mean 'jsonl'"),
        (
            {"kind": "arrow"},
            "known are scenes, motion, jsonl, json, csv, parquet, captions",
        ),
        ({"wrold": "easy"}, "data of kind \"scenes\" has no wrold; did you mean 'world'"),
        ({"kind": "numbers", "size": 0}, r"data\.0\.size: must be at least 1, got 0"),
        ({"kind": "numbers", "size": "5"}, r"data\.0\.size: .*integer, got '5'"),
        ({"kind": "numbers"}, r"data\.0\.size: Field required"),
        ("scenes", r'data\.0: must be a table such as \{ kind = "scenes" \}'),
    ],
)
def test_wrong_data_is_one_error_that_says_what_there_is(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(data)
