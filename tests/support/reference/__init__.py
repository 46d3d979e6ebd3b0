"""A second implementation of the whole model: slow, plain, float64, one token at a time.

It is written from the equations of the model, not from `neounify.model`, and shares nothing with
it: weights come in as a table from published tensor names to arrays, the input as a list of
documents, each a list of text, clean image and noisy image spans. The tests hold the fast model
against it. Nothing here is meant to be quick, only to be read next to the equations:

    x += o(attention(rope(qnorm(q(n1 x))), rope(knorm(k(n1 x))), v(n1 x)))
    x += mlp(n2 x)                             for each stream with its own weights,

where query i sees key j of its document iff j is an und token at or before i or of i's own clean
image, or both are gen tokens of one noisy image.
"""

from support.reference.documents import (
    Clean,
    ClipSpan,
    Document,
    Noisy,
    NoisyClip,
    Span,
    Text,
    Token,
    Tube,
    mask_of,
    next_time,
    tokens_of,
)
from support.reference.layers import KeysValues, layer, router_weights, sparse
from support.reference.model import Answer, forward
from support.reference.pieces import Array, Facts, Weights, rms_norm, rotate_halves
from support.reference.pixels import (
    flow_head,
    frames_of,
    patch_embed,
    pixel_head,
    rotate_patches,
    scalar_embed,
    sinusoids,
    tube_rows,
)

__all__ = [
    "Answer",
    "Array",
    "Clean",
    "ClipSpan",
    "Document",
    "Facts",
    "KeysValues",
    "Noisy",
    "NoisyClip",
    "Span",
    "Text",
    "Token",
    "Tube",
    "Weights",
    "flow_head",
    "forward",
    "frames_of",
    "layer",
    "mask_of",
    "next_time",
    "patch_embed",
    "pixel_head",
    "rms_norm",
    "rotate_halves",
    "rotate_patches",
    "router_weights",
    "scalar_embed",
    "sinusoids",
    "sparse",
    "tokens_of",
    "tube_rows",
]
