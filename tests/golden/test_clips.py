"""Clips against the recorded arrays of PixelUMM: positions, masks, rows, answers, videos."""

from __future__ import annotations

import PIL.Image
import pytest
import torch

import neounify
from neounify.cache import SequenceCache, new_cache
from neounify.checkpoint import load_model
from neounify.engine.denoiser import Denoiser, make_job
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.errors import RequestError
from neounify.flow.guidance import Branch
from neounify.flow.path import clean_from_velocity
from neounify.flow.sampling import ImageSampling
from neounify.image.clips import cut_levels, frame_levels, rows_to_frames, tube_rows
from neounify.image.pixels import normalise_und
from neounify.model import Document, Image, Layout, NeoUnify, Noise, Span, Text
from neounify.model.parts import GEN, UND
from neounify.tasks.chat import chat_images, make_chat_request, prompt_of
from neounify.tasks.clips import Frames
from neounify.tasks.video import clip_grid, draw_clip_noise, in_tubes
from support.attention import plan
from support.golden import checkpoint, load_fixture, needs_golden
from support.golden_steps import DPM, SINGLE_PASS, TRAJECTORY, Steps, visibility
from support.models import assert_close, one_thread
from support.scripted_sampler import script_sampler

__all__ = ["one_thread"]  # a fixture

pytestmark = needs_golden
FAMILY = "pixelumm"


def test_positions_of_text_images_and_clips() -> None:
    recorded, facts = load_fixture("common", "positions", FAMILY)
    for name, span in (("text", Text(5)), ("image_2x3", Image(2, 3))):
        positions = Layout([Document((span,), start_t=7)])[UND].positions.T
        assert positions.dtype == recorded[name].dtype
        assert torch.equal(positions, recorded[name])
    assert Noise(2, 3).next_t(7) == facts["after_image"]


@pytest.mark.parametrize("fps", [24, 12, 30, 16, 60])
def test_positions_at_every_frame_rate(fps: int) -> None:
    recorded, facts = load_fixture("common", "positions", FAMILY)
    clip = Noise(2, 3, 3, 24 / fps)
    positions = Layout([Document((clip,), start_t=7)])[GEN].positions.T
    assert torch.equal(positions.float(), recorded[f"video_3x2x3_fps{fps}"])
    assert clip.next_t(7) == facts["video"][str(fps)]["next"]


# --- a whole model ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, NeoUnify]:
    root = tmp_path_factory.mktemp("clips")
    folders = {name: checkpoint(name, root, FAMILY) for name in ("tiny-f18", "tiny-f22")}
    return {name: load_model(path, config=path / "llm") for name, path in folders.items()}


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, neounify.Pipeline]:
    root = tmp_path_factory.mktemp("pipes")
    folders = {name: checkpoint(name, root, FAMILY) for name in ("tiny-f18", "tiny-f22")}
    return {name: neounify.load(path, config=path / "llm") for name, path in folders.items()}


@pytest.mark.parametrize("name", ["tiny-f18", "tiny-f22"])
def test_clips_to_rows_and_back(name: str) -> None:
    recorded, _ = load_fixture(name, "vision", FAMILY)
    frames = recorded["clip"].movedim(-1, 1).float() / 127.5 - 1
    rows = tube_rows(frames, 16, 4)
    assert_close(rows, recorded["tube_rows"], SINGLE_PASS)
    back = rows_to_frames(recorded["tube_rows"], 2, 3, 16, 4).movedim(1, -1)
    assert_close(back, recorded["tube_frames_back"], SINGLE_PASS)


def _prefilled(model: NeoUnify, ids: list[int]) -> SequenceCache:
    cache = new_cache(model, len(ids))
    forward_und(model, [ModelInput(cache, (Text(len(ids)),), ids)])
    return cache


VIDEO_CASES = [
    ("tiny-f18", "unipc", True),
    ("tiny-f18", "unipc_fps16", True),
    *(
        ("tiny-f22", c, True)
        for c in ("unipc", "unipc_neg", "unipc_fps16", "unipc_cfg1", "unipc7", "dpm")
    ),
    ("tiny-f22", "dpm", False),
]


