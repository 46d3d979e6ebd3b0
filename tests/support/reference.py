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

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
Weights: TypeAlias = Mapping[str, Array]
"""Float64 arrays by published tensor name."""

SINUSOIDS = 128
PERIOD = 10000.0


@dataclass(frozen=True)
class Facts:
    """What the weights alone do not say."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    patch: int
    merge: int
    theta: float
    theta_hw: float
    theta_vision: float
    eps: float
    top_k_und: int = 1
    top_k_gen: int = 1
    renormalise: bool = False
    pixel_head_shuffles: tuple[int, int, int] | None = None
    """The three pixel-shuffle factors of the pixel head; None means the flow head."""

    @property
    def token_side(self) -> int:
        return self.patch * self.merge


# --- the input -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """Text tokens."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Clean:
    """An image to look at: normalised pixels [3, H, W]. `image` names what it shows."""

    pixels: Array
    image: str


@dataclass(frozen=True)
class Noisy:
    """A noisy image [3, H, W] at time t; `noise` is σ / σ_max. `image` names what it shows."""

    pixels: Array
    image: str
    t: float
    noise: float


Span: TypeAlias = Text | Clean | Noisy
Document: TypeAlias = Sequence[Span]


@dataclass(frozen=True)
class Token:
    """Where one token stands and which block of pixels, if any, it belongs to."""

    document: int
    order: int
    gen: bool
    block: int | None
    """The index of its image span in the document; None for text."""
    position: tuple[int, int, int]


def tokens_of(documents: Iterable[Document], side: int) -> list[list[Token]]:
    """Lay out every document: order, stream, block and (t, h, w) of each token."""
    return [_tokens_of_one(number, document, side) for number, document in enumerate(documents)]


def _tokens_of_one(number: int, document: Document, side: int) -> list[Token]:
    tokens: list[Token] = []
    time = 0
    time_of_image: dict[str, int] = {}
    for index, span in enumerate(document):
        if isinstance(span, Text):
            for _ in span.ids:
                tokens.append(Token(number, len(tokens), False, None, (time, 0, 0)))
                time += 1
            continue
        if span.image not in time_of_image:  # the first showing takes the next index ...
            time_of_image[span.image] = time
            time += 1
        at = time_of_image[span.image]  # ... and every other showing stands at the same place
        rows, columns = span.pixels.shape[1] // side, span.pixels.shape[2] // side
        for row in range(rows):
            for column in range(columns):
                gen = isinstance(span, Noisy)
                tokens.append(Token(number, len(tokens), gen, index, (at, row, column)))
    return tokens


def sees(query: Token, key: Token) -> bool:
    """Say whether the query may attend to the key."""
    if query.document != key.document:
        return False
    if key.gen:
        return query.gen and query.block == key.block
    if key.order <= query.order:
        return True
    return not query.gen and key.block is not None and query.block == key.block


def mask_of(queries: Sequence[Token], keys: Sequence[Token]) -> Array:
    """Give the boolean [queries, keys] table of `sees`."""
    mask = np.zeros((len(queries), len(keys)), dtype=bool)
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            mask[i, j] = sees(query, key)
    return mask


