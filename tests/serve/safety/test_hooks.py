"""Hooks: composed, loaded by name, and the word list that comes with the package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from neounify.errors import ServiceError
from neounify.serve.safety.hooks import (
    MAX_LIST_BYTES,
    HookError,
    Hooks,
    Refused,
    SafetyHook,
    WordList,
    WordListError,
    load_hook,
    make_hooks,
)

IMAGE = Image.new("RGB", (2, 2))
LISTED = ("forbidden", "very bad", "Café", "坏东西", "x坏y", "ＷＩＤＥ")


class Noting:
    """Records its calls; refuses images with `refuses`."""

    def __init__(self, name: str, asked: list[str], *, refuses: bool = False) -> None:
        self.name, self.asked, self.refuses = name, asked, refuses

    def check_prompt(self, text: str, images: Sequence[Image.Image]) -> None:
        self.asked.append(f"{self.name} {text} {len(images)}")

    def check_image(self, image: Image.Image) -> None:
        self.asked.append(f"{self.name} image")
        if self.refuses:
            raise Refused(self.name, "not this one.")


def refused(text: str) -> bool:
    try:
        WordList(LISTED).check_prompt(text, [])
    except Refused:
        return True
    return False


@pytest.mark.parametrize(
    "text",
    [
        "a forbidden thing",
        "FORBIDDEN",
        "for\u200bbid\u00adden",
        "ｆｏｒｂｉｄｄｅｎ",
        "fo\ufe0frbidden",
        "a_forbidden_thing",
        "forbidden坏",
        "a very\n  bad day",
        "very, bad",
        "cafe\u0301 au lait",
        "这个坏东西。",
        "坏 东\u200b西",
        "坏，东西",
        "XX坏YY",
        "wide",
    ],
)
def test_listed_words_are_found(text: str) -> None:
    assert refused(text)


@pytest.mark.parametrize(
    "text",
    ["", "unforbidden", "forbiddenly", "bad very", "veryb ad", "cafe", "坏", "东西坏", "widely"],
)
def test_other_words_are_not(text: str) -> None:
    assert not refused(text)


def test_the_message_names_the_rule_and_no_word() -> None:
    with pytest.raises(Refused) as caught:
        WordList(LISTED).check_prompt("a forbidden thing", [])
    assert isinstance(caught.value, ServiceError)
    assert caught.value.rule == "word list"
    assert "refused by the rule 'word list'" in str(caught.value)
    assert "forbidden" not in str(caught.value)


def test_a_list_is_read_with_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\ufeff# not this: harmless\n\n  forbidden  \r\n坏东西\n", encoding="utf-8")
    hook = WordList.read(path)
    hook.check_prompt("harmless", [])
    hook.check_image(IMAGE)
    for text in ("Forbidden!", "坏东西"):
        with pytest.raises(Refused):
            hook.check_prompt(text, [])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"# nothing\n", "holds no words"),
        (b"caf\xe9\n", "not UTF-8"),
        (b"!!!\n", "no letter"),
        (b"a" * (MAX_LIST_BYTES + 1), "larger than"),
        (None, "cannot be read"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "words.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(WordListError, match=words):
        WordList.read(path)


def test_hooks_are_asked_in_order_until_one_refuses() -> None:
    asked: list[str] = []
    hooks = Hooks([Noting("a", asked), Noting("b", asked, refuses=True), Noting("c", asked)])
    hooks.check_prompt("hi", [IMAGE])
    assert asked == ["a hi 1", "b hi 1", "c hi 1"]
    asked.clear()
    with pytest.raises(Refused, match="by the rule 'b': not this one"):
        hooks.check_image(IMAGE)
    assert asked == ["a image", "b image"]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Write the module `own_hooks`."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str) -> None:
        (tmp_path / "own_hooks.py").write_text(source, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "own_hooks", raising=False)

    return write


OWN = """
class Own:
    def check_prompt(self, text, images): pass
    def check_image(self, image): pass
ready = Own()
def make(): return Own()
def broken(): raise OSError("no key")
def wrong(): return 3
number = 3
"""


@pytest.mark.parametrize("attribute", ["Own", "ready", "make"])
def test_hooks_are_loaded_by_name(module: Callable[[str], None], attribute: str) -> None:
    module(OWN)
    assert isinstance(load_hook(f"own_hooks:{attribute}"), SafetyHook)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own_hooks", "package.module:attribute"),
        ("own_hooks:a.b", "package.module:attribute"),
        ("../own_hooks:Own", "package.module:attribute"),
        ("no_such_module_here:Own", "cannot be imported"),
        ("own_hooks:nothing", "has no 'nothing'"),
        ("own_hooks:number", "neither a hook"),
        ("own_hooks:wrong", "check_prompt and check_image"),
        ("own_hooks:broken", "no key"),
    ],
)
def test_names_that_lead_to_no_hook(module: Callable[[str], None], name: str, words: str) -> None:
    module(OWN)
    with pytest.raises(HookError, match=words):
        load_hook(name)


def test_nothing_is_refused_by_default() -> None:
    hooks = make_hooks(None, [])
    assert len(hooks) == 0
    hooks.check_prompt("forbidden", [IMAGE])
    hooks.check_image(IMAGE)


def test_the_word_list_and_named_hooks_together(
    tmp_path: Path, module: Callable[[str], None]
) -> None:
    module(OWN)
    (tmp_path / "words.txt").write_text("forbidden")
    hooks = make_hooks(tmp_path / "words.txt", ["own_hooks:Own"])
    assert len(hooks) == 2
    with pytest.raises(Refused):
        hooks.check_prompt("forbidden", [])
