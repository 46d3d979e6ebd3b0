"""The whole model: tokens and pixels in, text logits and predicted clean images out.

Pixels become tokens by the layers of `embed`, and states pixels by those of `heads`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from neounify.config import ModelConfig
from neounify.image.clips import join_rows, tube_rows
from neounify.image.pixels import patchify
from neounify.model import embed, heads
from neounify.model.layout import Grid, Kind, Layout, Rows, StreamRows, stills
from neounify.model.parts import GEN, UND, StreamName
from neounify.model.stream import (
    Attend,
    Layer,
    QKVProjection,
    RMSNorm,
    Rotation,
    SparseMlp,
    StackedExperts,
    attention_rotation,
    frozen_linear,
    onednn_is_faster,
)

Logits = Callable[[Tensor], Tensor]
ScoreFunction = Callable[[Logits, Tensor], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelBatch:
    """Input of one call of the streams: of both without caches, or of `gen` behind cached prompts.

    `ids` of all text tokens and `images`, as for `embed_und`, None where the prompts are cached;
    `z`, `t` and `noise_scale` as for `embed_noisy`, None without noisy images. `logit_rows` are the
    understanding rows whose logits are computed, None for all. `rows` are those that the layers
    compute here, None for all, and `logit_rows` count from their first one; an image head that
    reads an image as a whole needs all rows.
    """

    layout: Layout
    attend: Attend
    ids: Int[Tensor, " n"] | None = None
    images: Sequence[Float[Tensor, "*_frames c _height _width"]] = ()
    z: Float[Tensor, "g ccc"] | None = None
    t: Float[Tensor, " j"] | None = None
    noise_scale: Float[Tensor, " j"] | None = None
    logit_rows: Int[Tensor, " rows"] | None = None
    rows: Rows | None = None


class ModelOutput(NamedTuple):
    """`text`: logits [rows, vocab], or the result of `score`. `clean`: x̂, a row for each of z.

    `states`: what the image head read, [G, D]. None of a stream that was not in the call.
    """

    text: Any
    clean: Tensor | None
    states: Tensor | None


class NeoUnify(nn.Module):
    """A native unified multimodal model.

    Legend: U, G rows of the understanding and generation stream; D hidden size; C token
    side in pixels, M merge side and P patch side (C = M·P); I clean, J noisy images.
    Single device, no state: caches are arguments. `compute_dtype` is that of activations and
    caches; weights may be stored in another one. `kv_heads` are the heads of the keys that each
    layer computes: what leaves a rank a share of them sets it, and caches have so many.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.get_default_dtype()
        self.kv_heads = config.num_kv_heads
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        patch_embed = embed.PATCH_EMBEDS[config.patch_embed]
        self.und_patch, self.gen_patch = patch_embed(config), patch_embed(config)
        if config.video is not None and not config.clips_are_images:
            self.gen_tube, self.video_head = embed.TubeEmbed(config), heads.TubeHead(config)
            if config.sees_tubes:
                self.und_tube = embed.TubeEmbed(config)
        if config.flow.time_embedding or config.flow.unread_time_embedder:
            self.timestep_embedder = embed.ScalarEmbed(size)
        if config.flow.noise_scale_embedding:
            self.noise_scale_embedder = embed.ScalarEmbed(size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.und_norm = RMSNorm(size, eps)
        self.gen_norm = RMSNorm(size, eps)
        if config.lm_head and not config.tie_embeddings:
            self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.image_head = heads.IMAGE_HEADS[config.image_head](config)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Deprecated name of `compute_dtype`."""
        text = "NeoUnify.dtype is deprecated: use NeoUnify.compute_dtype"
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return self.compute_dtype

    def pixel_layers(self, kind: Kind) -> tuple[nn.Module, nn.Module]:
        """The generation stream's embedding and head of a kind of token."""
        if kind == "image" or self.config.clips_are_images:
            return self.gen_patch, self.image_head
        return self.gen_tube, self.video_head

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NeoUnify:
        super()._apply(fn, recurse)
        # A cast of the weights is a cast of what is computed with them.
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        return self

    def embed_und(
        self,
        layout: Layout,
        token_ids: Int[Tensor, " n"],
        images: Sequence[Float[Tensor, "*_frames c _height _width"]] = (),
    ) -> Float[Tensor, "u d"]:
        """Embed all text tokens, clean images and tubes, in packed order.

        `images` have pixels as `config.und_pixels` says; those of a tube are [F, c, height, width].
        """
        rows = layout[UND]
        grids = [self.token_grid(image) for image in images]
        if grids != rows.grids or token_ids.shape[0] != layout.text_length:
            raise ValueError(
                f"{token_ids.shape[0]} ids and images of {_sizes(grids)} tokens do not fit the "
                f"layout: {layout.text_length} ids and images of {_sizes(rows.grids)}"
            )
        parts = []
        if token_ids.numel():
            parts.append(self.embed_tokens(token_ids).to(self.compute_dtype))
        side, channels = self.config.token_size, self.config.channels
        alone = [patchify(image[None], side, channels)[0] for image in images if image.ndim == 3]
        if alone:
            parts.append(self.und_patch(torch.cat(alone).to(self.compute_dtype), rows))
        tubes = [tube_rows(image, side, len(image)) for image in images if image.ndim == 4]
        if tubes:
            parts.append(self.und_tube(torch.cat(tubes).to(self.compute_dtype)))
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        order = rows.order_on(x.device)
        return x if order is None else x.index_select(0, order)

    def embed_noisy(
        self,
        layout: Layout,
        z: Float[Tensor, "g ccc"],
        t: Float[Tensor, " j"],
        noise_scale: Float[Tensor, " j"],
    ) -> Float[Tensor, "g d"]:
        """The generation stream's embedding of all noisy images and clips, in packed order.

        `z` holds one row per token, pixels in order (row, column, channel), of clips (frame, row,
        column, channel); rows of images are padded where there are clips too. `t` in [0, 1] and
        `noise_scale` (σ) are per image or clip.
        """
        flow, rows = self.config.flow, layout[GEN]
        count = len(rows.grids)
        if not count or not t.shape == noise_scale.shape == (count,) or z.shape[0] != rows.length:
            raise ValueError(
                f"z {tuple(z.shape)}, t {tuple(t.shape)} and noise_scale "
                f"{tuple(noise_scale.shape)} do not fit images of {_sizes(rows.grids)} tokens"
            )
        x = self._embed_pixels(z.to(self.compute_dtype), rows)
        conditions = []
        if flow.time_embedding:
            conditions.append(self.timestep_embedder(t, self.compute_dtype))
        if flow.noise_scale_embedding:
            relative = noise_scale / flow.noise_scale_max
            conditions.append(self.noise_scale_embedder(relative, self.compute_dtype))
        for condition in conditions[1:]:
            conditions[0] = conditions[0] + condition
        return x + conditions[0].index_select(0, rows.owners_on(z.device)) if conditions else x

    def _embed_pixels(self, z: Float[Tensor, "g _ccc"], rows: StreamRows) -> Float[Tensor, "g d"]:
        """Embedding of noisy pixels, padding left out: each kind of token by its own layers."""
        if self.config.clips_are_images:
            return self.gen_patch(z, rows)
        parts: list[Tensor] = []
        widths: dict[Kind, int] = {"image": self.config.token_width, "tube": self.config.tube_width}
        for kind, width in widths.items():
            if not rows.grids_of(kind):
                continue
            chosen = rows.rows_of(kind, z.device)
            pixels = z if chosen is None else z.index_select(0, chosen)[:, :width]
            parts.append(self.gen_tube(pixels) if kind == "tube" else self.gen_patch(pixels, rows))
        order = rows.order_on(z.device)
        return parts[0] if order is None else torch.cat(parts).index_select(0, order)

    def backbone(
        self,
        layout: Layout,
        hidden: Mapping[StreamName, Float[Tensor, "_n d"]],
        attend: Attend,
        rows: Rows | None = None,
    ) -> dict[StreamName, Float[Tensor, "_n d"]]:
        """All layers and the final norms, from the embeddings of the streams in the call.

        `attend` is an attention plan of the layout and its caches (`neounify.attention`). `rows`
        are those of `hidden`, and of what `attend` is given, all by default.
        """
        work = self.layer_by_layer(layout, hidden, attend, rows)
        while True:
            try:
                next(work)
            except StopIteration as end:
                last: dict[StreamName, Tensor] = end.value
                return last

    def layer_by_layer(
        self,
        layout: Layout,
        hidden: Mapping[StreamName, Float[Tensor, "_n d"]],
        attend: Attend,
        rows: Rows | None = None,
    ) -> Generator[None, None, dict[StreamName, Float[Tensor, "_n d"]]]:
        """The same as `backbone`, with a pause after each layer but the last."""
        numbers = range(self.config.num_layers)
        hidden = yield from self.some_layers(layout, hidden, attend, numbers, rows)
        return {name: self.get_submodule(f"{name}_norm")(x) for name, x in hidden.items()}

    def some_layers(
        self,
        layout: Layout,
        hidden: Mapping[StreamName, Float[Tensor, "_n d"]],
        attend: Attend,
        numbers: range,
        rows: Rows | None = None,
    ) -> Generator[None, None, Mapping[StreamName, Float[Tensor, "_n d"]]]:
        """States behind some layers, before the final norms, with a pause between two layers."""
        lengths = {name: x.shape[0] for name, x in hidden.items()}
        wanted = layout.lengths
        if rows is not None:
            wanted = {name: len(rows[name]) for name in wanted}
        if lengths != wanted:
            raise ValueError(f"{lengths} rows of the streams, the call has {wanted}")
        rotations = {name: self._rotation(layout, name, x) for name, x in hidden.items()}
        if rows is not None:
            for name, whole in rotations.items():
                part = slice(rows[name].start, rows[name].stop)
                rotations[name] = Rotation(whole.cos[part], whole.sin[part])
        for number in numbers:
            if number > numbers.start:
                yield
            hidden = self.layers[number](hidden, rotations, attend)
        return hidden

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        """Next-token scores. RuntimeError for a model without a text head."""
        if not self.config.lm_head:
            raise RuntimeError("the model has no lm_head, so there are no scores of tokens")
        if self.config.tie_embeddings:
            return linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def clean_prediction(
        self, hidden: Float[Tensor, "g d"], grids: Sequence[Grid], rows: range | None = None
    ) -> Float[Tensor, "g ccc"]:
        """The predicted clean images and clips x̂: one row per token, as `z` of `embed_noisy`.

        `hidden` are the rows of all `grids`, or some `rows` of them.
        """
        tubes = [bool(grid.tubes) for grid in grids]
        if self.config.clips_are_images or not any(tubes):
            return self.image_head(hidden, stills(grids))
        if all(tubes):
            return self.video_head(hidden)
        ends = np.cumsum([0, *(grid.length for grid in grids)])
        if rows is not None:
            ends = ends.clip(rows.start, rows.stop)
        pieces = zip(hidden.split(np.diff(ends).tolist()), grids, strict=True)
        parts = [self.clean_prediction(x, [grid]) for x, grid in pieces]
        return join_rows(parts, self.config.tube_width)

    def forward(self, batch: ModelBatch, score: ScoreFunction | None = None) -> ModelOutput:
        """The streams of many packed documents in one call; differentiable.

        `score` computes what is wanted of the text, for instance losses in pieces, from the
        function that turns states [n, D] into logits and the states of `logit_rows`; without it,
        the output holds their logits.
        """
        hidden = self.embed(batch)
        if batch.rows is not None:
            hidden = {n: x[batch.rows[n].start : batch.rows[n].stop] for n, x in hidden.items()}
        hidden = self.backbone(batch.layout, hidden, batch.attend, batch.rows)
        text = clean = None
        if UND in hidden:
            states = hidden[UND]
            if batch.logit_rows is not None:
                states = states.index_select(0, batch.logit_rows)
            text = self.logits(states) if score is None else score(self.logits, states)
        if GEN in hidden:
            rows = batch.rows[GEN] if batch.rows else None
            clean = self.clean_prediction(hidden[GEN], batch.layout[GEN].grids, rows)
        return ModelOutput(text, clean, hidden.get(GEN))

    def embed(self, batch: ModelBatch) -> dict[StreamName, Float[Tensor, "_n d"]]:
        """Input of the first layer, for each stream."""
        layout = batch.layout
        embedded: dict[StreamName, Tensor] = {}
        if batch.ids is not None:
            embedded[UND] = self.embed_und(layout, batch.ids, batch.images)
        z, t, noise_scale = batch.z, batch.t, batch.noise_scale
        if z is not None and t is not None and noise_scale is not None:
            embedded[GEN] = self.embed_noisy(layout, z, t, noise_scale)
        elif layout[GEN].grids or any(x is not None for x in (z, t, noise_scale)):
            raise ValueError(
                f"{len(layout[GEN].grids)} noisy images need z, t and noise_scale, all of them"
            )
        return embedded

    def token_grid(self, image: Float[Tensor, "*_frames c _height _width"]) -> Grid:
        """Token rows and columns of an image or a tube.

        ValueError when a side is no multiple of C, and for another number of frames.
        """
        grid = Grid.of_pixels(image.shape[-2], image.shape[-1], self.config.token_size)
        if image.ndim == 3:
            return grid
        c = self.config
        if not c.sees_tubes or len(image) != c.seen_tube_frames:
            tubes = f"tubes of {c.seen_tube_frames}" if c.sees_tubes else "no tubes"
            raise ValueError(f"{len(image)} frames are no tube: the model reads {tubes}")
        return replace(grid, tubes=1)

    def fuse(self) -> None:
        """Join the head norms of frozen weights (`train()` undoes it), and experts off the CPU."""
        for module in self.modules():
            if isinstance(module, QKVProjection):
                module.fuse()
        if self.device.type != "cpu":
            self.stack_experts()

    def multiply_fast(self) -> None:
        """Compute linear layers by the faster library of the CPU, where nothing is differentiated.

        The libraries round differently, so a model does it wherever its weights are kept.
        """
        faster = self.device.type == "cpu" and onednn_is_faster()
        for module in self.modules() if faster else ():
            if type(module) is nn.Linear:
                vars(module)["forward"] = partial(frozen_linear, module)

    @property
    def sparse_mlps(self) -> list[SparseMlp]:
        """The mixtures of experts, by layer and stream."""
        return [module for module in self.layers.modules() if isinstance(module, SparseMlp)]

    def stack_experts(self) -> None:
        """Join the experts of every layer that have no adapters; see `SparseMlp.stack`.

        Checkpoints have each by itself, whatever the model has.
        """
        for mlp in self.sparse_mlps:
            mlp.stack()

    def stack_experts_like(self, other: NeoUnify) -> None:
        """Join the experts that another model of this config has joined, and no others."""
        for mlp, theirs in zip(self.sparse_mlps, other.sparse_mlps, strict=False):
            if isinstance(theirs.experts, StackedExperts):
                mlp.stack()
            else:
                mlp.unstack()

    def _rotation(self, layout: Layout, stream: StreamName, x: Tensor) -> Rotation:
        """Rotary embedding of a stream's tokens, made once for the layout."""
        c, rows = self.config, layout[stream]

        def make() -> Rotation:
            return attention_rotation(
                rows.positions_on(x.device),
                c.head_dim,
                theta=c.rope_theta,
                theta_hw=c.rope_theta_hw,
                dtype=x.dtype,
            )

        key = ("rotation", c.head_dim, c.rope_theta, c.rope_theta_hw, x.dtype, x.device)
        return rows.derived(key, make)


def _sizes(grids: Sequence[Grid]) -> str:
    return ", ".join(map(str, grids)) or "no"