# --- small pieces --------------------------------------------------------------------------------


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean x² + eps) · weight, for one vector."""
    mean_square = sum(float(value) ** 2 for value in x) / len(x)
    return x / math.sqrt(mean_square + eps) * weight


def linear(x: Array, weights: Weights, name: str) -> Array:
    """W x + b, for one vector; the bias is there or not."""
    out = weights[f"{name}.weight"] @ x
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def gelu(x: Array) -> Array:
    """The exact form: x · Φ(x) with the error function."""
    flat = [value * 0.5 * (1.0 + math.erf(value / math.sqrt(2.0))) for value in x.ravel()]
    return np.array(flat, dtype=np.float64).reshape(x.shape)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max())
    return powers / powers.sum()


def rotate_halves(part: Array, position: int, base: float) -> Array:
    """Rotate pair (i, i + n/2) of a part of width n by position · base^(−2i/n)."""
    half = len(part) // 2
    out = np.empty_like(part)
    for i in range(half):
        angle = position * base ** (-2.0 * i / len(part))
        a, b = part[i], part[i + half]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return out


def rotate_adjacent(part: Array, position: int, base: float) -> Array:
    """Rotate pair (2i, 2i + 1) of a part of width n by position · base^(−2i/n)."""
    out = np.empty_like(part)
    for i in range(len(part) // 2):
        angle = position * base ** (-2.0 * i / len(part))
        a, b = part[2 * i], part[2 * i + 1]
        out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
        out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


def norm_and_rotate(
    head: Array, position: tuple[int, int, int], norm: Array, norm_hw: Array, facts: Facts
) -> Array:
    """Norm and rotate one query or key head, cut as [t: d/2 | h: d/4 | w: d/4]."""
    d = len(head)
    time = rms_norm(head[: d // 2], norm, facts.eps)
    place = rms_norm(head[d // 2 :], norm_hw, facts.eps)
    t, h, w = position
    return np.concatenate(
        [
            rotate_halves(time, t, facts.theta),
            rotate_halves(place[: d // 4], h, facts.theta_hw),
            rotate_halves(place[d // 4 :], w, facts.theta_hw),
        ]
    )


# --- one layer -----------------------------------------------------------------------------------


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


# --- image in ------------------------------------------------------------------------------------


def patches_of(pixels: Array, patch: int) -> Array:
    """Cut [3, H, W] into [rows, columns, 3, P, P]."""
    _, height, width = pixels.shape
    grid = np.zeros((height // patch, width // patch, 3, patch, patch))
    for row in range(height // patch):
        for column in range(width // patch):
            top, left = row * patch, column * patch
            grid[row, column] = pixels[:, top : top + patch, left : left + patch]
    return grid


def patch_features(pixels: Array, weights: Weights, name: str, facts: Facts) -> Array:
    """The first convolution and GELU, before the rotation: [rows, columns, channels]."""
    grid = patches_of(pixels, facts.patch)
    kernel = weights[f"{name}.patch_embedding.weight"]
    bias = weights[f"{name}.patch_embedding.bias"]
    rows, columns = grid.shape[:2]
    features = np.zeros((rows, columns, len(kernel)))
    for row in range(rows):
        for column in range(columns):
            for channel in range(len(kernel)):
                total = float((kernel[channel] * grid[row, column]).sum())
                features[row, column, channel] = total + bias[channel]
    return gelu(features)


def rotate_patches(features: Array, facts: Facts) -> Array:
    """Rotate the first half of the channels by the column, the second half by the row."""
    half = features.shape[2] // 2
    out = np.empty_like(features)
    base = facts.theta_vision
    for row in range(features.shape[0]):
        for column in range(features.shape[1]):
            vector = features[row, column]
            out[row, column, :half] = rotate_adjacent(vector[:half], column, base)
            out[row, column, half:] = rotate_adjacent(vector[half:], row, base)
    return out


def patch_embed(pixels: Array, weights: Weights, gen: bool, facts: Facts) -> Array:
    """Turn an image [3, H, W] into its token vectors [h·w, D], row by row."""
    name = "fm_modules.vision_model_mot_gen" if gen else "vision_model"
    name += ".embeddings"
    features = rotate_patches(patch_features(pixels, weights, name, facts), facts)
    kernel = weights[f"{name}.dense_embedding.weight"]
    bias = weights[f"{name}.dense_embedding.bias"]
    merge = facts.merge
    out: list[Array] = []
    for row in range(features.shape[0] // merge):
        for column in range(features.shape[1] // merge):
            vector = bias.copy()
            for i in range(merge):
                for j in range(merge):
                    patch = features[row * merge + i, column * merge + j]
                    vector = vector + kernel[:, :, i, j] @ patch
            out.append(vector)
    return np.array(out)


def sinusoids(t: float) -> Array:
    """[cos(t·f), sin(t·f)] with f_i = 10000^(−i/128)."""
    angles = [t * PERIOD ** (-i / SINUSOIDS) for i in range(SINUSOIDS)]
    return np.array([math.cos(a) for a in angles] + [math.sin(a) for a in angles])


def scalar_embed(value: float, weights: Weights, name: str) -> Array:
    """Linear, SiLU, Linear on the sinusoids of one number."""
    hidden = silu(linear(sinusoids(value), weights, f"fm_modules.{name}.mlp.0"))
    return linear(hidden, weights, f"fm_modules.{name}.mlp.2")


# --- image out -----------------------------------------------------------------------------------


def flow_head(hidden: Array, rows: int, columns: int, weights: Weights, side: int) -> Array:
    """Each token's vector is its pixel block in order (row, column, channel)."""
    out = np.zeros((3, rows * side, columns * side))
    for token, vector in enumerate(hidden):
        inner = gelu(linear(vector, weights, "fm_modules.fm_head.0"))
        values = linear(inner, weights, "fm_modules.fm_head.2")
        top, left = token // columns * side, token % columns * side
        for y in range(side):
            for x in range(side):
                for channel in range(3):
                    out[channel, top + y, left + x] = values[(y * side + x) * 3 + channel]
    return out


def pixel_shuffle(image: Array, factor: int) -> Array:
    """[c·r², h, w] -> [c, h·r, w·r] by index arithmetic."""
    channels, height, width = image.shape
    out = np.zeros((channels // factor**2, height * factor, width * factor))
    for channel in range(channels):
        to, rest = divmod(channel, factor**2)
        dy, dx = divmod(rest, factor)
        out[to, dy::factor, dx::factor] = image[channel]
    return out


def conv3x3(image: Array, weights: Weights, name: str) -> Array:
    """A 3×3 convolution with bias and a border of zeros, as nine weighted sums."""
    kernel, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    _, height, width = image.shape
    padded = np.zeros((len(image), height + 2, width + 2))
    padded[:, 1:-1, 1:-1] = image
    out = np.zeros((len(kernel), height, width)) + bias[:, None, None]
    for dy in range(3):
        for dx in range(3):
            shifted = padded[:, dy : dy + height, dx : dx + width].reshape(len(image), -1)
            out += (kernel[:, :, dy, dx] @ shifted).reshape(out.shape)
    return out


def pixel_head(
    hidden: Array, rows: int, columns: int, weights: Weights, shuffles: tuple[int, int, int]
) -> Array:
    """Shuffle, convolve, GELU, shuffle, convolve, shuffle on the D × h × w map."""
    first, second, third = shuffles
    image = np.zeros((hidden.shape[1], rows, columns))
    for token, vector in enumerate(hidden):
        image[:, token // columns, token % columns] = vector
    image = conv3x3(pixel_shuffle(image, first), weights, "fm_modules.fm_head.conv1")
    image = conv3x3(pixel_shuffle(gelu(image), second), weights, "fm_modules.fm_head.conv2")
    return pixel_shuffle(image, third)


# --- the whole model -----------------------------------------------------------------------------


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
