"""The second family against its recordings: embeddings, heads and passes of the streams."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neounify.cache import SequenceCache
from neounify.checkpoint import load_model
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.flow.path import velocity
from neounify.image.pixels import normalise_und, patchify
from neounify.model import Image, Layout, NeoUnify, Noise, Text
from neounify.model.layout import Document
from neounify.model.parts import GEN
from support.attention import plan
from support.golden import checkpoint, load_fixture, needs_golden
from support.models import assert_close

FAMILY, TOLERANCE = "pixelumm", 2e-5
pytestmark = [needs_golden, pytest.mark.parametrize("name", ["tiny-f18", "tiny-f22"])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NeoUnify]:
    root = tmp_path_factory.mktemp("pixelumm")
    folders = {name: checkpoint(name, root, FAMILY) for name in ("tiny-f18", "tiny-f22")}
    return {name: load_model(path, config=Path(path) / "llm") for name, path in folders.items()}


def test_pixels_to_tokens_and_back(name: str, models: dict[str, NeoUnify]) -> None:
    model, (recorded, _) = models[name], load_fixture(name, "vision", FAMILY)
    pixels = recorded["picture"].permute(2, 0, 1).float() / 255
    image = normalise_und(pixels, model.config.und_pixels)
    assert_close(patchify(image[None], 16, 3)[0], recorded["image_rows"], TOLERANCE)
    layout = Layout([Document((Image(3, 5),))])
    embedded = model.embed_und(layout, torch.empty(0, dtype=torch.int64), [image])
    assert_close(embedded, recorded["image_und"], TOLERANCE)
    noisy = Layout([Document((Noise(3, 5),))])
    time = torch.tensor([0.3])
    embedded = model.embed_noisy(noisy, recorded["image_rows"], time, torch.ones(1))
    assert_close(embedded, recorded["image_gen"], TOLERANCE)
    assert_close(model.gen_tube(recorded["tube_rows"]), recorded["tube_gen"], TOLERANCE)
    assert hasattr(model, "und_tube") == ("tube_und" in recorded)
    if hasattr(model, "und_tube"):
        assert_close(model.und_tube(recorded["tube_rows"]), recorded["tube_und"], TOLERANCE)
    head = model.clean_prediction(recorded["head_hidden"], ())
    assert_close(head, recorded["head_image"], TOLERANCE)
    assert_close(model.video_head(recorded["head_hidden"]), recorded["head_video"], TOLERANCE)


@pytest.mark.parametrize("prefix", ["cond", "uncond"])
def test_keys_and_values_of_a_prompt(name: str, prefix: str, models: dict[str, NeoUnify]) -> None:
    model, (recorded, _) = models[name], load_fixture(name, "t2i", FAMILY)
    cache = _prefilled(model, recorded[f"{prefix}.ids"].tolist())
    for layer in (0, model.config.num_layers - 1):
        k, v = cache.read(layer, cache.length)
        assert_close(k, recorded[f"{prefix}.layer{layer}.k"][0], TOLERANCE)
        assert_close(v, recorded[f"{prefix}.layer{layer}.v"][0], TOLERANCE)
    layout = Layout([cache.document(Noise(3, 4))])
    assert torch.equal(layout[GEN].positions.T.float(), recorded[f"{prefix}.noise_positions"])


def test_velocity(name: str, models: dict[str, NeoUnify]) -> None:
    """The clean image behind a prompt, whatever the time, and its velocity at four times."""
    model, (recorded, _) = models[name], load_fixture(name, "velocity", FAMILY)
    prompt, _ = load_fixture(name, "t2i", FAMILY)
    cache = _prefilled(model, prompt["cond.ids"].tolist())
    layout, z = Layout([cache.document(Noise(3, 4))]), recorded["image.z"]
    embedded = model.embed_noisy(layout, z, torch.tensor([0.3]), torch.ones(1))
    assert_close(embedded, recorded["image.embeds"], TOLERANCE)
    hidden = model.backbone(layout, {GEN: embedded}, plan(layout, [cache]))[GEN]
    assert_close(hidden, recorded["image.hidden"], TOLERANCE)
    clean = model.clean_prediction(hidden, layout[GEN].grids)
    assert_close(clean, recorded["image.x"], TOLERANCE)
    for family_t in (0.9997, 0.7, 0.05, 0.02):
        v = velocity(clean, z, 1 - family_t, model.config.flow.t_eps_training)
        assert_close(-v, recorded[f"image.v_{family_t}"], TOLERANCE)


def _prefilled(model: NeoUnify, ids: list[int]) -> SequenceCache:
    cache = SequenceCache(model.config, 8, dtype=torch.float32, device=torch.device("cpu"))
    forward_und(model, [ModelInput(cache, (Text(len(ids)),), ids)])
    return cache
