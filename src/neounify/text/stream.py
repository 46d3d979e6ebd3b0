"""Incremental decoding: token ids in, text out, never half a character."""

import codecs
from collections.abc import Callable


class TextStream:
    """Turns ids into text one at a time; all pieces together equal one decode of all ids.

    A character may be spread over several byte-level tokens: its bytes are held back
    until it is complete. Special tokens and unknown ids give no text. The library's own
    stream is not used: it never gives back an incomplete tail, and holds whole words back
    behind a byte that no later token can complete.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """Make a stream over `bytes_of`, which gives the raw bytes of an id (empty: no text)."""
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token_id: int) -> str:
        """Add one id; return the text that is complete now, often a word, sometimes ''."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """End the text; return what stands for an incomplete character, normally ''."""
        return self._decoder.decode(b"", final=True)
