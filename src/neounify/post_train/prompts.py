"""Prompts of post-training: case i of a source is a function of i, so that runs resume exactly.

    { kind = "scenes", categories = { two_object = 1, attribution = 2, edit = 1 } }
    { kind = "scenes", wording = 0.5, chinese = 0.3, sizes = [[64, 64, 2], [128, 64, 1]] }
    { kind = "scenes", categories = { "question/where" = 1, caption = 1 } }       for texts
    { kind = "scenes", categories = { story = 1 } }  its texts, or an image of it behind the others
    { kind = "jsonl", path = "prompts.jsonl" }      an object a line: prompt, answer, image, …
    { kind = "text", path = "prompts.txt" }         one prompt a line

Scenes are those of the train split; no benchmark draws from the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, cast

import numpy as np
import PIL.Image
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass

from neounify.config.ranges import STRICT, Fraction, Positive, Range, Seed
from neounify.data.sample import DataError
from neounify.errors import ConfigError, ImageError
from neounify.files import read_text
from neounify.image import read_image
from neounify.scenes.bench.prompts import CaptionCase, VqaCase, categories, draw_paint_case
from neounify.scenes.world.draw import chance, pick, pick_weighted, sample_rng
from neounify.scenes.world.edits import sample_edit, sample_story
from neounify.scenes.world.facts import FULL_STYLE, facts_of
from neounify.scenes.world.language import caption
from neounify.scenes.world.lexicon import Language
from neounify.scenes.world.questions import QUESTION_KINDS, QuestionKind, ask
from neounify.scenes.world.render import render
from neounify.scenes.world.samples import CAPTION_REQUESTS, story_text
from neounify.scenes.world.scene import PRESETS, Scene, SceneConfig, sample_scene, scene_config
from neounify.scenes.world.wide import (
    WIDE_EDIT_WEIGHTS,
    wide_instruction,
    wide_prompt,
    wide_question,
)

STREAM = 10_000
"""First number of the paths that random numbers of prompts have; benchmarks stay below."""
MAX_PROMPT_FILE_BYTES = 2**28
MAX_SIDE = 2**14
"""Largest side of an image in pixels."""
Side = Annotated[int, AfterValidator(Range(1, MAX_SIDE))]
MAX_SCENES = 500
"""Scenes that are drawn for a question of one kind; many allow none."""
EDIT, CAPTION, QUESTION, STORY = "edit", "caption", "question/", "story"
ANSWER_CATEGORIES = (*(f"{QUESTION}{kind}" for kind in QUESTION_KINDS), CAPTION)
"""Categories of scenes that are answered by text; stories are text and images."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptCase:
    """One prompt to generate images of, or to answer, and what a reward needs to know about it.

    `images` are input images of an edit, or those that a question is about. `preceding` is for
    prompts of an interleaved answer: texts and images in turn that precede the image which is
    wanted; empty where all of the answer is wanted, None for other prompts. `target` is what
    rewards of scenes compare with, `record` the JSON object of a file's line.
    """

    prompt: str
    width: int
    height: int
    category: str = ""
    images: tuple[PIL.Image.Image, ...] = ()
    preceding: tuple[str | PIL.Image.Image, ...] | None = None
    target: Any = None
    record: Mapping[str, Any] = field(default_factory=dict)
    real: Callable[[], PIL.Image.Image] | None = None
    """An image that the prompt describes: the drawn scene, or `image` of the file's line."""

    @property
    def editing(self) -> bool:
        """Whether its images are sampled as edits are: with input images, or interleaved."""
        return bool(self.images) or self.preceding is not None


class PromptSource(Protocol):
    """Cases by number, without end."""

    def case(self, number: int) -> PromptCase:
        """Case `number`, from 0 up."""


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptConfig:
    """Prompts of a stage. `categories` are shares of kinds of prompts, by default alike.

    Of scenes there is "story" besides, which has to be named.

    `width` and `height` are of images whose prompt names no size; None is the checkpoint's default.
    Of scenes, `sizes` are widths, heights and weights in their place, and `wording` and `chinese`
    the shares of prompts in wider wordings and in Chinese, as in training data.
    """

    kind: Literal["scenes", "jsonl", "text"] = "scenes"
    categories: Mapping[str, Positive] | None = None
    world: str = "default"
    seed: Seed = 0
    path: str | None = None
    width: Side | None = None
    height: Side | None = None
    sizes: tuple[tuple[Side, Side, Positive], ...] = ()
    wording: Fraction = 0.0
    chinese: Fraction = 0.0

    def __post_init__(self) -> None:
        if self.kind != "scenes" and (self.sizes or self.wording or self.chinese):
            raise ValueError("sizes, wording and chinese are of prompts of scenes alone")
        if self.sizes and (self.width or self.height):
            raise ValueError("give sizes, or width and height, not both")
        if self.categories is not None and not self.categories:
            raise ValueError(
                "categories name no category; leave categories out to have all of them alike"
            )
        if self.kind != "scenes" and not self.path:
            raise ValueError(f'prompts of kind "{self.kind}" need a path')
        if self.kind == "scenes" and self.path:
            raise ValueError("prompts of scenes have no path")
        if self.kind == "text" and self.categories:
            raise ValueError("prompts of a text file have no categories")
        if self.world not in PRESETS:
            raise ValueError(f"world {self.world!r} is unknown; known: {', '.join(PRESETS)}")
        pairs = [size[:2] for size in self.sizes]
        for width, height in pairs:
            scene_config(self.world).sized(width, height)
            if pairs.count((width, height)) > 1:
                raise ValueError(f"sizes have {width}x{height} more than once")


