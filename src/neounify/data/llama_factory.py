"""Data sets of LLaMA-Factory, as a `dataset_info.json` describes them.

    {"walls": {"file_name": "walls.json", "formatting": "sharegpt",
               "columns": {"messages": "messages", "images": "images"},
               "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user",
                        "assistant_tag": "assistant"}}}

A description names the file, its columns and, for messages ("sharegpt"), the keys and roles in
them. As LLaMA-Factory does, columns that it does not name are not read once it names some; the
source reports them. Paths of images are relative to the folder of the description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic.dataclasses import dataclass as config_dataclass

from neounify.config.ranges import STRICT
from neounify.data.arrays import JsonSource
from neounify.data.configs import RecordData
from neounify.data.formats import DESCRIPTION, named, recognise
from neounify.data.forms import Fields, has_value
from neounify.data.forms.captions import MAX_UNREAD
from neounify.data.media import file_inside
from neounify.data.parquet import ParquetSource
from neounify.data.records import RecordRules
from neounify.data.sample import DataError
from neounify.data.sources import JsonlSource, RecordSource
from neounify.data.tables import CsvSource
from neounify.files import parse_json_object, read_bytes

MAX_DESCRIPTION_BYTES = 16 * 2**20
SOURCES: dict[str, type[RecordSource]] = {
    "json": JsonSource,
    "jsonl": JsonlSource,
    "csv": CsvSource,
    "parquet": ParquetSource,
}
ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
FIELDS = ("file_name", "formatting", "ranking", "split", "columns", "tags", *ELSEWHERE)

ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
"""Names of columns by their use, without "columns"; all others are then not read."""
ANY_FORM = ("system", "tools", "images", "videos", "audios", "chosen", "rejected", "kto_tag")
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ROLES = {"user_tag": "human", "assistant_tag": "gpt", "system_tag": "system"}
"""Our name of a role by its tag; results and calls of tools are not trained on."""


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class LlamaFactoryData(RecordData):
    """`kind = "llama_factory"`: a dataset_info.json, or its folder, and the name of a data set."""

    kind: Literal["llama_factory"] = "llama_factory"
    dataset: str | None = None

    def build(self) -> RecordSource:
        path = Path(self.path)
        if path.is_dir():
            path /= DESCRIPTION
        try:
            content = read_bytes(path, MAX_DESCRIPTION_BYTES, DataError)
        except OSError as error:
            raise DataError(f"the data {path} cannot be read: {error}") from error
        entries = parse_json_object(content, path, DataError)
        entry = _chosen(entries, self.dataset, path)
        file, described = _file_of(entry, path), Described.of(entry)
        try:
            kind = recognise(file).kind
        except OSError as error:
            raise DataError(f"the data {file} cannot be read: {error}") from error
        if kind not in SOURCES:
            what = recognise(file).what or "is of no kind that is read"
            raise DataError(f"the data {file} {what}")
        return SOURCES[kind](
            file,
            root=self.image_folder or path.parent,
            rules=replace(self.rules, described=described),
            colour_profiles=self.colour_profiles,
        )


def _chosen(entries: Mapping[str, Any], name: str | None, path: Path) -> Mapping[str, Any]:
    """The description of a data set. Raises DataError."""
    if name is None:
        if len(entries) != 1:
            raise DataError(f"{path} describes {named(entries)}; name one (dataset = NAME)")
        name = next(iter(entries))
    entry = entries.get(name)
    if not isinstance(entry, Mapping):
        raise DataError(f"{path} describes no data set {name[:40]!r}; it has {named(entries)}")
    for key, value in entry.items():
        if key not in FIELDS and has_value(value):
            raise DataError(
                f'the description of {name[:40]!r} has "{key[:40]}", which is not followed here'
            )
    if entry.get("ranking") or entry.get("split") not in (None, "train"):
        raise DataError(f"{name[:40]!r} has ranking or a split; answers to learn from are read")
    return entry


def _file_of(entry: Mapping[str, Any], path: Path) -> Path:
    """The file or folder of a description, below its folder. Raises DataError."""
    there = [key for key in ELSEWHERE if has_value(entry.get(key))]
    if there:
        raise DataError(f"{path.name} names data elsewhere ({there[0]}); download it first")
    name = entry.get("file_name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{path.name} does not say the file of the data (file_name)")
    file = path.parent / name
    if not file.resolve().is_relative_to(path.parent.resolve()):
        raise DataError(f"the data {name[:80]!r} lies outside the folder of {path.name}")
    if not file.is_dir():
        file_inside(file, path.parent)
    if not file.exists():
        raise DataError(f"the data {file}, which {path.name} names, is not there")
    return file


@dataclass(frozen=True)
class Described:
    """Gives the columns of a record the names of its form.

    `columns` are names in the data by LLaMA-Factory's names; `tags` those of messages, None for
    records of the form alpaca.
    """

    columns: Mapping[str, str]
    tags: Mapping[str, str] | None = None

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Described:
        """From a description. Raises DataError."""
        formatting = entry.get("formatting", "alpaca")
        if formatting not in ("alpaca", "sharegpt"):
            raise DataError(f"the formatting {formatting!r:.40} is none of alpaca and sharegpt")
        chat = formatting == "sharegpt"
        known = (*(("messages",) if chat else (*ALPACA, "history")), *ANY_FORM)
        columns = _texts(entry, "columns", known)
        if chat:
            columns = {"messages": "conversations"} | columns
            return cls(columns, TAGS | _texts(entry, "tags", tuple(TAGS)))
        return cls(columns or ALPACA)

    def __call__(self, fields: Fields, rules: RecordRules) -> Fields:
        """The fields of a record by the names of its form. Raises DataError."""
        left = fields.keys() - set(self.columns.values())
        rules.unread.update(
            sorted(str(name)[:40] for name in left if has_value(fields[name]))[:MAX_UNREAD]
        )
        record = {use: fields[name] for use, name in self.columns.items() if name in fields}
        if self.tags is not None:
            turns = self._turns(record.pop("messages", None), self.tags)
            if turns[0]["from"] == "system":
                record.pop("system", None)  # that of the messages counts
            return {**record, "conversations": turns}
        if "response" not in record:
            raise DataError("the record has no response; text without an answer is not read")
        return {ALPACA.get(use, use): value for use, value in record.items()}

    def _turns(self, messages: Any, tags: Mapping[str, str]) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{self.columns['messages']!r:.40} must be a list that is not empty")
        roles = {tags[tag]: role for tag, role in ROLES.items()}
        turns = []
        for message in messages:
            if not isinstance(message, Mapping):
                raise DataError(f"a message is a {type(message).__name__}, not an object")
            role = message.get(tags["role_tag"])
            if not isinstance(role, str) or role not in roles:
                raise DataError(f"a message has the role {role!r:.80}; known are {named(roles)}")
            extra = [key for key in message if key not in (tags["role_tag"], tags["content_tag"])]
            known = {key: message[key] for key in extra if has_value(message[key])}
            turns.append({"from": roles[role], "value": message.get(tags["content_tag"])} | known)
        return turns


def _texts(entry: Mapping[str, Any], name: str, known: tuple[str, ...]) -> dict[str, str]:
    """A table of texts in a description, without empty ones. Raises DataError."""
    table = entry.get(name) or {}
    if not isinstance(table, Mapping):
        raise DataError(f'"{name}" of a description is {type(table).__name__}, not an object')
    for key, value in table.items():
        if key not in known or not isinstance(value, str | None):
            raise DataError(
                f'"{name}" of a description has {str(key)[:40]!r}: {value!r:.40}; known are '
                f"{', '.join(known)}, each a text"
            )
    return {key: value for key, value in table.items() if value}
