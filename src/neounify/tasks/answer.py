"""Tokens to the text a reader sees: stop strings cut off, outer whitespace stripped."""

from __future__ import annotations

from collections.abc import Sequence

from neounify.errors import RequestError
from neounify.text.tokenizer import TextStream

MAX_STOP_STRINGS = 16


def check_stop(stop: Sequence[str]) -> None:
    """RequestError for too many stop strings, or one that is empty or no string."""
    if len(stop) > MAX_STOP_STRINGS or not all(isinstance(s, str) and s for s in stop):
        raise RequestError(
            f"stop must be at most {MAX_STOP_STRINGS} non-empty strings", param="stop"
        )


class AnswerText:
    """Turns a stream of tokens into pieces of text whose concatenation is the answer.

    Text that might be the beginning of a stop string, or whitespace that might be the
    end of the answer, is held back until it is known.
    """

    def __init__(
        self,
        stream: TextStream,
        stop: Sequence[str] = (),
        *,
        continues: bool = False,
        strip: bool = True,
    ) -> None:
        """`continues`: it goes on behind text that is there, so leading whitespace counts.

        Without `strip` all outer whitespace is part of the answer.
        """
        check_stop(stop)
        self._stream = stream
        self._stop = tuple(stop)
        self._strip = strip
        self._held = ""
        self._begun = continues
        self.stopped = False

    def put(self, token: int) -> str:
        """Add a token; what can be shown now, often a word, sometimes ''."""
        return self._emit(self._stream.put(token), final=False)

    def flush(self) -> str:
        """The rest, at the end of the answer."""
        return self._emit(self._stream.flush(), final=True)

    def _emit(self, piece: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        hits = [at for s in self._stop if (at := text.find(s)) >= 0]
        if hits:
            self.stopped, final, text = True, True, text[: min(hits)]
        if self._strip and not self._begun:
            text = text.lstrip()
        shown = text if final else text[: self._safe(text)]
        keep = len(shown.rstrip() if self._strip else shown)
        self._held = "" if final else text[keep:]
        self._begun = self._begun or keep > 0
        return text[:keep]

    def _safe(self, text: str) -> int:
        """How much of the text cannot be the beginning of a stop string."""
        for start in range(max(0, len(text) - max(map(len, self._stop), default=0) + 1), len(text)):
            if any(s.startswith(text[start:]) for s in self._stop):
                return start
        return len(text)
