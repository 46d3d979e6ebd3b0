"""Messages of a conversation, and the check of their text."""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from neounify.errors import PromptError
from neounify.text.tools import ToolCall

IMAGE_MARK = "<image>"
"""Stands in a user's text where an image belongs."""

Role = Literal["system", "user", "assistant", "tool"]

_NOT_TEXT = re.compile("[\\0\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    A user's text marks each image with `<image>`. In other roles the mark is plain text; an
    assistant's images stand at `image_offsets`, ascending numbers of characters of `text`.
    `tool_calls` are those an assistant's turn ended with; the text of a "tool" turn is the result
    of one of them.

    Raises PromptError for an unknown role, for what is no text, and for offsets out of place.
    """

    role: Role
    text: str
    tool_calls: tuple[ToolCall, ...] = field(default=(), kw_only=True)
    image_offsets: tuple[int, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if self.role not in ("system", "user", "assistant", "tool"):
            raise PromptError(
                f"a message is from system, user, assistant or tool, not {self.role!r}"
            )
        check_text(self.text, f"the {self.role} message")
        if self.tool_calls and self.role != "assistant":
            raise PromptError(f"only assistant messages hold tool calls, this one is {self.role!r}")
        for call in self.tool_calls:
            check_text(call.name + call.arguments, "a tool call")
        if self.image_offsets and self.role != "assistant":
            raise PromptError(f"image_offsets are for assistant messages, not for {self.role!r}")
        cuts = (0, *self.image_offsets, len(self.text))
        if any(low > high for low, high in pairwise(cuts)):
            raise PromptError(
                f"image_offsets {self.image_offsets} must ascend within the text's "
                f"{len(self.text)} characters"
            )

    @property
    def pieces(self) -> list[str]:
        """The texts around the images: one more than there are images."""
        if self.role == "user":
            return self.text.split(IMAGE_MARK)
        cuts = (0, *self.image_offsets, len(self.text))
        return [self.text[low:high] for low, high in pairwise(cuts)]

    @property
    def n_images(self) -> int:
        """How many images the message holds."""
        return len(self.pieces) - 1


def check_text(text: str, what: str) -> None:
    """Raise PromptError unless `what`, as the error calls it, is text."""
    if not isinstance(text, str):
        raise PromptError(f"{what} must be text, not {type(text).__name__}")
    wrong = _NOT_TEXT.search(text)
    if wrong:
        raise PromptError(
            f"{what} holds U+{ord(wrong[0]):04X} at character {wrong.start()}; "
            "NUL and lone surrogates are not text"
        )
