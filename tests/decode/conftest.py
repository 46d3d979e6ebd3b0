"""Small models run on one thread."""

from models import one_thread

__all__ = ["one_thread"]
