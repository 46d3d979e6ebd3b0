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
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from neounify.curate.recipe import CurateError
from neounify.errors import missing_extra

BANDS, ROWS = 14, 8
SHINGLE_WORDS, SHINGLE_CHARACTERS = 5, 8
REPEATED_WORDS = 3
"""Words of the runs whose repetition is measured."""
PAIRS_AT_ONCE = 2**16
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
LANGUAGE_CHARACTERS = 2000
"""Characters of a text that its language is found by."""
NO_FEATURES = -1e30
"""Scores of py3langid below are of texts that no feature of its model is in."""


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
    """The language of a text by ISO 639-1; "none" where none is recognised. Raises CurateError."""
    text = text[:LANGUAGE_CHARACTERS]
    if not any(letter.isalpha() for letter in text):
        return "none"
    try:
        import py3langid
    except ImportError as error:
        raise CurateError(missing_extra("languages of texts", "curate", error)) from error
    language, score = py3langid.classify(text)
    return str(language) if score > NO_FEATURES else "none"


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


def similarities(signatures: NDArray[np.uint32], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Estimated similarity of pairs [n, 2] of signatures, some at a time for the memory."""
    blocks = [pairs[start : start + PAIRS_AT_ONCE] for start in range(0, len(pairs), PAIRS_AT_ONCE)]
    parts = [similarity(signatures[block[:, 0]], signatures[block[:, 1]]) for block in blocks]
    return np.concatenate([*parts, np.zeros(0)])
