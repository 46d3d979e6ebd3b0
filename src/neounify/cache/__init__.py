"""Key-value caches of the understanding stream, passed to the model as arguments."""

from neounify.cache.contiguous import SequenceCache
from neounify.cache.paged import PagedKVCache, PagedSequence
from neounify.cache.protocol import Cache

__all__ = ["Cache", "PagedKVCache", "PagedSequence", "SequenceCache"]
