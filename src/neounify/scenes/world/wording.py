"""Wording of a finished sentence: synonyms, digits, articles, case, punctuation, typos; and back.

`Surface` changes how a text is written and never what it says; `plain` undoes it, so that
`parse_caption(plain(text))` reads a prompt in any wording. A misspelt word stands for exactly one
word of the language: at one typo's distance there is no other.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from neounify.scenes.world import phrasebook as book
from neounify.scenes.world.draw import chance, pick, pick_weighted
from neounify.scenes.world.lexicon import (
    COLOURS,
    PLACES,
    SHAPES,
    Language,
    TokenKind,
    language_of,
    number_word,
    phrases,
    plural,
    relation_words,
)

_CASES = {"": 0.4, "lower": 0.12, "upper": 0.3, "title": 0.06, "initial": 0.12}
_ENDS = {"": 0.55, "none": 0.2, ".": 0.1, "!": 0.09, "…": 0.03, "...": 0.03}
_QUESTION_ENDS = {"": 0.7, "none": 0.2, "??": 0.04, " ?": 0.03, "?!": 0.03}
_CHINESE_ENDS = {"": 0.5, "none": 0.2, "。": 0.15, "！": 0.1, "…": 0.05}
_STOPS = ".!?…。！？ "
_NUMBERS = {number_word(n): str(n) for n in range(1, 10)}
_CHINESE_NUMBERS = {f"{number_word(n, 'zh')}个": f"{n}个" for n in range(1, 10)}
MIN_TYPO_LETTERS = 4
"""Shorter words are spelt correctly: one typo in them leaves too little."""


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Variations of how a sentence is written. The default changes nothing.

    Args:
        words: share of words that are replaced by synonyms, 0 to 1.
        without: synonyms that are not used.
        digits: numbers as digits, "2 circles".
        articles: False leaves out "a", "an" and "the".
        case: "lower", "upper", "title", "initial" (a capital in front), or "" for as it is.
        end: what stands at the end; "none" takes the mark away, "" leaves it.
        typos: words with one typo each.
        spaces: how many between words.
    """

    words: float = 0.0
    without: frozenset[str] = frozenset()
    digits: bool = False
    articles: bool = True
    case: str = ""
    end: str = ""
    typos: int = 0
    spaces: int = 1

    def write(self, text: str, rng: np.random.Generator) -> str:
        """The sentence in this wording."""
        language = language_of(text)
        if self.words:
            text = _with_synonyms(text, rng, self.words, self.without, language)
        if self.digits:
            text = _with_digits(text, language)
        text = with_end(text, self.end)
        if language == "zh":
            return text
        if not self.articles:
            text = re.sub(r"\b(?:a|an|the) ", "", text)
            text = re.sub(r"\b(?:A|An|The) (\w)", lambda m: m[1].upper(), text)
        for _ in range(self.typos):
            text = misspell(text, rng)
        return with_case(text, self.case).replace(" ", " " * self.spaces)


def draw_surface(
    rng: np.random.Generator,
    task: book.WordTask,
    language: Language,
    *,
    question: bool = False,
    articles: bool = True,
) -> Surface:
    """A wording as training has them; `articles`: whether they must stay."""
    ends = _QUESTION_ENDS if question else (_CHINESE_ENDS if language == "zh" else _ENDS)
    misspelt = pick(rng, (1, 1, 1, 2)) if chance(rng, 0.28) else 0
    return Surface(
        words=0.5 if chance(rng, 0.4) else 0.0,
        without=book.HELD_OUT_WORDS[task],
        digits=chance(rng, 0.25),
        articles=articles or not chance(rng, 0.15),
        case=pick_weighted(rng, _CASES),
        end=pick_weighted(rng, ends),
        typos=misspelt,
        spaces=2 if chance(rng, 0.03) else 1,
    )


def with_case(text: str, case: str) -> str:
    """A text in another case; "" leaves it."""
    if case == "initial":
        return text[:1].upper() + text[1:]
    if case == "title":
        return re.sub(r"[A-Za-z']+", lambda m: m[0][0].upper() + m[0][1:], text)
    return {"lower": text.lower(), "upper": text.upper()}.get(case, text)


def with_end(text: str, end: str) -> str:
    """A text with another mark at its end; "none" takes it away, "" leaves it."""
    if not end:
        return text
    return text.rstrip(_STOPS) + ("" if end == "none" else end)


