"""Safety hooks: checks of prompts and generated images, which may refuse them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from PIL import Image

from neounify.errors import NeounifyError, ServiceError
from neounify.files import read_text
from neounify.plugins import load_object
from neounify.provenance.metadata import Format, encode_image

if TYPE_CHECKING:
    from neounify.provenance.watermark import Marker


class Refused(ServiceError):
    """A hook refused the request; `rule` is the name of the rule, never what it looks for."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"The request was refused by the rule {rule!r}: {reason}")
        self.rule = rule


@runtime_checkable
class SafetyHook(Protocol):
    """Checks before and after generation. Called from several threads."""

    def check_prompt(self, text: str, images: Sequence[Image.Image]) -> None:
        """Check a prompt and its images before any work; raises Refused."""

    def check_image(self, image: Image.Image) -> None:
        """Check a generated image before it is returned; raises Refused."""


class Hooks:
    """Several hooks as one: asked in their order, the first that refuses ends it.

    Images are written with provenance metadata, and with an invisible mark if there is a `marker`.
    """

    def __init__(self, hooks: Sequence[SafetyHook] = (), marker: Marker | None = None) -> None:
        self._hooks, self._marker = tuple(hooks), marker

    def __len__(self) -> int:
        return len(self._hooks)

    def check_prompt(self, text: str, images: Sequence[Image.Image]) -> None:
        """Ask every hook; raises Refused."""
        for hook in self._hooks:
            hook.check_prompt(text, images)

    def check_image(self, image: Image.Image) -> None:
        """Ask every hook; raises Refused."""
        for hook in self._hooks:
            hook.check_image(image)

    def encode_image(
        self, image: Image.Image, format: Format, metadata: Mapping[str, str]
    ) -> bytes:
        """The file of a generated image or preview, checked and marked; raises Refused.

        `metadata` says how it was generated: model, task, seed, steps and so on.
        """
        self.check_image(image)
        return encode_image(self._marker.mark(image) if self._marker else image, format, metadata)


# --- the word list ---

MAX_LIST_BYTES = 1024 * 1024
"""Largest word list that is read, in bytes."""

# Han characters with their extensions, kana: scripts that put no spaces between words.
_UNSPACED = r"\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af"
_HAS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[^\W_{_UNSPACED}]+")
_SYMBOL = re.compile(rf"[^\w{_UNSPACED}]|_")


class WordListError(NeounifyError, ValueError):
    """A word list is missing, too large, not UTF-8, or holds nothing that could be found."""


class WordList:
    """Hook that refuses prompts with a listed word or phrase.

    Whole words, whatever their case, their width or invisible characters inside; what stands
    between the words of a phrase does not matter. Phrases with Chinese or Japanese characters are
    found anywhere, as these scripts do not separate words.
    """

    rule = "word list"

    def __init__(self, phrases: Iterable[str]) -> None:
        self._words: set[tuple[str, ...]] = set()
        self._pieces: set[str] = set()
        for phrase in phrases:
            self._add(phrase)
        self._lengths = sorted({len(words) for words in self._words})

    @classmethod
    def read(cls, path: Path) -> WordList:
        """Read a UTF-8 file: a word or phrase a line, `#` starts a line that is a comment.

        Raises WordListError.
        """
        text = read_text(path, MAX_LIST_BYTES, WordListError)
        lines = (line.strip() for line in text.splitlines())
        phrases = [line for line in lines if line and not line.startswith("#")]
        if not phrases:
            raise WordListError(f"the word list {path.name} holds no words")
        return cls(phrases)

    def check_prompt(self, text: str, images: Sequence[Image.Image]) -> None:
        """Raise Refused if the text holds a listed phrase; images are not checked."""
        if self._holds(normalise_text(text)):
            raise Refused(self.rule, "its text holds words that are not allowed here.")

    def check_image(self, image: Image.Image) -> None:
        """Accept every image: a word list does not apply."""

    def _add(self, phrase: str) -> None:
        text = normalise_text(phrase)
        words = tuple(_WORD.findall(text))
        if _HAS_UNSPACED.search(text):
            self._pieces.add(_bare(text))
        elif words:
            self._words.add(words)
        else:
            raise WordListError(f"the phrase {phrase!r} of the word list holds no letter or digit")

    def _holds(self, text: str) -> bool:
        words = _WORD.findall(text)
        if any(
            tuple(words[start : start + length]) in self._words
            for length in self._lengths
            for start in range(len(words) - length + 1)
        ):
            return True
        bare = _bare(text)
        return any(piece in bare for piece in self._pieces)


def normalise_text(text: str) -> str:
    """The text as lists are compared with it: NFKC, without case, without invisible characters."""
    visible = "".join(c for c in text if not _is_invisible(c))
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


def _is_invisible(character: str) -> bool:
    # Cf: zero-width spaces and joiners, soft hyphens, direction marks. Variation selectors are Mn.
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _bare(text: str) -> str:
    """Letters and digits only: spaces and signs between Chinese characters hide nothing."""
    return _SYMBOL.sub("", text)


# --- hooks of a command line; requests never name code ---


class HookError(NeounifyError, ValueError):
    """A hook that the command line names cannot be loaded."""


def make_hooks(word_list: Path | None, names: Sequence[str], marker: Marker | None = None) -> Hooks:
    """The hooks a server was started with: the word list first, if there is one, then the others.

    Without either nothing is ever refused. Raises WordListError and HookError.
    """
    first: list[SafetyHook] = [] if word_list is None else [WordList.read(word_list)]
    return Hooks([*first, *(load_hook(name) for name in names)], marker)


def load_hook(name: str) -> SafetyHook:
    """The hook behind "package.module:attribute", which is a hook, or makes one when called.

    Imports the module, so the name must come from the operator of the server. Raises HookError.
    """
    hook = load_object(name, "hook", HookError)
    if isinstance(hook, type) or not isinstance(hook, SafetyHook):
        hook = _make(name, hook)
    if not isinstance(hook, SafetyHook):
        raise HookError(f"{name}: a hook has the methods check_prompt and check_image")
    return hook


def _make(name: str, factory: object) -> object:
    if not callable(factory):
        raise HookError(f"{name}: neither a hook nor something that makes one")
    try:
        return factory()
    except Exception as error:  # a factory's own code may fail in any way
        raise HookError(f"{name}: calling it failed ({error})") from error
