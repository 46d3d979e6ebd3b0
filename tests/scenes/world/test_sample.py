"""The sample type and the published JSONL schema."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neounify.data import (
    DataError,
    Part,
    RecordRules,
    Sample,
    SampleImage,
    SampleText,
    Turn,
    sample_from_record,
    sample_to_record,
)
from neounify.errors import NeounifyError
from support.samples import write_sample

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def make(
    task: str, user: Iterable[Part], assistant: Iterable[Part], system: str | None = None
) -> Sample:
    turns = [Turn("user", tuple(user)), Turn("assistant", tuple(assistant))]
    if system:
        turns.insert(0, Turn("system", (SampleText(system),)))
    return Sample(task, tuple(turns))


def path_of(part: SampleImage) -> Path:
    assert isinstance(part.image, Path)
    return part.image


def edit_sample() -> Sample:
    return make(
        "edit_think",
        [SampleImage(PIXELS, "input"), SampleText("\nMake it red.")],
        [SampleText("<think>\nred\n</think>\n\n", loss=True), SampleImage(PIXELS, "target")],
        system="Paint.",
    )


def test_data_error_is_one_of_ours() -> None:
    assert issubclass(DataError, NeounifyError)
    assert issubclass(DataError, ValueError)


def test_a_sample_written_and_read_is_the_same(tmp_path: Path) -> None:
    record = write_sample(edit_sample(), tmp_path, "a")
    assert record["image"] == ["a-0.png", "a-1.png"]
    assert [c["from"] for c in record["conversations"]] == ["system", "human", "gpt"]
    assert record["conversations"][1]["value"] == "<image>\nMake it red."
    assert "loss" not in record
    again = sample_from_record(json.loads(json.dumps(record)), tmp_path)
    assert again.task == "edit_think"
    assert again.text() == edit_sample().text()
    flags = [[part.loss for part in turn.parts] for turn in again.turns]
    assert flags == [[False], [False, False], [True, True]]
    for part in again.images:
        assert (np.asarray(Image.open(path_of(part))) == PIXELS).all()


def test_pil_images_are_written_too(tmp_path: Path) -> None:
    sample = make("t2i", [SampleText("a")], [SampleImage(Image.fromarray(PIXELS), "target")])
    write_sample(sample, tmp_path, "b")
    assert (np.asarray(Image.open(tmp_path / "b-0.png")) == PIXELS).all()


def test_images_that_are_files_keep_their_paths(tmp_path: Path) -> None:
    record = write_sample(edit_sample(), tmp_path, "a")
    again = sample_from_record(record, tmp_path)
    assert write_sample(again, tmp_path, "c")["image"] == [
        str(tmp_path / n) for n in record["image"]
    ]
    assert not (tmp_path / "c-0.png").exists()


def test_loss_flags_that_differ_from_the_rule_survive(tmp_path: Path) -> None:
    sample = make(
        "interleave",
        [SampleText("go")],
        [
            SampleImage(PIXELS, "input"),
            SampleText("no loss"),
            SampleImage(PIXELS, "target"),
            SampleText("x", True),
        ],
    )
    record = write_sample(sample, tmp_path, "d")
    assert record["loss"] == [[False], [False, False, True, True]]
    again = sample_from_record(record, tmp_path)
    assert [p.loss for p in again.turns[1].parts] == [False, False, True, True]


@pytest.mark.parametrize(
    ("conversations", "images", "task"),
    [
        ([("human", "a cat"), ("gpt", "<image>")], "x.png", "t2i"),
        ([("human", "a cat"), ("gpt", "<think>\nhm\n</think>\n\n<image>")], ["x.png"], "t2i_think"),
        ([("human", "<image>\nWhat?"), ("gpt", "a cat")], ["x.png"], "vqa"),
        ([("human", "What?"), ("gpt", "a cat")], ["x.png"], "vqa"),
        ([("human", "<image>\nbluer"), ("gpt", "<image>")], ["x.png", "y.png"], "edit"),
        ([("human", "tell"), ("gpt", "one <image> two <image>")], ["x.png", "y.png"], "interleave"),
        ([("system", "s"), ("human", "1+1"), ("gpt", "2")], None, "text"),
    ],
)
def test_published_records_are_read(
    tmp_path: Path, conversations: list[tuple[str, str]], images: Any, task: str
) -> None:
    turns = [{"from": speaker, "value": value} for speaker, value in conversations]
    record: dict[str, Any] = {"conversations": turns, "id": 5}
    if images is not None:
        record["image"] = images
    sample = sample_from_record(record, tmp_path)
    assert sample.task == task
    assert sample.id == "5"
    for part in sample.images:
        assert path_of(part).parent == tmp_path


def test_published_task_names_are_known(tmp_path: Path) -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "<image>\nbluer"},
            {"from": "gpt", "value": "<image>"},
        ],
        "image": ["a.png", "b.png"],
    }
    assert sample_from_record(record, tmp_path, RecordRules(task="it2i")).task == "edit"
    assert sample_from_record({**record, "task": "mm_it2i"}, tmp_path).task == "edit"


GOOD: dict[str, Any] = {
    "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}],
    "image": ["a.png"],
}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "not an object"),
        ({}, "conversations"),
        ({"conversations": []}, "conversations"),
        ({**GOOD, "conversations": ["hello"]}, "value"),
        ({**GOOD, "conversations": [{"from": "alien", "value": "a"}]}, "alien"),
        ({**GOOD, "image": 7}, "path"),
        ({**GOOD, "image": []}, "marks"),
        ({**GOOD, "task": "dance"}, "dance"),
        ({**GOOD, "task": 3}, "task"),
        ({**GOOD, "loss": [True]}, "loss"),
        ({**GOOD, "loss": [[False], [True, True]]}, "booleans"),
        ({**GOOD, "loss": [[False], [False]]}, "nothing to train on"),
        ({**GOOD, "conversations": GOOD["conversations"][:1], "image": []}, "alternating"),
        ({"conversations": GOOD["conversations"][::-1], "image": ["a.png"]}, "alternating"),
    ],
)
def test_broken_records_are_one_clear_error(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sample_from_record(record, tmp_path)


def test_parts_that_make_no_sense_are_errors() -> None:
    with pytest.raises(DataError, match="empty"):
        SampleText("")
    with pytest.raises(DataError, match="<image>"):
        SampleText("see <image>")
    with pytest.raises(DataError, match="role"):
        SampleImage(PIXELS, "output")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="float32"):
        SampleImage(PIXELS.astype(np.float32), "input")
    with pytest.raises(DataError, match="uint8"):
        SampleImage(PIXELS[..., 0], "input")
    with pytest.raises(DataError, match="str"):
        SampleImage("a.png", "input")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="RGBA"):
        SampleImage(Image.new("RGBA", (4, 4)), "input")
    with pytest.raises(DataError, match="not been read"):
        SampleImage(Path("a.png"), "input").pixels()
    with pytest.raises(DataError, match="user turn"):
        Turn("user", (SampleText("a", loss=True),))
    with pytest.raises(DataError, match="role"):
        Turn("narrator", ())  # type: ignore[arg-type]


def test_paths_must_match_the_images() -> None:
    with pytest.raises(DataError, match="2 images"):
        sample_to_record(edit_sample(), ["one.png"])


def test_adjacent_texts_with_different_losses_cannot_be_written() -> None:
    sample = make("text", [SampleText("a")], [SampleText("b"), SampleText("c", loss=True)])
    with pytest.raises(DataError, match="adjacent text parts"):
        sample_to_record(sample, [])
