"""Key-value caches of the understanding stream, passed to the model as arguments."""

from neounify.cache.contiguous import Cache, SequenceCache
from neounify.cache.paged import PagedKVCache, PagedSequence

__all__ = ["Cache", "PagedKVCache", "PagedSequence", "SequenceCache"]
