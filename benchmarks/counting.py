"""Operations of inference: 2 × the weights a token passes, 4 · queries · keys · heads · d."""

from __future__ import annotations

from neounify.model import NeoUnify
from neounify.model.parts import GEN, UND
from neounify.train.speed import attention, layer_weights, weights


def prefill(model: NeoUnify, tokens: int, image_tokens: int = 0) -> int:
    """Operations of a prefill, every query against every key; logits of the last position only."""
    operations = 2 * layer_weights(model, UND) * tokens + attention(model.config, tokens**2)
    logits = 2 * model.config.vocab_size * model.config.hidden_size
    return operations + 2 * weights(model.und_patch) * image_tokens + logits


def denoise(model: NeoUnify, tokens: int, prefixes: list[int]) -> int:
    """Operations of one step behind several prefixes; the image is embedded once."""
    passed = layer_weights(model, GEN) + weights(model.image_head)
    branches = sum(
        2 * passed * tokens + attention(model.config, tokens * (prefix + tokens))
        for prefix in prefixes
    )
    return branches + 2 * weights(model.gen_patch) * tokens
