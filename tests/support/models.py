"""Small random models and random packed input, for the fast model and for the reference alike."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from neounify.checkpoint import to_published
from neounify.config import CheckpointDefaults, FlowConfig, MlpConfig, ModelConfig
from neounify.config.presets import TINY
from neounify.model import Document, Image, Layout, ModelBatch, NeoUnify, Noise, Span, Text
from neounify.model.embed import sinusoid_frequencies
from neounify.model.stream import frequencies
from support import reference
from support.attention import plan
from support.reference import Array, Clean, Facts, Noisy, Token

# --- models --------------------------------------------------------------------------------------

SPARSE_MLP = MlpConfig(
    width=16,
    num_experts=4,
    experts_per_token=2,
    expert_width=16,
    sparse=(True,) * TINY.num_layers,
)
"""Experts in every layer of a model as deep as TINY."""
TINY_CHANGES: dict[str, int] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "flow_head_width": 32,
}
"""Changes of the preset `scenes` that make a model for tests of training."""


def random_config(rng: random.Random, **fixed: object) -> ModelConfig:
    """A small legal configuration; `fixed` fields are as given."""
    layers = rng.choice([1, 2, 3])
    kv_heads = rng.choice([1, 2, 3])
    values: dict[str, object] = {
        "hidden_size": rng.choice([16, 24, 32]),
        "num_layers": layers,
        "num_heads": kv_heads * rng.choice([1, 2, 3]),
        "num_kv_heads": kv_heads,
        "head_dim": rng.choice([8, 16, 24]),
        "vocab_size": rng.choice([30, 47]),
        "rms_norm_eps": rng.choice([1e-6, 1e-3]),
        "rope_theta": rng.choice([50.0, 5e6]),
        "rope_theta_hw": rng.choice([7.0, 1e4]),
        "rope_theta_vision": rng.choice([11.0, 1e4]),
        "attention_bias": rng.random() < 0.5,
        "tie_embeddings": rng.random() < 0.5,
        "patch_size": rng.choice([4, 8]),
        "merge": rng.choice([1, 2, 3]),
        "vision_hidden_size": rng.choice([8, 12]),
        "image_head": rng.choice(["flow", "pixel"]),
        "flow_head_width": rng.choice([20, 32]),
        "flow": FlowConfig(
            noise_scale_max=rng.choice([4.0, 8.0]), noise_scale_embedding=rng.random() < 0.7
        ),
    } | fixed
    side = int(values["patch_size"]) * int(values["merge"])  # type: ignore[call-overload]
    values.setdefault("sampling", CheckpointDefaults(image_size=(4 * side, 4 * side)))
    depth = values["num_layers"]
    assert isinstance(depth, int)
    if "und_mlp" not in values:
        sparse = rng.random() < 0.5
        values["und_mlp"] = _random_mlp(rng, depth, sparse, all_layers=False)
        values["gen_mlp"] = _random_mlp(rng, depth, sparse, all_layers=True)
        if sparse:  # one checkpoint setting for both streams
            normalise = rng.random() < 0.5
            for name in ("und_mlp", "gen_mlp"):
                mlp = values[name]
                assert isinstance(mlp, MlpConfig)
                values[name] = MlpConfig(**{**vars(mlp), "normalise_top_k": normalise})
    return ModelConfig(**values)  # type: ignore[arg-type]


def _random_mlp(rng: random.Random, layers: int, sparse: bool, *, all_layers: bool) -> MlpConfig:
    if not sparse:
        return MlpConfig(width=rng.choice([20, 36]))
    experts = rng.choice([3, 4, 6])
    return MlpConfig(
        width=28,
        num_experts=experts,
        experts_per_token=rng.choice([1, 2, experts]),
        expert_width=rng.choice([8, 12]),
        sparse=tuple(all_layers or rng.random() < 0.7 for _ in range(layers)),
    )


def random_model(
    config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32, *, grad: bool = False
) -> NeoUnify:
    """A model none of whose weights is near zero, so that each one matters."""
    model = NeoUnify(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            sign = 2.0 * torch.randint(0, 2, parameter.shape, generator=generator) - 1
            value = size * sign
            if "norm" in name:
                value = size
            elif name.endswith("bias"):
                value *= 0.3
            elif not name.startswith("embed_tokens"):
                value /= parameter[0].numel() ** 0.5
            parameter.copy_(value)
    return model.to(dtype).requires_grad_(grad).eval()


@contextmanager
def exact() -> Iterator[None]:
    """Let a float64 model compute in float64 also where it asks for float32 by name.

    The model computes angles and router weights in float32 whatever its dtype. Inside this
    context those places do it in float64, so that its equations can be checked without rounding.
    """
    caches = (frequencies, sinusoid_frequencies)
    for function in caches:
        function.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(torch, "float32", torch.float64)
            yield
    finally:
        for function in caches:
            function.cache_clear()


def embed_clean(model: NeoUnify, images: Sequence[Tensor]) -> Tensor:
    """The understanding stream's embedding of clean images alone."""
    spans = tuple(Image.of(model.token_grid(image)) for image in images)
    return model.embed_und(Layout([Document(spans)]), torch.empty(0, dtype=torch.int64), images)


