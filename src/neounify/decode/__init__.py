"""From a prompt to token ids: feeding the understanding stream, choosing tokens, stopping.

Everything here speaks ids; text belongs to the pipeline.
"""

from neounify.decode.choose import Choose, SamplingSettings, greedy, make_chooser
from neounify.decode.feed import Feed, feed
from neounify.decode.loop import Generation, decode

__all__ = [
    "Choose",
    "Feed",
    "Generation",
    "SamplingSettings",
    "decode",
    "feed",
    "greedy",
    "make_chooser",
]