def misspell(text: str, rng: np.random.Generator) -> str:
    """The text with one typo in one word, if any word can have one."""
    words = [m for m in re.finditer(r"\b[A-Za-z][a-z]+\b", text) if m[0].lower() in _typos_of()]
    if not words:
        return text
    word = pick(rng, words)
    typo = pick(rng, _typos_of()[word[0].lower()])
    return (
        text[: word.start()]
        + (typo.capitalize() if word[0][0].isupper() else typo)
        + text[word.end() :]
    )


def plain(text: str) -> str:
    """A prompt in plain words: small letters, no typos, usual words, nothing polite around it."""
    language = language_of(text)
    text = re.sub(r"\s+", " ", text.strip())
    if language == "zh":
        return _usual_words(_unframed(text, language), language)
    text = re.sub(r"[a-z]+", lambda m: _intended().get(m[0], m[0]), text.lower())
    return _usual_words(_unframed(text, language), language)


def _with_synonyms(
    text: str,
    rng: np.random.Generator,
    share: float,
    without: frozenset[str],
    language: Language,
) -> str:
    taken = without | ({"shape"} if "shape" in text else set())

    def other(match: re.Match[str]) -> str:
        name, many = _synonym_names(language).get(match[0], ("", False))
        if not name:
            return match[0]  # a longer word that holds a shorter one: "light blue"
        table = book.SYNONYMS if language == "en" else book.CHINESE_SYNONYMS
        options = [w for w in table[name] if w not in taken]
        if not options or not chance(rng, share):
            return match[0]
        word = pick(rng, options)
        return plural_of(word) if many else word

    text = _synonym_pattern(language).sub(other, text)
    return with_right_articles(text) if language == "en" else text


def plural_of(noun: str) -> str:
    """The plural of a synonym of a shape, "boxes", "plus signs"."""
    return noun + "es" if noun.endswith(("x", "s")) else plural(noun)


def with_right_articles(text: str) -> str:
    """A text whose "a" and "an" fit the words behind them."""
    fitted = r"\b([Aa])n?(?= ([A-Za-z]))"
    return re.sub(fitted, lambda m: m[1] + ("n" if m[2].lower() in "aeiou" else ""), text)


@cache
def _synonym_names(language: Language) -> dict[str, tuple[str, bool]]:
    """Phrases that have synonyms: the usual word of each, and whether it is a plural."""
    if language == "zh":
        return {name: (name, False) for name in book.CHINESE_SYNONYMS}
    names = {name: (name, False) for name in book.SYNONYMS}
    names |= {plural(s): (s, True) for s in (*SHAPES, "object") if s in book.SYNONYMS}
    for relation in ("left of", "right of"):
        names |= dict.fromkeys(relation_words(relation, "en"), (relation, False))
    return names


@cache
def _synonym_pattern(language: Language) -> re.Pattern[str]:
    return _pattern_of({**_own_words(language), **_synonym_names(language)}, language)


@cache
def _own_words(language: Language) -> dict[str, str]:
    """The words for shapes, colours and places, each standing for itself."""
    kinds: tuple[TokenKind, ...] = ("shape", "colour", "place")
    return {word: word for kind in kinds for word in phrases(kind, language)}


def _pattern_of(known: Mapping[str, object], language: Language) -> re.Pattern[str]:
    edge = r"\b" if language == "en" else ""
    longest_first = sorted(known, key=len, reverse=True)
    return re.compile(edge + "(?:" + "|".join(map(re.escape, longest_first)) + ")" + edge)


def _with_digits(text: str, language: Language) -> str:
    table = _NUMBERS if language == "en" else _CHINESE_NUMBERS
    return _pattern_of(table, language).sub(lambda m: table[m[0]], text)


@cache
def _usual(language: Language) -> dict[str, str]:
    """Every word of the language that has another as its usual one; usual words too."""
    usual = dict(_own_words(language))
    table = book.SYNONYMS if language == "en" else book.CHINESE_SYNONYMS
    for name, others in table.items():
        for word in (name, *others):
            usual[word] = name
            if language == "en" and name in (*SHAPES, "object"):
                usual[plural_of(word)] = plural(name)
    if language == "en":
        # What leaving out articles and writing digits makes of "to the left of", "five-pointed".
        for relation in ("left of", "right of"):
            usual |= {f"{before} {relation}": relation for before in ("to", "on")}
        usual |= {"5-pointed star": "star", "5-pointed stars": "stars"}
    return usual


