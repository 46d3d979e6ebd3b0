"""Forms of records of other tools: what each becomes, and what of them is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from neounify.data.configs import read_data
from neounify.data.forms import FORMS, KEYS, form_of
from neounify.data.records import RecordRules, sample_from_record
from neounify.data.sample import DataError, Sample, SampleText
from neounify.data.sources import JsonlSource
from support.own_data import png, write_lines

HERE = Path("folder")


def read(record: dict[str, Any], **rules: Any) -> Sample:
    return sample_from_record(record, HERE, RecordRules(**rules))


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.value) for turn in sample.turns]


def names(sample: Sample) -> list[str]:
    return [Path(str(part.image)).relative_to(HERE).as_posix() for part in sample.images]


def ask(question: Any, answer: Any = "Red.", **fields: Any) -> dict[str, Any]:
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": chat, **fields}


QUESTION = [("user", "<image>Which colour?"), ("assistant", "Red.")]
TEXT, IMAGE = {"type": "text", "text": "Which colour?"}, {"type": "image"}


@pytest.mark.parametrize(
    "record",
    [
        ask("<image>Which colour?", images=["a.png"]),
        ask("<image>Which colour?", image="a.png"),
        ask([IMAGE, TEXT], images=["a.png"]),
        ask([IMAGE, TEXT], [{"type": "text", "text": "Red."}], images=["a.png"]),
        ask([{"type": "image", "text": None, "index": 0}, {**TEXT, "index": None}], image="a.png"),
        ask([{"type": "image", "image": "a.png"}, TEXT]),
        ask([{"type": "image", "path": "a.png"}, "Which colour?"]),
        ask([{"type": "image", "url": "file://a.png"}, TEXT]),
        ask([{"type": "image_url", "image_url": {"url": "a.png"}}, TEXT]),
        {"conversations": ask("<image>Which colour?")["messages"], "images": ["a.png"]},
        {"query": "<image>Which colour?", "response": "Red.", "images": ["a.png"]},
        {"instruction": "<image>Which colour?", "input": "", "output": "Red.", "images": ["a.png"]},
    ],
)
def test_one_question_in_every_form(record: dict[str, Any]) -> None:
    sample = read(record)
    assert turns(sample) == QUESTION
    assert (sample.task, names(sample)) == ("vqa", ["a.png"])
    assert [part.loss for turn in sample.turns for part in turn.parts] == [False, False, True]


def test_images_of_parts_may_stand_in_any_order() -> None:
    second, first = {"type": "image", "index": 1}, {"type": "image", "index": 0}
    sample = read(ask([second, TEXT, first], images=["a.png", "b.png"]))
    assert names(sample) == ["b.png", "a.png"]
    painted = read(ask("red", [{"type": "image", "image": "a.png"}]))
    assert (painted.task, painted.images[0].role) == ("t2i", "target")


def test_a_message_without_loss_is_not_trained_on() -> None:
    record = ask("a", "b")
    record["messages"] += ask("c", "d")["messages"]
    record["messages"][1]["loss"] = False
    losses = [part.loss for turn in read(record).turns for part in turn.parts]
    assert losses == [False, False, False, True]
    record["messages"][1]["loss"] = 0.5
    with pytest.raises(DataError, match=r'"loss" of a message must be true or false, got 0\.5'):
        read(record)


def test_earlier_turns_come_first() -> None:
    record: dict[str, Any] = {
        "instruction": "Translate.",
        "input": "rot",
        "output": "red",
        "system": "Be brief.",
        "history": [["Hi", "Hello"]],
    }
    expected = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Translate.\nrot"),
        ("assistant", "red"),
    ]
    assert turns(read(record)) == expected
    shared = {name: record[name] for name in ("system", "history")}
    query = {"query": "Translate.\nrot", "response": "red", **shared}
    assert turns(read(query)) == expected


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (ask("a", tools=[{"name": "x"}]), 'unknown field "tools"'),
        (ask("a", rejected_response="no"), 'unknown field "rejected_response"'),
        (ask("a", audios=["a.mp3"]), '"audios": only text, images and clips'),
        (ask("a", objects={"bbox": [[1, 2, 3, 4]]}), 'unknown field "objects"'),
        ({"messages": []}, "not empty"),
        ({"messages": ["a"]}, "is a str"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'; known are"),
        ({"messages": [{"role": "user", "content": 3}]}, "is int, not text or parts"),
        (
            {**ask("a"), "conversations": [{"from": "human", "value": "b"}]},
            'unknown field "messages"',
        ),
        ({**ask("a"), "conversations": ask("b")["messages"]}, "both"),
        (ask([{"type": "video", "video": "a.mp4", "fps": 2}]), 'unknown field "fps"'),
        (ask([{"type": "video"}]), "clip part 1 stands for clip 0 .* lists 0"),
        (ask([{"type": "video", "video": "a", "path": "b"}]), "more than one clip"),
        (ask([{"type": "audio"}]), "type 'audio'; only text, images and clips"),
        (ask([IMAGE, TEXT]), "image part 1 stands for image 0 .* lists 0"),
        (ask([{"type": "image", "index": -1}], images=["a"]), "image -1"),
        (ask([{"type": "image", "index": True}], images=["a"]), "image True"),
        (ask([IMAGE, TEXT], images=["a", "b"]), "1 images of the record belong to no part"),
        (ask([{"type": "text", "text": "<image>"}]), "a part of the type .image. there"),
        (ask([{"type": "image", "image": "a", "url": "b"}]), "more than one image"),
        (ask([{"type": "image", "image": {"url": 3}}]), "by a text"),
        (
            ask([{"type": "image_url", "image_url": {"url": "data:image/png,AA"}}]),
            "no image in base64",
        ),
        ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}, "reason"),
        ({"messages": [{"role": "user", "content": "a", "loss": True}]}, "only assistant messages"),
        ({"instruction": "a", "output": ["b"]}, '"output" is list, not text'),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "list of pairs"),
        ({"query": "a", "response": "b", "label": True}, 'unknown field "label"'),
        ({"file_name": "a.png", "text": " "}, "caption is not text|caption is empty"),
        ({"file_name": "a.png", "text": "a", "caption": "b"}, '"text" and "caption" may both be'),
        ({"image": "a.png", "file_name": "b.png", "text": "a"}, "may both be the image"),
        ({"image": "a.png", "prompt": "a", "edit_image": "b.png"}, 'field "edit_image" is another'),
        ({"image": "a.png", "text": "a", "depth_file_name": "b.png"}, "depth_file_name"),
        ({"image": "a.png", "text": "paint <image>"}, "caption contains <image>"),
        ({"jpg": None, "caption": "a", "status": "failed_to_download"}, "no image .*failed_to"),
    ],
)
def test_what_would_change_the_meaning_is_refused(record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words) as raised:
        read(record)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_a_caption_is_the_prompt_of_its_image() -> None:
    rules = RecordRules()
    record = {"file_name": "a.png", "text": " a wall\n", "width": 3, "label": "x", "exif": None}
    sample = sample_from_record(record, HERE, rules)
    assert (sample.task, turns(sample)) == ("t2i", [("user", "a wall"), ("assistant", "<image>")])
    assert rules.unread == {"width", "label"}
    both = {"image": "a.png", "prompt": "a", "caption": "b", "key": "7"}
    assert read(both, ignored=("prompt",)).turns[0].value == "b"
    assert read(both, ignored=("prompt",)).id == "7"


def test_a_recipe_may_allow_one_form_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = write_lines(tmp_path / "x.jsonl", [ask("a"), {"file_name": "a.png", "text": "a"}])
    source = read_data({"kind": "jsonl", "path": str(path), "form": "caption"}).build()
    assert isinstance(source, JsonlSource)
    with pytest.raises(DataError, match=r'line 1: a record of the form "messages" .* says form'):
        source[0]
    assert source[1].task == "t2i"
    with pytest.raises(ValueError, match="unknown form 'caption_'; did you mean 'caption'"):
        read_data({"kind": "jsonl", "path": str(path), "form": "caption_"})


def test_every_form_has_its_keys() -> None:
    assert set(FORMS) == set(KEYS)
    assert form_of({"a": 1}) is None


def test_an_unread_sample_names_its_images_and_decodes_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    path = write_lines(tmp_path / "x.jsonl", [{"file_name": "a.png", "text": "a", "width": 3}])
    source = JsonlSource(path)
    unread = source.unread(0)
    assert isinstance(unread.sample.turns[0].parts[0], SampleText)
    assert unread.find(tmp_path / "a.png") == (tmp_path / "a.png", "a.png")
    assert source.rules.unread == {"width"}
    with pytest.raises(DataError, match=r"x\.jsonl, line 1: .*a\.png") as raised:
        source[0]
    assert raised.value.reason is not None
    assert "a.png" not in raised.value.reason
