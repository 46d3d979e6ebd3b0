"""Operations a model needs: 2 × the weights a token passes, 4 · queries · keys · heads · d."""

from __future__ import annotations

from torch import nn

from neounify.config import ModelConfig
from neounify.model import NeoUnify


def weights(*modules: nn.Module) -> int:
    """Parameters in matrices; a norm's vector is no matrix product."""
    sizes = [p.numel() for m in modules for p in m.parameters() if p.ndim > 1]
    return sum(sizes)


def und_weights(model: NeoUnify) -> int:
    """Weights every understanding token passes, without embedding and logits."""
    return weights(*(layer.get_submodule("und") for layer in model.layers))


def gen_weights(model: NeoUnify) -> int:
    """Weights every noisy token passes, embedding and head included."""
    return weights(*(layer.get_submodule("gen") for layer in model.layers), model.image_head)


def attention(config: ModelConfig, queries: int, keys: int) -> int:
    """Operations of all layers, every query against every key."""
    return 4 * queries * keys * config.num_heads * config.head_dim * config.num_layers


def prefill(model: NeoUnify, tokens: int, image_tokens: int = 0) -> int:
    """Operations of a prefill; logits of the last position only."""
    config = model.config
    operations = 2 * und_weights(model) * tokens + attention(config, tokens, tokens)
    return operations + 2 * patch_weights(model) * image_tokens + logits(model)


def denoise(model: NeoUnify, tokens: int, prefixes: list[int]) -> int:
    """Operations of one step behind several prefixes; the image is embedded once."""
    config = model.config
    branches = sum(
        2 * gen_weights(model) * tokens + attention(config, tokens, prefix + tokens)
        for prefix in prefixes
    )
    return branches + 2 * patch_weights(model) * tokens


def logits(model: NeoUnify) -> int:
    return 2 * model.config.vocab_size * model.config.hidden_size


def patch_weights(model: NeoUnify) -> int:
    """Multiply-adds of one token's patch embedding: M² patches, then the merge."""
    c = model.config
    return c.merge**2 * 3 * c.patch_size**2 * c.vision_hidden_size + weights(model.gen_patch.merge)
