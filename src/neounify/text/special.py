"""The special tokens a model relies on, by name; their ids belong to each tokenizer."""

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"
IMAGE_OPEN = "<img>"
IMAGE_CLOSE = "</img>"
END_OF_TEXT = "<|endoftext|>"

REQUIRED = (IM_START, IM_END, THINK_OPEN, THINK_CLOSE, IMAGE_CONTEXT, IMAGE_OPEN, IMAGE_CLOSE)
"""A tokenizer without all of these cannot drive a model."""

CONTROL = (IM_START, IM_END, IMAGE_CONTEXT, IMAGE_OPEN, IMAGE_CLOSE, END_OF_TEXT)
"""Tokens that steer the model: typed by a user they must never become the token itself."""
