"""The `usage` of text answers, every field of OpenAI's schema filled in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neounify.serve.events import Finished


def text_usage(answers: Sequence[Finished], prompts: Sequence[Finished]) -> dict[str, Any]:
    """Tokens of all `answers`; a prompt with several counts once, as in one of `prompts`.

    Tokens of painted images are not in the totals.
    """
    read = sum(answer.prompt_tokens for answer in prompts)
    written = sum(answer.completion_tokens for answer in answers)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {
            "audio_tokens": 0,
            "cached_tokens": sum(answer.cached_tokens for answer in prompts),
            "image_tokens": sum(answer.prompt_image_tokens for answer in prompts),
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "audio_tokens": 0,
            "image_tokens": sum(answer.image_tokens for answer in answers),
            "reasoning_tokens": sum(answer.reasoning_tokens for answer in answers),
            "rejected_prediction_tokens": 0,
        },
    }
