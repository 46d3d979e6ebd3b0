"""Hooks that check prompts and generated images, and may refuse them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from PIL import Image

from neounify.errors import ServiceError


class Refused(ServiceError):
    """A hook refused the request; `rule` is the name of the rule, never what it looks for."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(f"The request was refused by the rule {rule!r}: {reason}")
        self.rule = rule


@runtime_checkable
class SafetyHook(Protocol):
    """Checks before and after generation. Called from several threads."""

    def check_prompt(self, text: str, images: Sequence[Image.Image]) -> None:
        """Check a prompt and its images before any work; raises Refused."""

    def check_image(self, image: Image.Image) -> None:
        """Check a generated image before it is returned; raises Refused."""


class Hooks:
    """Several hooks as one: asked in their order, the first that refuses ends it."""

    def __init__(self, hooks: Sequence[SafetyHook] = ()) -> None:
        self._hooks = tuple(hooks)

    def __len__(self) -> int:
        return len(self._hooks)

    def check_prompt(self, text: str, images: Sequence[Image.Image]) -> None:
        """Ask every hook; raises Refused."""
        for hook in self._hooks:
            hook.check_prompt(text, images)

    def check_image(self, image: Image.Image) -> None:
        """Ask every hook; raises Refused."""
        for hook in self._hooks:
            hook.check_image(image)
