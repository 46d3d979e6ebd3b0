"""The second family against its recordings: embeddings, heads and passes of the streams."""

from __future__ import annotations

from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

import neounify
from neounify.cache import SequenceCache
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.flow.path import velocity
from neounify.flow.sampling import ImageSampling
from neounify.image.pixels import normalise_und, patchify
from neounify.model import Image, Layout, NeoUnify, Noise, Text
from neounify.model.layout import Document, Grid
from neounify.model.parts import GEN, UND
from neounify.tasks.chat import chat_images, make_chat_request, prompt_of
from neounify.tasks.image import ImageRequest, branch_prompt
from neounify.tasks.video import clip_grid
from neounify.text.template import ImageSegment
from support.attention import plan
from support.golden import checkpoint, load_fixture, needs_golden
from support.golden_steps import visibility
from support.models import assert_close
from support.scripted_sampler import script_sampler

FAMILY, TOLERANCE = "pixelumm", 2e-5
pytestmark = [needs_golden, pytest.mark.parametrize("name", ["tiny-f18", "tiny-f22"])]


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, neounify.Pipeline]:
    root = tmp_path_factory.mktemp("pixelumm")
    folders = {name: checkpoint(name, root, FAMILY) for name in ("tiny-f18", "tiny-f22")}
    return {name: neounify.load(path, config=path / "llm") for name, path in folders.items()}


@pytest.fixture(scope="module")
def models(pipes: dict[str, neounify.Pipeline]) -> dict[str, NeoUnify]:
    return {name: pipe.model for name, pipe in pipes.items()}


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


@pytest.mark.parametrize("group", ["t2i", "t2v"])
@pytest.mark.parametrize("prefix", ["cond", "uncond"])
def test_keys_and_values_of_a_prompt(
    name: str, prefix: str, group: str, models: dict[str, NeoUnify]
) -> None:
    model, (recorded, facts) = models[name], load_fixture(name, group, FAMILY)
    cache = _prefilled(model, recorded[f"{prefix}.ids"].tolist())
    for layer in (0, model.config.num_layers - 1):
        k, v = cache.read(layer, cache.length)
        assert_close(k, recorded[f"{prefix}.layer{layer}.k"][0], TOLERANCE)
        assert_close(v, recorded[f"{prefix}.layer{layer}.v"][0], TOLERANCE)
    layout = Layout([cache.document(Noise.of(_grid(model, facts)))])
    assert torch.equal(layout[GEN].positions.T.float(), recorded[f"{prefix}.noise_positions"])


def _grid(model: NeoUnify, facts: dict[str, Any]) -> Grid:
    """The tokens of a recorded image, or of a clip at 24 frames a second."""
    if "height_width" in facts:
        height, width = facts["height_width"]
        return Grid.of_pixels(height, width, model.config.token_size)
    frames, height, width = facts["frames_height_width"]
    return clip_grid(model.config, width, height, frames, 24.0)


@pytest.mark.parametrize(
    ("kind", "group", "times"),
    [("image", "t2i", (0.9997, 0.7, 0.05, 0.02)), ("video", "t2v", ())],
)
def test_velocity(
    name: str, kind: str, group: str, times: tuple[float, ...], models: dict[str, NeoUnify]
) -> None:
    """What is predicted behind a prompt, whatever the time; of an image its velocity, too."""
    model, (recorded, _) = models[name], load_fixture(name, "velocity", FAMILY)
    prompt, facts = load_fixture(name, group, FAMILY)
    cache = _prefilled(model, prompt["cond.ids"].tolist())
    layout, z = Layout([cache.document(Noise.of(_grid(model, facts)))]), recorded[f"{kind}.z"]
    embedded = model.embed_noisy(layout, z, torch.tensor([0.3]), torch.ones(1))
    assert_close(embedded, recorded[f"{kind}.embeds"], TOLERANCE)
    hidden = model.backbone(layout, {GEN: embedded}, plan(layout, [cache]))[GEN]
    assert_close(hidden, recorded[f"{kind}.hidden"], TOLERANCE)
    clean = model.clean_prediction(hidden, layout[GEN].grids)
    assert_close(clean, recorded[f"{kind}.x"], TOLERANCE)
    for family_t in times:
        v = velocity(clean, z, 1 - family_t, model.config.flow.t_eps_training)
        assert_close(-v, recorded[f"{kind}.v_{family_t}"], TOLERANCE)


