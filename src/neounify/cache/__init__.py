"""Key-value caches of the understanding stream, passed to the model as arguments."""

from neounify.cache.key_values import (
    Cache,
    PagedKVCache,
    PagedSequence,
    SequenceCache,
    new_cache,
    new_paged_cache,
)

__all__ = [
    "Cache",
    "PagedKVCache",
    "PagedSequence",
    "SequenceCache",
    "new_cache",
    "new_paged_cache",
]
