"""Sampling state of one sequence: random generator and tokens of its context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from neounify.config import TextSampling


class SamplingState:
    """Random state of one sequence, and the tokens in its context.

    `context` are the token ids it begins with. With a random state per sequence, the sampled tokens
    do not depend on what else is in the batch.
    """

    def __init__(self, settings: TextSampling, context: Sequence[int] = ()) -> None:
        self.settings = settings
        self.constraint = None if settings.constraint is None else settings.constraint.start()
        self._context = list(context) if settings.repetition_penalty != 1 else None
        self._seen: Tensor | None = None
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    @property
    def plain(self) -> bool:
        """Whether sampling is the argmax of the unchanged logits."""
        s = self.settings
        return s.temperature == 0 and s.repetition_penalty == 1 and self.constraint is None

    def accept(self, token: int) -> None:
        """Record a chosen token that is part of the text."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if self._context is None:
            return
        if self._seen is None:
            self._context.append(token)
        else:
            self._seen[token] = True

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return torch.rand((), generator=self._generator, dtype=torch.float64).item()

    def seen(self, vocab: int, device: torch.device) -> Bool[Tensor, " vocab"]:
        """Mask of the tokens in the context."""
        if self._seen is None:
            self._seen = torch.zeros(vocab, dtype=torch.bool, device=device)
            self._seen[torch.tensor(self._context or [], dtype=torch.int64, device=device)] = True
        return self._seen
