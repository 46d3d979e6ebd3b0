"""From a prompt to token ids: feeding the understanding stream, choosing tokens, stopping.

Everything here speaks ids; text belongs to the pipeline.
"""

from neounify.decode.feed import Feed, feed
from neounify.decode.loop import Generation, Writing, choose_tokens, decode
from neounify.decode.sampler import Choice, LogProbs, sample
from neounify.decode.sampling import (
    Constraint,
    ConstraintFactory,
    SamplingSettings,
    SamplingState,
)

__all__ = [
    "Choice",
    "Constraint",
    "ConstraintFactory",
    "Feed",
    "Generation",
    "LogProbs",
    "SamplingSettings",
    "SamplingState",
    "Writing",
    "choose_tokens",
    "decode",
    "feed",
    "sample",
]
