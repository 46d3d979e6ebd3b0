"""Process-wide settings (`process`) and execution limits of a model on a device (`plan`)."""

from neounify.runtime.process import (
    MemoryReturner,
    freeze_objects,
    keep_freed_memory,
    lasting_imports,
    one_thread,
    resident_bytes,
    return_freed_memory,
    share_one_arena,
    switch_threads_often,
)

__all__ = [
    "MemoryReturner",
    "freeze_objects",
    "keep_freed_memory",
    "lasting_imports",
    "one_thread",
    "resident_bytes",
    "return_freed_memory",
    "share_one_arena",
    "switch_threads_often",
]
