"""Vocabulary for llguidance: the tokens of a model, and the grammars compiled for them."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from neounify.errors import RequestError, missing_extra
from neounify.text.special import IM_END
from neounify.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_COMPILED = 32
"""Compiled grammars that are kept, the latest ones."""

_MAX_LEXER_STATES = 50_000
_MAX_GRAMMAR_SIZE = 100_000
"""A fifth of the library's own limits: a grammar is compiled beside other requests' text."""
_MAX_ROW_ITEMS = 5000
"""Enough for an object of schema.MAX_PROPERTIES optional properties."""
_LOCATION = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?")
_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]")

_vocabularies: WeakValueDictionary[str, Vocabulary] = WeakValueDictionary()
_lock = threading.Lock()


class Vocabulary:
    """The tokens of one tokenizer, ended by `<|im_end|>`. Threads may share it.

    A grammar travels between processes as text and finds the vocabulary that it was made for by
    its name, so every process that decodes holds one, made with `of`.
    """

    def __init__(self, tokenizer: Tokenizer, name: str) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.size = tokenizer.vocab_size
        self._building = threading.Lock()
        self._library: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """The vocabulary of a tokenizer; one for all tokenizers of equal files."""
        name = tokenizer.digest()
        with _lock:
            vocabulary = _vocabularies.get(name)
            if vocabulary is None:
                vocabulary = _vocabularies[name] = cls(tokenizer, name)
            return vocabulary

    @classmethod
    def named(cls, name: str) -> Vocabulary:
        """The vocabulary of that name in this process. Raises RequestError without one."""
        vocabulary = _vocabularies.get(name)
        if vocabulary is None:
            raise RequestError("the grammar was made for another tokenizer")
        return vocabulary

    def prepare(self) -> None:
        """Build the library's tokenizer now: about a second for 150,000 tokens.

        Raises RequestError where llguidance is not installed.
        """
        with self._building:
            if self._library is None:
                self._library = _library_tokenizer(self.tokenizer)

    def prepare_soon(self) -> None:
        """Build it in a thread, so that the first grammar need not wait, if it can be built."""

        def prepare() -> None:
            with suppress(RequestError):
                self.prepare()

        threading.Thread(target=prepare, name="vocabulary", daemon=True).start()

    def compile(self, lark: str) -> llguidance.LLMatcher:
        """A matcher at the beginning of a grammar. Raises RequestError for one it cannot follow."""
        self.prepare()
        with self._building:
            known = self._compiled.get(lark)
            if known is not None:
                self._compiled.move_to_end(lark)
                return known.deep_copy()
        library = self._library
        assert library is not None
        matcher = _package().LLMatcher(library, lark, log_level=0, limits=_limits())
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars turn out to be too large only here
        if matcher.is_error():
            raise RequestError(_reason(matcher.get_error()))
        with self._building:
            self._compiled[lark] = matcher
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()


class _Tokens:
    """A tokenizer in the shape that the library's wrapper reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens: Sequence[bytes] = tokenizer.all_bytes()
        # Added tokens that are not flagged special, like <think>, are no text in an answer either.
        self.special_token_ids = sorted(tokenizer.added_ids)
        self.eos_token_id = tokenizer.id(IM_END)
        self.bos_token_id = None
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", errors="replace")
        return self._tokenizer.encode(text)


def _package() -> Any:
    try:
        import llguidance
    except ImportError as error:
        what = "answers by a schema and forced tool calls"
        raise RequestError(missing_extra(what, "grammar", error)) from error
    return llguidance


def _library_tokenizer(tokenizer: Tokenizer) -> llguidance.LLTokenizer:
    package = _package()
    tokens = _Tokens(tokenizer)
    return package.LLTokenizer(
        package.TokenizerWrapper(tokens), n_vocab=len(tokens.tokens), eos_token=tokens.eos_token_id
    )


def _limits() -> llguidance.LLParserLimits:
    return _package().LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES,
        max_grammar_size=_MAX_GRAMMAR_SIZE,
        max_items_in_row=_MAX_ROW_ITEMS,
        verbose_errors=False,
    )


def _reason(error: str) -> str:
    """The library's message without the place in a grammar that the caller never saw."""
    line = _LOCATION.sub("", error.strip().partition("\n")[0])
    keywords = _KEYWORDS.search(line)
    if keywords:
        return f"the schema uses {keywords[1]}, which is not supported here"
    if line.startswith("regex parse error"):
        line += " " + error.rpartition("error: ")[2].partition("\n")[0]
    return f"the schema cannot be followed: {line[:300]}"
