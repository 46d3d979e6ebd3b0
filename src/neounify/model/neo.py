"""The whole model: tokens and pixels in, text logits and predicted clean images out."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from neounify.config import ModelConfig
from neounify.model.attention import shared_attention
from neounify.model.image_head import FlowHead, PixelHead
from neounify.model.key_values import Caches
from neounify.model.layout import Layout, grid_places
from neounify.model.norm import RMSNorm
from neounify.model.patch_embed import PatchEmbed, token_patches
from neounify.model.rope import Rotation, attention_rotation
from neounify.model.scalar_embed import ScalarEmbed
from neounify.model.stream import Layer


class Hidden(NamedTuple):
    """Last hidden states after each stream's final norm; None for a stream not in the call."""

    und: Tensor | None
    gen: Tensor | None


class NeoUnify(nn.Module):
    """A native unified multimodal model.

    Legend: U, G rows of the understanding and generation stream; D hidden size; C token
    side in pixels, M merge side and P patch side (C = M·P); I clean, J noisy images.
    Single device, no state: caches are arguments.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.und_patch = PatchEmbed(config)
        self.gen_patch = PatchEmbed(config)
        self.timestep_embedder = ScalarEmbed(size)
        if config.flow.noise_scale_embedding:
            self.noise_scale_embedder = ScalarEmbed(size)
        self.layers = nn.ModuleList(Layer(config, n) for n in range(config.num_layers))
        self.und_norm = RMSNorm(size, eps)
        self.gen_norm = RMSNorm(size, eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.image_head = PixelHead(config) if config.image_head == "pixel" else FlowHead(config)

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    def embed_und(
        self,
        layout: Layout,
        token_ids: Int[Tensor, " n"],
        images: Sequence[Float[Tensor, "3 _height _width"]] = (),
    ) -> Float[Tensor, "u d"]:
        """Embed all text tokens and clean images (ImageNet-normalised pixels), in packed order."""
        grids = [self.token_grid(image) for image in images]
        if grids != layout.image_grids or token_ids.shape[0] != layout.text_length:
            raise ValueError(
                f"{token_ids.shape[0]} ids and images of {grids} tokens do not fit the layout: "
                f"{layout.text_length} ids and {layout.image_grids}"
            )
        parts = [self.embed_tokens(token_ids)] if token_ids.numel() else []
        if images:
            parts.append(self.embed_clean(images))
        x = torch.cat(parts) if len(parts) > 1 else parts[0]
        order = layout.und_order
        return x if order is None else x[order.to(x.device)]

    def embed_clean(
        self, images: Sequence[Float[Tensor, "3 _height _width"]]
    ) -> Float[Tensor, "n d"]:
        """The understanding stream's embedding of clean images, all tokens in a row."""
        c = self.config
        grids = [self.token_grid(image) for image in images]
        patches = torch.cat([token_patches(i, c.patch_size, c.merge) for i in images])
        places = grid_places(grids, c.merge).to(patches.device)
        return self.und_patch(patches.to(self.dtype), places)

    def embed_noisy(
        self,
        grids: Sequence[tuple[int, int]],
        z: Float[Tensor, "g ccc"],
        t: Float[Tensor, " j"],
        noise_scale: Float[Tensor, " j"],
    ) -> Float[Tensor, "g d"]:
        """The generation stream's embedding of noisy images.

        `z` holds one row per token, pixels in order (row, column, channel); `t` in
        [0, 1] and `noise_scale` (σ) are per image, `grids` its token rows and columns.
        """
        c = self.config
        m, p = c.merge, c.patch_size
        lengths = torch.tensor([rows * columns for rows, columns in grids], device=z.device)
        per_image = t.shape == noise_scale.shape == lengths.shape
        if not grids or not per_image or z.shape[0] != sum(lengths.tolist()):
            raise ValueError(
                f"z {tuple(z.shape)}, t {tuple(t.shape)} and noise_scale "
                f"{tuple(noise_scale.shape)} do not fit images of {list(grids)} tokens"
            )
        # (row, column, channel) of a token -> M·M patches of (channel, row, column)
        patches = z.view(-1, m, p, m, p, 3).permute(0, 1, 3, 5, 2, 4).reshape(-1, m * m, 3 * p * p)
        x = self.gen_patch(patches.to(self.dtype), grid_places(grids, m).to(z.device))
        condition = self.timestep_embedder(t)
        if c.flow.noise_scale_embedding:
            relative = noise_scale / c.flow.noise_scale_max
            condition = condition + self.noise_scale_embedder(relative)
        return x + condition.repeat_interleave(lengths, dim=0)

    def backbone(
        self,
        layout: Layout,
        und: Float[Tensor, "u d"] | None,
        gen: Float[Tensor, "g d"] | None = None,
        caches: Caches | None = None,
    ) -> Hidden:
        """All layers and the final norms. Caches, if given, are those of the layout's documents."""
        work = self.layer_by_layer(layout, und, gen, caches)
        while True:
            try:
                next(work)
            except StopIteration as end:
                hidden: Hidden = end.value
                return hidden

    def layer_by_layer(
        self,
        layout: Layout,
        und: Float[Tensor, "u d"] | None,
        gen: Float[Tensor, "g d"] | None = None,
        caches: Caches | None = None,
    ) -> Generator[None, None, Hidden]:
        """What `backbone` computes, with a pause after each layer but the last."""
        rows = tuple(0 if x is None else x.shape[0] for x in (und, gen))
        if rows != (layout.und_length, layout.gen_length):
            raise ValueError(
                f"{rows} rows of the two streams, "
                f"the layout has {(layout.und_length, layout.gen_length)}"
            )
        if caches is None and any(document.past for document in layout.documents):
            raise ValueError("documents that continue a cached prefix need their caches")
        und_rotation = None if und is None else self._rotation(layout.und_positions, und)
        gen_rotation = None if gen is None else self._rotation(layout.gen_positions, gen)
        for number, layer in enumerate(self.layers):
            if number:
                yield
            attend = partial(shared_attention, layout=layout, caches=caches, layer=number)
            und, gen = layer(und, gen, und_rotation, gen_rotation, attend)
        return Hidden(
            None if und is None else self.und_norm(und),
            None if gen is None else self.gen_norm(gen),
        )

    def logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n vocab"]:
        """Next-token scores."""
        if self.config.tie_embeddings:
            return linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def clean_prediction(
        self, hidden: Float[Tensor, "g d"], grids: Sequence[tuple[int, int]]
    ) -> Float[Tensor, "g ccc"]:
        """The predicted clean image x̂: one row per token, pixels as (row, column, channel)."""
        return self.image_head(hidden, grids)

    def forward(
        self,
        layout: Layout,
        token_ids: Int[Tensor, " n"],
        images: Sequence[Float[Tensor, "3 _height _width"]] = (),
        z: Float[Tensor, "g ccc"] | None = None,
        t: Float[Tensor, " j"] | None = None,
        noise_scale: Float[Tensor, " j"] | None = None,
    ) -> tuple[Float[Tensor, "u vocab"], Float[Tensor, "g ccc"] | None]:
        """Logits of all understanding rows and x̂ of all noisy tokens, in one call.

        Und and gen tokens of many packed documents in one call; differentiable.
        """
        und = self.embed_und(layout, token_ids, images)
        gen = None
        if z is not None and t is not None and noise_scale is not None:
            gen = self.embed_noisy(layout.noise_grids, z, t, noise_scale)
        elif layout.noise_grids or (z, t, noise_scale) != (None, None, None):
            raise ValueError(
                f"{len(layout.noise_grids)} noisy images need z, t and noise_scale, all of them"
            )
        hidden = self.backbone(layout, und, gen)
        assert hidden.und is not None
        prediction = None
        if hidden.gen is not None:
            prediction = self.clean_prediction(hidden.gen, layout.noise_grids)
        return self.logits(hidden.und), prediction

    def token_grid(self, image: Float[Tensor, "3 _height _width"]) -> tuple[int, int]:
        """Token rows and columns of an image; ValueError when a side is no multiple of C."""
        side = self.config.token_size
        rows, columns = image.shape[1] // side, image.shape[2] // side
        if (rows * side, columns * side) != tuple(image.shape[1:]):
            raise ValueError(f"image sides {tuple(image.shape[1:])} must be multiples of {side}")
        return rows, columns

    def _rotation(self, positions: Tensor, x: Tensor) -> Rotation:
        c = self.config
        return attention_rotation(
            positions.to(x.device),
            c.head_dim,
            theta=c.rope_theta,
            theta_hw=c.rope_theta_hw,
            dtype=x.dtype,
        )
