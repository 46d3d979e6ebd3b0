"""The network: one implementation for inference and training, single-device, without state."""

from neounify.model.layout import Document, Image, Layout, Noise, Span, Text
from neounify.model.neo import Hidden, NeoUnify

__all__ = ["Document", "Hidden", "Image", "Layout", "NeoUnify", "Noise", "Span", "Text"]
