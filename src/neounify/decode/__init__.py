"""From a prompt to token ids: the understanding stream's forward call, sampling, stopping.

Everything here speaks ids; text belongs to the pipeline.
"""

from neounify.decode.forward import ModelInput, forward_und
from neounify.decode.loop import Writing, choose_tokens
from neounify.decode.sampler import Choice, LogProbs, sample
from neounify.decode.sampling import SamplingState

__all__ = [
    "Choice",
    "LogProbs",
    "ModelInput",
    "SamplingState",
    "Writing",
    "choose_tokens",
    "forward_und",
    "sample",
]
