"""Tokens of an answer to the events that tell of it: thought, text, calls of functions."""

from __future__ import annotations

from collections.abc import Callable

from neounify.decode.sampler import LogProbs
from neounify.engine.messages import Token
from neounify.serve.events import TextPiece, TokenLogProb, ToolCallPiece
from neounify.tasks.answer import AnswerText
from neounify.tasks.processor import Front
from neounify.text.special import THINK_CLOSE, THINK_OPEN
from neounify.text.tokenizer import TextStream
from neounify.text.tools import ToolCall, ToolCallReader

Pieces = list[TextPiece | ToolCallPiece]


class AnswerEvents:
    """Turns the tokens of one answer into pieces of text, each marked as thought or answer.

    Log-probabilities go with the piece that shows their token's text, those of a thought nowhere.
    """

    def __init__(
        self,
        front: Front,
        answer: Callable[[], AnswerText | TextStream],
        *,
        thinking: bool = False,
        thoughts: bool = True,
        calls: ToolCallReader | None = None,
    ) -> None:
        """`answer` makes what decodes tokens outside of thoughts; `calls` finds calls in it.

        `thinking`: the answer begins inside a thought. Without `thoughts` their marks are text.
        """
        marks = {front.token(THINK_OPEN): True, front.token(THINK_CLOSE): False}
        self._marks = marks if thoughts else {}
        self._front, self._answer, self._calls = front, answer, calls
        self._log_probs: list[TokenLogProb] = []
        self.thinking = thinking
        self._text = self._fresh()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return isinstance(self._text, AnswerText) and self._text.stopped

    def put(self, token: Token) -> Pieces:
        """Add a token; what can be shown now."""
        if token.id in self._marks:
            pieces = self.flush()
            self.thinking = self._marks[token.id]
            self._text = self._fresh()
            return pieces
        if token.logprobs is not None and not self.thinking:
            self._log_probs.append(self._named(token.id, token.logprobs))
        text = self._text.put(token.id)
        if self.stopped:
            self._drop_unshown(text)
        return self._shown(text)

    def flush(self) -> Pieces:
        """What was held back."""
        pieces = self._shown(self._text.flush())
        if self._calls is not None and not self.thinking:
            pieces += [self._piece(item) for item in self._calls.flush()]
        if self._log_probs:
            pieces.append(TextPiece("", log_probs=self._taken()))
        return pieces

    def _shown(self, text: str) -> Pieces:
        if not text:
            return []
        if self._calls is None or self.thinking:
            return [self._piece(text)]
        return [self._piece(item) for item in self._calls.put(text)]

    def _piece(self, item: str | ToolCall) -> TextPiece | ToolCallPiece:
        if isinstance(item, ToolCall):
            return ToolCallPiece(item.name, item.arguments, self._taken())
        return TextPiece(item, self.thinking, self._taken())

    def _taken(self) -> tuple[TokenLogProb, ...]:
        taken, self._log_probs = tuple(self._log_probs), []
        return taken

    def _drop_unshown(self, text: str) -> None:
        """Forget the tokens behind what is shown: those of a stop string."""
        left = len(text.encode())
        kept = []
        for token in self._log_probs:
            if left <= 0:
                break
            kept.append(token)
            left -= len(token.token)
        self._log_probs = kept

    def _named(self, token: int, log_probs: LogProbs) -> TokenLogProb:
        name = self._front.tokenizer.token_bytes
        top = tuple((name(other), value) for other, value in log_probs.top)
        return TokenLogProb(name(token), log_probs.chosen, top)

    def _fresh(self) -> AnswerText | TextStream:
        return AnswerText(self._front.tokenizer.stream()) if self.thinking else self._answer()
