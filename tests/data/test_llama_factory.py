"""Data sets that a dataset_info.json of LLaMA-Factory describes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from neounify.data.configs import read_data
from neounify.data.formats import recognise
from neounify.data.sample import DataError, Sample
from support.own_data import png, write_lines

CHAT = [
    {"role": "user", "content": "<image>Which colour?"},
    {"role": "assistant", "content": "Red."},
]
OPENAI = {
    "file_name": "chat.json",
    "formatting": "sharegpt",
    "columns": {"messages": "talk", "images": "pictures"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
    },
}


def described(folder: Path, entry: dict[str, Any], records: list[Any], **settings: Any) -> Any:
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(png(32, 32))
    file = folder / str(entry.get("file_name", "unused.json"))
    if records:
        file.write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"walls": entry}, indent=1))
    return read_data({"kind": "llama_factory", "path": str(folder), **settings}).build()


def turns(sample: Sample) -> list[tuple[str, str]]:
    return [(turn.role, turn.value) for turn in sample.turns]


ASKED = [("user", "<image>Which colour?"), ("assistant", "Red.")]


def test_messages_with_other_names(tmp_path: Path) -> None:
    record = {"talk": CHAT, "pictures": ["a.png"], "origin": "web"}
    source = described(tmp_path / "in", OPENAI, [record])
    assert turns(source[0]) == ASKED
    assert source[0].images[0].pixels().shape == (32, 32, 3)
    assert source.rules.unread == {"origin"}
    assert pickle.loads(pickle.dumps(source))[0].task == "vqa"


def test_the_system_text_of_the_messages_counts(tmp_path: Path) -> None:
    entry = {"file_name": "c.json", "formatting": "sharegpt", "columns": {"system": "rule"}}
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    first = {"from": "system", "value": "Be brief."}
    records = [
        {"conversations": talk, "rule": "Be long."},
        {"conversations": [first, *talk], "rule": "Be long."},
    ]
    source = described(tmp_path / "in", entry, records)
    assert [source[number].text("system") for number in (0, 1)] == ["Be long.", "Be brief."]


def test_alpaca_with_other_names(tmp_path: Path) -> None:
    columns = {"prompt": "ask", "response": "say", "history": "before", "images": "pictures"}
    record = {"ask": "<image>Which colour?", "say": "Red.", "before": [], "pictures": ["a.png"]}
    source = described(tmp_path / "in", {"file_name": "d.json", "columns": columns}, [record])
    assert turns(source[0]) == ASKED


def test_alpaca_without_columns(tmp_path: Path) -> None:
    record = {"instruction": "Name a colour.", "input": "in French", "output": "Rouge."}
    source = described(tmp_path / "in", {"file_name": "d.json"}, [record])
    assert turns(source[0]) == [("user", "Name a colour.\nin French"), ("assistant", "Rouge.")]
    assert dict(source.rules.forms) == {"alpaca": 1}


def test_images_are_below_the_folder_of_the_description(tmp_path: Path) -> None:
    (tmp_path / "in" / "part").mkdir(parents=True)
    entry = {**OPENAI, "file_name": "part"}
    record = {"talk": CHAT, "pictures": ["a.png"]}
    write_lines(tmp_path / "in" / "part" / "one.jsonl", [record])
    source = described(tmp_path / "in", entry, [])
    assert source[0].images[0].pixels().shape == (32, 32, 3)


def test_one_of_several_is_named(tmp_path: Path) -> None:
    described(tmp_path / "in", OPENAI, [{"talk": CHAT, "pictures": "a.png"}])
    info = tmp_path / "in" / "dataset_info.json"
    info.write_text(json.dumps({"walls": OPENAI, "other": {"hf_hub_url": "x/y"}}))
    settings = {"kind": "llama_factory", "path": str(info)}
    with pytest.raises(DataError, match=r'describes "walls", "other"; name one'):
        read_data(settings).build()
    assert turns(read_data({**settings, "dataset": "walls"}).build()[0]) == ASKED
    with pytest.raises(DataError, match=r"data elsewhere \(hf_hub_url\); download it first"):
        read_data({**settings, "dataset": "other"}).build()
    with pytest.raises(DataError, match="no data set 'roofs'"):
        read_data({**settings, "dataset": "roofs"}).build()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file_name": "../d.json"}, "lies outside the folder"),
        ({"file_name": "/etc/passwd"}, "lies outside the folder"),
        ({"file_name": "gone.json"}, "is not there"),
        ({"file_name": 3}, "does not say the file"),
        ({"formatting": "other"}, "none of alpaca and sharegpt"),
        ({"ranking": True}, "has ranking or a split"),
        ({"num_samples": 100}, '"num_samples", which is not followed'),
        ({"columns": {"messages": 3}}, "each a text"),
        ({"columns": {"prompts": "x"}}, "known are messages"),
        ({"tags": ["role"]}, "is list, not an object"),
    ],
)
def test_descriptions_that_cannot_be_followed(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    described(tmp_path / "in", OPENAI, [{"talk": CHAT}])
    with pytest.raises(DataError, match=words):
        described(tmp_path / "in", {**OPENAI, **changes}, [])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"talk": []}, "a list that is not empty"),
        ({"talk": ["a"]}, "a message is a str"),
        ({"talk": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"talk": [{**CHAT[0], "tool_calls": ["x"]}, CHAT[1]]}, 'unknown field "tool_calls"'),
        ({"talk": CHAT, "pictures": ["../a.png"]}, "lies outside"),
    ],
)
def test_records_that_are_not_as_described(
    record: dict[str, Any], words: str, tmp_path: Path
) -> None:
    source = described(tmp_path / "in", OPENAI, [record])
    with pytest.raises(DataError, match=words):
        source[0]


def test_columns_that_are_another_task_are_refused(tmp_path: Path) -> None:
    entry = {"file_name": "d.json", "columns": {"prompt": "a", "response": "b", "tools": "t"}}
    source = described(tmp_path / "in", entry, [{"a": "x", "b": "y", "t": "[]"}, {"a": "x"}])
    with pytest.raises(DataError, match='unknown field "tools"'):
        source[0]
    with pytest.raises(DataError, match="no response"):
        source[1]


def test_the_description_is_recognised_and_that_of_hugging_face_is_not(tmp_path: Path) -> None:
    described(tmp_path / "in", OPENAI, [{"talk": CHAT}])
    assert recognise(tmp_path / "in").kind == "llama_factory"
    assert recognise(tmp_path / "in" / "dataset_info.json").kind == "llama_factory"
    (tmp_path / "in" / "dataset_info.json").write_text('{"builder_name": "json", "features": {}}')
    assert recognise(tmp_path / "in").kind == "json"
