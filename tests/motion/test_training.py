"""The recipes of clips train, and their models are measured in MotionBench."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from neounify.checkpoint.load import expected_shapes
from neounify.checkpoint.reader import CheckpointFolder
from neounify.config import VideoConfig
from neounify.data.draws import GuidanceDropout
from neounify.data.encode import Encoder
from neounify.data.sample import SampleClip, SampleText
from neounify.errors import RequestError
from neounify.motion.bench import (
    MotionBenchConfig,
    PipelineMotionSubject,
    motion_names,
    motion_plan,
)
from neounify.motion.world import motion_config
from neounify.motion.world.samples import SHOWN_FPS, MotionDataset
from neounify.motion.world.scene import FPS
from neounify.pipeline import Pipeline, load
from neounify.tasks.chat import make_chat_request, prompt_of
from neounify.text import byte_tokenizer
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import Recipe, StageRecipe, TokenizerRecipe, read_recipe
from neounify.train.setup import build_setup, recipe_config
from neounify.train.supervised import SupervisedConfig
from support.models import TINY_CHANGES, one_thread

__all__ = ["one_thread"]  # a fixture

RECIPE = Path(__file__).parents[2] / "recipes" / "motion.toml"
FRAMES = RECIPE.with_name("motion_frames.toml")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps of each stage of the recipe, with a tiny model."""
    recipe, folder = read_recipe(RECIPE), tmp_path_factory.mktemp("motion")
    model = replace(
        recipe.model,
        checkpoint=None,
        preset="scenes",
        changes={**recipe.model.changes, **TINY_CHANGES},
        tokenizer=TokenizerRecipe(vocab_size=300, samples=60),
    )
    _run(replace(recipe, model=model), folder)
    return folder


@pytest.fixture(scope="module")
def by_frame(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the other recipe, from the model of the first one."""
    recipe, folder = read_recipe(FRAMES), tmp_path_factory.mktemp("frames")
    model = replace(recipe.model, checkpoint=trained / "model")
    _run(replace(recipe, model=model, parallel=None), folder)
    return folder


def _run(recipe: Recipe, folder: Path) -> None:
    stages = tuple(_shortened(stage) for stage in recipe.stages)
    recipe = replace(recipe, stages=stages, workers=0)
    log = Log(folder, Console(quiet=True), tensorboard=False)
    Trainer(recipe, build_setup(recipe, torch.device("cpu"), folder), folder, log).run()


def _shortened(stage: StageRecipe) -> StageRecipe:
    assert isinstance(stage.method, SupervisedConfig)
    method = replace(stage.method, tokens_per_pack=900)
    return replace(stage, steps=2, packs_per_step=1, compile=False, method=method)


def test_two_steps_of_the_recipe(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines if line["kind"] == "train"}
    assert [line["stage_step"] for line in last.values()] == [2, 2, 2]
    assert np.isfinite([last["frames"]["image/loss"], last["clips"]["image/loss"]]).all()
    assert np.isfinite(last["understanding"]["text/loss"])
    model = load(trained / "model")
    assert model.config.video == VideoConfig(tube_frames=1, position_fps=8.0, image_weights=True)
    defaults = model.config.sampling.video
    assert (defaults.size, defaults.frames, defaults.fps) == ((64, 64), 8, FPS)


def test_two_steps_of_clips_frame_by_frame(by_frame: Path) -> None:
    lines = [json.loads(line) for line in (by_frame / "log.jsonl").read_text().splitlines()]
    last = {line["stage"]: line for line in lines if line["kind"] == "train"}
    assert list(last) == ["moves", "ends", "clips"]
    assert np.isfinite([line["image/loss"] for line in last.values()]).all()
    config = load(by_frame / "model").config
    assert config.frame_by_frame
    assert (config.sampling.video.size, config.sampling.video.steps) == ((64, 64), 12)


def test_the_recipe_needs_no_new_weights_of_pixels() -> None:
    """Its model is the checkpoint's but for the rows of new words."""
    recipe = read_recipe(RECIPE)
    source, config = CheckpointFolder.open(RECIPE.parent / "scenes-base"), recipe_config(recipe)
    before, after = (expected_shapes(one) for one in (source.config, config))
    assert before == after
    assert config.sampling.video.sample_fps == SHOWN_FPS


@pytest.mark.parametrize("folder", ["trained", "by_frame"])
def test_its_model_is_measured(
    folder: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: Path = request.getfixturevalue(folder)
    monkeypatch.setattr("neounify.motion.bench.subject.MAX_ANSWER_TOKENS", 3)
    asked = MotionBenchConfig(world=motion_config("default"), cases=2)
    subject = PipelineMotionSubject(load(trained / "model"), steps=2)
    outcomes = [category.run() for category in motion_plan(subject, asked)]
    assert [outcome.score.category for outcome in outcomes] == motion_names(asked)
    assert all(len(outcome.examples) == 2 for outcome in outcomes)


@pytest.mark.parametrize("folder", ["trained", "by_frame"])
def test_generated_clips_depend_on_their_seed_alone(
    folder: str, request: pytest.FixtureRequest
) -> None:
    trained: Path = request.getfixturevalue(folder)
    subject = PipelineMotionSubject(load(trained / "model"), steps=2)
    one, two, other = subject.film(["a star moves left"] * 3, [8, 8, 12], 64, [1, 2, 1])
    (alone,) = subject.film(["a star moves left"], [8], 64, [1])
    assert one.shape == alone.shape == (8, 64, 64, 3)
    assert other.shape == (12, 64, 64, 3)
    assert np.abs(one.astype(int) - alone).max() <= 1
    assert (one != two).any()
    (rest,) = subject.extend([one[:4]], ["Continue the clip."], [4], [3])
    assert rest.shape == (4, 64, 64, 3)


def test_a_question_of_training_is_the_prompt_of_inference(trained: Path) -> None:
    pipe = load(trained / "model")
    encode = Encoder(
        config=pipe.config,
        tokenizer=pipe.tokenizer,
        dropout=GuidanceDropout(text=0.0, all=0.0),
    )
    for number in range(4):
        world = motion_config("default")
        data = MotionDataset(number, world, {"video_qa": 1})
        whole = MotionDataset(number, world, {"video_qa": 1}, shown_fps=FPS)
        asked: list[object] = []

        def note(prompts: list[object], asked: list[object] = asked, **_: object) -> list[object]:
            asked.extend(prompts)
            return []

        clip, question = whole[0].turns[0].parts
        assert isinstance(clip, SampleClip)
        assert isinstance(question, SampleText)
        pipe_that_notes = SimpleNamespace(config=pipe.config, chat_batch=note)
        PipelineMotionSubject(pipe_that_notes).watch(  # type: ignore[arg-type]
            [clip.pixels()], [question.text]
        )
        prompt = prompt_of(pipe.processor, make_chat_request(asked[0], []))  # type: ignore[arg-type]
        sample = replace(data[0], turns=data[0].turns[:2])
        wanted = prompt.ids([0] * prompt.n_images, context_id=-1)
        ids = encode(sample, np.random.default_rng(0)).ids
        assert list(ids[: len(wanted)]) == wanted
        assert len(ids) > len(wanted)


def test_models_without_tubes_are_refused() -> None:
    from neounify.config.presets import TINY
    from neounify.model import NeoUnify

    pipe = Pipeline(NeoUnify(TINY).eval(), byte_tokenizer())
    with pytest.raises(RequestError, match="not trained to generate videos"):
        PipelineMotionSubject(pipe).film(["x"], [8], 64, [0])
