"""Key-value caches of the understanding stream, passed to the model as arguments."""

from neounify.cache.sequence import SequenceCache

__all__ = ["SequenceCache"]
