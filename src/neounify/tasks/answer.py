"""Answer text from decoded tokens: stop strings cut off, thoughts and tool calls separated."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from neounify.decode.sampler import LogProbs
from neounify.engine.messages import Decoded, DecodedToken
from neounify.errors import RequestError
from neounify.tasks.program import (
    NEXT,
    Processor,
    Program,
    TextPiece,
    TokenLogProb,
    ToolCallPiece,
    Usage,
)
from neounify.text.tokenizer import TextStream
from neounify.text.tokens import THINK_CLOSE, THINK_OPEN
from neounify.text.tools import ToolCall, ToolCallReader

MAX_STOP_STRINGS = 16
Pieces = list[TextPiece | ToolCallPiece]


def check_stop(stop: Sequence[str]) -> None:
    """Check stop strings: at most MAX_STOP_STRINGS, none empty. Raises RequestError."""
    unusable = [s for s in stop if not (isinstance(s, str) and s)]
    if unusable or len(stop) > MAX_STOP_STRINGS:
        got = f"{str(unusable[0])[:40]!r} among them" if unusable else f"{len(stop)}"
        raise RequestError(
            f"stop must be at most {MAX_STOP_STRINGS} non-empty strings, got {got}", param="stop"
        )


class AnswerText:
    """Streaming text of an answer; the pieces concatenate to the answer.

    Text that may begin a stop string, or whitespace that may end the answer, is held back until
    the following tokens decide.
    """

    def __init__(
        self,
        stream: TextStream,
        stop: Sequence[str] = (),
        *,
        continues: bool = False,
        strip: bool = True,
    ) -> None:
        """`continues`: the answer continues existing text, so leading whitespace counts.

        Without `strip` all outer whitespace is part of the answer.
        """
        check_stop(stop)
        self._stream = stream
        self._stop = tuple(stop)
        self._strip = strip
        self._pending = ""
        self._begun = continues
        self.stopped = False

    def put(self, token: int) -> str:
        """Add a token; returns the text that is certain now, often a word, sometimes ''."""
        return self._emit(self._stream.put(token), final=False)

    def flush(self) -> str:
        """Rest of the text, at the end of the answer."""
        return self._emit(self._stream.flush(), final=True)

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._pending + piece
        hits = [at for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            self.stopped, final, text = True, True, text[: min(hits)]
        if self._strip and not self._begun:
            text = text.lstrip()
        shown = text if final else text[: self._safe(text)]
        keep = len(shown.rstrip() if self._strip else shown)
        self._pending = "" if final else text[keep:]
        self._begun = self._begun or keep > 0
        return text[:keep]

    def _safe(self, text: str) -> int:
        """Length of the text before a possible beginning of a stop string."""
        for start in range(max(0, len(text) - max(map(len, self._stop), default=0) + 1), len(text)):
            if any(s.startswith(text[start:]) for s in self._stop):
                return start
        return len(text)


class AnswerEvents:
    """Streaming events of one answer: text pieces, marked as thought or answer, and tool calls.

    Log-probabilities go with the piece that shows their token's text, those of a thought nowhere.
    """

    def __init__(
        self,
        processor: Processor,
        answer: Callable[[], AnswerText | TextStream],
        *,
        thinking: bool = False,
        thoughts: bool = True,
        calls: ToolCallReader | None = None,
    ) -> None:
        """`answer` builds the text decoder outside of thoughts; `calls` parses tool calls in it.

        `thinking`: the answer begins inside a thought. Without `thoughts` their marks are text.
        """
        # Models that do not think may have no such tokens.
        find = processor.tokenizer.find
        marks = {find(name): name == THINK_OPEN for name in (THINK_OPEN, THINK_CLOSE)}
        self._marks = marks if thoughts else {}
        self._processor, self._answer, self._calls = processor, answer, calls
        self._log_probs: list[TokenLogProb] = []
        self.thinking = thinking
        self._text = self._fresh()

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the answer."""
        return isinstance(self._text, AnswerText) and self._text.stopped

    def put(self, token: DecodedToken) -> Pieces:
        """Add a token; returns the pieces that are certain now."""
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
        """Pieces that were held back."""
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
        """Drop the log-probabilities behind the text shown: those of a stop string."""
        left = len(text.encode())
        kept = []
        for token in self._log_probs:
            if left <= 0:
                break
            kept.append(token)
            left -= len(token.token)
        self._log_probs = kept

    def _named(self, token: int, log_probs: LogProbs) -> TokenLogProb:
        name = self._processor.tokenizer.token_bytes
        top = tuple((name(other), value) for other, value in log_probs.top)
        return TokenLogProb(name(token), log_probs.chosen, top)

    def _fresh(self) -> AnswerText | TextStream:
        return AnswerText(self._processor.tokenizer.stream()) if self.thinking else self._answer()


def decode_text(
    answer: DecodedToken | Decoded, text: AnswerEvents, usage: Usage
) -> Program[Decoded | None]:
    """Events of a decoded text from its first `answer` on; how decoding ended.

    None when a stop string of the text came first: the release of the sequence ends decoding.
    """
    while isinstance(answer, DecodedToken):
        usage.completion += 1
        usage.reasoning += text.thinking
        yield answer
        yield from text.put(answer)
        if text.stopped:
            break
        answer = yield NEXT
    yield from text.flush()
    return answer if isinstance(answer, Decoded) else None