def _usual_words(text: str, language: Language) -> str:
    usual = _usual(language)
    return _pattern_of(usual, language).sub(lambda m: usual[m[0]], text)


@cache
def _frames(language: Language) -> list[tuple[str, str]]:
    """(head, tail) texts around a prompt's phrase, most letters first."""
    sets: tuple[book.FormSet, ...] = ("wide", "held_out")
    requests = [f for s in sets for f in book.PROMPT_REQUESTS[s][language]]
    polite = [f for s in sets for f in book.POLITE[s][language]]
    forms = {f for s in sets for f in book.PROMPT_STATEMENTS[s][language]}
    forms |= {around.replace("{x}", request) for around in polite for request in requests}
    bare = {form.lower().rstrip(_STOPS) for form in forms}
    bare |= {re.sub(r"\b(?:an|a|the) ", "", form) for form in bare}
    frames = [(head, tail) for head, tail in (form.split("{c}") for form in bare) if head or tail]
    return sorted(frames, key=lambda frame: -len(frame[0] + frame[1]))


def _unframed(text: str, language: Language) -> str:
    bare = text.rstrip(_STOPS)
    for head, tail in _frames(language):
        if bare.startswith(head) and bare.endswith(tail) and len(bare) > len(head + tail):
            return bare[len(head) : len(bare) - len(tail)]
    return text.rstrip("!…")


@cache
def known_words() -> frozenset[str]:
    """Every English word of small letters that a form, a template or a synonym holds."""
    texts: list[str] = [*COLOURS, *SHAPES, *map(plural, SHAPES), *PLACES, "objects", "object"]
    for word, others in book.SYNONYMS.items():
        texts += [word, *others, *map(plural_of, others)]
    for kind in ("number", "size", "relation", "place"):
        texts += phrases(kind, "en")
    texts += _strings(vars(book))
    return frozenset(re.findall(r"[a-z]+", re.sub(r"\{\w+\}", " ", " ".join(texts).lower())))


def _strings(value: object) -> Iterator[str]:
    """All texts inside tables of tables."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not str(key).startswith("__"):
                yield from _strings(item)
    elif isinstance(value, tuple | frozenset | list):
        for item in value:
            yield from _strings(item)


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


@cache
def _neighbours() -> dict[str, str]:
    """The letters beside each on a keyboard."""
    beside: dict[str, str] = {}
    for row in _ROWS:
        for at, letter in enumerate(row):
            beside[letter] = row[max(0, at - 1) : at] + row[at + 1 : at + 2]
    return beside


def _typos(word: str) -> set[str]:
    """All that one typo makes of a word: letters swapped, dropped, doubled, or hit beside."""
    typos = {word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)}
    typos |= {word[:i] + word[i + 1 :] for i in range(len(word))}
    typos |= {word[: i + 1] + word[i:] for i in range(len(word))}
    typos |= {
        word[:i] + c + word[i + 1 :] for i in range(len(word)) for c in _neighbours()[word[i]]
    }
    return typos


@cache
def _intended() -> dict[str, str]:
    """The word that each unambiguous misspelling means."""
    sources: defaultdict[str, set[str]] = defaultdict(set)
    for word in known_words():
        for typo in _typos(word) - known_words():
            sources[typo].add(word)
    return {
        typo: words.copy().pop()
        for typo, words in sources.items()
        if len(words) == 1 and len(next(iter(words))) >= MIN_TYPO_LETTERS
    }


@cache
def _typos_of() -> dict[str, list[str]]:
    """Misspellings by word, in order."""
    by_word: defaultdict[str, list[str]] = defaultdict(list)
    for typo, word in sorted(_intended().items()):
        by_word[word].append(typo)
    return dict(by_word)


UPPER = Surface(case="upper")
MISSPELT = Surface(typos=1)


def punctuated(rng: np.random.Generator, language: Language = "en") -> Surface:
    """A wording that differs in its last mark alone."""
    marks = (".", "!", "…", "none") if language == "en" else ("。", "！", "…", "none")
    return replace(Surface(), end=pick(rng, marks))
