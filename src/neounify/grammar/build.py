"""Grammars of answers: JSON by a schema, calls of functions, or either; and one answer's state."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neounify.errors import RequestError, naming_param
from neounify.grammar.schema import check_schema
from neounify.grammar.vocabulary import Vocabulary
from neounify.text.special import IM_END, THINK_CLOSE
from neounify.text.tools import CALL_CLOSE, CALL_OPEN, Tool

if TYPE_CHECKING:
    import llguidance


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What an answer may be, in llguidance's Lark form, for the vocabulary of that name.

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
    """Which tokens may come next. See `decode.sampling.Constraint`."""

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: Vocabulary, *, thinks: bool
    ) -> None:
        self._matcher = matcher
        self._thinking = thinks
        self._size = vocabulary.size
        self._end = vocabulary.tokenizer.id(IM_END)
        self._close = vocabulary.tokenizer.id(THINK_CLOSE)

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