def scene_categories(config: PromptConfig, *, answers: bool) -> dict[str, float]:
    """Shares of the categories of scenes, of texts or of images. Raises ConfigError."""
    known = ANSWER_CATEGORIES if answers else (*categories(scene_config(config.world)), EDIT)
    shares = dict(config.categories or dict.fromkeys(known, 1.0))
    if unknown := sorted(set(shares) - {*known, STORY}):
        raise ConfigError(
            f"prompts: no category {', '.join(unknown)}; there are {', '.join((*known, STORY))}"
        )
    return shares


def build_prompts(
    config: PromptConfig, size: tuple[int, int], token_size: int, *, answers: bool = False
) -> PromptSource:
    """The source of a config; `size` is the checkpoint's (width, height), sides multiples of C.

    With `answers` its prompts are answered by texts. Raises ConfigError for unknown categories or
    sizes, DataError for a file that cannot be used.
    """
    width, height = config.width or size[0], config.height or size[1]
    sizes = config.sizes or ((width, height, 1.0),)
    for side in {side for size in sizes for side in size[:2]}:
        if side % token_size:
            raise ConfigError(
                f"prompts: images with a side of {side} pixels; sides must be multiples of "
                f"{token_size}"
            )
    if config.kind == "scenes":
        shares = scene_categories(config, answers=answers)
        return ScenePrompts(config, sizes, shares, answers=answers)
    return FilePrompts(config, (width, height), token_size)


class ScenePrompts:
    """Prompts of SceneBench from scenes of the train split: paintings and edits, or texts.

    With `answers` a story is its request, otherwise the request and all before one of its images.
    """

    def __init__(
        self,
        config: PromptConfig,
        sizes: Sequence[tuple[int, int, float]],
        shares: Mapping[str, float],
        *,
        answers: bool = False,
    ) -> None:
        self.answers = answers
        self.world: SceneConfig = scene_config(config.world)
        self.sizes = {(width, height): weight for width, height, weight in sizes}
        for size in self.sizes:
            self.world.sized(*size)
        self.shares = dict(shares)
        self.seed, self.wording, self.chinese = config.seed, config.wording, config.chinese

    def case(self, number: int) -> PromptCase:
        rng = sample_rng(self.seed, STREAM, number)
        category = pick_weighted(rng, self.shares)
        width, height = pick_weighted(rng, self.sizes)
        world = self.world.sized(width, height)
        language: Language = "zh" if chance(rng, self.chinese) else "en"
        is_wide = chance(rng, self.wording)
        if category == EDIT:
            kind = pick_weighted(rng, WIDE_EDIT_WEIGHTS) if is_wide else None
            edit = sample_edit(rng, world, kind, language, "train")
            text = wide_instruction(rng, edit, world, language) if is_wide else edit.instruction
            return _about(edit.source, text, category, world, edit, edit.target)
        if category == CAPTION:
            scene = sample_scene(rng, world, split="train")
            request = pick(rng, CAPTION_REQUESTS[language]["full"])
            asked_for = CaptionCase(scene, request, FULL_STYLE, False)
            return _about(scene, request, category, world, asked_for)
        if category == STORY:
            return _story(rng, world, language, answers=self.answers)
        if category.startswith(QUESTION):
            asked = _question(category.removeprefix(QUESTION), rng, world, language, is_wide)
            return _about(asked.scene, asked.question.text, category, world, asked)
        can_hold_out = category not in ("single_object", "two_object")
        drawn = draw_paint_case(category, rng, world, False if can_hold_out else None)
        text = drawn.prompt
        if is_wide:
            text = wide_prompt(rng, drawn.facts, language)
        elif language == "zh":
            text = caption(drawn.facts, rng, language)
        return PromptCase(
            prompt=text,
            width=width,
            height=height,
            category=category,
            target=drawn.facts,
            real=partial(_rendered, drawn.scene, world),
        )


def _about(
    scene: Scene,
    prompt: str,
    category: str,
    world: SceneConfig,
    target: Any,
    real: Scene | None = None,
) -> PromptCase:
    """A case whose input image shows a scene, and its real image another."""
    return PromptCase(
        prompt=prompt,
        width=world.width,
        height=world.height,
        category=category,
        images=(_rendered(scene, world),),
        target=target,
        real=None if real is None else partial(_rendered, real, world),
    )


