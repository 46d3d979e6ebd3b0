"""Shards with names that stand twice, links, empty members, and fields beside captions."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from neounify.data.records import RecordRules
from neounify.data.sample import DataError
from neounify.data.shards import ShardSource
from support.own_data import png, write_tar


def test_names_that_stand_twice_in_a_shard_and_links(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (
            *(("a.png", png()), ("a.txt", b"one"), ("a.txt", b"two")),
            *(("b.png", png()), ("b.txt", b"fine"), ("../../c.png", png()), ("../../c.txt", b"c")),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("d.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    source = ShardSource([path])
    assert source.size == 3
    with pytest.raises(DataError, match=r"a\.tar, a: txt stands twice in the shard"):
        source[0]
    assert source[1].text("user") == "fine"
    assert source[2].text("user") == "c"  # a name alone: no file is written
    assert source.damage == [
        "a.tar: 3 links and other members that are no plain files",
        "a.tar: 1 names that stand twice; none of their files is read",
    ]


def test_a_shard_of_empty_members_is_not_read_to_its_end(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    with (tmp_path / "a.tar").open("wb") as file:
        for n in range(20_000):
            header.name = f"{n}.txt"
            file.write(header.tobuf())
    source = ShardSource([tmp_path / "a.tar"])
    assert source.size == 10_000
    assert "more than 10,000 empty files" in source.damage[0]


def test_fields_beside_a_caption_in_a_shard_are_reported(tmp_path: Path) -> None:
    meta = {"caption": "a", "url": "u", "punsafe": 0.1}
    members = {"0.jpg": png(), "0.json": json.dumps(meta).encode()}
    members |= {"1.jpg": png(), "1.json": json.dumps({**meta, "edit_image": "x"}).encode()}
    source = ShardSource([write_tar(tmp_path / "a.tar", members)])
    assert source[0].text("user") == "a"
    assert source.rules.unread == {"url", "punsafe"}
    with pytest.raises(DataError, match='field "edit_image" is another task'):
        source[1]
    ignoring = ShardSource([tmp_path / "a.tar"], rules=RecordRules(ignored=("edit_image", "url")))
    assert ignoring[1].task == "t2i"
    assert ignoring.rules.unread == {"punsafe"}
