"""Capabilities: what a checkpoint was trained for, as names and as words of messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Capability = Literal[
    "chat",
    "generate",
    "edit",
    "interleave",
    "think",
    "chat_video",
    "generate_video",
    "continue_video",
]
"""What a checkpoint was trained for; the words of `CAPABILITIES`."""
CAPABILITIES: Mapping[Capability, str] = {
    "chat": "answer questions about text and images",
    "generate": "generate images",
    "edit": "edit images",
    "interleave": "write answers of text and images",
    "think": "think before answering",
    "chat_video": "answer questions about videos",
    "generate_video": "generate videos",
    "continue_video": "continue videos",
}
"""What models with a capability can do, for messages."""
