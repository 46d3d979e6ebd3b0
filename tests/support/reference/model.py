"""The whole model: logits, clean images, keys and values of every document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from support.reference.documents import Clean, Document, Noisy, Text, Token, tokens_of
from support.reference.layers import KeysValues, layer
from support.reference.pieces import Array, Facts, Weights, rms_norm
from support.reference.pixels import flow_head, patch_embed, pixel_head, scalar_embed


@dataclass
class Answer:
    """What the model says about one document."""

    tokens: list[Token]
    hidden: Array
    """After the final norm of each token's stream, [tokens, D]."""
    logits: Array
    """Of the und tokens in order, [und tokens, V]."""
    clean: list[Array] = field(default_factory=list)
    """The clean image [3, H, W] predicted for every noisy span, in order."""
    kv: list[KeysValues] = field(default_factory=list)
    """Every layer's keys and values, for all tokens."""


def embed(document: Document, weights: Weights, facts: Facts) -> list[Array]:
    """Give every token of a document its vector at the entrance of the first layer."""
    table = weights["language_model.model.embed_tokens.weight"]
    vectors: list[Array] = []
    for span in document:
        if isinstance(span, Text):
            vectors.extend(table[token_id] for token_id in span.ids)
        elif isinstance(span, Clean):
            vectors.extend(patch_embed(span.pixels, weights, False, facts))
        else:
            extra = scalar_embed(span.t, weights, "timestep_embedder")
            if "fm_modules.noise_scale_embedder.mlp.0.weight" in weights:
                extra = extra + scalar_embed(span.noise, weights, "noise_scale_embedder")
            embedded = patch_embed(span.pixels, weights, True, facts)
            vectors.extend(vector + extra for vector in embedded)
    return vectors


def predict_clean(hidden: Array, span: Noisy, weights: Weights, facts: Facts) -> Array:
    """Read the clean image of a noisy span off its tokens' last hidden vectors."""
    side = facts.token_side
    rows, columns = span.pixels.shape[1] // side, span.pixels.shape[2] // side
    if facts.pixel_head_shuffles is not None:
        return pixel_head(hidden, rows, columns, weights, facts.pixel_head_shuffles)
    return flow_head(hidden, rows, columns, weights, side)


def forward(documents: Sequence[Document], weights: Weights, facts: Facts) -> list[Answer]:
    """Run every document on its own, and give logits and clean images."""
    answers: list[Answer] = []
    all_tokens = tokens_of(documents, facts.token_side)
    for document, tokens in zip(documents, all_tokens, strict=True):
        xs = embed(document, weights, facts)
        answer = Answer(tokens, np.zeros((0, 0)), np.zeros((0, 0)))
        for index in range(facts.layers):
            xs, kv = layer(xs, tokens, index, weights, facts)
            answer.kv.append(kv)
        und_norm = weights["language_model.model.norm.weight"]
        gen_norm = weights["language_model.model.norm_mot_gen.weight"]
        answer.hidden = np.array(
            [
                rms_norm(x, gen_norm if token.gen else und_norm, facts.eps)
                for x, token in zip(xs, tokens, strict=True)
            ]
        )
        head = "language_model.lm_head.weight"
        table = weights.get(head, weights["language_model.model.embed_tokens.weight"])
        und = [i for i, token in enumerate(tokens) if not token.gen]
        answer.logits = np.array([table @ answer.hidden[i] for i in und])
        for index, span in enumerate(document):
            if isinstance(span, Noisy):
                rows = [i for i, token in enumerate(tokens) if token.gen and token.block == index]
                answer.clean.append(predict_clean(answer.hidden[rows], span, weights, facts))
        answers.append(answer)
    return answers
