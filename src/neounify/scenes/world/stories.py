"""Stories: a scene that changes step by step, told in text and pictures by turns.

The request names the start and every change, so that each picture can be checked; the answer
tells one step, shows it, tells the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import pick
from neounify.scenes.world.edits import SceneEdit, edit_scene
from neounify.scenes.world.facts import FULL_STYLE, facts_of
from neounify.scenes.world.language import caption
from neounify.scenes.world.lexicon import Language, number_word
from neounify.scenes.world.scene import Scene, SceneConfig, Split, in_split, sample_scene


@dataclass(frozen=True)
class StoryStep:
    """What is told and the scene that is shown after it."""

    text: str
    scene: Scene


@dataclass(frozen=True)
class Story:
    """The request and its steps; `edits[i]` leads from step i to step i + 1."""

    request: str
    steps: tuple[StoryStep, ...]
    edits: tuple[SceneEdit, ...]


def sample_story(
    rng: np.random.Generator,
    config: SceneConfig,
    length: int | None = None,
    language: Language = "en",
    split: Split = "train",
) -> Story:
    """Draw a story of `length` pictures, 2 to 4; "held_out" means that some scene in it is."""
    length = length or int(rng.integers(2, 4))
    if not 2 <= length <= 4:
        raise DataError(f"a story has 2 to 4 pictures, not {length}")
    each: Split = "train" if split == "train" else "any"
    for _ in range(200):
        scene = sample_scene(rng, config, split=each)
        scenes, edits = [scene], []
        while len(scenes) < length:
            edit = edit_scene(scenes[-1], rng, config, None, language, each)
            if edit is None:
                break
            edits.append(edit)
            scenes.append(edit.target)
        if len(scenes) == length and (
            split != "held_out" or any(in_split(s, "held_out") for s in scenes)
        ):
            return _tell(scenes, edits, rng, config, language)
    raise DataError(f"no story of {length} pictures of split {split!r} was found: {config}")


def _tell(
    scenes: list[Scene],
    edits: list[SceneEdit],
    rng: np.random.Generator,
    config: SceneConfig,
    language: Language,
) -> Story:
    start = caption(facts_of(scenes[0], config, FULL_STYLE), language=language)
    count = number_word(len(scenes), language)
    if language == "zh":
        request = f"用{count}张图讲一个故事：{start}。" + "".join(
            f"{edit.instruction}。" for edit in edits
        )
        texts = [f"{start}。", *(edit.news for edit in edits)]
    else:
        opening = pick(
            rng,
            (
                f"Tell a story in {count} pictures. It starts with {start}.",
                f"Paint a story of {count} pictures that begins with {start}.",
            ),
        )
        request = " ".join([opening.rstrip(".") + ".", *(edit.instruction for edit in edits)])
        texts = [start.rstrip(".").capitalize() + ".", *(edit.news for edit in edits)]
    steps = tuple(StoryStep(text, scene) for text, scene in zip(texts, scenes, strict=True))
    return Story(request, steps, tuple(edits))
