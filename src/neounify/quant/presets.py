"""Presets of `neounify quantise`: which format each linear weight of a model gets."""

from __future__ import annotations

from collections.abc import Mapping

from neounify.errors import RequestError
from neounify.quant.formats import FourBits, Fp8Rows, Int8Rows, PublishedFormat, Shape
from neounify.quant.rotation import group_size
from neounify.quant.w4 import GROUP

QUANT_PRESETS = ("int8", "int8-all", "fp8", "w4-mixed", "w4")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HEADS = ("embed_tokens.weight", "lm_head.weight")
ROBUST = ("q_proj", "k_proj", "gate_proj", "up_proj")
"""Projections whose weights feel 4 bits least; measured in docs/compression.md."""


def check_preset(preset: str) -> None:
    """Raise RequestError for a name that is no preset."""
    if preset not in QUANT_PRESETS:
        raise RequestError(
            f"preset {preset!r} is unknown; known are {', '.join(QUANT_PRESETS)}", param="quantise"
        )


def preset_formats(
    preset: str, shapes: Mapping[str, Shape], layers: int, *, tied: bool
) -> dict[str, PublishedFormat]:
    """The format of each weight that the preset quantises, by its name (ours).

    `shapes` are those of the model's tensors, `layers` is their number, `tied` whether the text
    head is the embedding, which then stays. Norms, biases, routers,
    patch embeddings, scalar embedders and the image head stay as they are. Rows that are no
    multiple of 16 stay in 8 bits. Raises RequestError for an unknown preset.
    """
    check_preset(preset)
    formats: dict[str, PublishedFormat] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        is_head = preset == "int8-all" and name in HEADS and not tied
        if is_head or (parts[0] == "layers" and parts[-1] == "weight" and parts[-2] in PROJECTIONS):
            formats[name] = _format(preset, parts, shape[1], layers)
    return formats


def _format(preset: str, parts: list[str], columns: int, layers: int) -> PublishedFormat:
    if preset == "fp8":
        return Fp8Rows()
    four = preset == "w4" or (
        preset == "w4-mixed" and parts[-2] in ROBUST and 0 < int(parts[1]) < layers - 1
    )
    group = group_size(columns)
    return FourBits(group) if four and columns % GROUP == 0 else Int8Rows(group)
