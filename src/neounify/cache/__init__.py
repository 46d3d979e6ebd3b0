"""Key-value caches of the understanding stream, passed to the model as arguments."""

from neounify.cache.paged import PagedPool, PagedSequence
from neounify.cache.protocol import Cache
from neounify.cache.sequence import SequenceCache

__all__ = ["Cache", "PagedPool", "PagedSequence", "SequenceCache"]
