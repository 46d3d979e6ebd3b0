"""One layer over the tokens of one document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from support.reference.documents import Token, mask_of
from support.reference.pieces import (
    Array,
    Facts,
    Weights,
    linear,
    norm_and_rotate,
    rms_norm,
    silu,
    softmax,
)


@dataclass(frozen=True)
class Names:
    """The published names of one stream's parts in one layer."""

    layer: int
    gen: bool

    def __getitem__(self, part: str) -> str:
        suffix = "_mot_gen" if self.gen else ""
        return f"language_model.model.layers.{self.layer}.{part}{suffix}"


def swiglu(x: Array, weights: Weights, name: str) -> Array:
    """down(silu(gate x) · up x)"""
    gate = silu(linear(x, weights, f"{name}.gate_proj"))
    return linear(gate * linear(x, weights, f"{name}.up_proj"), weights, f"{name}.down_proj")


def router_weights(scores: Array, top_k: int, renormalise: bool) -> dict[int, float]:
    """Give the weight of each chosen expert: softmax over all, then the top k."""
    probabilities = softmax(scores)
    chosen = sorted(range(len(scores)), key=lambda e: -float(probabilities[e]))[:top_k]
    total = sum(float(probabilities[e]) for e in chosen) if renormalise else 1.0
    return {e: float(probabilities[e]) / total for e in chosen}


def sparse(x: Array, weights: Weights, name: str, top_k: int, renormalise: bool) -> Array:
    """The mixture of experts, for one token."""
    scores = linear(x, weights, f"{name}.gate")
    out = np.zeros_like(x)
    for expert, share in router_weights(scores, top_k, renormalise).items():
        out += share * swiglu(x, weights, f"{name}.experts.{expert}")
    return out


def mlp(x: Array, weights: Weights, names: Names, facts: Facts) -> Array:
    """The dense or the sparse MLP, whichever the weights hold."""
    name = names["mlp"]
    if f"{name}.gate.weight" in weights:
        top_k = facts.top_k_gen if names.gen else facts.top_k_und
        return sparse(x, weights, name, top_k, facts.renormalise)
    return swiglu(x, weights, name)


def attend(queries: Array, keys: Array, values: Array, mask: Array) -> Array:
    """Softmax attention by loops: queries [n, H, d], keys and values [m, G, d] -> [n, H, d]."""
    n, heads, d = queries.shape
    group = heads // keys.shape[1]
    out = np.zeros_like(queries)
    for i in range(n):
        seen = [j for j in range(len(keys)) if mask[i, j]]
        for head in range(heads):
            shared = head // group
            scores = np.array([queries[i, head] @ keys[j, shared] for j in seen]) / math.sqrt(d)
            for probability, j in zip(softmax(scores), seen, strict=True):
                out[i, head] += probability * values[j, shared]
    return out


@dataclass
class KeysValues:
    """The keys (after norm and rotation) and values of one layer, [tokens, G, d]."""

    keys: Array
    values: Array


def layer(
    xs: Sequence[Array], tokens: Sequence[Token], index: int, weights: Weights, facts: Facts
) -> tuple[list[Array], KeysValues]:
    """One layer over the tokens of one document, each through the weights of its stream."""
    d = facts.head_dim
    queries = np.zeros((len(xs), facts.heads, d))
    keys = np.zeros((len(xs), facts.kv_heads, d))
    values = np.zeros((len(xs), facts.kv_heads, d))
    for i, (x, token) in enumerate(zip(xs, tokens, strict=True)):
        names = Names(index, token.gen)
        normed = rms_norm(x, weights[f"{names['input_layernorm']}.weight"], facts.eps)
        q = linear(normed, weights, names["self_attn.q_proj"]).reshape(facts.heads, d)
        k = linear(normed, weights, names["self_attn.k_proj"]).reshape(facts.kv_heads, d)
        values[i] = linear(normed, weights, names["self_attn.v_proj"]).reshape(-1, d)
        for heads, out, part in ((q, queries, "q"), (k, keys, "k")):
            norm = weights[f"{names[f'self_attn.{part}_norm']}.weight"]
            norm_hw = weights[f"{names[f'self_attn.{part}_norm_hw']}.weight"]
            for head in range(len(heads)):
                out[i, head] = norm_and_rotate(heads[head], token.position, norm, norm_hw, facts)
    mixed = attend(queries, keys, values, mask_of(tokens, tokens))
    after: list[Array] = []
    for i, (x, token) in enumerate(zip(xs, tokens, strict=True)):
        names = Names(index, token.gen)
        x = x + linear(mixed[i].reshape(-1), weights, names["self_attn.o_proj"])
        weight = weights[f"{names['post_attention_layernorm']}.weight"]
        after.append(x + mlp(rms_norm(x, weight, facts.eps), weights, names, facts))
    return after, KeysValues(keys, values)
