"""Decoding: the understanding stream's forward call, sampling, stopping.

All functions handle token ids; text belongs to the tasks.
"""

from neounify.decode.forward import ModelInput, forward_und
from neounify.decode.loop import DecodeState, choose_tokens
from neounify.decode.sampler import Choice, LogProbs, sample
from neounify.decode.sampling import SamplingState

__all__ = [
    "Choice",
    "DecodeState",
    "LogProbs",
    "ModelInput",
    "SamplingState",
    "choose_tokens",
    "forward_und",
    "sample",
]
