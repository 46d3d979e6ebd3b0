"""Word list: a hook that refuses prompts with listed words and phrases."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from neounify.errors import NeounifyError
from neounify.files import read_text
from neounify.serve.safety.hooks import Refused

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
    """Refuses prompts that hold a listed word or phrase.

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
        if self._holds(normalise(text)):
            raise Refused(self.rule, "its text holds words that are not allowed here.")

    def check_image(self, image: Image.Image) -> None:
        """Accept every image: a word list does not apply."""

    def _add(self, phrase: str) -> None:
        text = normalise(phrase)
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


def normalise(text: str) -> str:
    """The text as lists are compared with it: NFKC, without case, without invisible characters."""
    visible = "".join(c for c in text if not _is_invisible(c))
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", visible).casefold())


def _is_invisible(character: str) -> bool:
    # Cf: zero-width spaces and joiners, soft hyphens, direction marks. Variation selectors are Mn.
    return unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"


def _bare(text: str) -> str:
    """Letters and digits only: spaces and signs between Chinese characters hide nothing."""
    return _SYMBOL.sub("", text)