@pytest.mark.parametrize("case", ["one", "two", "numbered"])
def test_answers_about_images(
    name: str, case: str, pipes: dict[str, neounify.Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, positions, mask and states of the prompt, and twelve greedy tokens."""
    pipe, (recorded, facts) = pipes[name], load_fixture(name, "mm", FAMILY)
    question = facts["cases"][case]
    pictures = [PIL.Image.fromarray(recorded[f"picture{n}"].numpy()) for n in question["images"]]
    form = pipe.processor.template
    request = make_chat_request(question["instruction"], pictures, (), form)
    images = chat_images(pipe.processor, request)
    prompt = prompt_of(pipe.processor, request)
    grids = [pipe.model.token_grid(image) for image in images]
    assert prompt.ids([g.length for g in grids], -1) == recorded[f"{case}.ids"].tolist()
    spans = [
        Image.of(grids[part.image]) if isinstance(part, ImageSegment) else Text(len(part.ids))
        for part in prompt.segments
    ]
    layout = Layout([Document(tuple(spans))])
    assert torch.equal(layout[UND].positions.T.float(), recorded[f"{case}.positions"])
    ids = torch.tensor(prompt.ids([0] * len(grids), -1))
    hidden = pipe.model.embed_und(layout, ids, images)
    if f"{case}.mask" in recorded:
        assert torch.equal(visibility(layout), recorded[f"{case}.mask"])
    if f"{case}.inputs_embeds" in recorded:
        assert_close(hidden, recorded[f"{case}.inputs_embeds"], TOLERANCE)
    hidden = pipe.model.backbone(layout, {UND: hidden}, plan(layout))[UND]
    if f"{case}.last_hidden" in recorded:
        assert_close(hidden, recorded[f"{case}.last_hidden"], TOLERANCE)
    if f"{case}.logits" in recorded:
        assert_close(pipe.model.logits(hidden), recorded[f"{case}.logits"], TOLERANCE)
        cache = SequenceCache(pipe.config, 8, dtype=torch.float32, device=torch.device("cpu"))
        forward_und(pipe.model, [ModelInput(cache, tuple(spans), ids.tolist(), images)])
        for layer in (0, pipe.config.num_layers - 1):
            k, v = cache.read(layer, cache.length)
            assert_close(k, recorded[f"{case}.layer{layer}.k"][0], TOLERANCE)
            assert_close(v, recorded[f"{case}.layer{layer}.v"][0], TOLERANCE)
    shown: list[Tensor] = []

    def choose(logits: Tensor) -> int:
        shown.append(logits)
        return int(logits.argmax())

    script_sampler(monkeypatch, choose)
    answer = pipe.chat(question["instruction"], pictures, max_new_tokens=12)
    wanted = recorded[f"{case}.answer_ids"].tolist()
    assert list(answer.token_ids) == wanted
    assert_close(torch.stack(shown), recorded[f"{case}.answer_logits"], TOLERANCE)


@pytest.mark.parametrize("group", ["t2i", "t2v"])
@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_prompts_of_images_and_clips(
    name: str, branch: str, group: str, pipes: dict[str, neounify.Pipeline]
) -> None:
    pipe, (recorded, facts) = pipes[name], load_fixture(name, group, FAMILY)
    frames, height, width = facts.get("frames_height_width") or (0, *facts["height_width"])
    request = ImageRequest(
        prompt=facts["prompt"],
        width=width,
        height=height,
        frames=frames,
        sampling=ImageSampling().resolve(pipe.config, editing=False, video=bool(frames)),
    )
    prompt = branch_prompt(pipe.processor, request, branch)  # type: ignore[arg-type]
    assert prompt.ids([], -1) == recorded[f"{branch}.ids"].tolist()


def _prefilled(model: NeoUnify, ids: list[int]) -> SequenceCache:
    cache = SequenceCache(model.config, 8, dtype=torch.float32, device=torch.device("cpu"))
    forward_und(model, [ModelInput(cache, (Text(len(ids)),), ids)])
    return cache
