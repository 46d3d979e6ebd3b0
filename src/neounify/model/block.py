"""The unit in which visibility is described."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Consecutive queries of one stream and document that see the same keys.

    They see the first `visible` understanding tokens of their document (cached
    ones included) and, in the generation stream, all of their own block. A causal
    block ends at `visible`; its queries see only up to themselves.
    """

    document: int
    start: int
    stop: int
    visible: int
    causal: bool

    @property
    def length(self) -> int:
        return self.stop - self.start
