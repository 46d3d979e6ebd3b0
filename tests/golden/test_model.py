"""The model alone against the recorded arrays: embeddings, prefill, greedy tokens, velocities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import gelu, linear

from neounify.cache import SequenceCache
from neounify.checkpoint import load_model
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.flow.path import velocity
from neounify.image.pixels import patchify, unpatchify
from neounify.model import Image, Layout, NeoUnify, Noise, Span, Text
from neounify.model.embed import PatchEmbed
from neounify.model.layout import Document, Grid, grid_patches
from neounify.model.parts import GEN, UND
from neounify.model.stream import SparseMlp, patch_rotation, rotate_patches
from support import reference
from support.attention import plan
from support.decoding import Decoder, parts_of
from support.golden import load_fixture, needs_golden
from support.models import assert_close, batch_of, embed_clean, facts_of, one_thread, weights_of
from support.patches import from_patches, to_patches
from support.scripted_sampler import script_sampler

__all__ = ["one_thread"]  # a fixture

NAMES = ("tiny-dense", "tiny-moe", "tiny-pixelhead")
TOLERANCE = 2e-5
IMAGE_TOKEN = 538
PATCH, MERGE = 16, 2

pytestmark = needs_golden
Checkpoint = Callable[[str], Path]
every_checkpoint = pytest.mark.parametrize("name", NAMES)


@cache
def _load(folder: Path) -> NeoUnify:
    return load_model(folder, dtype="float32")


@pytest.fixture
def model(name: str, golden_checkpoint: Checkpoint) -> NeoUnify:
    return _load(golden_checkpoint(name))


def _cache(model: NeoUnify) -> SequenceCache:
    return SequenceCache(model.config, 8, dtype=torch.float32, device=torch.device("cpu"))


# --- image in ------------------------------------------------------------------------------------


def _token_order(rows: int, columns: int) -> Tensor:
    """Where the patches of every token stand in a row-major list of patches, [tokens, M·M]."""
    cells = grid_patches((Grid(rows // MERGE, columns // MERGE),), MERGE, torch.device("cpu"))
    return cells[..., 0] * columns + cells[..., 1]


@every_checkpoint
@pytest.mark.parametrize("stream", ["und", "gen"])
@pytest.mark.parametrize("image", ["a", "b"])
def test_patch_embedding_stage_by_stage(
    name: str, model: NeoUnify, stream: str, image: str
) -> None:
    recorded, _ = load_fixture(name, "vision")
    embed = model.und_patch if stream == "und" else model.gen_patch
    assert isinstance(embed, PatchEmbed)
    pixels = recorded[f"{image}.pixel_values"]
    rows, columns = recorded[f"{image}.grid_hw"][0].tolist()
    features = gelu(linear(pixels, embed.patch.weight.flatten(1), embed.patch.bias))
    assert_close(features, recorded[f"{image}.{stream}.patch_gelu"], TOLERANCE)
    channels, theta = model.config.vision_hidden_size, model.config.rope_theta_vision
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    rotated = rotate_patches(features, patch_rotation(places, channels, theta))
    assert_close(rotated, recorded[f"{image}.{stream}.rope"], TOLERANCE)
    cut = "n (m1 m2) (c p1 p2) -> n (m1 p1 m2 p2 c)"
    ordered = pixels[_token_order(rows, columns)]
    side = model.config.patch_size
    ordered = rearrange(ordered, cut, m1=MERGE, m2=MERGE, p1=side, p2=side)
    layout = Layout([Document((Image(rows // MERGE, columns // MERGE),))])
    tokens = embed(ordered, layout["und"])
    assert_close(tokens, recorded[f"{image}.{stream}.out"], TOLERANCE)


@every_checkpoint
def test_patch_embedding_of_images(name: str, model: NeoUnify) -> None:
    """From whole images, one by one and both in one call."""
    recorded, _ = load_fixture(name, "vision")
    images = [_image_tensor(recorded, "a"), _image_tensor(recorded, "b")]
    assert_close(embed_clean(model, images[:1]), recorded["a.und.out"], TOLERANCE)
    assert_close(embed_clean(model, images[1:]), recorded["b.und.out"], TOLERANCE)
    assert_close(embed_clean(model, images), recorded["ab.und.out"], TOLERANCE)


@every_checkpoint
def test_cutting_images(name: str, model: NeoUnify) -> None:
    recorded, _ = load_fixture(name, "vision")
    images, z = recorded["image"], recorded["image.z"]
    assert torch.equal(patchify(images, 32, 3), z)
    assert torch.equal(unpatchify(z, 3, 2, 32, 3), images)
    assert torch.equal(to_patches(images, 16), recorded["image.patches16"])
    assert torch.equal(from_patches(recorded["image.patches16"], 6, 4, 16), images)
    # The embedding of noisy images, less what it adds for the time and the noise scale.
    t, scale = torch.tensor([0.3, 0.6]), torch.tensor([1.0, 2.0])
    extra = model.timestep_embedder(t)
    extra += model.noise_scale_embedder(scale / model.config.flow.noise_scale_max)
    tokens = model.embed_noisy(
        Layout([Document((Noise(3, 2), Noise(3, 2)))]), z.flatten(0, 1), t, scale
    )
    tokens = tokens.view(2, 6, -1) - extra[:, None]
    assert_close(tokens, recorded["image.gen.out"], TOLERANCE)


def _image_tensor(recorded: dict[str, Tensor], image: str) -> Tensor:
    rows, columns = recorded[f"{image}.grid_hw"][0].tolist()
    return from_patches(recorded[f"{image}.pixel_values"][None], rows, columns, PATCH)[0]


# --- prefill and greedy decoding -----------------------------------------------------------------


class Prompt(NamedTuple):
    """A recorded prompt as the model takes it."""

    spans: tuple[Span, ...]
    ids: list[int]
    images: list[Tensor]

    def layout(self) -> Layout:
        return Layout([Document(self.spans)])

    def model_input(self, cache: SequenceCache) -> ModelInput:
        return ModelInput(cache, self.spans, self.ids, self.images)


def _prompt(recorded: dict[str, Tensor], images: Sequence[Tensor] = ()) -> Prompt:
    """Cut the recorded ids into text and images; ids between images are text."""
    ids = recorded["input_ids"][0].tolist()
    spans: list[Span] = []
    grids = [Grid.of_pixels(i.shape[1], i.shape[2], PATCH * MERGE) for i in images]
    start = 0
    while start < len(ids):
        if ids[start] == IMAGE_TOKEN:
            spans.append(Image.of(grids.pop(0)))
            start += spans[-1].length
            continue
        stop = ids.index(IMAGE_TOKEN, start) if IMAGE_TOKEN in ids[start:] else len(ids)
        spans.append(Text(stop - start))
        start = stop
    assert not grids
    return Prompt(tuple(spans), [i for i in ids if i != IMAGE_TOKEN], list(images))


def _recorded_prompt(name: str, group: str) -> tuple[dict[str, Tensor], Prompt]:
    recorded, _ = load_fixture(name, group)
    images: list[Tensor] = []
    if group == "mm":
        vision, _ = load_fixture(name, "vision")
        images = [_image_tensor(vision, "a"), _image_tensor(vision, "b")]
    return recorded, _prompt(recorded, images)


def _mask(layout: Layout) -> Tensor:
    mask = torch.zeros(layout["und"].length, layout["und"].length, dtype=torch.uint8)
    for block in layout["und"].blocks:
        for row in range(block.start, block.stop):
            mask[row, : row + 1 if block.causal else block.visible] = 1
    return mask


@every_checkpoint
@pytest.mark.parametrize("group", ["text", "mm"])
def test_prefill(name: str, group: str, model: NeoUnify) -> None:
    recorded, prompt = _recorded_prompt(name, group)
    layout = prompt.layout()
    assert torch.equal(layout["und"].positions.T, recorded["indexes"])
    assert torch.equal(_mask(layout), recorded["mask"])
    embedded = model.embed_und(layout, torch.tensor(prompt.ids), prompt.images)
    assert_close(embedded, recorded["inputs_embeds"][0], TOLERANCE)
    hidden = model.backbone(layout, {UND: embedded}, plan(layout))[UND]
    assert_close(hidden, recorded["last_hidden"][0], TOLERANCE)
    assert_close(model.logits(hidden), recorded["logits"][0], TOLERANCE)
    logits, *_ = model(batch_of(layout, torch.tensor(prompt.ids), prompt.images))
    assert_close(logits, recorded["logits"][0], TOLERANCE)


@every_checkpoint
@pytest.mark.parametrize("group", ["text", "mm"])
def test_prefill_fills_the_cache(name: str, group: str, model: NeoUnify) -> None:
    recorded, prompt = _recorded_prompt(name, group)
    cache = _cache(model)
    hidden = forward_und(model, [prompt.model_input(cache)])
    assert_close(hidden, recorded["last_hidden"][:, -1], TOLERANCE)
    for layer in (0, model.config.num_layers - 1):
        k, v = cache.read(layer, cache.length)
        assert_close(k, recorded[f"cache.{layer}.k"][0], TOLERANCE)
        assert_close(v, recorded[f"cache.{layer}.v"][0], TOLERANCE)


@every_checkpoint
@pytest.mark.parametrize("group", ["text", "mm"])
def test_greedy_tokens(
    name: str, group: str, model: NeoUnify, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, prompt = _recorded_prompt(name, group)
    shown: list[Tensor] = []

    def choose(logits: Tensor) -> int:
        shown.append(logits)
        return int(logits.argmax())

    script_sampler(monkeypatch, choose)
    decoder = Decoder(model)
    parts = parts_of(model, prompt.model_input(_cache(model)))
    written = decoder.start(parts, recorded["greedy_ids"].shape[1])
    decoder.run()
    assert written.ids == recorded["greedy_ids"][0].tolist()
    assert_close(torch.stack(shown), recorded["greedy_logits"][0], TOLERANCE)


@every_checkpoint
@pytest.mark.parametrize("group", ["text", "mm"])
def test_the_reference_agrees_with_the_recording_too(
    name: str, group: str, model: NeoUnify
) -> None:
    """The slow second implementation is checked by what it did not come from."""
    recorded, prompt = _recorded_prompt(name, group)
    document: list[reference.Span] = []
    ids, images = iter(prompt.ids), iter(prompt.images)
    for number, span in enumerate(prompt.spans):
        if isinstance(span, Image):
            document.append(reference.Clean(next(images).double().numpy(), f"image {number}"))
        else:
            document.append(reference.Text([next(ids) for _ in range(span.length)]))
    (answer,) = reference.forward([document], weights_of(model), facts_of(model.config))
    assert [t.position for t in answer.tokens] == [tuple(p) for p in recorded["indexes"].T.tolist()]
    mask = reference.mask_of(answer.tokens, answer.tokens)
    np.testing.assert_array_equal(mask, recorded["mask"].bool().numpy())
    assert_close(torch.from_numpy(answer.logits), recorded["logits"][0], TOLERANCE)
    assert_close(torch.from_numpy(answer.hidden), recorded["last_hidden"][0], TOLERANCE)


# --- denoising -----------------------------------------------------------------------------------


@every_checkpoint
@pytest.mark.parametrize("prefix", ["cond", "uncond"])
def test_velocity(name: str, prefix: str, model: NeoUnify) -> None:
    recorded, facts = load_fixture(name, "velocity")
    cache = _cache(model)
    ids = recorded[f"input_ids_{prefix}"][0].tolist()
    forward_und(model, [ModelInput(cache, (Text(len(ids)),), ids)])
    layout = Layout([cache.document(Noise(3, 2))])
    assert torch.equal(layout["gen"].positions.T, recorded[f"indexes_{prefix}"])
    z = recorded["z"][0]
    assert torch.equal(patchify(recorded["noise"], 32, 3)[0], z)
    for t in (0.0, 0.3, 0.97, 0.99):
        scale = torch.tensor([facts["noise_scale"]])
        embedded = model.embed_noisy(layout, z, torch.tensor([t]), scale)
        assert_close(embedded, recorded[f"t{t}.input_embeds"][0], TOLERANCE)
        hidden = model.backbone(layout, {GEN: embedded}, plan(layout, [cache]))[GEN]
        assert_close(hidden, recorded[f"t{t}.{prefix}.hidden"][0], TOLERANCE)
        clean = model.clean_prediction(hidden, layout[GEN].grids)
        assert_close(clean, recorded[f"t{t}.{prefix}.x_pred"][0], TOLERANCE)
        v = velocity(clean, z, t, 0.02)
        assert_close(v, recorded[f"t{t}.{prefix}.v_pred"][0], TOLERANCE)


@every_checkpoint
def test_the_mixed_forward_gives_the_recorded_clean_image(name: str, model: NeoUnify) -> None:
    """Both recorded prefixes, each with its noisy image, packed in one call."""
    recorded, facts = load_fixture(name, "velocity")
    prompts = [recorded[f"input_ids_{prefix}"][0] for prefix in ("cond", "uncond")]
    layout = Layout(Document((Text(len(ids)), Noise(3, 2))) for ids in prompts)
    output = model(
        batch_of(
            layout,
            torch.cat(prompts),
            (),
            recorded["z"][0].repeat(2, 1),
            torch.tensor([0.3, 0.97]),
            torch.full((2,), facts["noise_scale"]),
        )
    )
    wanted = recorded["t0.3.cond.x_pred"][0], recorded["t0.97.uncond.x_pred"][0]
    assert_close(output.clean, torch.cat(wanted), TOLERANCE)


@pytest.mark.parametrize("name", ["tiny-moe"])
@pytest.mark.parametrize("stream", ["und", "gen"])
def test_sparse_block(name: str, stream: str, model: NeoUnify) -> None:
    recorded, _ = load_fixture(name, "moe_block")
    block = model.get_submodule(f"layers.1.{stream}.out.mlp")
    assert isinstance(block, SparseMlp)
    assert_close(block(recorded["x"][0]), recorded[f"{stream}.out"][0], TOLERANCE)
