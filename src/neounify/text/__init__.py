"""Text: special tokens by name, the tokenizer, and the prompts of every task."""

from neounify.deprecation import moved
from neounify.text.forms import default_system_message
from neounify.text.template import (
    IMAGE_MARK,
    ImageSegment,
    Message,
    Prompt,
    Role,
    Segment,
    TextSegment,
    after_think_ids,
    chat_prompt,
    image_prompt,
    images_only_prompt,
    interleave_prompt,
    place_images,
    unconditional_prompt,
)
from neounify.text.tokenizer import BYTE_VOCAB_SIZE, TextStream, Tokenizer, byte_tokenizer
from neounify.text.tools import Tool, ToolCall

__all__ = [
    "BYTE_VOCAB_SIZE",
    "IMAGE_MARK",
    "ImageSegment",
    "Message",
    "Prompt",
    "Role",
    "Segment",
    "TextSegment",
    "TextStream",
    "Tokenizer",
    "Tool",
    "ToolCall",
    "after_think_ids",
    "byte_tokenizer",
    "chat_prompt",
    "default_system_message",
    "image_prompt",
    "images_only_prompt",
    "interleave_prompt",
    "place_images",
    "unconditional_prompt",
]

__getattr__ = moved(__name__, __name__, {"paint_prompt": "image_prompt"})
