"""Log-probabilities as OpenAI's clients read them, in the form of chat and the older one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from neounify.serve.events import TokenLogProb

LEAST = -9999.0
"""What stands for the logarithm of a probability of 0, which is no number of JSON."""


def of_chat(tokens: Iterable[TokenLogProb]) -> dict[str, Any]:
    """The `logprobs` of a choice of a chat completion."""
    return {
        "content": [
            _entry(token.token, token.log_prob)
            | {"top_logprobs": [_entry(other, value) for other, value in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def of_completion(tokens: Iterable[TokenLogProb], offset: int) -> dict[str, Any]:
    """The `logprobs` of a choice of a text completion; its text begins at `offset` characters.

    The token that was chosen is among the alternatives, as it always is in OpenAI's answers.
    """
    found: dict[str, Any] = {
        "tokens": [],
        "token_logprobs": [],
        "top_logprobs": [],
        "text_offset": [],
    }
    for token in tokens:
        name, value = _name(token.token), max(token.log_prob, LEAST)
        top = {_name(other): max(value, LEAST) for other, value in token.top}
        found["tokens"].append(name)
        found["token_logprobs"].append(value)
        found["top_logprobs"].append({name: value} | top)
        found["text_offset"].append(offset)
        offset += len(_text(token.token))
    return found


def _entry(token: bytes, log_prob: float) -> dict[str, Any]:
    return {"token": _text(token), "logprob": max(log_prob, LEAST), "bytes": list(token)}


def _name(token: bytes) -> str:
    """The text of a token; one that is no whole characters by its bytes, so that names differ."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _text(token: bytes) -> str:
    return token.decode("utf-8", errors="replace")