def _story(
    rng: np.random.Generator, world: SceneConfig, language: Language, *, answers: bool
) -> PromptCase:
    """A story to generate, or one of its images behind all that comes before it."""
    story = sample_story(rng, world, None, language, "train")
    whole = PromptCase(
        prompt=story.request,
        width=world.width,
        height=world.height,
        category=STORY,
        preceding=(),
        target=story,
    )
    if answers:
        return whole
    wanted = int(rng.integers(len(story.steps)))
    preceding: list[str | PIL.Image.Image] = []
    for number, step in enumerate(story.steps[:wanted]):
        preceding += [story_text(story, number), _rendered(step.scene, world)]
    scene = story.steps[wanted].scene
    return replace(
        whole,
        preceding=(*preceding, story_text(story, wanted)),
        target=facts_of(scene, world, FULL_STYLE),
        real=partial(_rendered, scene, world),
    )


def _question(
    kind: str, rng: np.random.Generator, world: SceneConfig, language: Language, is_wide: bool
) -> VqaCase:
    """A question of a kind, about the first scene that allows one."""
    for _ in range(MAX_SCENES):
        scene = sample_scene(rng, world, split="train")
        try:
            question = ask(scene, world, rng, cast(QuestionKind, kind), language, "train")
        except DataError:
            continue  # this scene has no such question
        return VqaCase(scene, wide_question(question, rng) if is_wide else question, False)
    raise DataError(f"prompts: no scene of this world allows a question of kind {kind}")


def _rendered(scene: Scene, world: SceneConfig) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.asarray(render(scene, world)))


class FilePrompts:
    """Prompts of a text file, or of JSON lines (prompt, width, height, category, images, …).

    Each epoch shuffles them anew; with shares of categories, each case draws its category first.
    Raises DataError, with the line, for a file that cannot be used.
    """

    def __init__(self, config: PromptConfig, size: tuple[int, int], token_size: int) -> None:
        assert config.path is not None
        self.path, self.seed, self.size = Path(config.path), config.seed, size
        self.token_size = token_size
        lines = _lines(self.path)
        parse = self._record if config.kind == "jsonl" else _plain_record
        self.records = [parse(number, line) for number, line in lines]
        self.by_category: dict[str, list[int]] = {}
        for index, record in enumerate(self.records):
            self.by_category.setdefault(str(record.get("category", "")), []).append(index)
        self.shares = dict(config.categories or {})
        if missing := sorted(set(self.shares) - set(self.by_category)):
            raise DataError(f"{self.path}: no prompt of category {', '.join(missing)}")

    def case(self, number: int) -> PromptCase:
        index = self._shared(number) if self.shares else self._shuffled(number)
        record = self.records[index]
        images = record.get("images", ())
        return PromptCase(
            prompt=record["prompt"],
            width=record.get("width", self.size[0]),
            height=record.get("height", self.size[1]),
            category=str(record.get("category", "")),
            images=tuple(self._image(name) for name in images),
            record=record,
            real=partial(self._image, record["image"]) if "image" in record else None,
        )

    def _shuffled(self, number: int) -> int:
        epoch, position = divmod(number, len(self.records))
        return int(sample_rng(self.seed, STREAM, epoch, 0).permutation(len(self.records))[position])

    def _shared(self, number: int) -> int:
        rng = sample_rng(self.seed, STREAM, number)
        weights = np.array(list(self.shares.values()))
        name = list(self.shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]
        indices = self.by_category[name]
        return indices[int(rng.integers(len(indices)))]

    def _record(self, number: int, line: str) -> Mapping[str, Any]:
        where = f"{self.path} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise DataError(f'{where}: expected an object with a text "prompt"')
        if not record["prompt"].strip():
            raise DataError(f"{where}: the prompt is empty")
        if not isinstance(record.get("answer", ""), str):
            raise DataError(f"{where}: answer must be a text, got {record['answer']!r}")
        for side in ("width", "height"):
            value = record.get(side, self.token_size)
            if type(value) is not int or not 1 <= value <= MAX_SIDE or value % self.token_size:
                raise DataError(
                    f"{where}: {side} must be a multiple of {self.token_size} up to {MAX_SIDE}, "
                    f"got {value!r}"
                )
        images, real = record.get("images", []), record.get("image", "")
        if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            raise DataError(f"{where}: images must be a list of paths")
        if not isinstance(real, str):
            raise DataError(f"{where}: image must be a path, got {real!r}")
        for name in (*images, real):
            if not (self.path.parent / name).resolve().is_relative_to(self.path.parent.resolve()):
                raise DataError(f"{where}: the image {name!r} lies outside the folder of the file")
        for name in (*images, *([real] if real else [])):
            if not (self.path.parent / name).is_file():
                raise DataError(f"{where}: there is no image {name!r} in {self.path.parent}")
        return record

    def _image(self, name: str) -> PIL.Image.Image:
        try:
            return read_image(self.path.parent / name)
        except ImageError as error:
            raise DataError(f"{self.path}: {error}") from error


def _lines(path: Path) -> Sequence[tuple[int, str]]:
    text = read_text(path, MAX_PROMPT_FILE_BYTES, DataError)
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise DataError(f"{path} holds no prompts")
    return lines


def _plain_record(number: int, line: str) -> Mapping[str, Any]:
    return {"prompt": line}
