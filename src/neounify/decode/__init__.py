"""From a prompt to token ids: feeding the understanding stream, choosing tokens, stopping.

Everything here speaks ids; text belongs to the pipeline.
"""

from neounify.decode.forward import ModelInput, forward_und
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
    "Generation",
    "LogProbs",
    "ModelInput",
    "SamplingSettings",
    "SamplingState",
    "Writing",
    "choose_tokens",
    "decode",
    "forward_und",
    "sample",
]
