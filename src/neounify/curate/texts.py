"""Measures of a text: words, language, repetition, addresses, file names; its MinHash signature.

The signature estimates the share of shingles that two texts have in common (Broder, "On the
resemblance and containment of documents", 1997): the least values of BANDS × ROWS hash functions
over the shingles, each (a · x + b mod 2^64) / 2^32 with a random odd a (Dietzfelbinger et al., "A
reliable randomized algorithm for the closest-pair problem", 1997). Texts are candidates when all
values of a band agree.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BANDS, ROWS = 14, 8
SHINGLE_WORDS, SHINGLE_CHARACTERS = 5, 8
REPEATED_WORDS = 3
"""Words of the runs whose repetition is measured."""
MAX_CHARACTERS = 2**20
"""Characters of a text that are measured."""

# Han, kana and Thai put no spaces between words.
_UNSPACED = (
    r"\u0e00-\u0e7f\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U000323af"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:['’][^\W_{_UNSPACED}]+)*")
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")
_URL = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_FILE_NAME = re.compile(
    r"\S*\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif|psd|raw|mp4|mov)"
    r"|(?:img|dsc|dscn|dscf|pict|screenshot|image|photo|untitled)[-_ ]?\(?\d*\)?",
    re.IGNORECASE,
)
_SCRIPTS = (
    ("ja", "HIRAGANA"),
    ("ja", "KATAKANA"),
    ("ko", "HANGUL"),
    ("zh", "CJK"),
    ("th", "THAI"),
    ("cyrillic", "CYRILLIC"),
    ("arabic", "ARABIC"),
    ("el", "GREEK"),
    ("he", "HEBREW"),
    ("devanagari", "DEVANAGARI"),
    ("latin", "LATIN"),
)
"""Languages by the script that writes them alone, or else the script; kana makes Han Japanese."""
_SAMPLED_LETTERS = 2000


@dataclass
class TextRow:
    """Measures of the text of a sample, without image marks."""

    characters: int
    words: int
    language: str
    repetition: float
    urls: int
    file_name: bool
    signature: bytes | None = None


def measure_text(text: str) -> TextRow:
    """Measures of a text; `signature` stays None."""
    text = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).strip()
    words = _WORD.findall(text.casefold())
    return TextRow(
        characters=len(text),
        words=len(words),
        language=language_of(text),
        repetition=_repetition(words),
        urls=len(_URL.findall(text)),
        file_name=bool(_FILE_NAME.fullmatch(text)),
    )


def language_of(text: str) -> str:
    """The language or script of most letters of a text, see `_SCRIPTS`; "none" without letters."""
    counts: Counter[str] = Counter()
    letters = [letter for letter in text if letter.isalpha()]
    step = max(1, len(letters) // _SAMPLED_LETTERS)
    for letter in letters[::step]:
        counts[_script(letter)] += 1
    if not counts:
        return "none"
    if counts["ja"]:
        counts["ja"] += counts.pop("zh", 0)
    return max(counts, key=lambda script: (counts[script], script))


@lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return next((key for key, script in _SCRIPTS if name.startswith(script)), "other")


def _repetition(words: list[str]) -> float:
    """Share of runs of REPEATED_WORDS words that stood in the text before."""
    runs = list(zip(*(words[shift:] for shift in range(REPEATED_WORDS)), strict=False))
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def shingles(text: str) -> set[str]:
    """Runs of words, or of characters where the text is in a script without spaces.

    A shorter text is one shingle; case, width and punctuation do not count.
    """
    text = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).casefold()
    words = _WORD.findall(text)
    unspaced = sum(1 for word in words if _UNSPACED_LETTER.match(word))
    if unspaced * 2 > len(words):
        pieces, size, join = list("".join(words)), SHINGLE_CHARACTERS, ""
    else:
        pieces, size, join = words, SHINGLE_WORDS, " "
    count = max(1, len(pieces) - size + 1) if pieces else 0
    return {join.join(pieces[start : start + size]) for start in range(count)}


def signature(text: str) -> bytes | None:
    """The MinHash of a text, BANDS · ROWS little-endian numbers of 32 bits; None without words."""
    pieces = shingles(text)
    if not pieces:
        return None
    digests = b"".join(
        hashlib.blake2b(piece.encode("utf-8", "replace"), digest_size=8).digest()
        for piece in sorted(pieces)
    )
    values = np.frombuffer(digests, "<u8")
    factors, shifts = _functions()
    least = np.full(BANDS * ROWS, 2**32 - 1, np.uint64)
    for start in range(0, len(values), 1024):
        block = values[start : start + 1024]
        hashed = factors[:, None] * block + shifts[:, None] >> np.uint64(32)
        least = np.minimum(least, hashed.min(axis=1))
    return least.astype("<u4").tobytes()


@lru_cache(maxsize=1)
def _functions() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """a and b of the hash functions, drawn once for all."""
    raw = b"".join(
        hashlib.blake2b(f"{number}".encode(), digest_size=16).digest()
        for number in range(BANDS * ROWS)
    )
    numbers = np.frombuffer(raw, "<u8").reshape(-1, 2)
    return numbers[:, 0] | np.uint64(1), numbers[:, 1]


def similarity(one: NDArray[np.uint32], other: NDArray[np.uint32]) -> NDArray[np.float64]:
    """Estimated similarity of signatures [..., BANDS · ROWS]: the share of values that agree."""
    return np.asarray((one == other).mean(axis=-1), np.float64)
