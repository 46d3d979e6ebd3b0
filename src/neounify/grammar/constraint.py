"""A grammar as plain data, and as the constraint of one answer that is being written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neounify.grammar.vocabulary import Vocabulary
from neounify.text.special import IM_END, THINK_CLOSE

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