# --- the same for the reference ------------------------------------------------------------------


def weights_of(model: NeoUnify) -> dict[str, Array]:
    """The model's weights for the reference: float64 arrays by published name."""
    tensors = model.state_dict()
    return {to_published(name): tensor.double().numpy() for name, tensor in tensors.items()}


def facts_of(config: ModelConfig) -> Facts:
    """The model's sizes for the reference."""
    assert config.und_mlp.normalise_top_k == config.gen_mlp.normalise_top_k
    pixel = config.image_head == "pixel"
    return Facts(
        layers=config.num_layers,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        patch=config.patch_size,
        merge=config.merge,
        theta=config.rope_theta,
        theta_hw=config.rope_theta_hw,
        theta_vision=config.rope_theta_vision,
        eps=config.rms_norm_eps,
        top_k_und=config.und_mlp.experts_per_token,
        top_k_gen=config.gen_mlp.experts_per_token,
        renormalise=config.und_mlp.normalise_top_k,
        pixel_head_shuffles=(2, 2, config.token_size // 4) if pixel else None,
    )


# --- input ---------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For models as small as these a second thread only gets in the way; import it to use it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Maker:
    """Makes random spans and documents for one model."""

    def __init__(self, rng: random.Random, config: ModelConfig) -> None:
        self.rng = rng
        self.config = config
        self.numbers = np.random.default_rng(rng.randrange(2**32))
        self.images = 0

    def text(self, length: int | None = None) -> reference.Text:
        length = self.rng.randint(1, 5) if length is None else length
        return reference.Text([self.rng.randrange(self.config.vocab_size) for _ in range(length)])

    def pixels(self, rows: int, columns: int) -> Array:
        side = self.config.token_size
        return self.numbers.normal(size=(3, rows * side, columns * side)).astype(np.float32)

    def grid(self) -> tuple[int, int]:
        return self.rng.choice([(1, 1), (1, 3), (2, 1), (2, 3), (3, 2)])

    def clean(self, grid: tuple[int, int] | None = None) -> list[reference.Span]:
        """An image that the prompt shows."""
        self.images += 1
        return [Clean(self.pixels(*(grid or self.grid())), f"image {self.images}")]

    def noisy(
        self, grid: tuple[int, int] | None = None, blocks: int = 1, copy: bool = False
    ) -> list[reference.Span]:
        """One or more noisy blocks of one image, followed by its clean copy or not."""
        self.images += 1
        grid, name = grid or self.grid(), f"image {self.images}"
        spans: list[reference.Span] = [
            Noisy(self.pixels(*grid), name, self._in_01(), self._in_01()) for _ in range(blocks)
        ]
        return [*spans, Clean(self.pixels(*grid), name)] if copy else spans

    def document(self) -> list[reference.Span]:
        """Text, images and noise in any legal order; noise without a copy comes last."""
        spans: list[reference.Span] = []
        for _ in range(self.rng.randint(0, 3)):
            kind = self.rng.choice(["text", "clean", "copy", "copies"])
            if kind == "text":
                spans.append(self.text())
            elif kind == "clean":
                spans.extend(self.clean())
            else:
                spans.extend(self.noisy(blocks=1 + (kind == "copies"), copy=True))
        spans.insert(self.rng.randint(0, len(spans)) if not _noise_in(spans) else 0, self.text())
        if self.rng.random() < 0.5:
            spans.extend(self.noisy(blocks=self.rng.choice([1, 2])))
        elif self.rng.random() < 0.5:
            spans.append(self.text())
        return spans

    def showcase(self) -> list[list[reference.Span]]:
        """Documents that hold every case between them, of different lengths."""
        return [
            [self.text(3), *self.clean((2, 3)), self.text(4), *self.noisy((3, 2))],
            [self.text(2), *self.noisy((1, 3), copy=True), self.text(3), *self.noisy((2, 2))],
            [self.text(5)],
            [*self.clean((2, 1)), *self.clean((1, 2)), self.text(2)],
            [self.text(1), *self.noisy((2, 1), blocks=2, copy=True), self.text(2)],
        ]

    def _in_01(self) -> float:
        return float(np.float32(self.rng.uniform(0.05, 0.95)))


def _noise_in(spans: Sequence[reference.Span]) -> bool:
    return any(isinstance(span, Noisy) for span in spans)


@dataclass(frozen=True)
class Packed:
    """The arguments of the fast model's mixed forward."""

    layout: Layout
    token_ids: Tensor
    images: list[Tensor]
    z: Tensor | None
    t: Tensor | None
    noise_scale: Tensor | None

    def run(self, model: NeoUnify) -> tuple[Tensor, Tensor | None]:
        logits, clean, _ = model(self.batch())
        return logits, clean

    def batch(self) -> ModelBatch:
        noise = (self.z, self.t, self.noise_scale)
        return batch_of(self.layout, self.token_ids, self.images, *noise)


def batch_of(
    layout: Layout,
    ids: Tensor,
    images: Sequence[Tensor] = (),
    z: Tensor | None = None,
    t: Tensor | None = None,
    noise_scale: Tensor | None = None,
) -> ModelBatch:
    """Input of the mixed forward, with a plan of its attention."""
    return ModelBatch(
        layout=layout,
        attend=plan(layout),
        ids=ids,
        images=images,
        z=z,
        t=t,
        noise_scale=noise_scale,
    )


def spans_of(document: reference.Document, config: ModelConfig) -> tuple[Span, ...]:
    """The spans of a document as the layout knows them."""
    side = config.token_size
    spans: list[Span] = []
    for span in document:
        if isinstance(span, reference.Text):
            spans.append(Text(len(span.ids)))
            continue
        rows, columns = span.pixels.shape[1] // side, span.pixels.shape[2] // side
        spans.append((Noise if isinstance(span, Noisy) else Image)(rows, columns))
    return tuple(spans)


def pack(
    documents: Sequence[reference.Document], config: ModelConfig, dtype: torch.dtype
) -> Packed:
    """The documents as one call of the fast model."""
    spans = [span for document in documents for span in document]
    ids = [i for span in spans if isinstance(span, reference.Text) for i in span.ids]
    noisy = [span for span in spans if isinstance(span, Noisy)]
    z = t = noise = None
    if noisy:
        z = torch.cat([torch.from_numpy(to_tokens(s.pixels, config)) for s in noisy]).to(dtype)
        t = torch.tensor([span.t for span in noisy], dtype=dtype)
        scale = config.flow.noise_scale_max
        noise = torch.tensor([span.noise * scale for span in noisy], dtype=dtype)
    return Packed(
        Layout(Document(spans_of(document, config)) for document in documents),
        torch.tensor(ids, dtype=torch.int64),
        [torch.from_numpy(s.pixels).to(dtype) for s in spans if isinstance(s, Clean)],
        z,
        t,
        noise,
    )


def to_tokens(pixels: Array, config: ModelConfig) -> Array:
    """An image [3, H, W] as rows of pixels in order (row, column, channel), one per token."""
    side = config.token_size
    _, height, width = pixels.shape
    rows = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            block = pixels[:, top : top + side, left : left + side]
            rows.append(np.moveaxis(block, 0, -1).reshape(-1))
    return np.stack(rows)


def expected(
    documents: Sequence[reference.Document], model: NeoUnify
) -> tuple[Array, Array, list[reference.Answer]]:
    """The reference's logits and clean tokens in packed order, and its answers by document."""
    config = model.config
    answers = reference.forward(documents, weights_of(model), facts_of(config))
    logits = np.concatenate([answer.logits for answer in answers])
    clean = [to_tokens(image, config) for answer in answers for image in answer.clean]
    empty = np.zeros((0, 3 * config.token_size**2))
    return logits, np.concatenate([empty, *clean]), answers


def assert_close(actual: Tensor, wanted: Array | Tensor, tolerance: float) -> None:
    """max |a - b| ≤ tolerance · max |b|, and the same shape."""
    wanted = torch.as_tensor(wanted)
    assert actual.shape == wanted.shape
    if wanted.numel() == 0:
        return
    difference = (actual.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert difference.item() <= tolerance, f"relative difference {difference.item():.3g}"


def by_stream(tokens: Sequence[Sequence[Token]]) -> tuple[list[Token], list[Token]]:
    """The tokens of all documents in packed order: those of the und stream, those of the gen."""
    flat = [token for document in tokens for token in document]
    return [t for t in flat if not t.gen], [t for t in flat if t.gen]