@pytest.mark.parametrize(("name", "case", "published"), VIDEO_CASES)
def test_generated_clips(
    name: str,
    case: str,
    published: bool,
    models: dict[str, NeoUnify],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Trajectories of both solvers, behind the recorded prompts, through the denoiser."""
    recorded, facts = load_fixture(name, "t2v", FAMILY)
    model, settings = models[name], facts["cases"][case]
    frames, height, width = facts["frames_height_width"]
    ids = {
        branch: recorded.get(f"{case}.{branch}.ids", recorded[f"{branch}.ids"]).tolist()
        for branch in ("cond", "uncond")
    }
    sampling = ImageSampling(
        steps=settings["steps"],
        shift=settings["shift"],
        guidance=settings["guidance"],
        solver="unipc" if settings["sampler"] == "unipc" else "dpm2m",
        published_solver=published,
    ).resolve(model.config, editing=False, video=True)
    branches = sampling.guidance.branches()
    prefixes: dict[Branch, SequenceCache] = {b: _prefilled(model, ids[b]) for b in branches}
    grid = clip_grid(model.config, width, height, frames, settings["fps"])
    generator = torch.Generator().manual_seed(facts["seed"])
    noise = draw_clip_noise(model.config, grid, generator)[0]
    assert torch.equal(noise, recorded["init_noise"])
    steps = Steps(monkeypatch)
    job = make_job(model, noise, grid, prefixes, sampling)
    denoiser = Denoiser(model)
    with torch.inference_mode():
        while not job.done:
            denoiser.step([job])
    # At another rate those of the unconditional branch are not recorded.
    wanted = {"cond": f"{case}.noise_positions"}
    if f"{case}.noise_positions" not in recorded:
        negative = f"{case}.uncond.noise_positions"
        wanted = {b: f"{b}.noise_positions" for b in branches}
        wanted |= {"uncond": negative} if negative in recorded else {}
    for branch, array in wanted.items():
        assert torch.equal(steps.positions[0][branch].float(), recorded[array])
    assert torch.allclose(torch.tensor(steps.t).double(), 1 - recorded[f"{case}.t"], atol=1e-6)
    if f"{case}.z" in recorded:
        _check_steps(steps, recorded, case, model)
    tolerance = TRAJECTORY if published else DPM
    assert_close(job.z, recorded[f"{case}.final"], tolerance)
    if f"{case}.uint8" in recorded:
        pixels = rows_to_frames(job.z, grid.rows, grid.columns, 16, 4)
        levels = frame_levels(pixels).int() - recorded[f"{case}.uint8"].int()
        assert levels.abs().max() <= 1


def _check_steps(
    steps: Steps, recorded: dict[str, torch.Tensor], case: str, model: NeoUnify
) -> None:
    """z and the predictions of both branches, of every step."""
    t_eps = model.config.flow.t_eps_sampling
    assert t_eps is not None
    assert len(steps.z) == len(recorded[f"{case}.z"])
    for k, (z, t, v) in enumerate(zip(steps.z, steps.t, steps.v, strict=True)):
        assert_close(z, recorded[f"{case}.z"][k], TRAJECTORY)
        for branch in ("cond", "uncond"):
            clean = clean_from_velocity(v[branch], z, t, t_eps)
            assert_close(clean, recorded[f"{case}.x_{branch}"][k], TRAJECTORY)


@pytest.mark.parametrize("group", ["t2i", "t2v"])
@pytest.mark.parametrize("name", ["tiny-f18", "tiny-f22"])
def test_levels_are_cut_as_published(name: str, group: str) -> None:
    """The recorded levels of the recorded ends, exactly; rounded ones are others."""
    recorded, facts = load_fixture(name, group, FAMILY)
    compared = 0
    for case in facts["cases"]:
        if f"{case}.uint8" not in recorded:
            continue
        wanted, end = recorded[f"{case}.uint8"], recorded[f"{case}.final"]
        height, width = wanted.shape[-3] // 16, wanted.shape[-2] // 16
        pixels = rows_to_frames(end, height, width, 16, 4 if group == "t2v" else 1)
        levels = frame_levels(cut_levels(pixels))
        assert torch.equal(levels.reshape(wanted.shape), wanted)
        assert not torch.equal(frame_levels(pixels).reshape(wanted.shape), wanted)
        compared += 1
    assert compared


LOOKED_AT = pytest.mark.parametrize(
    ("name", "kind"), [("tiny-f18", "sparse"), ("tiny-f22", "sparse"), ("tiny-f22", "tubes")]
)


@LOOKED_AT
def test_clips_to_look_at(name: str, kind: str, models: dict[str, NeoUnify]) -> None:
    """Prefill of tubes, each with its own embedding and t, and of frames as images."""
    model, (recorded, facts) = models[name], load_fixture(name, "video_und", FAMILY)
    frames = normalise_und(recorded["frames"].movedim(-1, 1).float() / 255, "symmetric")
    images = list(frames[:3])
    if kind == "tubes":
        filled = torch.cat([frames, frames[-1:].expand(-len(frames) % 4, -1, -1, -1)])
        images = list(filled.split(4))
    spans: list[Span] = []
    shown = [model.token_grid(image) for image in images]
    grids = iter(shown)
    for what, length in facts[f"{kind}.answer"]["segments"]:
        spans.append(Image.of(next(grids)) if what == "image" else Text(length))
    ids = [token for token in recorded[f"{kind}.ids"].tolist() if token >= 0]
    layout = Layout([Document(tuple(spans))])
    assert torch.equal(layout[UND].positions.T.float(), recorded[f"{kind}.positions"])
    assert torch.equal(visibility(layout), recorded[f"{kind}.mask"])
    cache = new_cache(model, layout[UND].length)
    embedded = model.embed_und(layout, torch.tensor(ids), images)
    if f"{kind}.inputs_embeds" in recorded:
        assert_close(embedded, recorded[f"{kind}.inputs_embeds"], SINGLE_PASS)
    states = model.backbone(layout, {UND: embedded}, plan(layout))[UND]
    assert_close(states, recorded[f"{kind}.last_hidden"], SINGLE_PASS)
    if f"{kind}.logits" in recorded:
        assert_close(model.logits(states), recorded[f"{kind}.logits"], SINGLE_PASS)
    hidden = forward_und(model, [ModelInput(cache, tuple(spans), ids, images)])
    assert_close(hidden[0], recorded[f"{kind}.last_hidden"][-1], SINGLE_PASS)
    if f"{kind}.layer0.k" in recorded:
        for layer in range(model.config.num_layers):
            k, v = cache.read(layer, cache.length)
            assert_close(k, recorded[f"{kind}.layer{layer}.k"][0], SINGLE_PASS)
            assert_close(v, recorded[f"{kind}.layer{layer}.v"][0], SINGLE_PASS)
    for token, logits in zip(
        recorded[f"{kind}.answer_ids"].tolist(), recorded[f"{kind}.answer_logits"], strict=True
    ):
        assert_close(model.logits(hidden)[0], logits, SINGLE_PASS)
        assert int(logits.argmax()) == token
        hidden = forward_und(model, [ModelInput(cache, (Text(1),), [token])])


@LOOKED_AT
def test_questions_about_clips(
    name: str, kind: str, pipes: dict[str, neounify.Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorded prompt and answer, from frames with their times."""
    pipe, (recorded, facts) = pipes[name], load_fixture(name, "video_und", FAMILY)
    if name == "tiny-f18":  # recorded, although the family refuses it
        with pytest.raises(RequestError, match="not trained to answer questions about videos"):
            pipe.config.check_can("chat_video")
        able = pipe.config.replace(capabilities=(*pipe.config.capabilities, "chat_video"))
        monkeypatch.setattr(pipe.model, "config", able)
        pipe = neounify.Pipeline(pipe.model, pipe.tokenizer)
    images = [PIL.Image.fromarray(frame) for frame in recorded["frames"].numpy()]
    if kind == "tubes":
        clip = in_tubes(pipe.config, images, facts["timestamps"])
    else:
        chosen = [images[number] for number in facts["sparse"]["frames"]]
        clip = Frames(chosen, facts["sparse"]["timestamps"])
    request = make_chat_request(facts["instruction"], (), [clip], pipe.processor.template)
    shown = [pipe.model.token_grid(image) for image in chat_images(pipe.processor, request)]
    ids = prompt_of(pipe.processor, request).ids([grid.length for grid in shown], -1)
    assert ids == recorded[f"{kind}.ids"].tolist()
    script_sampler(monkeypatch, lambda logits: int(logits.argmax()))
    answer = pipe.chat(facts["instruction"], video=clip, max_new_tokens=12)
    assert list(answer.token_ids) == recorded[f"{kind}.answer_ids"].tolist()


@pytest.mark.parametrize("name", ["tiny-f18", "tiny-f22"])
def test_videos_of_a_pipeline(name: str, pipes: dict[str, neounify.Pipeline]) -> None:
    """The whole way from a prompt to frames, with the recorded settings."""
    pipe, (recorded, facts) = pipes[name], load_fixture(name, "t2v", FAMILY)
    frames, height, width = facts["frames_height_width"]
    out = pipe.generate(
        facts["prompt"],
        frames=frames,
        height=height,
        width=width,
        seed=facts["seed"],
        fps=facts["cases"]["unipc"]["fps"],
        steps=facts["cases"]["unipc"]["steps"],
        published_solver=True,
    )
    levels = out.videos[0].frames.int() - recorded["unipc.uint8"].int()
    assert levels.abs().max() <= 1
