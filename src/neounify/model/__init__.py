"""The network: one implementation for inference and training, single-device, without state."""

from neounify.model.layout import Document, Image, Layout, Noise, Span, Text
from neounify.model.neo import ModelBatch, NeoUnify

__all__ = ["Document", "Image", "Layout", "ModelBatch", "NeoUnify", "Noise", "Span", "Text"]
