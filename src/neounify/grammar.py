"""Constrained decoding: answers that follow a JSON schema or are calls of functions.

llguidance computes which tokens may come next; this module bounds the untrusted schemas that it
compiles, and keeps the state of one answer. Needs the extra `grammar`, which is part of `serve`.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from neounify.errors import RequestError, missing_extra, naming_param
from neounify.text.tokenizer import Tokenizer
from neounify.text.tokens import IM_END, THINK_CLOSE
from neounify.text.tools import CALL_CLOSE, CALL_OPEN, Tool

if TYPE_CHECKING:
    import llguidance

# --- limits of schemas ---

MAX_SCHEMA_BYTES = 128 * 1024
MAX_DEPTH = 64
"""Nested JSON values; a property of a property is four deep."""
MAX_PROPERTIES = 1000
"""Named properties over the whole schema."""
MAX_VALUES = 20_000
"""JSON values of any kind over the whole schema, names of properties not counted."""
MAX_REFS = 500
"""Uses of `$ref`: many that refer to one another take long to compile."""
MAX_PATTERN = 1000
"""Characters of a regular expression."""
MAX_MULTIPLE = 10_000
"""The least common multiple of all `multipleOf`: compiling takes time and memory in proportion."""

_OPTIONS = "x-guidance"
WHITESPACE = r"\n? {0,16}"
"""Between the tokens of JSON: none, a space, or a line with its indentation, but not for ever."""


def check_schema(schema: object, what: str) -> str:
    """The text of a schema within all bounds, with options for the compiler.

    `what` begins the message of the RequestError for a schema that is none or out of bounds.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{what}: a schema is a JSON object, not {type(schema).__name__}")
    _check_shape(schema, what)
    options = {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
    try:
        # The caller's own options could loosen what the schema promises.
        text = json.dumps({**schema, _OPTIONS: options}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{what}: the schema is not JSON ({error})") from error
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_SCHEMA_BYTES:
        raise RequestError(
            f"{what}: the schema has {size} bytes; at most {MAX_SCHEMA_BYTES} are read"
        )
    return text


def _check_shape(schema: Mapping[str, Any], what: str) -> None:
    """Walk the schema level by level, so that no nesting can exhaust the stack."""
    level: list[Any] = [schema]
    depth = values = properties = refs = 0
    multiple = 1
    while level:
        depth += 1
        values += len(level)
        if depth > MAX_DEPTH:
            raise RequestError(f"{what}: the schema is nested deeper than {MAX_DEPTH} values")
        if values > MAX_VALUES:
            raise RequestError(f"{what}: the schema has more than {MAX_VALUES} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, Mapping):
                properties += _count_properties(value)
                _check_patterns(value, what)
                refs += "$ref" in value
                multiple = math.lcm(multiple, _multiple(value.get("multipleOf"), what))
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
        if properties > MAX_PROPERTIES:
            raise RequestError(f"{what}: the schema has more than {MAX_PROPERTIES} properties")
        if refs > MAX_REFS:
            raise RequestError(f"{what}: the schema uses $ref more than {MAX_REFS} times")
        if multiple > MAX_MULTIPLE:
            raise RequestError(
                f"{what}: multipleOf is followed up to {MAX_MULTIPLE} over the whole schema"
            )
        level = below


def _multiple(value: object, what: str) -> int:
    """A `multipleOf` without its decimal point; 1 for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return 1
    if not -MAX_MULTIPLE <= value <= MAX_MULTIPLE or not math.isfinite(value):
        raise RequestError(
            f"{what}: multipleOf is followed up to {MAX_MULTIPLE}, got {str(value)[:20]}"
        )
    digits = Decimal(str(value)).normalize().as_tuple()
    coefficient = int("".join(map(str, digits.digits)))
    exponent = digits.exponent
    assert isinstance(exponent, int)
    return coefficient * 10 ** max(0, exponent)


def _count_properties(schema: Mapping[str, Any]) -> int:
    named = (schema.get("properties"), schema.get("patternProperties"))
    return sum(len(names) for names in named if isinstance(names, Mapping))


def _check_patterns(schema: Mapping[str, Any], what: str) -> None:
    patterns = schema.get("patternProperties")
    names = list(patterns) if isinstance(patterns, Mapping) else []
    for pattern in (*names, schema.get("pattern")):
        if isinstance(pattern, str) and len(pattern) > MAX_PATTERN:
            raise RequestError(
                f"{what}: a pattern has {len(pattern)} characters; at most {MAX_PATTERN} are read"
            )


# --- vocabulary: the tokens of a model, and the grammars compiled for them ---

MAX_COMPILED = 32
"""Compiled grammars that are kept, the latest ones."""

_MAX_LEXER_STATES = 50_000
_MAX_GRAMMAR_SIZE = 100_000
"""A fifth of the library's own limits: a grammar is compiled beside other requests' text."""
_MAX_ROW_ITEMS = 5000
"""Enough for an object of MAX_PROPERTIES optional properties."""
_LOCATION = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?")
_KEYWORDS = re.compile(r"Unimplemented keys: \[(.*)\]")

_vocabularies: WeakValueDictionary[str, Vocabulary] = WeakValueDictionary()
_lock = threading.Lock()


class Vocabulary:
    """The tokens of one tokenizer, ended by `<|im_end|>`. Threads may share it.

    A grammar travels between processes as text and finds the vocabulary that it was built for by
    its name, so every process that decodes holds one, built by `of`.
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
            raise RequestError("the grammar was built for another tokenizer")
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
            compiled = self._compiled.get(lark)
            if compiled is not None:
                self._compiled.move_to_end(lark)
                return compiled.deep_copy()
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


# --- the grammar and the state of one answer ---


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """Grammar of an answer in llguidance's Lark form, for the vocabulary of that name.

    With `thinks` the answer begins inside a thought, which is free but must be closed.
    """

    lark: str
    vocabulary: str
    thinks: bool = False

    def start(self) -> GrammarConstraint:
        """The constraint at the beginning of an answer.

        Raises RequestError for a grammar that cannot be followed.
        """
        vocabulary = Vocabulary.named(self.vocabulary)
        matcher = vocabulary.compile(self.lark)
        return GrammarConstraint(matcher, vocabulary, thinks=self.thinks)


class GrammarConstraint:
    """State of one answer: which tokens may come next. See `config.Constraint`."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: Vocabulary, *, thinks: bool
    ) -> None:
        self._matcher = matcher
        self._thinking = thinks
        self._size = vocabulary.size
        self._end = vocabulary.tokenizer.id(IM_END)
        self._close = vocabulary.tokenizer.find(THINK_CLOSE)  # None for models that do not think

    def mask(self) -> Tensor:
        """The tokens allowed next, one bit each; none where the grammar became too complex."""
        if self._thinking:
            allowed = torch.ones(self._size, dtype=torch.bool)
            allowed[self._end] = False
            return allowed
        mask = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.int32)
        return torch.zeros_like(mask) if self._matcher.is_error() else mask

    def accept(self, token: int) -> None:
        """Take in the token that was chosen."""
        if self._thinking:
            self._thinking = token != self._close
        else:
            self._matcher.consume_token(token)


# --- grammars of JSON and calls ---

MAX_CALLS = 16
"""Calls that a forced answer may hold."""


def json_grammar(
    vocabulary: Vocabulary,
    schema: object,
    *,
    what: str,
    tools: Sequence[Tool] = (),
    thinks: bool = False,
) -> Grammar:
    """An answer that is JSON by `schema`, or a call of one of `tools`.

    `what` names the parameter in the RequestError for a schema that cannot be followed.
    """
    with naming_param(what):
        lark = f"answer: %json {_checked(vocabulary, schema, what)}\n"
    body = "answer"
    if tools:
        body = "answer | calls"
        lark += _calls(vocabulary, tools, parallel=True)
    return _grammar(vocabulary, body, lark, thinks=thinks)


def calls_grammar(
    vocabulary: Vocabulary, tools: Sequence[Tool], *, parallel: bool = True, thinks: bool = False
) -> Grammar:
    """An answer that is a call of one of `tools`, or with `parallel` up to MAX_CALLS of them.

    Raises RequestError for parameters that cannot be followed.
    """
    return _grammar(vocabulary, "calls", _calls(vocabulary, tools, parallel=parallel), thinks)


def _grammar(vocabulary: Vocabulary, body: str, rules: str, thinks: bool) -> Grammar:
    # A thought is followed by a blank line.
    lines = "/\\n{0,2}/ " if thinks else ""
    grammar = Grammar(
        lark=f"start: {lines}({body})\n{rules}", vocabulary=vocabulary.name, thinks=thinks
    )
    vocabulary.compile(grammar.lark)
    return grammar


def _calls(vocabulary: Vocabulary, tools: Sequence[Tool], *, parallel: bool) -> str:
    begin, end = (_mark(vocabulary, mark) for mark in (CALL_OPEN, CALL_CLOSE))
    more = f' ("\\n" call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    names = " | ".join(f"call_{number}" for number in range(len(tools)))
    rules = [f"calls: call{more}", f'call: {begin} "\\n" ({names}) "\\n" {end}']
    for number, tool in enumerate(tools):
        head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
        rules.append(f'call_{number}: {head} arguments_{number} "}}"')
        with naming_param("tools"):
            schema = _checked(vocabulary, tool.schema, f"tools: the parameters of {tool.name!r}")
        rules.append(f"arguments_{number}: %json {schema}")
    return "\n".join(rules) + "\n"


def _mark(vocabulary: Vocabulary, mark: str) -> str:
    """A mark as its token where the tokenizer has one, else spelt."""
    return mark if vocabulary.tokenizer.find(mark) is not None else json.dumps(mark)


def _checked(vocabulary: Vocabulary, schema: object, what: str) -> str:
    """A schema as text that compiles on its own, so that an error names it."""
    text = check_schema(schema, what)
    try:
        vocabulary.compile(f"start: %json {text}\n")
    except RequestError as error:
        raise RequestError(f"{what}: {error}") from error
    return text
