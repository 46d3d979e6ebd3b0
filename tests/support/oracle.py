"""Subjects whose scores are known: one that is always right, and one that sees nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from neounify.scenes.bench import (
    BenchConfig,
    Painting,
    caption_cases,
    categories,
    copy_cases,
    edit_cases,
    paint_cases,
    relation_yes_no_cases,
    story_cases,
    vqa_cases,
)
from neounify.scenes.bench.category import Pixels
from neounify.scenes.bench.plan import question_kinds
from neounify.scenes.bench.subject import Side
from neounify.scenes.world.facts import FULL_STYLE, facts_of
from neounify.scenes.world.language import caption, layout_text
from neounify.scenes.world.render import render
from neounify.scenes.world.scene import Scene


class Oracle:
    """Knows all cases of a run: gives true renders and true answers."""

    def __init__(self, config: BenchConfig) -> None:
        self._config, world = config, config.world
        drawn = (world, config.cases, config.seed)
        self.scenes = {
            case.prompt: case.scene
            for name in categories(world)
            for case in paint_cases(name, *drawn)
        }
        self.answers = {
            (self.seen(case.scene), case.question.text): case.question.answer
            for kind in question_kinds(config)
            for case in vqa_cases(kind, *drawn)
        }
        if "relation" in question_kinds(config):
            for case in relation_yes_no_cases(*drawn):
                self.answers[self.seen(case.scene), case.question.text] = case.question.answer
        for described in caption_cases(*drawn):
            words = caption(facts_of(described.scene, world, FULL_STYLE))
            self.answers[self.seen(described.scene), described.request] = words
        self.edits = {
            (self.seen(case.edit.source), case.edit.instruction): case.edit.target
            for case in edit_cases(*drawn)
        }
        for copied in copy_cases(*drawn):
            self.edits[self.seen(copied.scene), copied.request] = copied.scene
        self.stories = {case.story.request: case.story for case in story_cases(*drawn)}
        self.noise: list[tuple[str, int]] = []
        """Every (prompt, seed) that was generated or edited."""

    def seen(self, scene: Scene) -> bytes:
        return render(scene, self._config.world).tobytes()

    def answer(self, images: Sequence[Pixels | None], questions: Sequence[str]) -> list[str]:
        return [
            self.answers[image.tobytes(), question]
            for image, question in zip(images, questions, strict=True)
            if image is not None
        ]

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        assert side == self._config.world.side
        self.noise += zip(prompts, seeds, strict=True)
        return [self._painting(self.scenes[prompt], think) for prompt in prompts]

    def edit(
        self,
        images: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]:
        self.noise += zip(instructions, seeds, strict=True)
        return [
            self._painting(self.edits[image.tobytes(), text], think)
            for image, text in zip(images, instructions, strict=True)
        ]

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]:
        return [render(step.scene, self._config.world) for step in self.stories[request].steps]

    def _painting(self, scene: Scene, think: bool) -> Painting:
        thought = layout_text(scene, self._config.world) if think else None
        return Painting(render(scene, self._config.world), thought)


class Blind:
    """Sees nothing, says nothing, generates grey noise."""

    def answer(self, images: Sequence[Pixels | None], questions: Sequence[str]) -> list[str]:
        return [""] * len(questions)

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        thought = "grey" if think else None
        return [Painting(self._noise(side, seed), thought) for seed in seeds]

    def edit(
        self,
        images: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]:
        return self.paint(instructions, images[0].shape[0], seeds, think=think)

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]:
        return []

    def _noise(self, side: Side, seed: int) -> Pixels:
        width, height = (side, side) if isinstance(side, int) else side
        rng = np.random.default_rng(seed)
        return rng.integers(100, 150, (height, width, 3), dtype=np.uint8)
